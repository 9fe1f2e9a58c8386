//! The entries of L2 tables: counts what they refer to, and repairs those that cannot be right. The hot loop of every
//! check. Each table is read once, however many L1 entries refer to it.

use diskfuse_block::Result;

use crate::format::{COPIED, OFFSET_MASK};

use super::ahead::{Ahead, join};
use super::counts::{COPIED_CLEAR, COPIED_SET, METADATA};
use super::entries::{Entry, Judge, Target};
use super::references::{Table, Walk};

/// One table while it is looked at.
struct Looking {
    /// Where it is, in bytes.
    offset: u64,
    table: Table,
    judge: Judge,
    /// Where the next cluster lies if it is not fragmented.
    next: Option<u64>,
    changed: bool,
}

impl Walk<'_, '_> {
    /// Counts what all listed L2 tables refer to. `step` is told of every table.
    pub(super) async fn l2_tables(&mut self, step: &mut dyn FnMut(u64)) -> Result<()> {
        let size = self.image.geometry.cluster_size();
        let tables: Vec<(u64, Table)> = self.tables.iter().map(|(o, t)| (*o, *t)).collect();
        let offsets = tables.iter().map(|(offset, _)| *offset);
        let mut ahead = Ahead::new(self.image.file, join(offsets, size));
        while let Some(piece) = ahead.next().await {
            let (piece, mut buf) = piece?;
            let mut changed = false;
            let here = tables.iter().skip(piece.first);
            for (bytes, (offset, table)) in
                buf.as_mut_slice().chunks_exact_mut(size as usize).zip(here)
            {
                changed |= self.l2_table(*offset, *table, bytes);
                step(1);
            }
            if changed {
                self.image.write_buf(piece.offset, buf).await?;
            }
        }
        Ok(())
    }

    /// Looks at one table; whether it was repaired.
    fn l2_table(&mut self, offset: u64, table: Table, bytes: &mut [u8]) -> bool {
        let judge = self.judge();
        let extended = judge.geometry.extended_l2();
        let size = judge.geometry.cluster_size();
        let bits = judge.geometry.cluster_bits();
        let active = table.active.is_some();
        let mut looking = Looking {
            offset,
            table,
            judge,
            next: None,
            changed: false,
        };
        let (words, _) = bytes.as_chunks_mut::<8>();
        let step = judge.geometry.words_per_entry();
        for (index, entry) in words.chunks_exact_mut(step).enumerate() {
            let (word, bitmap) = match &*entry {
                [word] => (u64::from_be_bytes(*word), 0),
                [word, bitmap] if extended => {
                    (u64::from_be_bytes(*word), u64::from_be_bytes(*bitmap))
                }
                _ => continue,
            };
            if word == 0 && bitmap == 0 {
                continue;
            }
            if judge.data_file || !judge.is_plain(word, bitmap) {
                let found = Entry { word, bitmap };
                let right = self.unusual(&mut looking, index, found);
                put(entry, found, right);
                continue;
            }
            let host = word & OFFSET_MASK;
            let flag = match (active, word & COPIED != 0) {
                (false, _) => 0,
                (true, true) => COPIED_SET,
                (true, false) => COPIED_CLEAR,
            };
            let before = self.counts.add(host >> bits, table.references, flag);
            if before & METADATA != 0 {
                let found = Entry { word, bitmap };
                let right = self.on_metadata(&mut looking, index, found, host >> bits);
                put(entry, found, right);
            } else if active {
                self.found.allocated_clusters += table.active_references;
                let behind = looking.next.is_none_or(|next| next == host);
                self.found.fragmented_clusters += u64::from(!behind) * table.active_references;
                looking.next = Some(host + size);
            }
        }
        looking.changed
    }

    /// An entry that is not just a whole cluster of this file; returns what it should be.
    #[cold]
    fn unusual(&mut self, looking: &mut Looking, index: usize, entry: Entry) -> Entry {
        let found = &mut self.found;
        let mut wrong = false;
        let mut right = looking.judge.judge(entry, |fault| {
            wrong = true;
            found.corruption(|| place(looking, index, entry, fault));
        });
        if wrong && self.fix {
            looking.changed = true;
            self.content_changed = true;
        } else {
            right = entry;
        }
        self.count_target(looking, index, right)
    }

    /// Counts what an unusual entry refers to, if the file has it; returns what the entry should be.
    fn count_target(&mut self, looking: &mut Looking, index: usize, entry: Entry) -> Entry {
        let judge = looking.judge;
        let size = judge.geometry.cluster_size();
        let (offset, len, is_compressed) = match judge.target(entry) {
            Target::None => return entry,
            Target::Compressed { offset, len } => (offset, len, true),
            Target::Cluster(host) => (host, size, false),
        };
        if looking.table.active.is_some() {
            self.count_allocated(looking, offset, is_compressed);
        }
        if judge.data_file {
            return self.in_data_file(looking, index, entry);
        }
        if judge.is_beyond(offset, len) {
            return entry;
        }
        let (first, last) = (
            judge.geometry.cluster_of(offset),
            judge.geometry.cluster_of(offset + len.max(1) - 1),
        );
        let flag = match (
            looking.table.active,
            is_compressed,
            entry.word & COPIED != 0,
        ) {
            (None, _, _) | (_, true, _) => 0,
            (Some(_), false, true) => COPIED_SET,
            (Some(_), false, false) => COPIED_CLEAR,
        };
        let times = looking.table.references;
        self.refer(offset, len, times, flag);
        for cluster in first..=last {
            if self.counts.flags(cluster) & METADATA != 0 {
                let right = self.on_metadata(looking, index, entry, cluster);
                if right != entry {
                    (first..=last)
                        .filter(|&other| other != cluster)
                        .for_each(|other| self.counts.remove(other, times));
                    return right;
                }
            }
        }
        entry
    }

    fn count_allocated(&mut self, looking: &mut Looking, host: u64, is_compressed: bool) {
        let times = looking.table.active_references;
        self.found.allocated_clusters += times;
        if is_compressed {
            self.found.compressed_clusters += times;
            self.found.fragmented_clusters += times;
            return;
        }
        let behind = looking.next.is_none_or(|next| next == host);
        self.found.fragmented_clusters += u64::from(!behind) * times;
        looking.next = host.checked_add(looking.judge.geometry.cluster_size());
    }

    /// Clusters of a data file have no refcount: nobody shares them, and their entries must say so.
    fn in_data_file(&mut self, looking: &mut Looking, index: usize, entry: Entry) -> Entry {
        if entry.word & COPIED != 0 {
            return entry;
        }
        self.found.corruption(|| {
            place(
                looking,
                index,
                entry,
                "a cluster of the data file is not said to be its own",
            )
        });
        if !self.fix {
            return entry;
        }
        looking.changed = true;
        Entry {
            word: entry.word | COPIED,
            ..entry
        }
    }

    /// An entry refers to a cluster that belongs to a structure, and was counted; returns what it should be.
    #[cold]
    fn on_metadata(
        &mut self,
        looking: &mut Looking,
        index: usize,
        entry: Entry,
        cluster: u64,
    ) -> Entry {
        if self.fix && !self.is_refcounts(cluster) {
            self.counts.remove(cluster, looking.table.references);
            looking.changed = true;
            self.content_changed = true;
            return looking.judge.zeroes();
        }
        let what = place(looking, index, entry, "its data");
        self.overlap(cluster, &what);
        entry
    }
}

/// Which entry it is, for people.
fn place(looking: &Looking, index: usize, entry: Entry, fault: &str) -> String {
    let geometry = looking.judge.geometry;
    let (table, word) = (looking.offset, entry.word);
    match looking.table.active {
        Some(l1_index) => {
            let guest = u128::from(l1_index) * u128::from(geometry.l2_coverage())
                + ((index as u128) << geometry.cluster_bits());
            format!(
                "Entry {index} ({word:#x}) of the L2 table at {table}, disk offset {guest}: {fault}"
            )
        }
        None => {
            format!("Entry {index} ({word:#x}) of the L2 table at {table} of a snapshot: {fault}")
        }
    }
}

fn put(entry: &mut [[u8; 8]], found: Entry, right: Entry) {
    if found == right {
        return;
    }
    if let Some(word) = entry.first_mut() {
        *word = right.word.to_be_bytes();
    }
    if let Some(bitmap) = entry.get_mut(1) {
        *bitmap = right.bitmap.to_be_bytes();
    }
}
