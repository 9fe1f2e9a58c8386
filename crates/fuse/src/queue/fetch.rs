//! Getting requests out of the kernel. One read that waits is armed at a time; after it has answered, further reads
//! are tried at once for as long as there is something, so that a burst costs one wake-up. Every fetched request is
//! handed to a slot; one that cannot be trusted halts the export.

use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use diskfuse_ring::{Buf, read_now, read_ready, yield_now};

use super::Queue;
use super::pending::Pending;
use super::slots::Slot;
use crate::request::{Malformed, Operation, Request, parse};
use crate::shared::End;

/// Requests fetched in a row before those that were fetched get their turn.
const BURST: usize = 32;
/// The same while a disk is busy, which stays so best if what there is is handed on.
const BURST_WHILE_MOVING: usize = 4;

/// What came of trying to fetch.
enum Fetched {
    /// A request is in its slot, or was one that wants no answer.
    Something,
    /// There is nothing now.
    Nothing,
    /// No slot is free, or too much memory is in use.
    NoRoom,
    /// There will be nothing any more.
    Gone,
}

/// Wakes in a row that brought one request each before looking for a second one becomes an exception.
const PATIENCE: u32 = 4;
/// Of how many wakes one then looks for a second request.
const PROBE_EVERY: u32 = 16;

impl Queue {
    /// Fetches until the export ends.
    pub(super) async fn fetch(self: &Rc<Self>) {
        while !self.shared.ending() {
            if self.must_register() {
                self.register().await;
                continue;
            }
            if self.must_rest() {
                self.rest().await;
                continue;
            }
            if !self.reads_device() {
                self.until_distracted().await;
                continue;
            }
            match self.fetch_when_ready().await {
                Fetched::Something if self.expects_more() => self.fetch_the_rest().await,
                Fetched::Something | Fetched::Nothing => {}
                Fetched::NoRoom => self.slot_freed().await,
                Fetched::Gone => self.disconnected(),
            }
        }
    }

    /// Whether this queue is not to fetch now.
    pub(super) fn must_rest(&self) -> bool {
        self.shared.ending() || self.shared.paused() || !self.shared.wanted(self.index)
    }

    /// Waits until this queue may fetch again, and says so to whoever drains once nothing is in flight.
    async fn rest(&self) {
        let lane = self.lane();
        self.settled().await;
        self.let_go_of_nodes();
        lane.quiet.store(true, Ordering::SeqCst);
        self.shared.became_quiet();
        std::future::poll_fn(|_| {
            // The task's waker is in the lane; whoever changes a flag wakes it.
            if self.shared.ending() || !self.must_rest() || self.must_register() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        // From here on whoever drains waits for this queue; if a drain began just before, the caller sees it.
        lane.quiet.store(false, Ordering::SeqCst);
    }

    /// Whether a second request is likely to be there after the first. With one synchronous caller it never is, and
    /// looking costs a system call.
    fn expects_more(&self) -> bool {
        let lonely = self.lonely_wakes.get();
        lonely < PATIENCE || lonely.is_multiple_of(PROBE_EVERY) || {
            self.lonely_wakes.set(lonely.wrapping_add(1));
            false
        }
    }

    /// Takes everything that is there, in bursts.
    async fn fetch_the_rest(self: &Rc<Self>) {
        let mut got = 0;
        let mut burst = 0;
        while !self.is_distracted() {
            match self.fetch_now() {
                Fetched::Something => {
                    got += 1;
                    burst += 1;
                    let moving = diskfuse_ring::is_moving();
                    if burst >= if moving { BURST_WHILE_MOVING } else { BURST } {
                        burst = 0;
                        yield_now().await;
                    }
                }
                Fetched::NoRoom => self.slot_freed().await,
                Fetched::Nothing => break,
                Fetched::Gone => self.disconnected(),
            }
        }
        let lonely = if got == 0 {
            self.lonely_wakes.get().wrapping_add(1)
        } else {
            0
        };
        self.lonely_wakes.set(lonely);
    }

    /// Reads one request if there is one.
    fn fetch_now(self: &Rc<Self>) -> Fetched {
        let slot = match self.room() {
            Ok(slot) => slot,
            Err(instead) => return instead,
        };
        let mut memory = slot.take_memory();
        let mut buf = memory.take_for_request();
        let read = read_now(&self.device, &mut buf);
        memory.put(buf);
        slot.put_memory(memory);
        self.fetched(slot, read)
    }

    /// Waits for a request and reads it. `Nothing` if it was told to rest, or if another queue was faster.
    async fn fetch_when_ready(self: &Rc<Self>) -> Fetched {
        let slot = match self.room() {
            Ok(slot) => slot,
            Err(instead) => return instead,
        };
        let mut memory = slot.take_memory();
        let (read, buf) = self.read_unless_resting(memory.take_for_request()).await;
        memory.put(buf);
        slot.put_memory(memory);
        let cancelled =
            read.as_ref().err().and_then(io::Error::raw_os_error) == Some(libc::ECANCELED);
        let outcome = self.fetched(slot, read);
        // The wait that was cancelled may have swallowed the wake-up for a request that is still there. Whoever fetches
        // next looks first; with the other queues asleep that has to be this one.
        if cancelled && !self.shared.paused() && !self.shared.ending() {
            return self.fetch_now();
        }
        outcome
    }

    async fn read_unless_resting(self: &Rc<Self>, buf: Buf) -> (io::Result<usize>, Buf) {
        let mut read = read_ready(&self.device, buf);
        let key = read.key();
        let mut cancelled = false;
        std::future::poll_fn(|cx| {
            if !cancelled && self.is_distracted() {
                cancelled = true;
                diskfuse_ring::cancel(key);
            }
            Pin::new(&mut read).poll(cx)
        })
        .await
    }

    fn room(self: &Rc<Self>) -> Result<Rc<Slot>, Fetched> {
        match self.slots.take(self) {
            Ok(Some(slot)) => Ok(slot),
            Ok(None) => Err(Fetched::NoRoom),
            // Without memory for one request more, those in flight must do; without any, the export cannot live.
            Err(error) if self.slots.busy() > 0 => {
                tracing::warn!(%error, "no memory for another request");
                Err(Fetched::NoRoom)
            }
            Err(error) => {
                tracing::error!(%error, "no memory for a single request");
                self.shared.end(End::Halted);
                Err(Fetched::Nothing)
            }
        }
    }

    /// Looks at what a read has brought.
    fn fetched(self: &Rc<Self>, slot: Rc<Slot>, read: io::Result<usize>) -> Fetched {
        let error = match read {
            Ok(len) if len > 0 => return self.accept(slot, len),
            Ok(_) => libc::ENODEV,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        self.slots.put_back(slot);
        match error {
            // Nothing there, cancelled, or the caller gave its request up while it was being read.
            libc::EAGAIN | libc::EINTR | libc::ECANCELED => Fetched::Nothing,
            libc::ENOENT => Fetched::Something,
            libc::ENODEV | libc::ECONNABORTED | libc::EPERM => Fetched::Gone,
            errno => {
                let error = io::Error::from_raw_os_error(errno);
                tracing::error!(export = %self.shared.options.id, %error, "cannot read from /dev/fuse");
                self.shared.end(End::Halted);
                Fetched::Nothing
            }
        }
    }

    /// Hands a request to its slot, or deals with one that is not to be served.
    fn accept(self: &Rc<Self>, slot: Rc<Slot>, len: usize) -> Fetched {
        let mut memory = slot.take_memory();
        let parsed = parse(memory.request(len));
        slot.put_memory(memory);
        match parsed {
            Ok(Request {
                operation: Operation::Silent,
                ..
            }) => self.slots.put_back(slot),
            Ok(request) => {
                let reads = match request.operation {
                    Operation::Read { size, .. } => size as usize,
                    _ => 0,
                };
                self.slots.begin(&slot, len + reads);
                self.accepted();
                slot.assign(request);
                self.count_for_scale();
            }
            Err(Malformed::Body { unique }) => {
                tracing::warn!(export = %self.shared.options.id, len, "a truncated request; answered EINVAL");
                Pending::refuse(&self.device, unique, libc::EINVAL);
                self.slots.put_back(slot);
            }
            Err(Malformed::Length { read, said }) => {
                tracing::error!(
                    export = %self.shared.options.id, read, ?said,
                    "a request's length disagrees with what was read; halting the export"
                );
                self.slots.put_back(slot);
                self.shared.end(End::Halted);
            }
        }
        Fetched::Something
    }
}
