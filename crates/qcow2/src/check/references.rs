//! Who refers to which cluster: walks every structure of an image once, in the order of the file, and counts. It must
//! never follow a reference twice, nor read more than the file has.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use diskfuse_block::{Kind, Result};

use crate::format::bitmap::TableEntry;
use crate::format::{COPIED, OFFSET_MASK};

use super::ahead::{Ahead, cut};
use super::bitmaps;
use super::counts::{COPIED_CLEAR, COPIED_SET, Counts, METADATA};
use super::entries::{Judge, is_beyond};
use super::findings::CheckResult;
use super::image::{Image, words};
use crate::snapshots::SnapshotInfo;

/// Bits of a refcount table entry that are reserved (specification, "Refcount table entry").
const REFCOUNT_RESERVED: u64 = 0x1ff;

/// Bytes of the largest L1 table.
const MOST_L1: u64 = 32 << 20;

/// A walk over an image.
pub(super) struct Walk<'i, 'a> {
    pub(super) image: &'i Image<'a>,
    /// Repairs entries as it goes.
    pub(super) fix: bool,
    pub(super) counts: Counts,
    pub(super) found: CheckResult,
    /// Bytes of the file when the walk began.
    pub(super) end: u64,
    /// L2 tables by where they are.
    pub(super) tables: BTreeMap<u64, Table>,
    /// The refcount table as it is on disk, unusable entries as 0.
    pub(super) refcount_blocks: Vec<u64>,
    /// Clusters that the refcount structures are in; every time one is counted for them.
    pub(super) refcount_clusters: Vec<u64>,
    /// The refcount structures cannot be used as they are.
    pub(super) rebuild: bool,
    /// Clusters of metadata that something else refers to as well.
    pub(super) overlaps: HashSet<u64>,
    /// The bitmaps cannot be right.
    pub(super) bad_bitmaps: bool,
    /// What the guest or a snapshot reads was changed.
    pub(super) content_changed: bool,
}

/// What refers to an L2 table.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Table {
    /// L1 entries, of all L1 tables.
    pub(super) references: u64,
    /// Those of the active one.
    pub(super) active_references: u64,
    /// The first entry of the active L1 table that does.
    pub(super) active: Option<u64>,
}

/// An L1 table.
#[derive(Clone, Debug)]
pub(super) struct L1 {
    pub(super) offset: u64,
    /// How many entries.
    pub(super) entries: u64,
    /// For messages.
    pub(super) name: String,
    pub(super) active: bool,
}

impl<'i, 'a> Walk<'i, 'a> {
    pub(super) fn new(image: &'i Image<'a>, fix: bool) -> Result<Self> {
        Ok(Self {
            image,
            fix,
            counts: Counts::new(image.clusters())?,
            found: CheckResult::default(),
            end: image.file.size(),
            tables: BTreeMap::new(),
            refcount_blocks: Vec::new(),
            refcount_clusters: Vec::new(),
            rebuild: false,
            overlaps: HashSet::new(),
            bad_bitmaps: false,
            content_changed: false,
        })
    }

    pub(super) fn judge(&self) -> Judge {
        Judge {
            geometry: self.image.geometry,
            version: self.image.header.version,
            data_file: self.image.header.has_data_file(),
            end: self.end,
        }
    }

    /// The active L1 table.
    pub(super) fn active(&self) -> L1 {
        L1 {
            offset: self.image.header.l1_offset,
            entries: self.image.header.l1_size.into(),
            name: "the active L1 table".into(),
            active: true,
        }
    }

    /// Counts `times` references to the clusters of a range, unless it is beyond the file.
    pub(super) fn refer(&mut self, offset: u64, len: u64, times: u64, flags: u16) {
        let geometry = self.image.geometry;
        if len == 0 || is_beyond(self.end, offset, len, geometry) {
            return;
        }
        for cluster in geometry.cluster_of(offset)..=geometry.cluster_of(offset + (len - 1)) {
            self.counts.add(cluster, times, flags);
        }
    }

    /// Counts a structure of the format.
    fn own(&mut self, offset: u64, len: u64, what: &str) {
        let geometry = self.image.geometry;
        if len == 0 {
            return;
        }
        if is_beyond(self.end, offset, len, geometry) {
            self.found.corruption(|| {
                format!("{what} at {offset} ({len} bytes) lies beyond the end of the file")
            });
            return;
        }
        let last = offset + (len - 1);
        for cluster in geometry.cluster_of(offset)..=geometry.cluster_of(last) {
            if self.counts.add(cluster, 1, METADATA) & METADATA != 0 {
                self.overlap(cluster, what);
            }
        }
    }

    /// Something refers to a cluster that belongs to a structure.
    pub(super) fn overlap(&mut self, cluster: u64, what: &str) {
        let at = cluster << self.image.geometry.cluster_bits();
        let text = || format!("{what} lies in the cluster at {at}, where another structure is");
        let is_first = self.overlaps.insert(cluster);
        if self.is_refcounts(cluster) {
            self.rebuild = true;
            // A refcount block that is no use is one more thing that is wrong (QEMU counts it so).
            if is_first && !self.refcount_table().contains(&cluster) {
                self.found.corruption(text);
                return;
            }
        }
        self.found.say(text);
    }

    /// The clusters of the refcount table, as the header has them.
    fn refcount_table(&self) -> Range<u64> {
        let header = &self.image.header;
        let first = header.geometry.cluster_of(header.refcount_table_offset);
        first..first + u64::from(header.refcount_table_clusters)
    }

    /// Whether the refcount table or a refcount block is in it.
    pub(super) fn is_refcounts(&self, cluster: u64) -> bool {
        self.refcount_clusters.binary_search(&cluster).is_ok()
    }

    /// Counts everything but what L1 tables refer to.
    pub(super) async fn structures(&mut self, l1_tables: &[L1], snapshots_len: u64) -> Result<()> {
        self.own(0, self.image.geometry.cluster_size(), "the header");
        for l1 in l1_tables {
            self.own(l1.offset, l1.entries * 8, &l1.name);
        }
        let header = &self.image.header;
        self.own(header.snapshots_offset, snapshots_len, "the snapshot table");
        self.bitmaps().await?;
        self.refcounts().await
    }

    async fn refcounts(&mut self) -> Result<()> {
        let header = &self.image.header;
        let geometry = self.image.geometry;
        let (offset, clusters) = (
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters),
        );
        let len = clusters * geometry.cluster_size();
        let first = geometry.cluster_of(offset);
        if is_beyond(self.end, offset, len, geometry) {
            self.rebuild = true;
        } else {
            self.refcount_clusters.extend(first..first + clusters);
        }
        self.own(offset, len, "the refcount table");
        let table = self.image.read(offset, len).await?;
        for (index, entry) in words(table.as_slice()).enumerate() {
            let usable = entry == 0 || self.refcount_block(index, entry);
            self.refcount_blocks.push(if usable { entry } else { 0 });
        }
        self.refcount_clusters.sort_unstable();
        // An overlap that was seen before the list was sorted.
        self.rebuild |= self.overlaps.iter().any(|&c| self.is_refcounts(c));
        Ok(())
    }

    fn refcount_block(&mut self, index: usize, entry: u64) -> bool {
        let geometry = self.image.geometry;
        let wrong = if entry & REFCOUNT_RESERVED != 0 || geometry.offset_in_cluster(entry) != 0 {
            "is not aligned"
        } else if is_beyond(self.end, entry, geometry.cluster_size(), geometry) {
            "lies beyond the end of the file"
        } else {
            let cluster = geometry.cluster_of(entry);
            self.refcount_clusters.push(cluster);
            if self.counts.add(cluster, 1, METADATA) & METADATA == 0 {
                return true;
            }
            "lies where another structure is"
        };
        self.rebuild = true;
        self.found
            .corruption(|| format!("Refcount block {index} at {entry} {wrong}"));
        false
    }

    /// Bitmaps that the header calls consistent; others are of no use to anybody.
    async fn bitmaps(&mut self) -> Result<()> {
        let Some(extension) = bitmaps::extension(self.image) else {
            return Ok(());
        };
        let (offset, len) = (extension.directory_offset, extension.directory_size);
        let before = (self.found.corruptions, self.overlaps.len());
        self.own(offset, len, "the bitmap directory");
        match bitmaps::tables(self.image, &extension).await {
            Ok(tables) => self.bitmap_tables(tables).await?,
            Err(error) if error.kind() == Kind::Corrupt => {
                self.found.corruption(|| {
                    format!("The bitmap directory at {offset} ({len} bytes): {error}")
                });
            }
            Err(error) => return Err(error),
        }
        self.bad_bitmaps = before != (self.found.corruptions, self.overlaps.len());
        Ok(())
    }

    async fn bitmap_tables(&mut self, tables: Vec<(u64, u64)>) -> Result<()> {
        // Tables that do not overlap are not longer, together, than the file.
        let mut budget = self.end;
        for (table, entries) in tables {
            let bytes = entries * 8;
            self.own(table, bytes, "a bitmap table");
            if bytes > budget || is_beyond(self.end, table, bytes, self.image.geometry) {
                continue;
            }
            budget -= bytes;
            self.bitmap_table(table, bytes).await?;
        }
        Ok(())
    }

    async fn bitmap_table(&mut self, table: u64, len: u64) -> Result<()> {
        let geometry = self.image.geometry;
        let mut ahead = Ahead::new(self.image.file, cut(table, len));
        while let Some(piece) = ahead.next().await {
            let (_, bytes) = piece?;
            for word in words(bytes.as_slice()) {
                match TableEntry::decode(word, geometry) {
                    Some(TableEntry::Data(host)) => {
                        self.own(host, geometry.cluster_size(), "a bitmap's data");
                    }
                    Some(TableEntry::Zeroes | TableEntry::Ones) => {}
                    None => self.found.corruption(|| {
                        format!("The bitmap table at {table}: the entry {word:#x} cannot be right")
                    }),
                }
            }
        }
        Ok(())
    }

    /// Checks the entries of L1 tables and lists the L2 tables that they refer to.
    pub(super) async fn l1_tables(&mut self, l1_tables: &[L1]) -> Result<()> {
        // Tables that do not overlap are not longer, together, than the file.
        let mut budget = self.end.saturating_add(MOST_L1);
        for l1 in l1_tables {
            let len = l1.entries * 8;
            if len > budget || is_beyond(self.end, l1.offset, len, self.image.geometry) {
                continue;
            }
            budget -= len;
            self.l1_table(l1, len).await?;
        }
        Ok(())
    }

    async fn l1_table(&mut self, l1: &L1, len: u64) -> Result<()> {
        let mut ahead = Ahead::new(self.image.file, cut(l1.offset, len));
        while let Some(piece) = ahead.next().await {
            let (piece, bytes) = piece?;
            let first = piece.first as u64 / 8;
            for (index, word) in (first..).zip(words(bytes.as_slice())) {
                if word == 0 {
                    continue;
                }
                let right = self.l1_entry(l1, index, word);
                if right != word && self.fix {
                    self.image
                        .write(l1.offset + index * 8, &right.to_be_bytes())
                        .await?;
                }
            }
        }
        Ok(())
    }

    /// Counts the L2 table of an L1 entry; returns what the entry should be.
    fn l1_entry(&mut self, l1: &L1, index: u64, word: u64) -> u64 {
        let geometry = self.image.geometry;
        let size = geometry.cluster_size();
        let name = &l1.name;
        let right = word & (COPIED | OFFSET_MASK);
        if right != word {
            self.found.corruption(|| {
                format!("Entry {index} of {name}: reserved bits are set ({word:#x})")
            });
        }
        let table = word & OFFSET_MASK;
        if table == 0 {
            return right;
        }
        let wrong = if geometry.offset_in_cluster(table) != 0 {
            Some("is not aligned")
        } else if is_beyond(self.end, table, size, geometry) {
            Some("lies beyond the end of the file")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            self.found
                .corruption(|| format!("Entry {index} of {name}: the L2 table at {table} {wrong}"));
            return self.give_up_table(table, right);
        }
        let cluster = geometry.cluster_of(table);
        let known = self.tables.contains_key(&table);
        if !known && self.counts.flags(cluster) & METADATA != 0 {
            if self.fix && !self.is_refcounts(cluster) {
                return self.give_up_table(table, right);
            }
            self.overlap(cluster, &format!("The L2 table of entry {index} of {name}"));
        }
        let flag = match (l1.active, word & COPIED != 0) {
            (false, _) => 0,
            (true, true) => COPIED_SET,
            (true, false) => COPIED_CLEAR,
        };
        self.counts.add(cluster, 1, METADATA | flag);
        let entry = self.tables.entry(table).or_default();
        entry.references += 1;
        if l1.active {
            entry.active_references += 1;
            entry.active.get_or_insert(index);
        }
        right
    }

    /// An L2 table cannot be where it should be: nothing of it can be read, and after a repair nothing refers to it.
    fn give_up_table(&mut self, table: u64, word: u64) -> u64 {
        if self.fix {
            self.content_changed = true;
            return 0;
        }
        self.refer(table, self.image.geometry.cluster_size(), 1, 0);
        word
    }
}

/// Why a snapshot's L1 table cannot be where the snapshot table says; `None` if it can.
pub(crate) fn fault_of(image: &Image<'_>, snapshot: &SnapshotInfo) -> Option<&'static str> {
    let (offset, len) = (snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
    if image.geometry.offset_in_cluster(offset) != 0 {
        Some("is not aligned")
    } else if len > MOST_L1 {
        Some("is larger than any can be")
    } else if len > 0 && is_beyond(image.file.size(), offset, len, image.geometry) {
        Some("lies beyond the end of the file")
    } else {
        None
    }
}

/// The L1 tables of snapshots; with a finding for each that cannot be one, and for each incomplete entry.
pub(super) fn snapshot_tables(
    image: &Image<'_>,
    snapshots: &[SnapshotInfo],
    found: &mut CheckResult,
) -> Vec<L1> {
    let mut tables = Vec::new();
    for snapshot in snapshots {
        let (offset, entries) = (snapshot.l1_offset, u64::from(snapshot.l1_entries));
        let name = format!("the L1 table of snapshot '{}'", snapshot.label());
        if image.header.version >= 3 && snapshot.is_incomplete() {
            found.corruption(|| {
                format!("The entry of snapshot '{}' is incomplete", snapshot.label())
            });
        }
        if let Some(fault) = fault_of(image, snapshot) {
            found.corruption(|| format!("At {offset}, {entries} entries: {name} {fault}"));
            continue;
        }
        tables.push(L1 {
            offset,
            entries,
            name,
            active: false,
        });
    }
    tables
}
