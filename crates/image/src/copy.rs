//! Moving the contents of one disk to another, as fast as both go: any number of threads, each with a ring of its own,
//! may work on one [`struct@Copy`], and each keeps several transfers in flight. It never reads what is known to be zero, and
//! never writes zeroes where zeroes are.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use diskfuse_block::{Error, Kind, Node, RangeQueue, Result, Zeroes, io};
use diskfuse_qcow2::node::{Layered, Qcow2Node};
use diskfuse_ring::{Buf, spawn};

/// Bytes of one transfer at most.
const CHUNK: u64 = 2 << 20;
/// Bytes that one thread takes at a time.
const REGION: u64 = 32 << 20;
/// Transfers in flight per thread when nothing is said.
pub const IN_FLIGHT: usize = 8;

/// What of the source is copied.
#[derive(Clone)]
pub enum Scope {
    /// All that its users see.
    Whole,
    /// Only what this image holds itself, and not the images below it.
    Layer(Arc<Qcow2Node>),
}

/// What is to be copied, and how.
pub struct Plan {
    /// From here.
    pub source: Arc<dyn Node>,
    /// What of it.
    pub scope: Scope,
    /// To here; at least as large as the source.
    pub target: Arc<dyn Node>,
    /// The target reads as zeroes now, so zeroes need not be written.
    pub target_is_zero: bool,
    /// Zeroes among data that are not written either: runs of so many bytes, aligned to as many; a power of two from
    /// 512. With `None` everything is written, zeroes too, so that the target is allocated as a whole.
    pub sparse: Option<u64>,
    /// Writes begin and end at multiples of this, but for the end of the disk: a power of two, 2 MiB at most (a
    /// compressed cluster is written as a whole). With [`Scope::Layer`], 512.
    pub alignment: u64,
}

/// A copy under way. Shared by the threads that work on it.
pub struct Copy {
    plan: Plan,
    total: u64,
    /// Where the next region begins.
    next: AtomicU64,
    done: AtomicU64,
    failed: AtomicBool,
}

/// What a part of the disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holds {
    Data,
    Zeroes,
    /// Nothing that is to be copied.
    Nothing,
}

/// A part of the disk, in bytes.
#[derive(Clone, Copy, Debug)]
struct Part {
    start: u64,
    end: u64,
    holds: Holds,
}

const EMPTY: Part = Part {
    start: 0,
    end: 0,
    holds: Holds::Nothing,
};

impl Copy {
    /// Nothing is copied yet.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the target is too small, or a unit is not a power of two.
    pub fn new(plan: Plan) -> Result<Arc<Self>> {
        let total = plan.source.size();
        if plan.target.size() < total {
            let message = format!(
                "the target has {} bytes, and {total} are to be copied to it",
                plan.target.size()
            );
            return Err(Error::new(Kind::Invalid, message));
        }
        let units = [plan.alignment, plan.sparse.unwrap_or(512)];
        if units.iter().any(|unit| !unit.is_power_of_two()) || plan.alignment > CHUNK {
            let message =
                "the units of a copy must be powers of two, and its alignment 2 MiB at most";
            return Err(Error::new(Kind::Invalid, message));
        }
        Ok(Arc::new(Self {
            plan,
            total,
            next: AtomicU64::new(0),
            done: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        }))
    }

    /// Bytes of the whole disk.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Bytes that are done with, zeroes included.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed).min(self.total)
    }

    /// Works until nothing is left, with so many transfers in flight. Runs on a ring; several threads may run it at
    /// once. After an error of one the others stop soon. What was written is not flushed.
    pub async fn work(self: &Arc<Self>, in_flight: usize) -> Result<()> {
        let feed = Rc::new(Feed {
            turn: RangeQueue::default(),
            region: Cell::new(EMPTY),
            found: Cell::new(EMPTY),
        });
        let tasks: Vec<_> = (0..in_flight.max(1))
            .map(|_| {
                let (copy, feed) = (Arc::clone(self), Rc::clone(&feed));
                spawn(async move { copy.carry(&feed).await })
            })
            .collect();
        let mut outcome = Ok(());
        for task in tasks {
            outcome = outcome.and(task.await);
        }
        outcome
    }

    /// One transfer after the other.
    async fn carry(&self, feed: &Feed) -> Result<()> {
        let mut buf = None;
        let outcome = loop {
            match self.next_part(feed).await {
                Ok(Some(part)) => {
                    if let Err(error) = self.transfer(part, &mut buf).await {
                        break Err(error);
                    }
                    self.count(part);
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if outcome.is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
        outcome
    }

    fn count(&self, part: Part) {
        self.done
            .fetch_add(part.end - part.start, Ordering::Relaxed);
    }

    /// What is to be copied next; `None` when all is done, or something failed elsewhere.
    async fn next_part(&self, feed: &Feed) -> Result<Option<Part>> {
        let _turn = feed.turn.turn(0, 1).await;
        while !self.failed.load(Ordering::Relaxed) {
            let found = feed.found.get();
            if found.start < found.end {
                let end = match self.is_one_piece(found.holds) {
                    true => found.end,
                    false => found.end.min((found.start / CHUNK + 1) * CHUNK),
                };
                feed.found.set(Part {
                    start: end,
                    ..found
                });
                let part = Part { end, ..found };
                if found.holds == Holds::Nothing {
                    self.count(part);
                    continue;
                }
                return Ok(Some(part));
            }
            let region = feed.region.get();
            if region.start >= region.end {
                let start = self.next.fetch_add(REGION, Ordering::Relaxed);
                if start >= self.total {
                    return Ok(None);
                }
                let end = start.saturating_add(REGION).min(self.total);
                feed.region.set(Part {
                    start,
                    end,
                    ..EMPTY
                });
                continue;
            }
            let found = self.look(region).await?;
            feed.found.set(found);
            feed.region.set(Part {
                start: found.end,
                ..region
            });
            if found.end > region.end {
                // Nobody needs to look again at what is known already.
                self.next
                    .fetch_max(found.end.next_multiple_of(REGION), Ordering::Relaxed);
            }
        }
        Ok(None)
    }

    /// Whether such a part needs no buffer, so that it may be of any length.
    fn is_one_piece(&self, holds: Holds) -> bool {
        holds != Holds::Data && (holds == Holds::Nothing || self.plan.sparse.is_some())
    }

    /// What is at the beginning of a region: data up to its end at most, or anything else in whole regions beyond it.
    async fn look(&self, region: Part) -> Result<Part> {
        let start = region.start;
        let rest = self.total - start;
        let (len, holds) = match &self.plan.scope {
            Scope::Whole => {
                let status = self.plan.source.block_status(start, rest).await?;
                let holds = match status.zero {
                    true => Holds::Zeroes,
                    false => Holds::Data,
                };
                (status.len, holds)
            }
            Scope::Layer(node) => {
                let status = node.layer_status(start, rest).await?;
                let holds = match status.layered {
                    Layered::Unallocated => Holds::Nothing,
                    Layered::Zero => Holds::Zeroes,
                    Layered::Data | Layered::Compressed => Holds::Data,
                };
                (status.len, holds)
            }
        };
        if len == 0 || len > rest {
            let message = format!("the source said nothing of its contents at {start}");
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(self.align(region, start + len, holds))
    }

    /// Cuts what begins at the region's beginning so that it ends at a multiple of the alignment.
    fn align(&self, region: Part, end: u64, holds: Holds) -> Part {
        let start = region.start;
        let unit = self.plan.alignment;
        let below = match end == self.total {
            true => end,
            false => end - end % unit,
        };
        let (end, holds) = match holds {
            // Less than a unit: what follows it belongs to the same write.
            Holds::Zeroes | Holds::Nothing if below <= start => {
                ((start + unit).min(self.total), Holds::Data)
            }
            // What begins in another region is found there; whole regions beyond this one need not be looked at.
            Holds::Zeroes | Holds::Nothing if below > region.end && below < self.total => {
                ((below - below % REGION).max(region.end), holds)
            }
            Holds::Zeroes | Holds::Nothing => (below, holds),
            Holds::Data => {
                let end = end.next_multiple_of(unit);
                (end.min(region.end), holds)
            }
        };
        Part { start, end, holds }
    }

    async fn transfer(&self, part: Part, buf: &mut Option<Buf>) -> Result<()> {
        let Plan {
            source,
            target,
            target_is_zero,
            sparse,
            alignment,
            ..
        } = &self.plan;
        let zeroes_matter = !target_is_zero;
        if part.holds == Holds::Zeroes && sparse.is_some() {
            if zeroes_matter {
                zero(&**target, part.start, part.end).await?;
            }
            return Ok(());
        }
        let len = usize::try_from(part.end - part.start).unwrap_or(usize::MAX);
        let mut bytes = match buf.take() {
            Some(bytes) => bytes,
            None => {
                let room = usize::try_from(CHUNK).unwrap_or(usize::MAX);
                Buf::new(room).map_err(|error| Error::os("get memory for copying", error))?
            }
        };
        bytes.set_window(0..len);
        let result;
        (result, bytes) = io::read(&**source, part.start, bytes).await;
        result?;
        let Some(sparse) = sparse else {
            let (result, bytes) = io::write(&**target, part.start, bytes).await;
            *buf = Some(bytes);
            return result;
        };
        let unit = usize::try_from(*sparse.max(alignment)).unwrap_or(usize::MAX);
        let mut at = 0;
        while at < len {
            let (end, is_zero) = run(bytes.as_slice(), at, unit, part.start);
            let place = part.start + at as u64;
            if !is_zero {
                bytes.set_window(at..end);
                let result;
                (result, bytes) = io::write(&**target, place, bytes).await;
                result?;
                bytes.set_window(0..len);
            } else if zeroes_matter {
                zero(&**target, place, part.start + end as u64).await?;
            }
            at = end;
        }
        *buf = Some(bytes);
        Ok(())
    }
}

async fn zero(target: &dyn Node, start: u64, end: u64) -> Result<()> {
    target
        .write_zeroes(start, end - start, Zeroes::MayUnmap)
        .await
}

/// Where the run of units that are alike ends which begins at `at`, and whether it is zero. Units are aligned on the disk,
/// where `bytes` begin at `start`.
fn run(bytes: &[u8], at: usize, unit: usize, start: u64) -> (usize, bool) {
    let into = usize::try_from(start % unit as u64).unwrap_or(0);
    let unit_end = |at: usize| (((into + at) / unit + 1) * unit - into).min(bytes.len());
    let is_zero_at = |at: usize| bytes.get(at..unit_end(at)).is_some_and(io::is_zero);
    let kind = is_zero_at(at);
    let mut end = unit_end(at);
    while end < bytes.len() && is_zero_at(end) == kind {
        end = unit_end(end);
    }
    (end, kind)
}

/// What the transfers of one thread share.
struct Feed {
    /// One looks at a time.
    turn: RangeQueue,
    /// What this thread took and has not looked at.
    region: Cell<Part>,
    /// What it has looked at and not begun to copy.
    found: Cell<Part>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_zeroes_begin_or_end_at_units_of_the_disk() {
        let mut bytes = vec![0; 10 * 512];
        bytes[512] = 1;
        bytes[4 * 512 - 1] = 1;
        assert_eq!(run(&bytes, 0, 512, 0), (512, true));
        assert_eq!(run(&bytes, 512, 512, 0), (1024, false));
        assert_eq!(run(&bytes, 1024, 512, 0), (3 * 512, true));
        assert_eq!(run(&bytes, 4 * 512, 512, 0), (bytes.len(), true));
        assert_eq!(run(&bytes, 0, 4096, 0), (4096, false));
        // The disk's units begin elsewhere than the bytes do.
        assert_eq!(run(&bytes, 0, 1024, 512), (512, true));
        assert_eq!(run(&bytes, 512, 1024, 512), (5 * 512, false));
    }
}
