//! How other threads reach a ring: closures that run on its thread, wake-ups of its tasks, results of worker threads.
//! Sending never blocks and never fails silently: to an ended ring it is an error.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use crossbeam_queue::SegQueue;

use crate::error::Error;
use crate::op::CancelKey;
use crate::polling::Polling;
use crate::waits::{WaitCounters, Waits};

/// One message to a ring.
pub(crate) enum Letter {
    /// Run this on the ring's thread.
    Run(Box<dyn FnOnce() + Send>),
    /// Poll this task.
    Wake(u32),
    /// A worker thread has done this operation.
    Done(CancelKey, i32),
}

/// The part of a ring that other threads may touch.
pub(crate) struct Postbox {
    letters: SegQueue<Letter>,
    /// The ring sleeps, or is about to: a letter must be followed by a ring of the bell.
    asleep: AtomicBool,
    ended: AtomicBool,
    bell: OwnedFd,
    /// How the ring has waited.
    pub(crate) waits: WaitCounters,
}

impl Postbox {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
        Ok(Arc::new(Self {
            letters: SegQueue::new(),
            asleep: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            bell: rustix::event::eventfd(0, flags)?,
            waits: WaitCounters::default(),
        }))
    }

    /// The eventfd that becomes readable when a sleeping ring has mail.
    pub(crate) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    pub(crate) fn send(&self, letter: Letter) -> Result<(), Error> {
        if self.ended.load(Ordering::SeqCst) {
            return Err(Error::Ended);
        }
        self.letters.push(letter);
        if self.ended.load(Ordering::SeqCst) {
            // The ring may have emptied its box just before: nobody would ever read this.
            self.close();
            return Err(Error::Ended);
        }
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It can only fail when the counter is full, and then the bell rings already.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
        Ok(())
    }

    pub(crate) fn receive(&self) -> Option<Letter> {
        self.letters.pop()
    }

    pub(crate) fn has_mail(&self) -> bool {
        !self.letters.is_empty()
    }

    /// Called before sleeping. True if the ring may sleep; false if a letter came meanwhile.
    pub(crate) fn lie_down(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.has_mail() {
            self.asleep.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// Called after sleeping.
    pub(crate) fn get_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// Called by the ring when it is dropped: later letters are refused, earlier ones are thrown away, which
    /// tells everyone who waits for a reply.
    pub(crate) fn close(&self) {
        self.ended.store(true, Ordering::SeqCst);
        while self.letters.pop().is_some() {}
    }
}

/// Sends work to a ring from any thread.
#[derive(Clone)]
pub struct Mailbox(pub(crate) Arc<Postbox>);

impl Mailbox {
    /// Runs `work` on the ring's thread, inside its loop, some time soon. It must not block. [`Error::Ended`] if the
    /// ring is gone.
    pub fn post(&self, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        self.0.send(Letter::Run(Box::new(work)))
    }

    /// Changes how the ring polls before it sleeps. It holds from the ring's next turn on: the ring forgets what it has
    /// learnt and begins as if it had been made so. [`Error::Ended`] if the ring is gone.
    pub fn set_polling(&self, polling: Polling) -> Result<(), Error> {
        self.post(move || crate::current::with(|inner| inner.set_polling(polling)))
    }

    /// How the ring has waited so far; asks nobody, so it can be called at any time.
    pub fn waits(&self) -> Waits {
        self.0.waits.read()
    }

    /// Runs the future that `make` returns as a task of the ring's thread; the reply resolves to its result, or to
    /// [`Error::Ended`] if the ring ends first.
    pub fn call<T, M, F>(&self, make: M) -> Reply<T>
    where
        T: Send + 'static,
        M: FnOnce() -> F + Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (sender, reply) = reply();
        // If the ring has ended, the closure is dropped with the sender in it, and the reply says so.
        let _ = self.post(move || {
            let future = make();
            drop(crate::spawn(async move { sender.send(future.await) }));
        });
        reply
    }
}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mailbox")
    }
}

enum Slot<T> {
    Waiting(Option<Waker>),
    Full(T),
    Gone,
}

struct Shared<T> {
    slot: Mutex<Slot<T>>,
    arrived: Condvar,
}

impl<T> Shared<T> {
    // The lock is held for a few instructions that cannot panic, so a poisoned lock is as good as a sound one.
    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, with: Slot<T>) {
        let before = std::mem::replace(&mut *self.lock(), with);
        self.arrived.notify_all();
        if let Slot::Waiting(Some(waker)) = before {
            waker.wake();
        }
    }
}

/// The sending half of a [`Reply`]; dropping it unsent tells the other half that nothing will come.
pub(crate) struct ReplySender<T>(Option<Arc<Shared<T>>>);

impl<T> ReplySender<T> {
    pub(crate) fn send(mut self, value: T) {
        if let Some(shared) = self.0.take() {
            shared.settle(Slot::Full(value));
        }
    }
}

impl<T> Drop for ReplySender<T> {
    fn drop(&mut self) {
        if let Some(shared) = self.0.take() {
            shared.settle(Slot::Gone);
        }
    }
}

/// A value that another thread will send. A future for tasks; [`Reply::wait`] for threads without a ring.
#[must_use = "a reply that nobody waits for is lost"]
pub struct Reply<T>(Arc<Shared<T>>);

pub(crate) fn reply<T>() -> (ReplySender<T>, Reply<T>) {
    let shared = Arc::new(Shared {
        slot: Mutex::new(Slot::Waiting(None)),
        arrived: Condvar::new(),
    });
    (ReplySender(Some(Arc::clone(&shared))), Reply(shared))
}

impl<T> Reply<T> {
    /// Blocks the calling thread until the value is there. Never call it on a ring's thread.
    pub fn wait(self) -> Result<T, Error> {
        let mut slot = self.0.lock();
        loop {
            match std::mem::replace(&mut *slot, Slot::Gone) {
                Slot::Full(value) => return Ok(value),
                Slot::Gone => return Err(Error::Ended),
                waiting @ Slot::Waiting(_) => *slot = waiting,
            }
            slot = self
                .0
                .arrived
                .wait(slot)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// [`Reply::wait`] for `limit` at most; the reply comes back if nothing was sent by then.
    pub fn wait_for(self, limit: std::time::Duration) -> Result<Result<T, Error>, Self> {
        let pending = |slot: &mut Slot<T>| matches!(slot, Slot::Waiting(_));
        let guard = self.0.lock();
        let (guard, _) = self
            .0
            .arrived
            .wait_timeout_while(guard, limit, pending)
            .unwrap_or_else(PoisonError::into_inner);
        let settled = !matches!(*guard, Slot::Waiting(_));
        drop(guard);
        if settled { Ok(self.wait()) } else { Err(self) }
    }
}

impl<T> Future for Reply<T> {
    type Output = Result<T, Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slot = self.0.lock();
        match std::mem::replace(&mut *slot, Slot::Gone) {
            Slot::Full(value) => Poll::Ready(Ok(value)),
            Slot::Gone => Poll::Ready(Err(Error::Ended)),
            Slot::Waiting(_) => {
                *slot = Slot::Waiting(Some(cx.waker().clone()));
                Poll::Pending
            }
        }
    }
}
