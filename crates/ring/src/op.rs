//! Operations: what can be asked of the kernel, as futures. A future only holds a key; what its operation needs kept
//! alive is the table's (`table.rs`). Dropping a future must never free what the kernel may still use.

use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustix::io::ReadWriteFlags;

use crate::buf::Buf;
use crate::command::Command;
use crate::current;
use crate::fd::SharedFd;
use crate::mail::Reply;

/// Names one operation. Names come again after 2^30 operations in one place, long after anybody could remember one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CancelKey {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

/// What an operation does. Offsets and lengths are bytes of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    Read {
        offset: u64,
    },
    Write {
        offset: u64,
    },
    ReadVec {
        offset: u64,
    },
    WriteVec {
        offset: u64,
    },
    Sync {
        data_only: bool,
    },
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    Poll {
        events: u32,
    },
    /// Wait (exclusively) until a descriptor opened with O_NONBLOCK is readable, then read.
    ReadReady,
    /// Write to a descriptor whose writes never block. Nobody is kept waiting for the answer unless it is urgent.
    WriteNow {
        urgent: bool,
    },
    /// A command of the descriptor's driver (IORING_OP_URING_CMD).
    Command(Command),
}

impl Action {
    pub(crate) fn is_transfer(self) -> bool {
        matches!(
            self,
            Self::Read { .. } | Self::Write { .. } | Self::ReadVec { .. } | Self::WriteVec { .. }
        )
    }
}

pub(crate) fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()))
}

/// What comes back from the table when an operation is done.
pub struct Finished {
    pub(crate) result: io::Result<usize>,
    pub(crate) buf: Option<Buf>,
    pub(crate) bufs: Vec<Buf>,
}

/// The form in which an operation gives its answer.
pub trait Answer {
    /// What the future resolves to.
    type Output;
    /// Picks it out of what the table had.
    fn from(finished: Finished) -> Self::Output;
}

/// An operation in flight; resolves when the kernel has answered.
#[must_use = "an operation that nobody waits for is abandoned"]
pub struct Op<A> {
    key: CancelKey,
    finished: bool,
    kind: PhantomData<fn() -> A>,
}

/// The answer of an operation with one buffer.
pub struct OneBuf;
/// The answer of an operation with several buffers.
pub struct ManyBufs;
/// The answer of an operation without buffers.
pub struct NoBuf;

/// Resolves to the count of bytes moved (or the error) and the buffer, its window as it was.
pub type BufOp = Op<OneBuf>;
/// Resolves to the count of bytes moved (or the error) and the buffers.
pub type VecOp = Op<ManyBufs>;
/// Resolves to the kernel's number (for [`poll`] the events) or the error.
pub type StatusOp = Op<NoBuf>;

impl Answer for OneBuf {
    type Output = (io::Result<usize>, Buf);
    fn from(finished: Finished) -> Self::Output {
        match finished.buf {
            Some(buf) => (finished.result, buf),
            // The table holds the buffer of such an operation from its start to here.
            None => unreachable!("an operation lost its buffer"),
        }
    }
}

impl Answer for ManyBufs {
    type Output = (io::Result<usize>, Vec<Buf>);
    fn from(finished: Finished) -> Self::Output {
        (finished.result, finished.bufs)
    }
}

impl Answer for NoBuf {
    type Output = io::Result<usize>;
    fn from(finished: Finished) -> Self::Output {
        finished.result
    }
}

impl<A> Op<A> {
    fn new(key: CancelKey) -> Self {
        Self {
            key,
            finished: false,
            kind: PhantomData,
        }
    }

    /// The name to give to [`cancel`].
    pub fn key(&self) -> CancelKey {
        self.key
    }
}

impl<A: Answer> Future for Op<A> {
    type Output = A::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<A::Output> {
        let key = self.key;
        match current::with(|r| r.ops.borrow_mut().poll(key, cx)) {
            Poll::Ready(finished) => {
                self.finished = true;
                Poll::Ready(A::from(finished))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<A> Drop for Op<A> {
    fn drop(&mut self) {
        if !self.finished {
            current::try_with(|r| r.ops.borrow_mut().abandon(self.key));
        }
    }
}

fn one(action: Action, fd: &SharedFd, buf: Buf, pooled: bool) -> BufOp {
    Op::new(current::with(|r| {
        r.start(action, fd, Some(buf), Vec::new(), pooled)
    }))
}

fn none(action: Action, fd: &SharedFd) -> StatusOp {
    Op::new(current::with(|r| {
        r.start(action, fd, None, Vec::new(), false)
    }))
}

/// Reads into the buffer's window from byte `offset` of a file or block device: `pread(2)`. Short at its end.
pub fn read_at(fd: &SharedFd, buf: Buf, offset: u64) -> BufOp {
    one(Action::Read { offset }, fd, buf, false)
}

/// Writes the buffer's window at byte `offset` of a file or block device: `pwrite(2)`. May be short.
pub fn write_at(fd: &SharedFd, buf: Buf, offset: u64) -> BufOp {
    one(Action::Write { offset }, fd, buf, false)
}

/// [`read_at`], by a worker thread whatever the backend (the `aio=threads` of a file node).
pub fn pool_read_at(fd: &SharedFd, buf: Buf, offset: u64) -> BufOp {
    one(Action::Read { offset }, fd, buf, true)
}

/// [`write_at`], by a worker thread whatever the backend.
pub fn pool_write_at(fd: &SharedFd, buf: Buf, offset: u64) -> BufOp {
    one(Action::Write { offset }, fd, buf, true)
}

/// Reads into the windows of several buffers, one after the other, from byte `offset`: `preadv(2)`.
pub fn readv_at(fd: &SharedFd, bufs: Vec<Buf>, offset: u64) -> VecOp {
    Op::new(current::with(|r| {
        r.start(Action::ReadVec { offset }, fd, None, bufs, false)
    }))
}

/// Writes the windows of several buffers, one after the other, at byte `offset`: `pwritev(2)`.
pub fn writev_at(fd: &SharedFd, bufs: Vec<Buf>, offset: u64) -> VecOp {
    Op::new(current::with(|r| {
        r.start(Action::WriteVec { offset }, fd, None, bufs, false)
    }))
}

/// `fsync(2)`: data and metadata are on stable storage when it resolves.
pub fn fsync(fd: &SharedFd) -> StatusOp {
    none(Action::Sync { data_only: false }, fd)
}

/// `fdatasync(2)`: data, and the metadata needed to find it, are on stable storage when it resolves.
pub fn fdatasync(fd: &SharedFd) -> StatusOp {
    none(Action::Sync { data_only: true }, fd)
}

/// `fallocate(2)` with `mode` as there; `offset` and `len` in bytes.
pub fn fallocate(fd: &SharedFd, mode: i32, offset: u64, len: u64) -> StatusOp {
    none(Action::Fallocate { mode, offset, len }, fd)
}

/// Waits once for `events` (POLLIN and so on, `poll(2)`); resolves to those that came.
pub fn poll(fd: &SharedFd, events: u32) -> StatusOp {
    none(Action::Poll { events }, fd)
}

/// Reads from a pollable descriptor that was opened with O_NONBLOCK, in place and without waiting: EAGAIN if there is
/// nothing. Not an operation: io_uring has no such read for descriptors whose driver lacks FMODE_NOWAIT, as
/// /dev/fuse does (it would arm a poll in spite of O_NONBLOCK).
pub fn read_now(fd: &SharedFd, buf: &mut Buf) -> io::Result<usize> {
    let read = || rustix::io::read(fd, buf.as_mut_slice());
    Ok(rustix::io::retry_on_intr(read)?)
}

/// Reads from byte `offset` of a file what is in the page cache, in place and without waiting: short, or EAGAIN, where
/// something is not. EOPNOTSUPP if the file system cannot tell.
pub fn read_cached(fd: &SharedFd, buf: &mut Buf, offset: u64) -> io::Result<usize> {
    let mut into = [io::IoSliceMut::new(buf.as_mut_slice())];
    let read = rustix::io::preadv2(fd, &mut into, offset, ReadWriteFlags::NOWAIT);
    Ok(read?)
}

/// Waits until a pollable descriptor that was opened with O_NONBLOCK has something, then reads it. Of several waiters
/// on one source the kernel wakes one. It may answer EAGAIN if somebody else was faster. After [`cancel`] it resolves to ECANCELED,
/// or to what was read before that.
///
/// A waiter that was cancelled may have swallowed a wake-up that was meant for its siblings: whoever cancels must
/// see to it that somebody looks at the source once more.
pub fn read_ready(fd: &SharedFd, buf: Buf) -> BufOp {
    one(Action::ReadReady, fd, buf, false)
}

/// Writes the window to a descriptor whose writes never block (as /dev/fuse), without an offset. If it is not
/// `urgent` the answer may be delivered as late as the next other one: that saves a system call for each write after
/// which the loop has nothing to do. Whoever comes to wait for it after all calls [`hurry`].
pub fn write_now(fd: &SharedFd, buf: Buf, urgent: bool) -> BufOp {
    one(Action::WriteNow { urgent }, fd, buf, false)
}

/// Lets the answers of all writes that were not urgent come at once; see [`write_now`].
pub fn hurry() {
    current::with(crate::inner::Inner::hurry);
}

/// Asks the kernel to give an operation up. Its future still resolves: to ECANCELED if that came in time, else to
/// what it did. Reads and writes of files that have started cannot be cancelled.
pub fn cancel(key: CancelKey) {
    current::with(|r| r.cancel(key));
}

/// Runs `work`, which may block, on a worker thread, and resolves to what it returned. If the returned future is
/// dropped the work still runs to its end.
pub fn offload<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Reply<T> {
    let (sender, reply) = crate::mail::reply();
    current::with(|r| r.pool.run(Box::new(move || sender.send(work()))));
    reply
}
