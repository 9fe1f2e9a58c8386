//! Between the guest and the source of a mirror: every change is noted when it is made, or made to the target as well before it is
//! answered. A change must never be lost: what is being copied is not dirty any more *before* it is read, and what was changed
//! is dirty *after* it was written.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use diskfuse_block::{
    DirtyBitmap, Edit, Edited, Error, Kind, LocalFuture, Node, RangeQueue, Resize, Result, Watch,
    Watched, Wrap, Zeroes, io,
};

use crate::copy::{Bounce, Copied, Holds, copy};
use crate::event::Operation;
use crate::job::Job;
use crate::policy::OnError;
use crate::seat::Seat;

pub(super) struct Tracker {
    job: Arc<Job>,
    target: Arc<Seat>,
    /// What differs.
    pub(super) dirty: DirtyBitmap,
    /// What was written to a target that showed zeroes at first.
    written: DirtyBitmap,
    /// It did.
    pub(super) fresh: AtomicBool,
    /// Turns on what is being written to the target.
    turns: RangeQueue,
    /// Changes are made to the target as well before they are answered, for now.
    keeps_up: AtomicBool,
    on_target_error: OnError,
    /// Nobody wants to know any more.
    over: AtomicBool,
}

impl Tracker {
    pub(super) fn new(
        job: Arc<Job>,
        target: Arc<Seat>,
        size: u64,
        granularity: u64,
        on_target_error: OnError,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            job,
            target,
            dirty: DirtyBitmap::new(size, granularity)?,
            written: DirtyBitmap::new(size, granularity)?,
            fresh: AtomicBool::new(false),
            turns: RangeQueue::default(),
            keeps_up: AtomicBool::new(false),
            on_target_error,
            over: AtomicBool::new(false),
        }))
    }

    /// The source stands still, with this around it: it has `size` bytes now and keeps them, and `all` of it is dirty, or
    /// nothing.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it has become too large for the granularity.
    pub(super) fn begin(&self, size: u64, all: bool) -> Result<()> {
        for bitmap in [&self.dirty, &self.written] {
            bitmap.follow(|| size)?;
            // What is new is neither written nor differs because of that.
            bitmap.clear(0, size);
        }
        if all {
            self.dirty.mark(0, size);
        }
        Ok(())
    }

    pub(super) fn job(&self) -> &Arc<Job> {
        &self.job
    }

    /// Whether, for now, nothing of what is the same becomes dirty because of a guest, who waits for the target instead. What is
    /// being written still may.
    pub(super) fn keep_up(&self, keeps_up: bool) {
        self.keeps_up.store(keeps_up, Ordering::SeqCst);
    }

    fn is_blocking(&self) -> bool {
        self.keeps_up.load(Ordering::SeqCst) || self.job.is_write_blocking()
    }

    pub(super) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    fn turn(&self, range: &Range<u64>) -> impl Future<Output = diskfuse_block::Turn<'_>> {
        let unit = self.dirty.granularity();
        let start = range.start / unit * unit;
        let end = range.end.checked_next_multiple_of(unit);
        self.turns.turn(start, end.unwrap_or(u64::MAX) - start)
    }

    /// Makes the target show what the source does in an area that is dirty. After an error it is dirty again.
    pub(super) async fn copy(
        &self,
        source: &dyn Node,
        area: Range<u64>,
        bounce: &mut Bounce,
    ) -> Copied {
        let _turn = self.turn(&area).await;
        let len = area.end - area.start;
        if !self.dirty.clear(area.start, len) {
            return Ok(());
        }
        let again = Mark(self, area.clone());
        let holds = match self.fresh.load(Ordering::SeqCst) {
            true => Holds::ZeroesBut(&self.written),
            false => Holds::Anything,
        };
        copy(source, &*self.target.node(), area, bounce, holds).await?;
        std::mem::forget(again);
        Ok(())
    }

    /// A change that is noted when it is made.
    async fn note(&self, node: &dyn Node, edit: Edit, range: Range<u64>) -> Edited {
        // Also if it fails half-way, or is given up.
        let _mark = Mark(self, range);
        edit.apply(node).await
    }

    /// A change that is made to the target, too.
    async fn make_both(&self, node: &dyn Node, edit: Edit, range: Range<u64>) -> Edited {
        let _turn = self.turn(&range).await;
        let mark = Mark(self, range.clone());
        if self.is_all_dirty(&range) {
            // It is copied later in any case; nobody else makes it clean during this turn.
            return edit.apply(node).await;
        }
        let zeroes = matches!(edit, Edit::Zeroes { .. });
        let mut edited = edit.apply(node).await;
        if edited.result.is_err() {
            return edited;
        }
        self.written.mark(range.start, range.end - range.start);
        let target = self.target.node();
        let copied = match edited.buf.take() {
            Some(buf) => {
                let (result, buf) = io::write(&*target, range.start, buf).await;
                edited.buf = Some(buf);
                result
            }
            None if zeroes => {
                let len = range.end - range.start;
                target.write_zeroes(range.start, len, Zeroes::Held).await
            }
            // What a discarded range shows, only the source knows: it is copied later.
            None => return edited,
        };
        match copied {
            Ok(()) => std::mem::forget(mark),
            // The guest has its data where it wants them; the job tries again.
            Err(error) => {
                let on = self.on_target_error;
                self.job.on_error(on, Operation::Write, &error);
            }
        }
        edited
    }

    fn is_all_dirty(&self, range: &Range<u64>) -> bool {
        let first = self.dirty.next_dirty(range.start, range.end, u64::MAX);
        first.is_some_and(|area| area == *range)
    }

    /// Refuses a disk whose size has changed further down, where nobody asks the job.
    pub(super) fn check_size(&self, node: &dyn Node) -> Result<()> {
        let (now, before) = (node.size(), self.dirty.size());
        if now == before {
            return Ok(());
        }
        let message = format!(
            "The disk has {now} bytes now and had {before} when block job '{}' began: its size was changed below the node that is copied",
            self.job.id()
        );
        Err(Error::new(Kind::Invalid, message))
    }

    fn check_resize(&self, node: &dyn Node, size: u64, how: Resize) -> Result<()> {
        let now = node.size();
        if size == now || (how == Resize::AtLeast && size < now) {
            return Ok(());
        }
        let (id, kind) = (self.job.id(), self.job.kind());
        let message =
            format!("the size cannot change: block device is in use by block job: {kind} ('{id}')");
        Err(Error::new(Kind::Busy, message))
    }
}

/// Makes a range dirty when it is dropped.
struct Mark<'t>(&'t Tracker, Range<u64>);

impl Drop for Mark<'_> {
    fn drop(&mut self) {
        self.0.dirty.mark(self.1.start, self.1.end - self.1.start);
    }
}

impl Watch for Tracker {
    fn lets_through(&self, _offset: u64, _len: u64) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    fn edit<'a>(&'a self, node: &'a dyn Node, edit: Edit) -> LocalFuture<'a, Edited> {
        Box::pin(async move {
            if self.over.load(Ordering::SeqCst) {
                return edit.apply(node).await;
            }
            if let Edit::Resize { size, how, .. } = &edit {
                return match self.check_resize(node, *size, *how) {
                    Ok(()) => edit.apply(node).await,
                    Err(error) => edit.refuse(error),
                };
            }
            let range = edit.range(node.size());
            // What the target has no room for is the end of the job.
            let fits = range.end <= self.dirty.size();
            match fits && self.is_blocking() {
                true => self.make_both(node, edit, range).await,
                false => self.note(node, edit, range).await,
            }
        })
    }
}

/// [`Tracker`] as something that is put around a node.
pub(super) struct AroundSource(pub(super) Arc<Tracker>);

impl Wrap for AroundSource {
    fn over(&self, node: Arc<dyn Node>) -> Arc<dyn Node> {
        let tracker: Arc<Tracker> = Arc::clone(&self.0);
        Arc::new(Watched::new(node, tracker))
    }
}
