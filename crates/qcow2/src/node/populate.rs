//! Filling from below: clusters that show the backing file get their data, as they are, into the image itself. Whoever writes
//! them meanwhile comes before or after, never in between.

use diskfuse_block::{Allocation, BackingName, Error, Kind, Result, io};

use crate::format::Backing;

use super::walk::{Place, Run};
use super::{Qcow2Node, scratch};

/// Bytes that are read and written in one go.
const AT_ONCE: u64 = 256 << 10;

impl Qcow2Node {
    /// Whether a range is held by the image itself.
    pub(super) async fn allocation_now(&self, offset: u64, len: u64) -> Result<Allocation> {
        self.check_range(offset, len)?;
        let run = self.loaded_run(offset, len).await?;
        let mut len_known = run.len;
        let allocated = run.place != Place::Unallocated;
        while len_known < len {
            match self.run(offset + len_known, len - len_known) {
                Ok(Some(Run { place, len })) if (place != Place::Unallocated) == allocated => {
                    len_known += len;
                }
                _ => break,
            }
        }
        Ok(Allocation {
            len: len_known,
            allocated,
        })
    }

    /// Copies what a range shows of the backing file into the image.
    pub(super) async fn populate_now(&self, offset: u64, len: u64) -> Result<()> {
        self.check_write(offset, len).await?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let run = self.loaded_run(at, end - at).await?;
            at += match run.place {
                Place::Unallocated => self.populate_some(at, run.len).await?,
                _ => run.len,
            };
        }
        Ok(())
    }

    /// Names another file below. Everything that was written is on stable storage before.
    pub(super) async fn change_backing_now(&self, backing: Option<BackingName>) -> Result<()> {
        self.check_write(0, 0).await?;
        self.meta.commit().await?;
        let backing = backing.map(|BackingName { name, format }| Backing { name, format });
        self.meta.change_backing(backing).await
    }

    /// Copies the beginning of a range; returns how far it is held now.
    async fn populate_some(&self, at: u64, len: u64) -> Result<u64> {
        let size = self.geometry.cluster_size();
        let first = self.geometry.round_down(at);
        let border = self.clusters_to_border(at) * size;
        // Zeroes need not be read, nor be written a piece at a time.
        let zeroes = len.min(border - (at - first));
        let most = match self.can_be_said_to_be_zero(at, zeroes) {
            true if self.backing_reads_zero(at, at + zeroes) => border,
            _ => AT_ONCE.max(size).min(border),
        };
        let span = (at - first + len).min(most).next_multiple_of(size);
        let _turn = self.turns.turn(first, span).await;
        // Whoever had the turn before may have given it a place.
        let run = self.loaded_run(at, len.min(span - (at - first))).await?;
        if run.place != Place::Unallocated {
            return Ok(run.len);
        }
        let sayable = self.can_be_said_to_be_zero(at, run.len);
        if sayable && self.backing_reads_zero(at, at + run.len) {
            self.link_zeroes(at, run.len).await?;
            return Ok(run.len);
        }
        // What is below is not zero any more, or never was known to be.
        let run_len = run.len.min(AT_ONCE.max(size));
        let buf = scratch::take(run_len as usize)?;
        let (result, buf) = self.fill(at, buf).await;
        result?;
        if self.can_be_said_to_be_zero(at, run_len) && io::is_zero(buf.as_slice()) {
            scratch::give(buf);
            self.link_zeroes(at, run_len).await?;
            return Ok(run_len);
        }
        let (stored, buf) = self.store_with_turn(at, buf, run_len).await;
        scratch::give(buf);
        match stored? {
            0 => {
                let message = format!("'{}': {at} is held and is not", self.name());
                Err(Error::new(Kind::Corrupt, message))
            }
            stored => Ok(stored),
        }
    }

    /// Whether a range, none of which has anything, is whole clusters that can be said to be zero instead of written.
    fn can_be_said_to_be_zero(&self, at: u64, len: u64) -> bool {
        let whole = self.geometry.offset_in_cluster(at) == 0
            && (self.geometry.offset_in_cluster(at + len) == 0 || at + len == self.meta.size());
        // With subclusters a cluster may have a place and nothing in it.
        let plain = self.version >= 3 && !self.raw_data && !self.geometry.extended_l2();
        whole && plain
    }

    /// With the turn on the clusters, none of which has anything.
    async fn link_zeroes(&self, at: u64, len: u64) -> Result<()> {
        let count = len.div_ceil(self.geometry.cluster_size());
        let entries = vec![self.zero_entry(None); count as usize];
        self.meta.link(at, &entries).await
    }
}
