//! Going over the refcount blocks of an image beside the counts of its clusters. Every block is read once, in order and
//! ahead, and written back if it was changed. Who looks decides what to change; see [`Run`].

use diskfuse_block::Result;

use crate::format::refcount;

use super::ahead::{Ahead, join};
use super::counts::{CHUNK, Counts};
use super::image::Image;

/// Neighbouring clusters: their counters and their refcounts on disk.
pub(crate) struct Run<'r> {
    /// The number of the first cluster.
    pub(crate) first: u64,
    /// How many clusters.
    pub(crate) len: usize,
    /// Their counters; `None`: all 0.
    pub(crate) counters: Option<&'r mut [u16]>,
    /// The refcount block; `None`: there is none, all refcounts are 0.
    pub(crate) block: Option<&'r mut [u8]>,
    /// The place of the first cluster in the block.
    pub(crate) index: usize,
    /// Width of a refcount.
    pub(crate) order: u32,
}

impl Run<'_> {
    /// The refcount on disk of the `i`th cluster.
    pub(crate) fn stored(&self, i: usize) -> u64 {
        match &self.block {
            Some(block) => refcount::get(block, self.order, self.index + i),
            None => 0,
        }
    }

    /// Changes the refcount of the `i`th cluster; false if there is no block to do it in.
    pub(crate) fn store(&mut self, i: usize, value: u64) -> bool {
        match &mut self.block {
            Some(block) => {
                refcount::set(block, self.order, self.index + i, value);
                true
            }
            None => false,
        }
    }

    /// The references counted to the `i`th cluster.
    pub(crate) fn counted(&self, counts: &Counts, i: usize) -> u64 {
        match &self.counters {
            Some(counters) => counts.decode(self.first + i as u64, counters[i]),
            None => 0,
        }
    }
}

/// Which blocks to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// All.
    All,
    /// Those with a cluster that is counted.
    Counted,
}

/// Shows `look` the clusters `0..clusters` in order. It answers whether it changed a refcount. What was written is not
/// flushed.
pub(crate) async fn each(
    image: &Image<'_>,
    table: &[u64],
    counts: &mut Counts,
    clusters: u64,
    which: Which,
    mut look: impl FnMut(&Counts, Run<'_>) -> bool,
) -> Result<()> {
    let per_block = image.geometry.refcounts_per_block();
    let size = image.geometry.cluster_size();
    let order = image.geometry.refcount_order();
    let blocks = usize::try_from(clusters.div_ceil(per_block)).unwrap_or(usize::MAX);
    let range = |block: usize| {
        let start = block as u64 * per_block;
        start..(start + per_block).min(clusters)
    };
    let wanted = |counts: &Counts, block: usize| {
        let range = range(block);
        which == Which::All || counts.any(range.start, range.end)
    };
    let present: Vec<(usize, u64)> = (0..blocks.min(table.len()))
        .filter_map(|block| Some((block, *table.get(block)?)))
        .filter(|&(block, offset)| offset != 0 && wanted(counts, block))
        .collect();
    let offsets = present.iter().map(|(_, offset)| *offset);
    let mut ahead = Ahead::new(image.file, join(offsets, size));
    let mut seen = 0;
    while let Some(piece) = ahead.next().await {
        let (piece, mut buf) = piece?;
        let mut changed = false;
        let here = present.iter().skip(piece.first);
        for (bytes, (block, _)) in buf.as_mut_slice().chunks_exact_mut(size as usize).zip(here) {
            for missing in seen..*block {
                show(counts, range(missing), order, None, &mut look);
            }
            changed |= show(counts, range(*block), order, Some(bytes), &mut look);
            seen = block + 1;
        }
        if changed {
            image.write_buf(piece.offset, buf).await?;
        }
    }
    for missing in seen..blocks {
        show(counts, range(missing), order, None, &mut look);
    }
    Ok(())
}

/// Shows the clusters of one block, a chunk of counters at a time.
fn show(
    counts: &mut Counts,
    clusters: std::ops::Range<u64>,
    order: u32,
    mut block: Option<&mut [u8]>,
    look: &mut impl FnMut(&Counts, Run<'_>) -> bool,
) -> bool {
    let mut changed = false;
    let mut at = clusters.start;
    while at < clusters.end {
        let number = (at / CHUNK as u64) as usize;
        let from = (at % CHUNK as u64) as usize;
        let len = (CHUNK - from).min((clusters.end - at) as usize);
        let mut chunk = counts.take(number);
        if chunk.is_some() || block.is_some() {
            let run = Run {
                first: at,
                len,
                counters: chunk.as_mut().map(|chunk| &mut chunk[from..from + len]),
                block: block.as_deref_mut(),
                index: (at - clusters.start) as usize,
                order,
            };
            changed |= look(counts, run);
        }
        counts.put(number, chunk);
        at += len as u64;
    }
    changed
}
