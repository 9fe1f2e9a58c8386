//! Timers of one ring: a heap, looked at once a turn. They never fire early.

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use crate::current;

struct Alarm {
    at: Instant,
    sequence: u64,
    waker: Waker,
}

impl PartialEq for Alarm {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Alarm {}
impl PartialOrd for Alarm {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Alarm {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

#[derive(Default)]
pub(crate) struct Timers {
    heap: BinaryHeap<Reverse<Alarm>>,
    sequence: u64,
}

impl Timers {
    fn add(&mut self, at: Instant, waker: Waker) {
        self.sequence += 1;
        self.heap.push(Reverse(Alarm {
            at,
            sequence: self.sequence,
            waker,
        }));
    }

    /// When the loop must be awake next.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse(alarm)| alarm.at)
    }

    /// Takes one alarm that is due.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Waker> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse(alarm)| alarm.waker)
    }
}

/// See [`sleep`].
#[must_use = "a sleep that nobody waits for does nothing"]
pub struct Sleep {
    at: Instant,
    armed: Cell<bool>,
}

/// Resolves when `time` has passed, counted from this call.
pub fn sleep(time: Duration) -> Sleep {
    Sleep {
        at: Instant::now() + time,
        armed: Cell::new(false),
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        // A future that is polled again before its time keeps its first alarm: tasks do not change wakers here.
        if !self.armed.replace(true) {
            current::with(|r| r.timers.borrow_mut().add(self.at, cx.waker().clone()));
        }
        Poll::Pending
    }
}
