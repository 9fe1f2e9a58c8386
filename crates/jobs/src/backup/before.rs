//! Copy before write: whoever changes a part of the source that is not in the target yet waits until it is. What is to be
//! copied is a bit for each cluster; a bit that is clear stays clear, so writes to what was copied pass as if nobody were
//! there. A bit is cleared only when the target has what the source had when the job began: who reads the target counts on it.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use diskfuse_block::{
    DirtyBitmap, Edit, Edited, Error, Kind, LocalFuture, Node, RangeQueue, Result, Watch, Watched,
    Wrap,
};
use parking_lot::Mutex;

use crate::copy::{Bounce, Copied, Failure, Holds, copy, copy_compressed};
use crate::job::Job;
use crate::seat::Seat;

/// Bytes that a guest's request copies in one go: others get in between.
const AT_ONCE: u64 = 1 << 20;

/// What happens to a guest's write if what was there cannot be copied (`on-cbw-error`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCbwError {
    /// It fails, and the backup goes on.
    #[default]
    BreakGuestWrite,
    /// It is made, and the backup fails.
    BreakSnapshot,
}

/// What stands between the guest and the source of a backup.
pub(super) struct Before {
    pub(super) job: Arc<Job>,
    /// Gone with the job: what stands on the source may be the target, and must not keep itself.
    target: Weak<Seat>,
    /// What is still to be copied.
    pub(super) left: DirtyBitmap,
    /// Turns on what is being copied.
    turns: RangeQueue,
    /// The target shows zeroes where nothing was copied to.
    pub(super) fresh: AtomicBool,
    /// The target keeps what is copied compressed, in units of so many bytes.
    compressed: Option<u64>,
    on_error: OnCbwError,
    /// Nothing is saved any more.
    over: AtomicBool,
    /// Why, if it ended before the job did.
    broken: Mutex<Option<Error>>,
}

impl Before {
    pub(super) fn new(
        job: Arc<Job>,
        target: &Arc<Seat>,
        left: DirtyBitmap,
        compressed: Option<u64>,
        on_error: OnCbwError,
    ) -> Arc<Self> {
        Arc::new(Self {
            job,
            target: Arc::downgrade(target),
            left,
            turns: RangeQueue::default(),
            fresh: AtomicBool::new(false),
            compressed,
            on_error,
            over: AtomicBool::new(false),
            broken: Mutex::default(),
        })
    }

    /// Copies what is left of a range that is whole clusters. After an error it is still left.
    pub(super) async fn save(
        &self,
        source: &dyn Node,
        range: Range<u64>,
        bounce: &mut Bounce,
    ) -> Copied {
        let _turn = self.turns.turn(range.start, range.end - range.start).await;
        let Some(target) = self.target.upgrade() else {
            return Ok(());
        };
        let target = target.node();
        let holds = match self.fresh.load(Ordering::SeqCst) {
            true => Holds::Zeroes,
            false => Holds::Anything,
        };
        while let Some(area) = self.left.next_dirty(range.start, range.end, AT_ONCE) {
            let range = area.clone();
            match self.compressed {
                Some(unit) => copy_compressed(source, &*target, range, unit, bounce, holds).await?,
                None => copy(source, &*target, range, bounce, holds).await?,
            }
            if self.is_over() {
                // It may have been overwritten while it was copied.
                return Ok(());
            }
            self.forget(area);
        }
        Ok(())
    }

    /// A range that is whole clusters need not be copied any more.
    fn forget(&self, area: Range<u64>) {
        let len = area.end - area.start;
        self.left.clear(area.start, len);
        self.job.progress(|done, _| *done += len);
    }

    /// A range that need not be copied at all; somebody may be copying parts of it.
    pub(super) async fn skip(&self, range: Range<u64>) {
        let _turn = self.turns.turn(range.start, range.end - range.start).await;
        while let Some(area) = self.left.next_dirty(range.start, range.end, u64::MAX) {
            let len = area.end - area.start;
            self.left.clear(area.start, len);
            // It was never part of the work, as with QEMU.
            self.job
                .progress(|_, total| *total = total.saturating_sub(len));
        }
    }

    /// The clusters that a range touches, up to the end of the disk as it was.
    fn clusters(&self, range: &Range<u64>) -> Range<u64> {
        let cluster = self.left.granularity();
        let start = range.start / cluster * cluster;
        let end = range.end.checked_next_multiple_of(cluster);
        let size = self.left.size();
        start.min(size)..end.unwrap_or(size).min(size)
    }

    /// Before the guest changes a range.
    async fn make_room(&self, source: &dyn Node, range: Range<u64>) -> Result<()> {
        let clusters = self.clusters(&range);
        let mut bounce = Bounce::default();
        let mut at = clusters.start;
        while at < clusters.end {
            let end = (at + AT_ONCE).min(clusters.end);
            if !self.lets_through(at, end - at)
                && let Err(failure) = self.save(source, at..end, &mut bounce).await
            {
                return self.cannot_save(failure);
            }
            at = end;
        }
        Ok(())
    }

    fn cannot_save(&self, failure: Failure) -> Result<()> {
        let id = self.job.id();
        let error = failure.error;
        match self.on_error {
            OnCbwError::BreakGuestWrite => {
                let message = format!(
                    "what is there cannot be saved first for block job '{id}', so it is not overwritten: {error}"
                );
                Err(Error::new(Kind::Os(error.errno()), message))
            }
            OnCbwError::BreakSnapshot => {
                tracing::warn!(id, %error, "a backup is given up, as a write went before it");
                self.broken.lock().get_or_insert(error);
                self.let_everything_through();
                self.job.notify();
                Ok(())
            }
        }
    }

    /// How many bytes of a range are still to be copied, whole clusters but for its ends.
    pub(super) fn left_within(&self, offset: u64, len: u64) -> u64 {
        let (mut at, end, mut left) = (offset, offset.saturating_add(len), 0);
        while let Some(area) = self.left.next_dirty(at, end, u64::MAX) {
            left += area.end - area.start;
            at = area.end;
        }
        left
    }

    /// From now on nothing is saved.
    pub(super) fn let_everything_through(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    /// Whether nothing is saved any more; while the job runs, because a write went before what it should have waited for.
    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Why the backup cannot be whole any more; the next call finds nothing.
    pub(super) fn take_broken(&self) -> Option<Error> {
        self.broken.lock().take()
    }
}

impl Watch for Before {
    fn lets_through(&self, offset: u64, len: u64) -> bool {
        self.is_over() || !self.left.is_dirty(offset, len)
    }

    fn edit<'a>(&'a self, node: &'a dyn Node, edit: Edit) -> LocalFuture<'a, Edited> {
        Box::pin(async move {
            let range = edit.range(node.size());
            match self.make_room(node, range).await {
                Ok(()) => edit.apply(node).await,
                Err(error) => edit.refuse(error),
            }
        })
    }
}

/// [`Before`] as something that is put around a node.
pub(super) struct AroundSource(pub(super) Arc<Before>);

impl Wrap for AroundSource {
    fn over(&self, node: Arc<dyn Node>) -> Arc<dyn Node> {
        let before: Arc<Before> = Arc::clone(&self.0);
        Arc::new(Watched::new(node, before))
    }
}
