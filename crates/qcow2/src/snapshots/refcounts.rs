//! Changing refcounts of a closed image: a tree's worth at once, or a stretch of clusters. Nothing is freed or allocated
//! that the refcounts on disk contradict.

use std::collections::{BTreeSet, HashSet};

use diskfuse_block::{Error, Kind, Result};

use crate::check::blocks::{Which, each};
use crate::check::counts::{Counts, STORED_ONE};
use crate::check::image::{Image, words};
use crate::check::layout::Plan;

/// The refcount table of an image. The blocks stay on disk.
pub(super) struct Refcounts {
    table: Vec<u64>,
}

/// In which direction a change goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// One reference more for each counted.
    Up,
    /// One less.
    Down,
}

impl Refcounts {
    /// Reads the table. [`Kind::Corrupt`] if it cannot be used.
    pub(super) async fn load(image: &Image<'_>) -> Result<Self> {
        let geometry = image.geometry;
        let header = &image.header;
        let len = u64::from(header.refcount_table_clusters) * geometry.cluster_size();
        let bytes = image.read(header.refcount_table_offset, len).await?;
        let mut table: Vec<u64> = words(bytes.as_slice()).collect();
        let mut seen = HashSet::new();
        for entry in table.iter().filter(|entry| **entry != 0) {
            let fits = geometry.offset_in_cluster(*entry) == 0 && *entry < image.file.size();
            if !fits || !seen.insert(*entry) {
                return Err(corrupt(
                    image,
                    &format!("a refcount block cannot be at {entry}"),
                ));
            }
        }
        let used = table.iter().rposition(|entry| *entry != 0);
        table.truncate(used.map_or(0, |last| last + 1));
        Ok(Self { table })
    }

    /// Whether [`Refcounts::change`] would work: every counted cluster has a refcount, at least as high as what is to
    /// be taken away, and with room for what is to be added.
    pub(super) async fn verify(
        &self,
        image: &Image<'_>,
        counts: &mut Counts,
        change: Change,
    ) -> Result<()> {
        let most = image.geometry.max_refcount();
        let mut wrong = None;
        self.each_counted(image, counts, |cluster, stored, counted| {
            let fits = match change {
                Change::Up => stored >= 1 && counted <= most - stored,
                Change::Down => stored >= counted,
            };
            if !fits {
                wrong.get_or_insert((cluster, stored));
            }
            None
        })
        .await?;
        let Some((cluster, stored)) = wrong else {
            return Ok(());
        };
        let at = cluster << image.geometry.cluster_bits();
        if change == Change::Up && stored >= 1 {
            let bits = image.geometry.refcount_bits();
            return Err(Error::new(
                Kind::Unsupported,
                format!(
                    "The refcounts of '{}' are {bits} bits wide: the cluster at {at} cannot be in one more snapshot. \
                     Convert the image to one with refcount_bits=16, or delete snapshots",
                    image.name()
                ),
            ));
        }
        Err(corrupt(
            image,
            &format!("the cluster at {at} is in use but its refcount is {stored}"),
        ))
    }

    /// Adds or takes away one reference for each counted. Not flushed.
    pub(super) async fn change(
        &self,
        image: &Image<'_>,
        counts: &mut Counts,
        change: Change,
    ) -> Result<()> {
        self.each_counted(image, counts, |_, stored, counted| match change {
            Change::Up => Some(stored.saturating_add(counted)),
            Change::Down => Some(stored.saturating_sub(counted)),
        })
        .await
    }

    /// Marks which of the counted clusters have a refcount of one.
    pub(super) async fn mark(&self, image: &Image<'_>, counts: &mut Counts) -> Result<()> {
        let clusters = counts.used_end();
        each(
            image,
            &self.table,
            counts,
            clusters,
            Which::Counted,
            |_, mut run| {
                for i in 0..run.len {
                    let is_one = run.stored(i) == 1;
                    if let Some(counters) = &mut run.counters {
                        counters[i] &= !STORED_ONE;
                        counters[i] |= if is_one { STORED_ONE } else { 0 };
                    }
                }
                false
            },
        )
        .await
    }

    /// Calls `decide(cluster, refcount, counted)` for every counted cluster; it answers the new refcount.
    async fn each_counted(
        &self,
        image: &Image<'_>,
        counts: &mut Counts,
        mut decide: impl FnMut(u64, u64, u64) -> Option<u64>,
    ) -> Result<()> {
        let clusters = counts.used_end();
        each(
            image,
            &self.table,
            counts,
            clusters,
            Which::Counted,
            |counts, mut run| {
                let mut changed = false;
                for i in 0..run.len {
                    let counted = run.counted(counts, i);
                    if counted == 0 {
                        continue;
                    }
                    let stored = run.stored(i);
                    if let Some(value) = decide(run.first + i as u64, stored, counted) {
                        changed |= value != stored && run.store(i, value);
                    }
                }
                changed
            },
        )
        .await
    }

    /// Takes one reference from every cluster of a range. Not flushed.
    pub(super) async fn free(&self, image: &Image<'_>, offset: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let geometry = image.geometry;
        let first = geometry.cluster_of(offset);
        let end = first + len.div_ceil(geometry.cluster_size());
        let mut counts = Counts::new(end)?;
        (first..end).for_each(|cluster| {
            counts.add(cluster, 1, 0);
        });
        self.change(image, &mut counts, Change::Down).await
    }

    /// Takes a free stretch for `bytes` bytes, with a refcount of one; returns where it is. Its refcounts may not be on
    /// stable storage yet; what is in it is undefined.
    pub(super) async fn allocate(&mut self, image: &mut Image<'_>, bytes: u64) -> Result<u64> {
        let geometry = image.geometry;
        let wanted = bytes.div_ceil(geometry.cluster_size()).max(1);
        let Some(first) = self.find(image, wanted).await? else {
            return self.grow(image, wanted).await;
        };
        let mut counts = Counts::new(first + wanted)?;
        (first..first + wanted).for_each(|cluster| {
            counts.add(cluster, 1, 0);
        });
        self.change(image, &mut counts, Change::Up).await?;
        Ok(first << geometry.cluster_bits())
    }

    /// The first stretch of that many clusters with refcount 0 that blocks exist for.
    async fn find(&self, image: &Image<'_>, wanted: u64) -> Result<Option<u64>> {
        let clusters = self.table.len() as u64 * image.geometry.refcounts_per_block();
        let mut stretch = 0..0;
        let mut found = None;
        let mut none = Counts::default();
        each(
            image,
            &self.table,
            &mut none,
            clusters,
            Which::All,
            |_, run| {
                for i in 0..run.len {
                    let cluster = run.first + i as u64;
                    if found.is_some() || run.stored(i) != 0 {
                        continue;
                    }
                    if stretch.end != cluster {
                        stretch.start = cluster;
                    }
                    stretch.end = cluster + 1;
                    if stretch.end - stretch.start == wanted {
                        found = Some(stretch.start);
                    }
                }
                false
            },
        )
        .await?;
        Ok(found)
    }

    /// More refcount blocks, behind all that there are.
    async fn grow(&mut self, image: &mut Image<'_>, wanted: u64) -> Result<u64> {
        let geometry = image.geometry;
        let first = self.table.len() as u64 * geometry.refcounts_per_block();
        let plan = Plan {
            first,
            payload: wanted,
            kept: std::mem::take(&mut self.table),
            wanted: BTreeSet::new(),
            move_table: false,
        };
        let laid = plan.carry_out(image, |_| 0).await?;
        self.table = laid.table;
        if let Some((offset, len)) = laid.old_table {
            self.free(image, offset, len).await?;
        }
        Ok(first << geometry.cluster_bits())
    }
}

pub(super) fn corrupt(image: &Image<'_>, what: &str) -> Error {
    Error::new(
        Kind::Corrupt,
        format!(
            "'{}' is damaged ({what}): run 'diskfuse check --repair all' on it first",
            image.name()
        ),
    )
}
