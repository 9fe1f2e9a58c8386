//! Opening: reading the tables that stay in memory, and refusing what cannot be served. It changes nothing but what a
//! crash left unrepaired (lazy refcounts).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Instant;

use crossbeam_utils::CachePadded;
use diskfuse_block::{Error, Holds, Kind, Node, RangeQueue, Result};
use parking_lot::Mutex;

use super::bitmaps::Bitmaps;
use super::l1::L1;
use super::layout::{Layout, Overlap};
use super::limbo::Limbo;
use super::lookups::Lookups;
use super::refcounts::{MAX_TABLE, Refcounts};
use super::slices::Slices;
use super::superblock::Superblock;
use super::{Meta, transfer};
use crate::format::{Encryption, Geometry, Header, L1Entry};
use crate::node::{OverlapCheck, Qcow2Config};
use crate::snapshots::{self, SnapshotInfo};

/// Bytes of an L2 slice, at most: as much as a disk reads at no extra cost.
const SLICE: u64 = 4096;
/// Bytes of an L1 table, at most.
const MAX_L1: u64 = super::l1::MAX_ENTRIES as u64 * 8;
/// Bytes of L2 slices in memory unless told otherwise: enough for 256 GiB with clusters of 64 KiB.
const DEFAULT_L2_CACHE: u64 = 32 << 20;
/// Fewest slices: so many may be loading at once.
const LEAST_SLICES: u64 = 32;
/// Bytes of refcount blocks in memory unless told otherwise; and fewest blocks.
const DEFAULT_REFCOUNT_CACHE: u64 = 4 << 20;
const LEAST_BLOCKS: u64 = 4;
/// Bytes that a reservation is about, and most clusters in it.
const RESERVE: u64 = 1 << 20;
const MOST_RESERVED: u64 = 64;

/// The table that maps the disk: the active one, or a snapshot's.
#[derive(Clone, Copy, Debug)]
pub struct ActiveTable {
    /// Byte offset of the L1 table.
    pub l1_offset: u64,
    /// Entries in it.
    pub l1_entries: u32,
    /// Bytes of the disk.
    pub size: u64,
}

impl Meta {
    /// Reads the tables of an image whose header was read. `table` says which disk to show.
    ///
    /// [`Kind::Unsupported`] for encrypted images, [`Kind::Corrupt`] for tables that cannot be, and for writing to an
    /// image whose corrupt bit is set. Dirty images must have been repaired before, unless they are only read.
    pub async fn open(
        file: Arc<dyn Node>,
        data_file: Option<Arc<dyn Node>>,
        header: &Header,
        table: ActiveTable,
        config: &Qcow2Config,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let name = file.filename().unwrap_or_else(|| "qcow2".to_owned());
        let read_only = config.read_only || file.read_only() || config.snapshot.is_some();
        refuse(&name, header, read_only)?;
        let l1 = read_l1(&*file, &name, geometry, table).await?;
        let refcount_table = match read_only {
            true => Vec::new(),
            false => read_refcount_table(&*file, &name, header).await?,
        };
        let slice_bytes = SLICE.min(geometry.cluster_size());
        let entries = slice_bytes / geometry.l2_entry_size();
        let (l2_cache, refcount_cache) = cache_sizes(config, geometry, table.size);
        let most_slices = super::l1::MAX_ENTRIES as u64 * (geometry.l2_entries() / entries);
        let size = geometry.cluster_size();
        let superblock = Superblock::read(&*file).await?;
        let meta = Self {
            geometry,
            version: header.version,
            read_only,
            lazy: !read_only
                && header.version >= 3
                && config.lazy_refcounts.unwrap_or(header.lazy_refcounts()),
            size: AtomicU64::new(table.size),
            superblock,
            backing: Mutex::new(header.backing.clone()),
            l1: L1::new(table.l1_offset, l1)?,
            slices: Slices::new(
                entries as usize,
                geometry.words_per_entry(),
                most_slices,
                (l2_cache / slice_bytes).max(LEAST_SLICES) as usize,
            )?,
            slice_bits: entries.trailing_zeros(),
            refcounts: Refcounts::new(
                geometry,
                header.refcount_table_offset,
                refcount_table,
                file.size().div_ceil(size),
                (refcount_cache / size).max(LEAST_BLOCKS) as usize,
            ),
            layout: Layout::new(config.overlap_check),
            limbo: Limbo::default(),
            lookups: Lookups::default(),
            holds: Holds::default(),
            reserved: std::array::from_fn(|_| CachePadded::new(Mutex::new(None))),
            reserve: (RESERVE / size).clamp(1, MOST_RESERVED),
            tables: RangeQueue::default(),
            growing: RangeQueue::default(),
            packing: RangeQueue::default(),
            preparing: RangeQueue::default(),
            committing: RangeQueue::default(),
            commits_begun: AtomicU64::new(0),
            commits_done: AtomicU64::new(0),
            prepared: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            unsettled: AtomicBool::new(false),
            broken: Mutex::new(None),
            on_corrupt: Mutex::new(config.on_corrupt.clone()),
            found_at_open: Mutex::new(None),
            bitmaps: Bitmaps::new(header.true_bitmaps()),
            clean_interval: config.cache_clean_interval,
            cleaned: Mutex::new(Instant::now()),
            file,
            data_file,
        };
        if !read_only {
            let snapshots = match header.snapshot_count {
                0 => Vec::new(),
                _ => snapshots::list(&*meta.file).await?,
            };
            let fault = snapshots::fault_in(&*meta.file, header, &snapshots)?;
            let found = meta.lay_out(header, table, &snapshots);
            *meta.found_at_open.lock() = fault.or_else(|| {
                let overlap = found?;
                let at = overlap.cluster << geometry.cluster_bits();
                Some(format!(
                    "two tables use the cluster at offset {at:#x}: one is {}",
                    overlap.holds
                ))
            });
        }
        Ok(meta)
    }

    /// Notes where the metadata is; the first two pieces of it that share a cluster are told.
    fn lay_out(
        &self,
        header: &Header,
        table: ActiveTable,
        snapshots: &[SnapshotInfo],
    ) -> Option<Overlap> {
        let geometry = self.geometry;
        let size = geometry.cluster_size();
        let mut overlap = None;
        let add = |overlap: &mut Option<Overlap>, kind, offset: u64, bytes: u64| {
            if bytes > 0 {
                let first = geometry.cluster_of(offset);
                let end = offset.saturating_add(bytes).div_ceil(size);
                let found = self.layout.add(kind, first, end - first);
                *overlap = overlap.or(found);
            }
        };
        add(&mut overlap, OverlapCheck::MAIN_HEADER, 0, size);
        let l1_bytes = u64::from(table.l1_entries) * 8;
        add(
            &mut overlap,
            OverlapCheck::ACTIVE_L1,
            table.l1_offset,
            l1_bytes,
        );
        let refcounts = u64::from(header.refcount_table_clusters) * size;
        add(
            &mut overlap,
            OverlapCheck::REFCOUNT_TABLE,
            header.refcount_table_offset,
            refcounts,
        );
        for (_, offset) in self.refcounts.blocks() {
            add(&mut overlap, OverlapCheck::REFCOUNT_BLOCK, offset, size);
        }
        if let Some(bitmaps) = header.true_bitmaps() {
            let (at, bytes) = (bitmaps.directory_offset, bitmaps.directory_size);
            add(&mut overlap, OverlapCheck::BITMAP_DIRECTORY, at, bytes);
        }
        for (_, entry) in self.l1.tables() {
            let mut found = None;
            add(&mut found, OverlapCheck::ACTIVE_L2, entry.table(), size);
            // A table that several entries share is copied before it is changed.
            let is_shared = !entry.copied() && found.is_some_and(|o| o.is_active_l2());
            overlap = overlap.or(found.filter(|_| !is_shared));
        }
        if header.snapshot_count > 0 {
            add(
                &mut overlap,
                OverlapCheck::SNAPSHOT_TABLE,
                header.snapshots_offset,
                snapshots::table_len(snapshots),
            );
        }
        for snapshot in snapshots {
            if overlap.is_some() {
                // Tables that overlap may be longer, together, than anything.
                break;
            }
            let bytes = (u64::from(snapshot.l1_entries) * 8).min(MAX_L1);
            add(
                &mut overlap,
                OverlapCheck::INACTIVE_L1,
                snapshot.l1_offset,
                bytes,
            );
        }
        overlap
    }
}

fn refuse(name: &str, header: &Header, read_only: bool) -> Result<()> {
    if header.encryption != Encryption::None {
        let message = format!(
            "'{name}' is encrypted ({}), which this version cannot decrypt",
            match header.encryption {
                Encryption::Luks => "LUKS",
                _ => "AES",
            }
        );
        return Err(Error::new(Kind::Unsupported, message));
    }
    if header.is_corrupt() && !read_only {
        let message = format!(
            "'{name}' is marked as corrupt: it can be read, or repaired with `diskfuse check --repair all`, but not written"
        );
        return Err(Error::new(Kind::Corrupt, message));
    }
    Ok(())
}

async fn read_l1(
    file: &dyn Node,
    name: &str,
    geometry: Geometry,
    table: ActiveTable,
) -> Result<Vec<u64>> {
    let corrupt = |what: String| Error::new(Kind::Corrupt, format!("'{name}': {what}"));
    let (offset, entries) = (table.l1_offset, table.l1_entries as usize);
    let needed = geometry.l1_entries_for(table.size);
    if (entries as u64) < needed {
        return Err(corrupt(format!(
            "the L1 table has {entries} entries, and a disk of {} bytes needs {needed}",
            table.size
        )));
    }
    if entries > super::l1::MAX_ENTRIES {
        return Err(corrupt(format!(
            "the L1 table has {entries} entries, which is too many"
        )));
    }
    if entries == 0 {
        return Ok(Vec::new());
    }
    let end = offset.checked_add(entries as u64 * 8);
    if geometry.offset_in_cluster(offset) != 0 || end.is_none_or(|end| end > file.size()) {
        return Err(corrupt(format!(
            "the L1 table, {entries} entries at offset {offset:#x}, is not within the file"
        )));
    }
    let words = transfer::read_words(file, offset, entries).await?;
    if let Some(bad) = words.iter().find(|&&w| L1Entry(w).check(geometry).is_err()) {
        // Told when that part of the disk is used; the rest can be read.
        tracing::warn!(
            image = name,
            entry = format!("{bad:#x}"),
            "an entry of the L1 table is not right"
        );
    }
    Ok(words)
}

async fn read_refcount_table(file: &dyn Node, name: &str, header: &Header) -> Result<Vec<u64>> {
    let geometry = header.geometry;
    let offset = header.refcount_table_offset;
    let bytes = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
    let end = offset.checked_add(bytes);
    let fits = end.is_some_and(|end| end <= file.size()) && bytes <= MAX_TABLE && bytes > 0;
    if !fits || geometry.offset_in_cluster(offset) != 0 {
        let message = format!(
            "'{name}': the refcount table, {bytes} bytes at offset {offset:#x}, is not within the file; `diskfuse check --repair all` makes a new one"
        );
        return Err(Error::new(Kind::Corrupt, message));
    }
    let mut table = transfer::read_words(file, offset, (bytes / 8) as usize).await?;
    for entry in &mut table {
        // Bits 0 to 8 are reserved (specification, "Refcount table").
        *entry &= !0x1ff;
    }
    Ok(table)
}

/// Bytes of the L2 cache and of the refcount cache.
fn cache_sizes(config: &Qcow2Config, geometry: Geometry, size: u64) -> (u64, u64) {
    let clusters = size.div_ceil(geometry.cluster_size());
    let whole_disk = clusters.saturating_mul(geometry.l2_entry_size());
    let least_refcounts = LEAST_BLOCKS * geometry.cluster_size();
    let (l2, refcounts) = match (
        config.cache_size,
        config.l2_cache_size,
        config.refcount_cache_size,
    ) {
        (None, l2, refcounts) => (l2, refcounts),
        (Some(both), None, None) => {
            let l2 = both.saturating_sub(least_refcounts).min(whole_disk);
            (Some(l2), Some(both.saturating_sub(l2)))
        }
        (Some(both), Some(l2), _) => (Some(l2), Some(both.saturating_sub(l2))),
        (Some(both), None, Some(r)) => (Some(both.saturating_sub(r)), Some(r)),
    };
    let l2 = l2.unwrap_or(DEFAULT_L2_CACHE);
    (l2, refcounts.unwrap_or(DEFAULT_REFCOUNT_CACHE))
}
