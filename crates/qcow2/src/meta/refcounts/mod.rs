//! Refcount table and blocks in memory, and where free clusters are. It does no I/O: whoever asks is told what has to
//! be loaded or made first. It must never hand out a cluster whose refcount is not zero, and never let the table on
//! disk name a block that is not there.

mod write_back;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::task::Waker;

use diskfuse_block::{Error, Kind, Result};
use parking_lot::Mutex;

use crate::format::{Geometry, refcount};

/// Largest refcount table, in bytes (QEMU, `QCOW_MAX_REFTABLE_SIZE`).
pub(super) const MAX_TABLE: u64 = 8 << 20;
/// Bytes of a block that are written back together.
const PIECE: usize = 4096;
/// Bytes of the smallest piece that a disk writes whole, in table entries.
const SECTOR_ENTRIES: usize = 64;

/// Clusters that were allocated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Byte offset in the file.
    pub host: u64,
    /// How many clusters.
    pub clusters: u64,
    /// They read as zeroes: the file was never that long before.
    pub fresh: bool,
}

pub(super) use write_back::{Adopted, Taken};

pub(super) struct Refcounts {
    geometry: Geometry,
    state: Mutex<State>,
}

struct State {
    table: Vec<u64>,
    /// What the table is on disk.
    disk_table: Vec<u64>,
    table_offset: u64,
    /// Entries that are not on disk.
    pending: BTreeSet<usize>,
    /// A longer table is to be written here, as the one on disk is too short: byte offset and clusters.
    moving_to: Option<(u64, u64)>,
    /// A commit is about to name the table there.
    moving_now: Option<(u64, u64)>,
    blocks: BTreeMap<usize, Block>,
    loading: HashMap<usize, Vec<Waker>>,
    limit: usize,
    hand: usize,
    /// No cluster before this one is free, as far as is known.
    scan: u64,
    /// No cluster from this one on was ever used.
    high_water: u64,
    /// Clusters that the file had when it was opened.
    opened: u64,
    /// Where the next compressed cluster goes: a byte of a cluster that is partly filled. 0: nowhere.
    cursor: u64,
}

struct Block {
    bytes: Vec<u8>,
    dirty: BTreeSet<usize>,
    /// A part of it is on its way to the disk.
    writing: bool,
    used: bool,
}

impl Block {
    fn is_clean(&self) -> bool {
        self.dirty.is_empty() && !self.writing
    }
}

/// What [`Refcounts::find`] found, or needs.
#[derive(Debug)]
pub(super) enum Find {
    Found(Run),
    /// Load this block, then ask again.
    Load(usize),
    /// There is no block for this cluster: make one, in this cluster.
    Make(u64),
    /// The table ends before the block that is needed.
    GrowTable,
    /// The file must have this many clusters first.
    GrowFile(u64),
}

/// What a change of a refcount needs.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Done; this is the refcount now.
    Done(u64),
    /// Load this block, then ask again.
    Load(usize),
}

/// Whether and by whom a block has to be loaded.
pub(super) enum Begin {
    Present,
    Wait,
    /// The block is at this byte offset. Call [`Refcounts::loaded`], whatever happens.
    Load(u64),
}

impl Refcounts {
    /// The table that was read from byte `table_offset`; the file has `file_clusters`. Keeps `limit` clean blocks.
    pub(super) fn new(
        geometry: Geometry,
        table_offset: u64,
        table: Vec<u64>,
        file_clusters: u64,
        limit: usize,
    ) -> Self {
        Self {
            geometry,
            state: Mutex::new(State {
                disk_table: table.clone(),
                table,
                table_offset,
                pending: BTreeSet::new(),
                moving_to: None,
                moving_now: None,
                blocks: BTreeMap::new(),
                loading: HashMap::new(),
                limit: limit.max(2),
                hand: 0,
                scan: 0,
                high_water: file_clusters,
                opened: file_clusters,
                cursor: 0,
            }),
        }
    }

    fn per_block(&self) -> u64 {
        self.geometry.refcounts_per_block()
    }

    /// The block that counts a cluster, and the cluster's index in it.
    fn place(&self, cluster: u64) -> (usize, usize) {
        let per_block = self.per_block();
        (
            usize::try_from(cluster / per_block).unwrap_or(usize::MAX),
            (cluster % per_block) as usize,
        )
    }

    fn order(&self) -> u32 {
        self.geometry.refcount_order()
    }

    /// Finds up to `want` free clusters in a row, exactly that many if `exact`, and takes them: their refcount is one.
    /// The file has `file_clusters`. Runs stay within what one block counts. Looks from cluster `from` on, and moves it
    /// behind what is known to be of no use, so that whoever asks again need not have all blocks in memory at once.
    pub(super) fn find(&self, want: u64, exact: bool, file_clusters: u64, from: &mut u64) -> Find {
        let mut state = self.state.lock();
        let mut at = state.scan;
        if exact {
            at = at.max(*from);
        }
        loop {
            *from = at;
            let (index, first) = self.place(at);
            match state.table.get(index) {
                None => return Find::GrowTable,
                Some(0) => return Find::Make(at),
                Some(_) => {}
            }
            let Some(block) = state.blocks.get_mut(&index) else {
                return Find::Load(index);
            };
            block.used = true;
            let per_block = self.per_block();
            let high_water = state.high_water;
            let base = index as u64 * per_block;
            let block = &state.blocks[&index];
            let limit = |start: u64| match start < high_water {
                // What was used before and what is fresh are not mixed.
                true => want.min(high_water - start),
                false => want,
            };
            let mut from = first;
            let found = loop {
                let Some(start) = self.first_free(&block.bytes, from) else {
                    break None;
                };
                if from == first && !exact {
                    // Nothing before it is free.
                    at = base + start as u64;
                }
                let most = limit(base + start as u64).min(per_block - start as u64) as usize;
                let len = self.free_from(&block.bytes, start, most);
                if !exact || len as u64 == want {
                    break Some((start, len));
                }
                from = start + len;
            };
            if !exact {
                state.scan = at;
            }
            let Some((start, len)) = found else {
                at = base + per_block;
                if !exact {
                    state.scan = at;
                }
                continue;
            };
            let cluster = base + start as u64;
            let end = cluster + len as u64;
            if end > file_clusters {
                return Find::GrowFile(end);
            }
            self.set_many(&mut state, index, start, len, 1);
            let fresh = cluster >= state.high_water;
            state.high_water = state.high_water.max(end);
            if !exact {
                state.scan = end;
            }
            return Find::Found(Run {
                host: cluster << self.geometry.cluster_bits(),
                clusters: len as u64,
                fresh,
            });
        }
    }

    /// The first index from `from` on whose refcount is zero.
    fn first_free(&self, block: &[u8], from: usize) -> Option<usize> {
        let count = self.per_block() as usize;
        if self.order() == 4 {
            let (counts, _) = block.as_chunks::<2>();
            let found = counts.get(from..)?.iter().position(|c| *c == [0, 0]);
            return found.map(|n| from + n);
        }
        (from..count).find(|&n| refcount::get(block, self.order(), n) == 0)
    }

    fn free_from(&self, block: &[u8], start: usize, most: usize) -> usize {
        let is_free = |n: &usize| refcount::get(block, self.order(), *n) == 0;
        (start..start + most).take_while(is_free).count()
    }

    fn set_many(&self, state: &mut State, index: usize, start: usize, len: usize, value: u64) {
        let order = self.order();
        if let Some(block) = state.blocks.get_mut(&index) {
            for n in start..start + len {
                refcount::set(&mut block.bytes, order, n, value);
            }
            let piece = |n: usize| ((n << order) >> 3) / PIECE;
            block.dirty.extend(piece(start)..=piece(start + len - 1));
        }
    }

    /// Whether the table has an entry for the block that is to count this cluster, and the entry names none.
    pub(super) fn lacks_block(&self, cluster: u64) -> bool {
        let (index, _) = self.place(cluster);
        self.state.lock().table.get(index) == Some(&0)
    }

    /// Makes a block for the region of a free cluster, in this cluster, unless there is one by now. The file must
    /// have the cluster. Whether it was made.
    pub(super) fn make(&self, cluster: u64) -> bool {
        let mut state = self.state.lock();
        let (index, place) = self.place(cluster);
        if state.table.get(index) != Some(&0) {
            return false;
        }
        make_room(&mut state);
        let size = self.geometry.cluster_size() as usize;
        let block = Block {
            bytes: vec![0; size],
            dirty: (0..size.div_ceil(PIECE)).collect(),
            writing: false,
            used: true,
        };
        state.blocks.insert(index, block);
        self.set_many(&mut state, index, place, 1, 1);
        state.table[index] = cluster << self.geometry.cluster_bits();
        state.pending.insert(index);
        state.high_water = state.high_water.max(cluster + 1);
        true
    }

    /// Adds to, or takes from, the refcount of a cluster. [`Kind::Corrupt`] below zero and above what fits.
    pub(super) fn change(&self, cluster: u64, by: i64) -> Result<Change> {
        self.change_in(&mut self.state.lock(), cluster, by)
    }

    fn change_in(&self, state: &mut State, cluster: u64, by: i64) -> Result<Change> {
        let (index, place) = self.place(cluster);
        let corrupt = |what: &str| {
            let offset = cluster << self.geometry.cluster_bits();
            let message = format!("the refcount of the cluster at offset {offset:#x} {what}");
            Err(Error::new(Kind::Corrupt, message))
        };
        if state.table.get(index).is_none_or(|&t| t == 0) {
            return corrupt("is in no refcount block");
        }
        let Some(block) = state.blocks.get_mut(&index) else {
            return Ok(Change::Load(index));
        };
        block.used = true;
        let old = refcount::get(&block.bytes, self.order(), place);
        let new = old.checked_add_signed(by);
        let Some(new) = new.filter(|&n| n <= self.geometry.max_refcount()) else {
            return corrupt(match by < 0 {
                true => "would fall below zero",
                false => "does not fit",
            });
        };
        self.set_many(state, index, place, 1, new);
        if new == 0 {
            state.scan = state.scan.min(cluster);
            self.leave(state, cluster);
        }
        Ok(Change::Done(new))
    }

    /// No more compressed data goes into this cluster.
    fn leave(&self, state: &mut State, cluster: u64) {
        if self.geometry.cluster_of(state.cursor) == cluster {
            state.cursor = 0;
        }
    }

    /// A cluster's refcount, if its block is in memory or there is none.
    fn get_in(&self, state: &mut State, cluster: u64) -> Change {
        let (index, place) = self.place(cluster);
        if state.table.get(index).is_none_or(|&t| t == 0) {
            return Change::Done(0);
        }
        match state.blocks.get_mut(&index) {
            None => Change::Load(index),
            Some(block) => {
                block.used = true;
                Change::Done(refcount::get(&block.bytes, self.order(), place))
            }
        }
    }

    /// The refcount of a cluster that is about to lose a reference. If that is the only one, no compressed data is put into the
    /// cluster any more: what it holds may be thrown away.
    pub(super) fn get_to_free(&self, cluster: u64) -> Change {
        let mut state = self.state.lock();
        let count = self.get_in(&mut state, cluster);
        if matches!(count, Change::Done(..=1)) {
            self.leave(&mut state, cluster);
        }
        count
    }

    /// One more reference to the cluster that is partly filled, if it takes one.
    fn share(&self, state: &mut State, cluster: u64) -> Result<bool> {
        match self.get_in(state, cluster) {
            Change::Done(count) if (1..self.geometry.max_refcount()).contains(&count) => {}
            _ => return Ok(false),
        }
        let changed = self.change_in(state, cluster, 1)?;
        Ok(matches!(changed, Change::Done(_)))
    }

    /// Room for `len` bytes of compressed data in the cluster that is partly filled: where. Takes a refcount.
    pub(super) fn continue_bytes(&self, len: u64) -> Result<Option<u64>> {
        // One lock for all of it: meanwhile the cluster may become free, and somebody else's.
        let mut state = self.state.lock();
        let cursor = state.cursor;
        let room = self.geometry.cluster_size() - self.geometry.offset_in_cluster(cursor);
        if cursor == 0 || room < len || !self.share(&mut state, self.geometry.cluster_of(cursor))? {
            return Ok(None);
        }
        self.move_cursor(&mut state, cursor + len);
        Ok(Some(cursor))
    }

    /// Compressed data may go on from the cluster that is partly filled into the next one, if that is the cluster at
    /// `next`: where. Takes a refcount on the first.
    pub(super) fn straddle(&self, next: u64) -> Option<u64> {
        let mut state = self.state.lock();
        let cursor = state.cursor;
        let cluster = self.geometry.cluster_of(cursor);
        if cursor == 0 || (cluster + 1) << self.geometry.cluster_bits() != next {
            return None;
        }
        matches!(self.share(&mut state, cluster), Ok(true)).then_some(cursor)
    }

    /// Where the next compressed cluster may go. A cluster that is full is no place.
    pub(super) fn set_cursor(&self, byte: u64) {
        self.move_cursor(&mut self.state.lock(), byte);
    }

    fn move_cursor(&self, state: &mut State, byte: u64) {
        let full = self.geometry.offset_in_cluster(byte) == 0;
        state.cursor = if full { 0 } else { byte };
    }

    pub(super) fn begin_load(&self, index: usize, waker: &Waker) -> Result<Begin> {
        let mut state = self.state.lock();
        if state.blocks.contains_key(&index) {
            return Ok(Begin::Present);
        }
        if let Some(waiting) = state.loading.get_mut(&index) {
            waiting.push(waker.clone());
            return Ok(Begin::Wait);
        }
        let offset = state.table.get(index).copied().unwrap_or(0);
        if offset == 0 || self.geometry.offset_in_cluster(offset) != 0 {
            let message = format!("entry {index} of the refcount table is not a cluster's offset");
            return Err(Error::new(Kind::Corrupt, message));
        }
        state.loading.insert(index, Vec::new());
        Ok(Begin::Load(offset))
    }

    /// A load has ended, with the block's bytes or without.
    pub(super) fn loaded(&self, index: usize, bytes: Option<Vec<u8>>) {
        let waiting = {
            let mut state = self.state.lock();
            if let Some(bytes) = bytes {
                make_room(&mut state);
                let block = Block {
                    bytes,
                    dirty: BTreeSet::new(),
                    writing: false,
                    used: true,
                };
                state.blocks.entry(index).or_insert(block);
            }
            state.loading.remove(&index)
        };
        waiting.into_iter().flatten().for_each(Waker::wake);
    }

    /// Whether more blocks in memory wait to be written than there should be blocks. Drops none: one of them may just have been
    /// loaded for whoever asks.
    pub(super) fn is_crowded(&self) -> bool {
        let state = self.state.lock();
        let most = 2 * state.limit;
        let waiting = || state.blocks.values().filter(|block| !block.is_clean());
        state.blocks.len() > most && waiting().count() > most
    }

    /// Blocks that the table names: index and byte offset.
    pub(super) fn blocks(&self) -> Vec<(usize, u64)> {
        let state = self.state.lock();
        let named = state.table.iter().copied().enumerate();
        named.filter(|(_, offset)| *offset != 0).collect()
    }

    /// The last cluster that is known to be used, plus one; or how far it is known, and the block to load to know more.
    pub(super) fn used_end(&self, from: u64) -> std::result::Result<u64, (u64, usize)> {
        let state = self.state.lock();
        let mut end = from;
        while end > 0 {
            let (index, place) = self.place(end - 1);
            if state.table.get(index).is_none_or(|&t| t == 0) {
                end = index as u64 * self.per_block();
                continue;
            }
            let Some(block) = state.blocks.get(&index) else {
                return Err((end, index));
            };
            if refcount::get(&block.bytes, self.order(), place) != 0 {
                break;
            }
            end -= 1;
        }
        Ok(end)
    }

    /// Between these clusters the file was used for the first time since it was opened: the first of them, and the one from which on
    /// none was ever used.
    pub(super) fn grown(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.opened, state.high_water)
    }
}

/// Drops a clean block that was not used lately, if there are too many.
fn make_room(state: &mut State) {
    if state.blocks.len() < state.limit {
        return;
    }
    let after = state
        .blocks
        .range(state.hand..)
        .chain(state.blocks.range(..state.hand));
    let order: Vec<usize> = after.map(|(&index, _)| index).collect();
    let mut victim = None;
    for index in order {
        let Some(block) = state.blocks.get_mut(&index) else {
            continue;
        };
        if !block.is_clean() || state.pending.contains(&index) {
            continue;
        }
        if !std::mem::replace(&mut block.used, false) {
            victim = Some(index);
            break;
        }
        victim = victim.or(Some(index));
    }
    if let Some(index) = victim {
        state.blocks.remove(&index);
        state.hand = index + 1;
    }
}
