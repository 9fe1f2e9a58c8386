//! The slots of one queue: each is a task that serves one request at a time with its own memory. They are made when
//! the load wants them, used last-in first-out so that few stay hot, and their memory is bounded.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use crate::queue::Queue;
use crate::request::Request;
use crate::slot::SlotBuf;

/// The most requests that one queue has in flight; the rest waits in the kernel.
const SLOTS: usize = 256;
/// Bytes that requests in flight may hold before the queue stops fetching. A WRITE of the largest size cannot be
/// refused once it is fetched, so one more may come.
const IN_FLIGHT_BYTES: usize = 16 << 20;
/// Bytes that idle slots may keep resident while requests come: as many as can be in flight, so that a stream of large
/// requests does not fault its memory in again and again.
const IDLE_BYTES: usize = 16 << 20;
/// Bytes that idle slots may keep resident when no request has come for [`TRIM_AFTER`].
const TRIMMED_BYTES: usize = 1 << 20;
/// See [`TRIMMED_BYTES`].
const TRIM_AFTER: Duration = Duration::from_secs(1);
/// What a slot may keep in any case.
pub(super) const SMALL: usize = 64 << 10;

/// One slot: shared by the fetcher, which fills it, and its task, which serves it.
pub(super) struct Slot {
    /// With the fetcher while it fetches, with the task while it serves, else here.
    memory: Cell<Option<SlotBuf>>,
    request: Cell<Option<Request>>,
    waker: RefCell<Option<Waker>>,
    closed: Cell<bool>,
    /// The entry whose request is served, and whose memory is borrowed for that; else the slot's memory is its own.
    entry: Cell<Option<u32>>,
    /// When its request came.
    arrived: Cell<Instant>,
    /// Bytes that the request in it may touch.
    cost: Cell<usize>,
    /// Bytes that are resident while it is idle.
    touched: Cell<usize>,
}

impl Slot {
    /// The slot's memory. Whoever takes it puts it back before it hands the slot on.
    pub(super) fn take_memory(&self) -> SlotBuf {
        match self.memory.take() {
            Some(memory) => memory,
            // A slot is with the fetcher or with its task, and both keep to the rule above.
            None => unreachable!("a slot's memory is elsewhere"),
        }
    }

    pub(super) fn put_memory(&self, memory: SlotBuf) {
        self.memory.set(Some(memory));
    }

    /// When the request came that is served.
    pub(super) fn arrived(&self) -> Instant {
        self.arrived.get()
    }

    /// The entry that the slot's request came in, if it came in one.
    pub(super) fn entry(&self) -> Option<u32> {
        self.entry.get()
    }

    /// Hands a request that came in an entry to the slot's task, with the entry's memory.
    pub(super) fn lend(&self, entry: u32, memory: SlotBuf, request: Request) {
        self.entry.set(Some(entry));
        self.put_memory(memory);
        self.assign(request);
    }

    /// Hands a request to the slot's task.
    pub(super) fn assign(&self, request: Request) {
        self.arrived.set(diskfuse_ring::recent_time());
        self.request.set(Some(request));
        diskfuse_ring::urgently(|| self.wake());
    }

    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Resolves when there is a request, or to `None` when there will be none.
    pub(super) fn assigned(&self) -> impl Future<Output = Option<Request>> + '_ {
        std::future::poll_fn(move |cx| {
            if let Some(request) = self.request.take() {
                return Poll::Ready(Some(request));
            }
            if self.closed.get() {
                return Poll::Ready(None);
            }
            let mut waker = self.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
    }
}

impl Slot {
    /// Makes a slot and its task.
    fn start(queue: &Rc<Queue>, memory: Option<SlotBuf>) -> Rc<Self> {
        let slot = Rc::new(Self {
            memory: Cell::new(memory),
            request: Cell::new(None),
            waker: RefCell::new(None),
            closed: Cell::new(false),
            entry: Cell::new(None),
            arrived: Cell::new(diskfuse_ring::recent_time()),
            touched: Cell::new(0),
            cost: Cell::new(0),
        });
        let task = super::serve::run(Rc::clone(queue), Rc::clone(&slot));
        drop(diskfuse_ring::spawn(task));
        slot
    }
}

/// All slots of a queue.
#[derive(Default)]
pub(super) struct Slots {
    free: RefCell<Vec<Rc<Slot>>>,
    /// Those without memory of their own, for requests that come in entries.
    bare: RefCell<Vec<Rc<Slot>>>,
    made: Cell<usize>,
    busy: Cell<usize>,
    bytes: Cell<usize>,
    idle_bytes: Cell<usize>,
    /// Requests begun so far.
    begun: Cell<u64>,
    /// A task waits to give memory back.
    trimming: Cell<bool>,
}

impl Slots {
    /// Requests in flight.
    pub(super) fn busy(&self) -> usize {
        self.busy.get()
    }

    /// A slot to fetch into, if the limits allow one more request.
    pub(super) fn take(&self, queue: &Rc<Queue>) -> io::Result<Option<Rc<Slot>>> {
        if self.bytes.get() > IN_FLIGHT_BYTES {
            return Ok(None);
        }
        if let Some(slot) = self.free.borrow_mut().pop() {
            self.idle_bytes
                .set(self.idle_bytes.get() - slot.touched.get());
            return Ok(Some(slot));
        }
        if self.made.get() == SLOTS {
            return Ok(None);
        }
        let memory = SlotBuf::new(queue.shared.plan.memory())?;
        self.made.set(self.made.get() + 1);
        Ok(Some(Slot::start(queue, Some(memory))))
    }

    /// A slot without memory. There are never more of them than entries.
    pub(super) fn take_bare(&self, queue: &Rc<Queue>) -> Rc<Slot> {
        let free = self.bare.borrow_mut().pop();
        free.unwrap_or_else(|| Slot::start(queue, None))
    }

    /// Takes a slot back, idle.
    pub(super) fn put_back(&self, slot: Rc<Slot>) {
        let mut memory = slot.take_memory();
        if memory.touched() > SMALL && self.idle_bytes.get() + memory.touched() > IDLE_BYTES {
            memory.release();
        }
        slot.touched.set(memory.touched());
        self.idle_bytes
            .set(self.idle_bytes.get() + memory.touched());
        slot.put_memory(memory);
        self.free.borrow_mut().push(slot);
    }

    /// Notes that a request that may touch `cost` bytes is in flight in `slot`.
    pub(super) fn begin(&self, slot: &Slot, cost: usize) {
        slot.cost.set(cost);
        self.begun.set(self.begun.get() + 1);
        self.busy.set(self.busy.get() + 1);
        self.bytes.set(self.bytes.get() + cost);
    }

    /// Counts a request that was answered without a slot.
    pub(super) fn count_begun(&self) {
        self.begun.set(self.begun.get() + 1);
    }

    /// Notes that the request in `slot` was answered.
    pub(super) fn finish(&self, slot: &Rc<Slot>) {
        self.busy.set(self.busy.get() - 1);
        self.bytes.set(self.bytes.get() - slot.cost.get());
        match slot.entry() {
            None => self.put_back(Rc::clone(slot)),
            Some(_) => self.bare.borrow_mut().push(Rc::clone(slot)),
        }
    }

    /// Whether it is time to think of giving memory back, once: then [`trim`] is to be spawned.
    /// `entries` is what is resident in entries with the kernel, in bytes.
    pub(super) fn wants_trim(&self, entries: usize) -> bool {
        self.busy.get() == 0
            && self.idle_bytes.get() + entries > TRIMMED_BYTES
            && !self.trimming.replace(true)
    }

    fn release_idle(&self) {
        let mut left = 0;
        for slot in &*self.free.borrow() {
            let mut memory = slot.take_memory();
            memory.release();
            slot.touched.set(memory.touched());
            left += memory.touched();
            slot.put_memory(memory);
        }
        self.idle_bytes.set(left);
    }

    /// Ends the tasks of all slots. None is busy any more.
    pub(super) fn close(&self) {
        let bare = self.bare.take();
        for slot in self.free.borrow_mut().drain(..).chain(bare) {
            slot.closed.set(true);
            slot.wake();
        }
    }
}

/// Gives the memory of idle slots back once no request has come for a while. It does not keep the queue alive.
pub(super) async fn trim(queue: Weak<Queue>) {
    loop {
        let Some(before) = queue.upgrade().map(|q| q.slots.begun.get()) else {
            return;
        };
        diskfuse_ring::sleep(TRIM_AFTER).await;
        let Some(queue) = queue.upgrade() else { return };
        let slots = &queue.slots;
        if slots.begun.get() == before && slots.busy.get() == 0 {
            slots.release_idle();
            queue.release_entries();
            if queue.resident_entries() > TRIMMED_BYTES {
                continue;
            }
            slots.trimming.set(false);
            return;
        }
    }
}
