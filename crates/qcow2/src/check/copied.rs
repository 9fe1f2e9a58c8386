//! The flags in the active tables that say "refcount exactly one, may be overwritten in place": compared with the
//! refcounts on disk, and made right. A flag that is set where it must not be lets a guest write into a snapshot.

use diskfuse_block::Result;

use crate::format::{COMPRESSED, COPIED, OFFSET_MASK};

use super::ahead::{Ahead, cut, join};
use super::counts::{Counts, STORED_ONE};
use super::findings::CheckResult;
use super::image::Image;

/// What to do with flags that are wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flags {
    /// Say so.
    Report,
    /// Make them right, by the refcounts that the counts were marked with.
    Correct,
    /// Clear them all.
    Clear,
}

/// The flags of one active L1 table and of the L2 tables that it refers to.
pub(crate) struct Copied<'c, 'i, 'a> {
    pub(crate) image: &'i Image<'a>,
    /// Marked with [`STORED_ONE`].
    pub(crate) counts: &'c Counts,
    pub(crate) flags: Flags,
    /// Where to say what is wrong.
    pub(crate) found: &'c mut CheckResult,
}

impl Copied<'_, '_, '_> {
    /// The entries of the L1 table at `offset`.
    pub(crate) async fn l1(&mut self, offset: u64, entries: u64) -> Result<()> {
        let mut ahead = Ahead::new(self.image.file, cut(offset, entries * 8));
        while let Some(piece) = ahead.next().await {
            let (piece, mut buf) = piece?;
            if self.table(buf.as_mut_slice(), 1, piece.offset, "L1") {
                self.image.write_buf(piece.offset, buf).await?;
            }
        }
        Ok(())
    }

    /// The entries of L2 tables, by where they are, in order.
    pub(crate) async fn l2(&mut self, tables: &[u64]) -> Result<()> {
        let geometry = self.image.geometry;
        let size = geometry.cluster_size();
        let step = geometry.words_per_entry();
        let mut ahead = Ahead::new(self.image.file, join(tables.iter().copied(), size));
        while let Some(piece) = ahead.next().await {
            let (piece, mut buf) = piece?;
            if self.table(buf.as_mut_slice(), step, piece.offset, "L2") {
                self.image.write_buf(piece.offset, buf).await?;
            }
        }
        Ok(())
    }

    /// Looks at every `step`th word; whether any was changed.
    fn table(&mut self, bytes: &mut [u8], step: usize, at: u64, what: &str) -> bool {
        let data_file = what == "L2" && self.image.header.has_data_file();
        let mut changed = false;
        let (words, _) = bytes.as_chunks_mut::<8>();
        for (index, bytes) in words.iter_mut().enumerate().step_by(step) {
            let word = u64::from_be_bytes(*bytes);
            let host = word & OFFSET_MASK;
            if word & COMPRESSED != 0 || host == 0 || data_file {
                continue;
            }
            let is_set = word & COPIED != 0;
            let should = self.should(host);
            if is_set == should {
                continue;
            }
            match self.flags {
                Flags::Report => {
                    let place = at + 8 * index as u64;
                    self.found.corruption(|| wrong(what, place, word, should));
                }
                Flags::Correct | Flags::Clear => {
                    *bytes = (word ^ COPIED).to_be_bytes();
                    changed = true;
                }
            }
        }
        changed
    }

    fn should(&self, host: u64) -> bool {
        let cluster = self.image.geometry.cluster_of(host);
        self.flags != Flags::Clear && self.counts.flags(cluster) & STORED_ONE != 0
    }
}

fn wrong(what: &str, place: u64, word: u64, should: bool) -> String {
    let says = if should {
        "says that its cluster is shared, but its refcount is one"
    } else {
        "says that its cluster may be overwritten, but its refcount is not one"
    };
    format!("The {what} entry at {place} ({word:#x}) {says}")
}
