//! A queue's requests that come in entries of FUSE over io_uring. They come by themselves: while the export is drained they are
//! held, and served when it goes on. Those that are held at the end go unanswered, and fail when the connection does.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::task::Poll;

use diskfuse_ring::yield_now;

use super::Queue;
use super::pending::Pending;
use super::slots::SMALL;
use crate::abi::OutHeader;
use crate::latency::RequestKind;
use crate::ops;
use crate::request::{Malformed, Operation, Request};
use crate::shared::End;
use crate::slot::SlotBuf;
use crate::transport::RingPlan;
use crate::transport::uring::Entries;

/// A request in its entry.
struct Held {
    entry: u32,
    memory: SlotBuf,
    request: Result<Request, Malformed>,
}

/// What a queue has of FUSE over io_uring.
#[derive(Default)]
pub(super) struct RingSide {
    entries: OnceCell<Rc<Entries>>,
    held: RefCell<Vec<Held>>,
    /// The kernel's word on the entries is awaited.
    registering: Cell<bool>,
}

impl Queue {
    /// Whether this queue has yet to offer its entries.
    pub(super) fn must_register(&self) -> bool {
        self.shared.registering() && self.ring.entries.get().is_none()
    }

    /// Whether the kernel's word on this queue's entries is awaited.
    pub(crate) fn registering(&self) -> bool {
        self.ring.registering.get()
    }

    /// Offers this queue's entries to the kernel, and tells the export what it said.
    pub(super) async fn register(self: &Rc<Self>) {
        let outcome = match &self.shared.plan.ring {
            Some(plan) => self.offer(plan).await,
            None => Ok(()),
        };
        self.shared.registered(outcome);
    }

    async fn offer(self: &Rc<Self>, plan: &RingPlan) -> Result<(), String> {
        let memory = self.shared.plan.memory();
        let threads = self.shared.lanes.len();
        let make =
            |plan: &RingPlan, memory| Entries::new(&self.device, plan, self.index, threads, memory);
        let (entries, lacking) = match make(plan, memory) {
            Ok(entries) => (entries, None),
            Err(error) => {
                // The kernel would wait for entries for ever: it gets one that it must refuse, as it is too small.
                let few = RingPlan { depth: 1, ..*plan };
                let entries = make(&few, 0).map_err(|error| {
                    self.shared.end(End::Halted);
                    error.to_string()
                })?;
                (entries, Some(error))
            }
        };
        self.take_place();
        self.ring.registering.set(true);
        // Set once: `must_register` looks.
        let _ = self.ring.entries.set(Rc::clone(&entries));
        entries.register(self);
        // The kernel refuses at once, when it gets them.
        yield_now().await;
        self.ring.registering.set(false);
        match (lacking, entries.refused()) {
            (Some(error), _) => Err(format!("no memory for FUSE over io_uring ({error})")),
            (None, Some(error)) => Err(format!(
                "the kernel refuses entries of FUSE over io_uring ({error})"
            )),
            (None, None) => Ok(()),
        }
    }

    /// Whether this queue has entries.
    pub(super) fn has_entries(&self) -> bool {
        self.ring.entries.get().is_some()
    }

    /// Whether requests, or some of them, come to this queue through `/dev/fuse`.
    pub(super) fn reads_device(&self) -> bool {
        self.index == 0 || !self.shared.by_ring()
    }

    /// Whether there is something else to do than to fetch. If not, what was held is served.
    pub(super) fn is_distracted(self: &Rc<Self>) -> bool {
        if self.must_rest() || self.must_register() {
            return true;
        }
        self.serve_held();
        false
    }

    /// Waits until there is something else to do.
    pub(super) async fn until_distracted(self: &Rc<Self>) {
        // The task's waker is in the lane; whoever changes a flag wakes it.
        std::future::poll_fn(|_| match self.is_distracted() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// A request has come in entry `entry`, whose memory this is.
    pub(crate) fn requested(
        self: &Rc<Self>,
        entry: u32,
        memory: SlotBuf,
        request: Result<Request, Malformed>,
    ) {
        let held = Held {
            entry,
            memory,
            request,
        };
        // Whoever drains believes a lane that calls itself quiet: it serves again when it has taken that back.
        let quiet = self.lane().quiet.load(Ordering::SeqCst);
        if quiet || self.shared.paused() || self.shared.ending() {
            self.ring.held.borrow_mut().push(held);
        } else {
            self.serve_entry(held);
        }
    }

    fn serve_held(self: &Rc<Self>) {
        if self.ring.held.borrow().is_empty() {
            return;
        }
        for held in self.ring.held.take() {
            self.serve_entry(held);
        }
    }

    fn serve_entry(self: &Rc<Self>, held: Held) {
        let Held {
            entry,
            mut memory,
            request,
        } = held;
        match request {
            Ok(request) => {
                self.count_for_placement();
                let arrived = diskfuse_ring::recent_time();
                if self.void.get()
                    && let Some(answer) = ops::at_once(self, &mut memory, &request)
                {
                    let (header, len) = Pending::new(None, request.unique).header(answer);
                    self.commit(entry, memory, &header, len);
                    self.note_time(RequestKind::of(&request.operation), arrived);
                    self.slots.count_begun();
                    if len > SMALL {
                        self.trim_later();
                    }
                    return;
                }
                let slot = self.slots.take_bare(self);
                let cost = match request.operation {
                    Operation::Read { size, .. } | Operation::Write { size, .. } => size as usize,
                    _ => 0,
                };
                self.slots.begin(&slot, cost);
                self.accepted();
                slot.lend(entry, memory, request);
            }
            Err(malformed) => {
                tracing::warn!(export = %self.shared.options.id, ?malformed, "a truncated request; answered EINVAL");
                let unique = match malformed {
                    Malformed::Body { unique } => unique,
                    Malformed::Length { .. } => 0,
                };
                let (header, len) = Pending::new(None, unique).header(Err(libc::EINVAL));
                self.commit(entry, memory, &header, len);
            }
        }
    }

    /// Answers the request in an entry.
    pub(super) fn commit(&self, entry: u32, memory: SlotBuf, header: &OutHeader, len: usize) {
        if let Some(entries) = self.ring.entries.get() {
            entries.commit(entry, memory, header, len);
        }
    }

    /// Bytes of data that may be resident in this queue's entries.
    pub(super) fn resident_entries(&self) -> usize {
        self.ring.entries.get().map_or(0, |e| e.resident())
    }

    /// Gives the memory of idle entries back.
    pub(super) fn release_entries(&self) {
        if let Some(entries) = self.ring.entries.get() {
            entries.release_idle();
        }
    }

    /// The connection is gone, say the entries.
    pub(crate) fn ring_gone(&self) {
        self.disconnected();
    }

    /// The kernel gave an entry back for a reason that nobody expects, a positive errno; `left` entries are left.
    pub(crate) fn ring_failed(&self, errno: i32, left: usize) {
        let error = std::io::Error::from_raw_os_error(errno);
        tracing::error!(export = %self.shared.options.id, %error, left, "the kernel refused an answer; halting the export");
        // Whoever waits for it would wait for ever: the end fails them.
        self.shared.end(End::Halted);
    }
}
