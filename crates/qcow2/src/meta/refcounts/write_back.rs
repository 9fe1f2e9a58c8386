//! Refcount blocks and table on their way to the disk: what has changed, and a longer table behind everything else. No
//! I/O here either. It must never take for written what was not.

use std::collections::BTreeSet;

use diskfuse_block::{Error, Kind, Result};

use super::{Block, MAX_TABLE, PIECE, Refcounts, SECTOR_ENTRIES, State, make_room};

impl Refcounts {
    /// Whether anything is not on disk.
    pub(in crate::meta) fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        !state.pending.is_empty()
            || state.moving_to.is_some()
            || state.blocks.values().any(|b| !b.dirty.is_empty())
    }

    /// Copies the changed parts of blocks and takes them for clean: byte offsets in the file, and bytes. Also the
    /// table entries of blocks that are wholly among them. One caller at a time, who calls [`Refcounts::written`].
    pub(in crate::meta) fn take_dirty(&self) -> Taken {
        let mut state = self.state.lock();
        let State {
            table,
            blocks,
            pending,
            moving_to,
            moving_now,
            ..
        } = &mut *state;
        // Counted by what is taken here. A table that is wanted later is not, and has to wait for the next time.
        *moving_now = *moving_to;
        let mut taken = Taken {
            entries: std::mem::take(pending).into_iter().collect(),
            moves_to: *moving_to,
            ..Taken::default()
        };
        for (&index, block) in blocks.iter_mut() {
            let base = table[index];
            for piece in std::mem::take(&mut block.dirty) {
                let from = piece * PIECE;
                let to = (from + PIECE).min(block.bytes.len());
                block.writing = true;
                taken.places.push((index, piece));
                taken
                    .pieces
                    .push((base + from as u64, block.bytes[from..to].to_vec()));
            }
        }
        taken
    }

    /// What was taken reached the disk, or did not.
    pub(in crate::meta) fn written(&self, taken: &Taken, reached: bool) {
        let mut state = self.state.lock();
        state.moving_now = None;
        for &(index, piece) in &taken.places {
            if let Some(block) = state.blocks.get_mut(&index) {
                block.writing = false;
                if !reached {
                    block.dirty.insert(piece);
                }
            }
        }
        if !reached {
            state.pending.extend(&taken.entries);
        }
    }

    /// The sectors of the table that hold these entries, which are to be written now.
    pub(in crate::meta) fn table_sectors(&self, entries: &[usize]) -> Vec<(u64, Vec<u8>)> {
        let mut state = self.state.lock();
        for &index in entries {
            let entry = state.table[index];
            state.disk_table[index] = entry;
        }
        let sectors: BTreeSet<usize> = entries.iter().map(|i| i / SECTOR_ENTRIES).collect();
        let sector = |s: usize| {
            let from = s * SECTOR_ENTRIES;
            let to = (from + SECTOR_ENTRIES).min(state.disk_table.len());
            let bytes = state.disk_table[from..to]
                .iter()
                .flat_map(|e| e.to_be_bytes());
            (state.table_offset + (from * 8) as u64, bytes.collect())
        };
        sectors.into_iter().map(sector).collect()
    }

    /// Lays out `payload` clusters in a row, behind everything, in regions that no block counts yet, together with
    /// the blocks that count them and, if the table is too short for those, a longer table. Nothing is changed.
    /// [`Kind::Os`] ENOSPC if the table would be larger than the format allows.
    pub(in crate::meta) fn plan(&self, payload: u64) -> Result<Plan> {
        self.plan_in(&self.state.lock(), payload)
    }

    fn plan_in(&self, state: &State, payload: u64) -> Result<Plan> {
        let per_block = self.per_block();
        let cluster = self.geometry.cluster_size();
        let last = state.table.iter().rposition(|&e| e != 0);
        let behind = state.high_water.div_ceil(per_block);
        let region = last.map_or(0, |n| n as u64 + 1).max(behind);
        let start = region * per_block;
        let (mut blocks, mut table) = (1, 0);
        loop {
            let clusters = blocks + table + payload;
            let blocks_now = clusters.div_ceil(per_block);
            let entries = region + blocks_now;
            let table_now = match entries > state.table.len() as u64 {
                // Half as much again, so that this happens seldom.
                true => ((entries + entries / 2) * 8).div_ceil(cluster),
                false => 0,
            };
            if (blocks_now, table_now) == (blocks, table) {
                break;
            }
            (blocks, table) = (blocks_now.max(blocks), table_now.max(table));
        }
        if table * cluster > MAX_TABLE {
            return Err(too_large());
        }
        Ok(Plan {
            start,
            blocks,
            table,
            payload,
        })
    }

    /// Takes the clusters of a plan and puts its blocks in place, as changed and not yet on disk, if the plan is still what would be
    /// planned now. The file must be long enough. A longer table is written by the next commit.
    pub(in crate::meta) fn adopt(&self, plan: &Plan) -> Result<Adopted> {
        let mut state = self.state.lock();
        if self.plan_in(&state, plan.payload)? != *plan {
            return Ok(Adopted::No);
        }
        make_room(&mut state);
        let region = (plan.start / self.per_block()) as usize;
        let bits = self.geometry.cluster_bits();
        let size = self.geometry.cluster_size() as usize;
        let mut outgrown = None;
        if plan.table > 0 {
            let entries = (plan.table as usize * size) / 8;
            state.table.resize(entries, 0);
            let place = ((plan.start + plan.blocks) << bits, plan.table);
            outgrown = state.moving_to.replace(place);
            // What a commit is just going over to is given back when the table moves on from there.
            outgrown = outgrown.filter(|there| Some(*there) != state.moving_now);
        }
        for n in 0..plan.blocks as usize {
            let block = Block {
                bytes: vec![0; size],
                dirty: (0..size.div_ceil(PIECE)).collect(),
                writing: false,
                used: true,
            };
            state.blocks.insert(region + n, block);
            state.table[region + n] = (plan.start + n as u64) << bits;
            state.pending.insert(region + n);
        }
        let end = plan.start + plan.blocks + plan.table + plan.payload;
        for cluster in plan.start..end {
            let (index, place) = self.place(cluster);
            self.set_many(&mut state, index, place, 1, 1);
        }
        state.high_water = state.high_water.max(end);
        Ok(Adopted::Yes { outgrown })
    }

    /// The longer table that has to be written before any of the entries, if there was one to be written when they were taken:
    /// where, and what it is to hold.
    pub(in crate::meta) fn table_to_move(&self, taken: &Taken) -> Option<(u64, Vec<u64>)> {
        let (offset, clusters) = taken.moves_to?;
        let state = self.state.lock();
        let mut table = state.disk_table.clone();
        table.resize((clusters * self.geometry.cluster_size() / 8) as usize, 0);
        for &index in &taken.entries {
            table[index] = state.table[index];
        }
        Some((offset, table))
    }

    /// The longer table is on disk at this byte offset, and the header names it. Returns where the old one was: byte
    /// offset and clusters.
    pub(in crate::meta) fn table_moved(&self, offset: u64, table: Vec<u64>) -> (u64, u64) {
        let mut state = self.state.lock();
        let old = (
            state.table_offset,
            self.table_clusters(state.disk_table.len()),
        );
        state.table_offset = offset;
        state.disk_table = table;
        if state.moving_to.is_some_and(|(to, _)| to == offset) {
            state.moving_to = None;
        }
        old
    }

    /// Clusters that a table of so many entries takes.
    pub(in crate::meta) fn table_clusters(&self, entries: usize) -> u64 {
        (entries as u64 * 8).div_ceil(self.geometry.cluster_size())
    }
}

/// Whether a plan was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::meta) enum Adopted {
    /// Something else has come in between: plan again.
    No,
    /// It was.
    Yes {
        /// The place of a table that was to be written, and is too short by now: byte offset and clusters.
        outgrown: Option<(u64, u64)>,
    },
}

/// Where a longer table, or a large piece of metadata, goes. In clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::meta) struct Plan {
    /// The first cluster: of the blocks, then the table, then the payload.
    pub(in crate::meta) start: u64,
    pub(in crate::meta) blocks: u64,
    pub(in crate::meta) table: u64,
    pub(in crate::meta) payload: u64,
}

/// See [`Refcounts::take_dirty`].
#[derive(Default)]
pub(in crate::meta) struct Taken {
    pub(in crate::meta) pieces: Vec<(u64, Vec<u8>)>,
    pub(in crate::meta) entries: Vec<usize>,
    places: Vec<(usize, usize)>,
    /// A longer table that is to be written here, which the pieces count: byte offset and clusters.
    moves_to: Option<(u64, u64)>,
}

fn too_large() -> Error {
    Error::new(
        Kind::Os(libc::ENOSPC),
        "the image cannot grow: its refcount table has the largest size that the format allows",
    )
}
