//! Consistency check and repair of an image that nobody has open: who refers to which cluster, against what the refcounts
//! say. It must never write when it is only to look, never free what anything refers to, and needs memory for the
//! clusters that the file has, whatever the image claims.
//!
//! A check reads every table once, in the order of the file, several pieces ahead. A repair first looks; then walks
//! again and repairs entries that cannot be right; then refcounts, in place where that is possible and else in new
//! structures at the end of the file; then flags; and looks once more. At every point in between the image is no worse
//! than before.

pub(crate) mod ahead;
mod bitmaps;
pub(crate) mod blocks;
mod compare;
pub(crate) mod copied;
pub(crate) mod counts;
mod entries;
mod findings;
pub(crate) mod image;
pub(crate) mod layout;
mod references;
mod tables;

use std::collections::BTreeSet;

use diskfuse_block::{Error, Kind, Node, Result};

use crate::format::features;
use crate::snapshots::{mend_table, read_table};

use compare::{Adjust, Compared};
use copied::{Copied, Flags};
use counts::Counts;
use image::Image;
use layout::Plan;
use references::{L1, Walk};

pub(crate) use bitmaps::{are_there as are_bitmaps_there, outdate};
pub use findings::CheckResult;
pub(crate) use references::fault_of;

/// What to repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: only look.
    #[default]
    None,
    /// Clusters that nothing refers to.
    Leaks,
    /// Everything. Entries that cannot be right read as zeroes afterwards.
    All,
}

/// Checks the image in `file`, which nobody else may have open, and repairs it if so told. `progress` is told how much
/// of how much was looked at, in tables; a repair begins from 0 again.
///
/// An image that is repaired keeps neither its dirty nor its corrupt flag when nothing corrupt is left.
///
/// # Errors
/// [`Kind::Corrupt`] if there is no header or snapshot table to begin with, [`Kind::ReadOnly`] if a repair may not
/// write, [`Kind::Unsupported`] if the file has more than 2³¹ clusters, and what the host answers. What is wrong
/// with the image is no error but in the result.
pub async fn check(
    file: &dyn Node,
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<CheckResult> {
    let mut image = Image::open(file).await?;
    let mut before = look(&image, progress).await?;
    let flagged = image.header.incompatible & (features::DIRTY | features::CORRUPT);
    note_flags(&image, &mut before);
    if repair == Repair::None || (before.is_clean() && flagged == 0) {
        return Ok(before);
    }
    image.prepare_to_write().await?;
    let mut after = before.clone();
    if !before.is_clean() {
        mend(&mut image, repair, progress).await?;
        image.flush().await?;
        let now = Image::open(file).await?;
        after = look(&now, progress).await?.after(before);
    }
    if after.corruptions == 0 && after.check_errors == 0 {
        image
            .set_incompatible(0, features::DIRTY | features::CORRUPT)
            .await?;
    }
    Ok(after)
}

/// What whoever opens an image does when its dirty flag is set: its refcounts may be wrong, so nothing may be allocated
/// before they are right.
///
/// # Errors
/// [`Kind::Corrupt`] if something is wrong that cannot be repaired, else as [`check`].
pub async fn rebuild_refcounts_of_dirty_image(file: &dyn Node) -> Result<()> {
    let result = check(file, Repair::All, &mut |_, _| {}).await?;
    if result.corruptions == 0 && result.check_errors == 0 {
        return Ok(());
    }
    let name = file.filename().unwrap_or_else(|| "the image".into());
    let first = result.messages.first().cloned().unwrap_or_default();
    Err(Error::new(
        Kind::Corrupt,
        format!(
            "'{name}' was not closed properly, and {} things in it cannot be repaired (first: {first}): \
             run 'diskfuse check' on it",
            result.corruptions
        ),
    ))
}

fn note_flags(image: &Image<'_>, result: &mut CheckResult) {
    if image.header.incompatible & features::DIRTY != 0 {
        result.say(|| "The image was not closed properly: its refcounts may be wrong".into());
    }
    if image.header.incompatible & features::CORRUPT != 0 {
        result.say(|| {
            "The image is marked as corrupt: it can be read only until it is repaired".into()
        });
    }
}

/// What an L1 table and its L2 tables refer to, themselves counted but for the L1 table.
pub(crate) struct Tree {
    /// References to clusters.
    pub(crate) counts: Counts,
    /// Where the L2 tables are, in order.
    pub(crate) tables: Vec<u64>,
    /// What is wrong with them.
    pub(crate) found: CheckResult,
}

/// Walks one L1 table.
pub(crate) async fn tree(image: &Image<'_>, l1_offset: u64, l1_entries: u64) -> Result<Tree> {
    let l1 = L1 {
        offset: l1_offset,
        entries: l1_entries,
        name: "the L1 table".into(),
        active: false,
    };
    let mut walk = Walk::new(image, false)?;
    walk.l1_tables(&[l1]).await?;
    walk.l2_tables(&mut |_| {}).await?;
    Ok(Tree {
        counts: walk.counts,
        tables: walk.tables.into_keys().collect(),
        found: walk.found,
    })
}

/// Progress of one walk.
struct Steps<'p> {
    done: u64,
    total: u64,
    progress: &'p mut dyn FnMut(u64, u64),
}

impl Steps<'_> {
    fn step(&mut self, tables: u64) {
        self.done = (self.done + tables).min(self.total);
        // Often enough for a person, seldom enough for the loop.
        if self.done.is_multiple_of(64) || self.done == self.total {
            (self.progress)(self.done, self.total);
        }
    }
}

/// One walk that changes nothing.
async fn look(image: &Image<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<CheckResult> {
    let mut walk = Walk::new(image, false)?;
    let mut steps = gather(&mut walk, progress).await?;
    let compared = walk.compare(Adjust::None, &mut |n| steps.step(n)).await?;
    if compared.copied_wrong {
        flags(&mut walk, Flags::Report).await?;
    }
    Ok(finish(walk, &compared))
}

fn finish(walk: Walk<'_, '_>, compared: &Compared) -> CheckResult {
    let geometry = walk.image.geometry;
    let mut found = walk.found;
    found.total_clusters = walk.image.header.size.div_ceil(geometry.cluster_size());
    found.image_end_offset = compared.used_end << geometry.cluster_bits();
    found
}

/// Counts all references of an image.
async fn gather<'p>(
    walk: &mut Walk<'_, '_>,
    progress: &'p mut dyn FnMut(u64, u64),
) -> Result<Steps<'p>> {
    let (snapshots, snapshots_len) = read_table(walk.image).await?;
    if walk.image.header.has_data_file() && !snapshots.is_empty() {
        walk.found
            .corruption(|| "An image with a data file cannot have snapshots".into());
    }
    let mut l1_tables: Vec<L1> = vec![walk.active()];
    l1_tables.extend(references::snapshot_tables(
        walk.image,
        &snapshots,
        &mut walk.found,
    ));
    walk.structures(&l1_tables, snapshots_len).await?;
    walk.l1_tables(&l1_tables).await?;
    let blocks = walk.refcount_blocks.iter().filter(|b| **b != 0).count();
    let mut steps = Steps {
        done: 0,
        total: (walk.tables.len() + blocks) as u64,
        progress,
    };
    walk.l2_tables(&mut |n| steps.step(n)).await?;
    Ok(steps)
}

/// The walk that repairs.
async fn mend(
    image: &mut Image<'_>,
    repair: Repair,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let all = repair == Repair::All;
    if all {
        mend_table(image).await?;
    }
    let mut walk = Walk::new(image, all)?;
    gather(&mut walk, progress).await?;
    if all && (walk.bad_bitmaps || (walk.content_changed && bitmaps::are_there(image))) {
        // They are not true any more. Without them their clusters are free.
        let without = image.header.autoclear & !features::BITMAPS;
        image.set_autoclear(without).await?;
        walk = Walk::new(image, all)?;
        gather(&mut walk, progress).await?;
    }
    image.flush().await?;
    let compared = walk.compare(Adjust::None, &mut |_| {}).await?;
    let rebuild = walk.rebuild || compared.missing;
    match (repair, rebuild) {
        // Which clusters leak cannot be told by refcounts that are no use.
        (Repair::None, _) | (Repair::Leaks, true) => Ok(()),
        (Repair::Leaks, false) => {
            let corrupt = walk.found.corruptions > 0;
            walk.compare(Adjust::Lower, &mut |_| {}).await?;
            image.flush().await?;
            if corrupt {
                return Ok(());
            }
            flags(&mut walk, Flags::Correct).await
        }
        (Repair::All, false) => {
            walk.compare(Adjust::All, &mut |_| {}).await?;
            image.flush().await?;
            flags(&mut walk, Flags::Correct).await
        }
        (Repair::All, true) => {
            let (plan, counts) = plan_rebuild(walk);
            plan.carry_out(image, |cluster| counts.get(cluster)).await?;
            let mut walk = Walk::new(image, false)?;
            gather(&mut walk, progress).await?;
            walk.compare(Adjust::None, &mut |_| {}).await?;
            flags(&mut walk, Flags::Correct).await
        }
    }
}

/// All refcount structures anew, behind everything else. The old ones are counted no more.
fn plan_rebuild(walk: Walk<'_, '_>) -> (Plan, Counts) {
    let mut counts = walk.counts;
    for cluster in &walk.refcount_clusters {
        counts.remove(*cluster, 1);
    }
    let first = walk.image.clusters().max(counts.used_end());
    let per_block = walk.image.geometry.refcounts_per_block();
    let wanted: BTreeSet<u64> = (0..first.div_ceil(per_block))
        .filter(|block| counts.any(block * per_block, (block + 1) * per_block))
        .collect();
    let plan = Plan {
        first,
        payload: 0,
        kept: Vec::new(),
        wanted,
        move_table: true,
    };
    (plan, counts)
}

/// Compares or corrects the flags of the active tables with the refcounts on disk.
async fn flags(walk: &mut Walk<'_, '_>, flags: Flags) -> Result<()> {
    let l1 = walk.active();
    let tables: Vec<u64> = walk
        .tables
        .iter()
        .filter(|(_, table)| table.active.is_some())
        .map(|(offset, _)| *offset)
        .collect();
    let mut copied = Copied {
        image: walk.image,
        counts: &walk.counts,
        flags,
        found: &mut walk.found,
    };
    copied.l1(l1.offset, l1.entries).await?;
    copied.l2(&tables).await
}
