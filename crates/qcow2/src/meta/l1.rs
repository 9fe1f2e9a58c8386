//! The active L1 table: in memory as a whole, read without a lock, and a copy of what is on disk. It does no I/O. It
//! must never let an entry reach the disk before the table that it names.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;

use diskfuse_block::{Error, Result};
use diskfuse_ring::Words;
use parking_lot::Mutex;

use crate::format::L1Entry;

/// Most entries that a table may have: 32 MiB (QEMU, `QCOW_MAX_L1_SIZE`).
pub(super) const MAX_ENTRIES: usize = (32 << 20) / 8;
/// Entries in the smallest piece that a disk writes whole.
const SECTOR_ENTRIES: usize = 64;

pub(super) struct L1 {
    words: Words,
    len: AtomicUsize,
    disk: Mutex<Disk>,
}

struct Disk {
    /// Byte offset of the table.
    offset: u64,
    /// What is on disk, as far as it was written by us or read.
    entries: Vec<u64>,
    dirty: BTreeSet<usize>,
}

impl L1 {
    /// A table that was read from byte `offset`. Its entries are in the host's byte order.
    pub(super) fn new(offset: u64, entries: Vec<u64>) -> Result<Self> {
        let words =
            Words::new(MAX_ENTRIES).map_err(|e| Error::os("map memory for the L1 table", e))?;
        for (place, &entry) in words.iter().zip(&entries) {
            place.store(entry, SeqCst);
        }
        Ok(Self {
            words,
            len: AtomicUsize::new(entries.len()),
            disk: Mutex::new(Disk {
                offset,
                entries,
                dirty: BTreeSet::new(),
            }),
        })
    }

    /// Entries in the table.
    pub(super) fn len(&self) -> usize {
        self.len.load(SeqCst)
    }

    /// Byte offset of the table on disk.
    pub(super) fn offset(&self) -> u64 {
        self.disk.lock().offset
    }

    /// An entry; none past the end of the table.
    pub(super) fn get(&self, index: u64) -> L1Entry {
        let known = usize::try_from(index).ok().filter(|&i| i < self.len());
        L1Entry(known.map_or(0, |i| self.words[i].load(SeqCst)))
    }

    /// Every table in it: its index and entry.
    pub(super) fn tables(&self) -> impl Iterator<Item = (u64, L1Entry)> {
        let all = (0..self.len() as u64).map(|i| (i, self.get(i)));
        all.filter(|(_, entry)| entry.table() != 0)
    }

    /// Changes an entry. What it names must be on disk, but for a flush, already.
    pub(super) fn set(&self, index: u64, entry: L1Entry) {
        let mut disk = self.disk.lock();
        self.words[index as usize].store(entry.0, SeqCst);
        disk.dirty.insert(index as usize);
    }

    /// Takes the changed entries for written and returns the sectors to write: byte offsets in the file, and bytes.
    pub(super) fn take_dirty(&self) -> (Vec<usize>, Vec<(u64, Vec<u8>)>) {
        let mut disk = self.disk.lock();
        let taken: Vec<usize> = std::mem::take(&mut disk.dirty).into_iter().collect();
        for &index in &taken {
            disk.entries[index] = self.words[index].load(SeqCst);
        }
        let sectors: BTreeSet<usize> = taken.iter().map(|index| index / SECTOR_ENTRIES).collect();
        let base = disk.offset;
        let bytes = |sector: usize| {
            let from = sector * SECTOR_ENTRIES;
            let to = (from + SECTOR_ENTRIES).min(disk.entries.len());
            disk.entries[from..to]
                .iter()
                .flat_map(|e| e.to_be_bytes())
                .collect()
        };
        let pieces = sectors
            .iter()
            .map(|&s| (base + (s * SECTOR_ENTRIES * 8) as u64, bytes(s)));
        let pieces = pieces.collect();
        (taken, pieces)
    }

    /// Entries that were taken and did not reach the disk.
    pub(super) fn not_written(&self, taken: Vec<usize>) {
        self.disk.lock().dirty.extend(taken);
    }

    /// The table as a larger one would hold it on disk: what is on disk, and zeroes.
    pub(super) fn enlarged(&self, entries: usize) -> Vec<u8> {
        let disk = self.disk.lock();
        let known = disk.entries.iter().copied();
        let all = known.chain(std::iter::repeat(0)).take(entries);
        all.flat_map(u64::to_be_bytes).collect()
    }

    /// The table is on disk at `offset` now, with `entries` entries: not fewer than before.
    pub(super) fn moved(&self, offset: u64, entries: usize) {
        let mut disk = self.disk.lock();
        disk.offset = offset;
        disk.entries.resize(entries, 0);
        self.len.store(entries.min(MAX_ENTRIES), SeqCst);
    }
}
