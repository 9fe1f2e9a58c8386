//! A queue: one `/dev/fuse` descriptor on one thread's ring, and the entries that the thread has in the kernel's queues of FUSE
//! over io_uring. It fetches requests, hands each to a slot, and pauses, parks or ends when the export says so. It never serves a request itself and never waits while it could fetch.

mod fetch;
mod pending;
mod placement;
mod ring;
mod scale;
mod serve;
mod slots;

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::Instant;

use diskfuse_ring::SharedFd;

use crate::abi::ROOT;
use crate::file::Local;
use crate::latency::RequestKind;
use crate::shared::{Lane, Shared};
use placement::Whereabouts;
use ring::RingSide;
use scale::Scale;
use slots::{Slot, Slots};

/// See the module. It lives and dies on its thread.
pub(crate) struct Queue {
    pub(crate) shared: Arc<Shared>,
    pub(crate) device: SharedFd,
    index: usize,
    slots: Slots,
    /// The fetcher waits for a slot, or for the last request to be answered.
    starved: RefCell<Option<Waker>>,
    /// Wakes in a row that brought a single request.
    lonely_wakes: Cell<u32>,
    scale: Scale,
    /// What this thread has in the kernel's queues of FUSE over io_uring.
    ring: RingSide,
    whereabouts: Whereabouts,
    /// The mount's root, if it is a file: what this thread knows it by.
    root: Option<Rc<Local>>,
    /// The files of a tree that this thread has met, by their inode numbers.
    met: RefCell<Vec<Option<Rc<Local>>>>,
    /// See [`Queue::found_void`].
    void: Cell<bool>,
}

/// Sees to it that the export learns of the queue's end, however it comes.
pub(crate) struct Membership {
    shared: Arc<Shared>,
    index: usize,
    /// It has been handed to its thread.
    begun: bool,
    served: bool,
}

impl Membership {
    /// Its thread is about to get it.
    pub(crate) fn begins(&mut self) {
        self.begun = true;
    }

    pub(crate) fn new(shared: &Arc<Shared>, index: usize) -> Self {
        Self {
            shared: Arc::clone(shared),
            index,
            begun: false,
            served: false,
        }
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.shared
            .queue_ended(self.index, self.served || !self.begun);
    }
}

/// Serves a queue of an export until the export ends. Runs on the ring's thread that it is to stay on.
pub(crate) async fn run(mut membership: Membership, device: SharedFd) {
    let index = membership.index;
    let shared = Arc::clone(&membership.shared);
    let root = shared.content.root_file().map(Arc::clone);
    let queue = Rc::new(Queue {
        shared,
        root: root.map(|file| Rc::new(Local::new(file))),
        met: RefCell::default(),
        device,
        index,
        slots: Slots::default(),
        starved: RefCell::new(None),
        lonely_wakes: Cell::new(0),
        scale: Scale::new(index),
        ring: RingSide::default(),
        whereabouts: Whereabouts::default(),
        void: Cell::new(false),
    });
    let mine = std::future::poll_fn(|cx| Poll::Ready(cx.waker().clone())).await;
    // Set once: this function runs once for each lane.
    let _ = queue.lane().fetcher.set(mine);
    queue.fetch().await;
    queue.settled().await;
    if queue.has_entries() {
        // The last answers wait to be handed to the kernel; the end may come from another thread.
        diskfuse_ring::yield_now().await;
    }
    queue.leave_place();
    queue.slots.close();
    let last = queue.shared.done_serving();
    if last && queue.shared.options.writable {
        for node in queue.shared.content.written() {
            if let Err(error) = node.flush().await {
                queue.shared.last_flush_failed(error);
            }
        }
    }
    drop(queue);
    membership.served = true;
    drop(membership);
}

impl Queue {
    /// This queue's flags and counters.
    pub(crate) fn lane(&self) -> &Lane {
        &self.shared.lanes[self.index]
    }

    /// The file of an inode number; `None` if that is something else, or nothing.
    pub(crate) fn local(&self, ino: u64) -> Option<Rc<Local>> {
        if ino == ROOT {
            return self.root.clone();
        }
        let index = usize::try_from(ino).ok()?;
        if let Some(Some(local)) = self.met.borrow().get(index) {
            return Some(Rc::clone(local));
        }
        self.meet(ino, index)
    }

    /// Lets go of all nodes until there is a request.
    fn let_go_of_nodes(&self) {
        self.root.iter().for_each(|local| local.let_go_of_node());
        let met = self.met.borrow();
        met.iter()
            .flatten()
            .for_each(|local| local.let_go_of_node());
    }

    /// The first request of this thread for a file of a tree.
    #[cold]
    fn meet(&self, ino: u64, index: usize) -> Option<Rc<Local>> {
        // There are [`MOST_FILES`](crate::tree::MOST_FILES) of them at most.
        let file = self.shared.content.tree()?.file(ino)?;
        let local = Rc::new(Local::new(file));
        let mut met = self.met.borrow_mut();
        if met.len() <= index {
            met.resize(index + 1, None);
        }
        *met.get_mut(index)? = Some(Rc::clone(&local));
        Some(local)
    }

    /// A read or a write found nothing where it went, or something: the next one is likely to find the same.
    pub(crate) fn found_void(&self, void: bool) {
        self.void.set(void);
    }

    /// A request that was fetched at `arrived` is answered, but for the handing over of the answer.
    fn note_time(&self, kind: RequestKind, arrived: Instant) {
        let time = diskfuse_ring::time().saturating_duration_since(arrived);
        self.lane().latencies.note(kind, time);
    }

    /// A request came in.
    fn accepted(&self) {
        self.count_in_flight(1);
    }

    /// A reply is about to be written. True if somebody waits for its slot.
    fn replying(&self) -> bool {
        self.count_in_flight(-1);
        self.starved.borrow().is_some()
    }

    fn count_in_flight(&self, by: i32) {
        let in_flight = &self.lane().in_flight;
        let now = in_flight.load(Ordering::Relaxed).saturating_add_signed(by);
        in_flight.store(now, Ordering::Relaxed);
    }

    /// A reply went out (or could not): its slot is free again.
    fn answered(self: &Rc<Self>, slot: &Rc<Slot>, sent: &io::Result<usize>) {
        match sent.as_ref().err().map(io::Error::raw_os_error) {
            // ENOENT: the request was given up by its caller meanwhile.
            None | Some(Some(libc::ENOENT)) => {}
            Some(Some(libc::ENODEV | libc::ECONNABORTED | libc::EPERM)) => self.disconnected(),
            Some(_) => {
                tracing::error!(export = %self.shared.options.id, ?sent, "the kernel refused a reply");
            }
        }
        self.freed(slot);
    }

    /// A slot's request is answered.
    fn freed(self: &Rc<Self>, slot: &Rc<Slot>) {
        self.slots.finish(slot);
        self.trim_later();
        if let Some(waker) = self.starved.take() {
            waker.wake();
        }
    }

    /// Sees to it that memory is given back once no request has come for a while.
    fn trim_later(self: &Rc<Self>) {
        if self.slots.wants_trim(self.resident_entries()) {
            drop(diskfuse_ring::spawn(slots::trim(Rc::downgrade(self))));
        }
    }

    /// The connection is gone.
    fn disconnected(&self) {
        if self.shared.disconnected() {
            tracing::warn!(
                export = %self.shared.options.id,
                mountpoint = %self.shared.options.mountpoint.display(),
                "unmounted from outside; finishing what is in flight and flushing"
            );
        }
    }

    /// Resolves when some slot has been freed.
    async fn slot_freed(&self) {
        let mut asked = false;
        std::future::poll_fn(|cx| {
            if std::mem::replace(&mut asked, true) && self.starved.borrow().is_none() {
                return Poll::Ready(());
            }
            *self.starved.borrow_mut() = Some(cx.waker().clone());
            diskfuse_ring::hurry();
            Poll::Pending
        })
        .await;
    }

    /// Resolves when nothing is in flight.
    async fn settled(&self) {
        while self.slots.busy() > 0 {
            self.slot_freed().await;
        }
    }
}
