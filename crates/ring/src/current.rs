//! The ring that runs on the calling thread, and what tasks ask of it. Nothing here is reached from another thread.

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use crate::config::{Backend, Counters};
use crate::inner::Inner;
use crate::mail::{Mailbox, Postbox};
use crate::task::{JoinHandle, joinable};

thread_local! {
    static CURRENT: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
}

/// Acts on the ring that runs on this thread; `None` when there is none.
pub(crate) fn try_with<R>(act: impl FnOnce(&Inner) -> R) -> Option<R> {
    CURRENT
        .try_with(|c| c.borrow().as_deref().map(act))
        .ok()
        .flatten()
}

/// [`try_with`] for callers that must run on a ring's thread.
pub(crate) fn with<R>(act: impl FnOnce(&Inner) -> R) -> R {
    match try_with(act) {
        Some(result) => result,
        None => panic!("no diskfuse-ring runs on this thread"),
    }
}

/// Queues a task of the ring that runs on this thread. False if `home` is another ring's, or none runs.
pub(crate) fn make_ready(home: &Arc<Postbox>, id: u32) -> bool {
    try_with(|inner| {
        let mine = Arc::ptr_eq(home, &inner.post);
        if mine {
            let mut ready = inner.ready.borrow_mut();
            if inner.urgent.get() {
                ready.push_front(id);
            } else {
                ready.push_back(id);
            }
        }
        mine
    })
    .unwrap_or(false)
}

/// Starts a task on this thread's ring. It runs until it is done, whether or not somebody waits for it.
pub fn spawn<T: 'static>(future: impl Future<Output = T> + 'static) -> JoinHandle<T> {
    let (future, handle) = joinable(future);
    with(|inner| {
        let id = inner.tasks.borrow_mut().insert(&inner.post, Some(future));
        inner.ready.borrow_mut().push_back(id);
    });
    handle
}

/// Lets the tasks that `wake` wakes run before those that are ready already: for work that keeps a device busy, ahead
/// of work that only tells somebody of it.
pub fn urgently(wake: impl FnOnce()) {
    with(|inner| inner.urgently(wake));
}

/// Whether this thread's ring has lately started reads or writes of files: then it is a disk that is to be kept busy.
pub fn is_moving() -> bool {
    with(|inner| inner.moving.get() > 0)
}

/// The mailbox of this thread's ring.
pub fn mailbox() -> Mailbox {
    with(|inner| Mailbox(Arc::clone(&inner.post)))
}

/// The way to the kernel of this thread's ring.
pub fn backend() -> Backend {
    with(Inner::backend)
}

/// What this thread's ring has done.
pub fn counters() -> Counters {
    with(|inner| Counters {
        turns: inner.turns.get(),
        enters: inner.driver.borrow().enters(),
        operations: inner.operations.get(),
        idle: inner.idle.get(),
    })
}

/// The time, as it was when it was last looked at in this turn of the loop: costs a look at the clock once a turn at most.
pub fn recent_time() -> Instant {
    with(|inner| {
        let time = inner.time.get().unwrap_or_else(Instant::now);
        inner.time.set(Some(time));
        time
    })
}

/// The time, by a look at the clock, which [`recent_time`] then remembers.
pub fn time() -> Instant {
    let now = Instant::now();
    with(|inner| inner.time.set(Some(now)));
    now
}

/// Lets every other ready task, and then the kernel, have a turn.
pub fn yield_now() -> impl Future<Output = ()> {
    let mut yielded = false;
    std::future::poll_fn(move |cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        with(|inner| inner.yielded.borrow_mut().push(cx.waker().clone()));
        Poll::Pending
    })
}

/// Makes a ring the current one of its thread for as long as it lives.
pub(crate) struct Running;

impl Running {
    pub(crate) fn enter(inner: &Rc<Inner>) -> Self {
        CURRENT.with(|c| {
            let before = c.borrow_mut().replace(Rc::clone(inner));
            assert!(
                before.is_none(),
                "a diskfuse-ring runs on this thread already"
            );
        });
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        CURRENT.with(|c| c.borrow_mut().take());
    }
}
