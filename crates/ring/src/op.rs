//! Operations: what is asked of the kernel, who waits for it, and what it needs kept alive. The table owns the buffers
//! and descriptors of everything in flight; a future only holds a key. It must never let go of either before the
//! kernel has answered.

use std::future::Future;
use std::io;
use std::marker::PhantomData;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use rustix::io::ReadWriteFlags;

use crate::buf::Buf;
use crate::command::{Command, CommandSink};
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

/// An operation in flight and all that it needs.
pub(crate) struct Entry {
    generation: u32,
    state: State,
    pub(crate) action: Action,
    pub(crate) fd: Option<SharedFd>,
    pub(crate) buf: Option<Buf>,
    pub(crate) bufs: Vec<Buf>,
    pub(crate) iovecs: Vec<libc::iovec>,
    /// Whether a worker thread does it, whatever the backend.
    pub(crate) pooled: bool,
}

enum State {
    Free,
    Flying(Option<Waker>),
    /// Whoever is to have the answer, and his name for it. The kernel has the command while the entry has its memory.
    Commanded(Weak<dyn CommandSink>, u32),
    Abandoned,
    Done(i32),
}

impl Entry {
    /// Whether the kernel or a worker still has it.
    fn in_flight(&self) -> bool {
        match self.state {
            State::Flying(_) | State::Abandoned => true,
            State::Commanded(..) => self.buf.is_some(),
            State::Done(_) | State::Free => false,
        }
    }
}

/// Who is to hear of an operation that is done.
pub(crate) enum Hearer {
    /// Nobody.
    Nobody,
    /// The task that waits for it.
    Task(Waker),
    /// The task that waits for something new.
    Fetcher(Waker),
    /// Who gave the command, with its name and its memory.
    Commander(Rc<dyn CommandSink>, u32, Buf),
}

/// Every operation of one ring.
pub(crate) struct Table {
    entries: Vec<Entry>,
    free: Vec<u32>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Operations that the kernel or a worker still has.
    pub(crate) fn in_flight(&self) -> usize {
        self.entries.iter().filter(|e| e.in_flight()).count()
    }

    /// Commands that the kernel still has. It gives none back but by its own decision.
    pub(crate) fn commands(&self) -> usize {
        let commanded = |e: &&Entry| matches!(e.state, State::Commanded(..)) && e.buf.is_some();
        self.entries.iter().filter(commanded).count()
    }

    /// Gives the memory of the commands in flight up for good, as the kernel may write to it for a while after their ring
    /// is closed.
    pub(crate) fn leak_commands(&mut self) {
        for entry in &mut self.entries {
            if matches!(entry.state, State::Commanded(..)) {
                std::mem::forget(entry.buf.take());
                entry.state = State::Done(-libc::ECANCELED);
            }
        }
    }

    /// Whether an operation still waits for something to read. Transfers cannot be cancelled, so trying again to do
    /// so would never end.
    pub(crate) fn still_waits(&mut self, key: CancelKey) -> bool {
        self.get(key).is_some_and(|entry| {
            matches!(entry.state, State::Flying(_) | State::Abandoned)
                && matches!(entry.action, Action::ReadReady)
        })
    }

    /// Keys of everything in flight, to cancel it.
    pub(crate) fn flying(&self) -> Vec<CancelKey> {
        (0u32..)
            .zip(&self.entries)
            .filter(|(_, e)| matches!(e.state, State::Flying(_) | State::Abandoned))
            .map(|(index, e)| CancelKey {
                index,
                generation: e.generation,
            })
            .collect()
    }

    /// Makes an entry; the caller fills in the rest and starts it.
    pub(crate) fn insert(&mut self, action: Action, fd: &SharedFd, buf: Option<Buf>) -> CancelKey {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry {
                generation: 0,
                state: State::Free,
                action,
                fd: None,
                buf: None,
                bufs: Vec::new(),
                iovecs: Vec::new(),
                pooled: false,
            });
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[index as usize];
        entry.state = State::Flying(None);
        entry.action = action;
        entry.fd = Some(fd.clone());
        entry.buf = buf;
        entry.pooled = false;
        CancelKey {
            index,
            generation: entry.generation,
        }
    }

    /// The entry behind a key, unless it is of an earlier life.
    pub(crate) fn get(&mut self, key: CancelKey) -> Option<&mut Entry> {
        self.entries
            .get_mut(key.index as usize)
            .filter(|e| e.generation == key.generation && !matches!(e.state, State::Free))
    }

    /// Names who is to have the answer of a command.
    pub(crate) fn commanded_by(&mut self, key: CancelKey, sink: Weak<dyn CommandSink>, name: u32) {
        if let Some(entry) = self.get(key) {
            entry.state = State::Commanded(sink, name);
        }
    }

    /// Makes an entry whose command was answered ready for the next one. False, and the memory is dropped, if it is not
    /// such an entry.
    pub(crate) fn command_again(&mut self, key: CancelKey, action: Action, buf: Buf) -> bool {
        match self.get(key) {
            Some(entry) if matches!(entry.state, State::Commanded(..)) && entry.buf.is_none() => {
                entry.action = action;
                entry.buf = Some(buf);
                true
            }
            _ => false,
        }
    }

    /// Gives an entry up whose command was answered.
    pub(crate) fn end_commands(&mut self, key: CancelKey) {
        if self
            .get(key)
            .is_some_and(|e| matches!(e.state, State::Commanded(..)) && e.buf.is_none())
        {
            self.recycle(key.index);
        }
    }

    /// Takes the kernel's answer: `result` is a count or a negative errno. Returns who is to hear of it.
    pub(crate) fn complete(&mut self, key: CancelKey, result: i32) -> Hearer {
        let Some(entry) = self.get(key) else {
            return Hearer::Nobody;
        };
        if let State::Commanded(sink, name) = &entry.state {
            let hearer = match (sink.upgrade(), entry.buf.take()) {
                (Some(sink), Some(buf)) => Hearer::Commander(sink, *name, buf),
                _ => Hearer::Nobody,
            };
            // After an error there is nothing to go on with.
            if result < 0 || matches!(hearer, Hearer::Nobody) {
                self.recycle(key.index);
            }
            return hearer;
        }
        let waited = matches!(entry.action, Action::ReadReady);
        match std::mem::replace(&mut entry.state, State::Done(result)) {
            State::Flying(Some(waker)) if waited => Hearer::Fetcher(waker),
            State::Flying(Some(waker)) => Hearer::Task(waker),
            State::Abandoned => {
                self.recycle(key.index);
                Hearer::Nobody
            }
            // Not looked at yet; and `get` finds no free entries, and nothing completes twice.
            State::Flying(None) | State::Commanded(..) | State::Done(_) | State::Free => {
                Hearer::Nobody
            }
        }
    }

    fn poll(&mut self, key: CancelKey, cx: &mut Context<'_>) -> Poll<Finished> {
        let Some(entry) = self.get(key) else {
            return Poll::Pending;
        };
        match &mut entry.state {
            State::Done(result) => {
                let finished = Finished {
                    result: outcome(*result),
                    buf: entry.buf.take(),
                    bufs: std::mem::take(&mut entry.bufs),
                };
                self.recycle(key.index);
                Poll::Ready(finished)
            }
            State::Flying(waker) => {
                if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                    *waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
            State::Abandoned | State::Commanded(..) | State::Free => Poll::Pending,
        }
    }

    fn abandon(&mut self, key: CancelKey) {
        let Some(entry) = self.get(key) else { return };
        match entry.state {
            State::Flying(_) => entry.state = State::Abandoned,
            State::Done(_) => self.recycle(key.index),
            State::Abandoned | State::Commanded(..) | State::Free => {}
        }
    }

    fn recycle(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        entry.state = State::Free;
        entry.generation = entry.generation.wrapping_add(1) & GENERATIONS;
        entry.fd = None;
        entry.buf = None;
        entry.bufs.clear();
        entry.iovecs.clear();
        self.free.push(index);
    }
}

/// Generations count in 30 bits: the two above them tell backends' own messages apart.
pub(crate) const GENERATIONS: u32 = (1 << 30) - 1;

fn outcome(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()))
}

/// What comes back from the table when an operation is done.
pub struct Finished {
    result: io::Result<usize>,
    buf: Option<Buf>,
    bufs: Vec<Buf>,
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
