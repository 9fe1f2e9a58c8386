//! The tasks of one thread. A task is allocated once, when it is spawned, and never when it is polled. A task never
//! leaves its thread; only its wake-ups may come from elsewhere.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use crate::current;
use crate::mail::{Letter, Postbox};

/// What a waker knows of a task: where it lives, and whether it is queued already.
pub(crate) struct Header {
    pub(crate) id: u32,
    pub(crate) queued: AtomicBool,
    pub(crate) home: Arc<Postbox>,
}

impl Wake for Header {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        if !current::make_ready(&self.home, self.id) {
            // An ended ring has no tasks left to wake.
            let _ = self.home.send(Letter::Wake(self.id));
        }
    }
}

pub(crate) type LocalFuture = Pin<Box<dyn Future<Output = ()>>>;

pub(crate) struct Task {
    pub(crate) header: Arc<Header>,
    pub(crate) waker: Waker,
    /// Taken out while it is being polled.
    pub(crate) future: Option<LocalFuture>,
}

impl Task {
    pub(crate) fn new(id: u32, home: &Arc<Postbox>, future: Option<LocalFuture>) -> Self {
        let header = Arc::new(Header {
            id,
            queued: AtomicBool::new(true),
            home: Arc::clone(home),
        });
        Self {
            waker: Waker::from(Arc::clone(&header)),
            header,
            future,
        }
    }
}

/// The tasks of a ring by number; 0 is the future that the loop was started for.
#[derive(Default)]
pub(crate) struct Tasks {
    slots: Vec<Option<Task>>,
    free: Vec<u32>,
}

impl Tasks {
    pub(crate) fn insert(&mut self, home: &Arc<Postbox>, future: Option<LocalFuture>) -> u32 {
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        self.slots[id as usize] = Some(Task::new(id, home, future));
        id
    }

    pub(crate) fn get(&mut self, id: u32) -> Option<&mut Task> {
        self.slots.get_mut(id as usize)?.as_mut()
    }

    pub(crate) fn remove(&mut self, id: u32) -> Option<Task> {
        let task = self.slots.get_mut(id as usize)?.take();
        if task.is_some() {
            self.free.push(id);
        }
        task
    }

    pub(crate) fn ids(&self) -> Vec<u32> {
        (0u32..)
            .zip(&self.slots)
            .filter(|(_, s)| s.is_some())
            .map(|(id, _)| id)
            .collect()
    }
}

struct JoinState<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

/// Waits for a spawned task; dropping it lets the task run on.
pub struct JoinHandle<T>(Rc<RefCell<JoinState<T>>>);

impl<T> Future for JoinHandle<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let mut state = self.0.borrow_mut();
        let value = state.value.take();
        if value.is_none() {
            state.waker = Some(cx.waker().clone());
        }
        value.map_or(Poll::Pending, Poll::Ready)
    }
}

/// Wraps a future so that its result reaches a [`JoinHandle`].
pub(crate) fn joinable<T: 'static>(
    future: impl Future<Output = T> + 'static,
) -> (LocalFuture, JoinHandle<T>) {
    let state = Rc::new(RefCell::new(JoinState {
        value: None,
        waker: None,
    }));
    let theirs = Rc::clone(&state);
    let wrapped = Box::pin(async move {
        let value = future.await;
        let waker = {
            let mut state = theirs.borrow_mut();
            state.value = Some(value);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    });
    (wrapped, JoinHandle(state))
}
