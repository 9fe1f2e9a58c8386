//! A throttle group: limits, and the requests that wait for them, member by member. Whoever waits does so as a task of
//! its own ring; the first one of each direction keeps the time for all. No lock is held while anybody waits, and no
//! waker is called under it.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use diskfuse_ring::{Sleep, sleep};
use parking_lot::Mutex;

use super::bucket::{Buckets, ThrottleLimits};
use crate::node::Access;

/// Limits that several nodes share. May be used from any thread; nothing here blocks.
///
/// Members take turns: of those that have requests waiting each gets one through, in order, however many it has. So do
/// reads and writes where they share a limit.
#[derive(Default)]
pub struct ThrottleGroup {
    /// A bit for each kind of access that is limited.
    limited: AtomicU8,
    state: Mutex<State>,
}

impl ThrottleGroup {
    /// A group without members.
    pub fn new(limits: ThrottleLimits) -> Arc<Self> {
        let group = Arc::new(Self::default());
        group.set_limits(limits);
        group
    }

    /// The limits that hold now.
    pub fn limits(&self) -> ThrottleLimits {
        self.state.lock().buckets.limits()
    }

    /// Other limits from now on, for requests that wait already as well. What was done before does not count against them.
    pub fn set_limits(&self, limits: ThrottleLimits) {
        let bits = [Access::Read, Access::Write]
            .into_iter()
            .filter(|access| limits.limits(*access))
            .fold(0, |bits, access| bits | bit(access));
        let woken = {
            let mut state = self.state.lock();
            self.limited.store(bits, Ordering::Release);
            state.buckets = Buckets::new(limits);
            state.alarms = [None; 2];
            state.pump(Instant::now())
        };
        wake(woken);
    }

    /// Whether such requests are limited: if not they need not ask.
    pub(super) fn is_limited(&self, access: Access) -> bool {
        self.limited.load(Ordering::Acquire) & bit(access) != 0
    }
}

impl std::fmt::Debug for ThrottleGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("ThrottleGroup")
            .field(&self.limits())
            .finish()
    }
}

/// A node's place in a group; it leaves when the last handle is dropped.
pub(super) struct Member {
    group: Arc<ThrottleGroup>,
    id: u64,
}

impl Member {
    pub(super) fn join(group: &Arc<ThrottleGroup>) -> Arc<Self> {
        let id = group.state.lock().join();
        Arc::new(Self {
            group: Arc::clone(group),
            id,
        })
    }

    pub(super) fn group(&self) -> &ThrottleGroup {
        &self.group
    }

    /// Resolves when a request of so many bytes may go on; it has been counted then.
    pub(super) async fn turn(&self, access: Access, bytes: u64) {
        if !self.group.is_limited(access) {
            return;
        }
        let admitted = {
            let mut state = self.group.state.lock();
            state.admit(self.id, access, bytes, Instant::now())
        };
        if let Some(number) = admitted {
            let waiting = Waiting {
                member: self,
                access,
                number,
                sleep: None,
            };
            waiting.await;
        }
    }

    /// Lets everything pass until what it returns is dropped.
    pub(super) fn release(self: &Arc<Self>) -> Released {
        self.change_released(1);
        Released(Arc::clone(self))
    }

    fn change_released(&self, change: isize) {
        let woken = {
            let mut state = self.group.state.lock();
            if let Some(queue) = state.members.get_mut(&self.id) {
                queue.released = queue.released.saturating_add_signed(change);
            }
            state.pump(Instant::now())
        };
        wake(woken);
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Whoever waits borrows the member, so nobody does.
        self.group.state.lock().members.remove(&self.id);
    }
}

/// See [`Member::release`].
pub(super) struct Released(Arc<Member>);

impl Drop for Released {
    fn drop(&mut self) {
        self.0.change_released(-1);
    }
}

/// A request that waits. Dropping it gives its place up.
struct Waiting<'m> {
    member: &'m Member,
    access: Access,
    number: u64,
    /// Until when it keeps the time, if it does.
    sleep: Option<(Instant, Sleep)>,
}

impl Future for Waiting<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let (woken, place) = {
                let mut state = self.member.group.state.lock();
                let woken = state.pump(Instant::now());
                let place = state.look(self.member.id, self.access, self.number, cx.waker());
                (woken, place)
            };
            wake(woken);
            let due = match place {
                Place::Passed => return Poll::Ready(()),
                Place::Behind => return Poll::Pending,
                Place::First(due) => due,
            };
            let this = &mut *self;
            if this.sleep.as_ref().is_none_or(|(at, _)| *at != due) {
                let time = due.saturating_duration_since(Instant::now());
                this.sleep = Some((due, sleep(time)));
            }
            if let Some((_, sleep)) = &mut this.sleep
                && Pin::new(sleep).poll(cx).is_pending()
            {
                return Poll::Pending;
            }
            // The time has come, or what is due has moved: look again.
            this.sleep = None;
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let woken = {
            let mut state = self.member.group.state.lock();
            if !state.forget(self.member.id, self.access, self.number) {
                return;
            }
            state.pump(Instant::now())
        };
        wake(woken);
    }
}

fn bit(access: Access) -> u8 {
    1 << index(access)
}

fn index(access: Access) -> usize {
    match access {
        Access::Read => 0,
        Access::Write => 1,
    }
}

fn wake(woken: Vec<Waker>) {
    woken.into_iter().for_each(Waker::wake);
}

/// Where a request stands.
enum Place {
    /// It may go on.
    Passed,
    /// Others come first.
    Behind,
    /// It is the next one, not before this.
    First(Instant),
}

struct Request {
    number: u64,
    bytes: u64,
    /// None until it has been polled: then it will look by itself.
    waker: Option<Waker>,
}

#[derive(Default)]
struct Queue {
    /// Requests that wait, by direction, the oldest first: their numbers ascend.
    waiting: [VecDeque<Request>; 2],
    /// How many want it to pass everything.
    released: usize,
}

/// Who keeps the time for its direction.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Alarm {
    number: u64,
    due: Instant,
}

/// What is under the lock. Time comes from outside.
#[derive(Default)]
struct State {
    buckets: Buckets,
    /// When the buckets were drained last.
    drained: Option<Instant>,
    members: BTreeMap<u64, Queue>,
    next_member: u64,
    next_number: u64,
    /// Requests that wait, by direction.
    count: [usize; 2],
    /// Who passed last, by direction.
    turn: [u64; 2],
    /// The direction that passed last: the other one is asked first.
    last: usize,
    alarms: [Option<Alarm>; 2],
}

const DIRECTIONS: [Access; 2] = [Access::Read, Access::Write];

impl State {
    fn join(&mut self) -> u64 {
        self.next_member += 1;
        self.members.insert(self.next_member, Queue::default());
        self.next_member
    }

    fn drain(&mut self, now: Instant) {
        let since = self
            .drained
            .map_or(Duration::ZERO, |then| now.saturating_duration_since(then));
        self.buckets.drain(since);
        // Threads may come with times in another order than they read them.
        self.drained = self.drained.max(Some(now));
    }

    /// Lets a request pass, or gives it a number to wait with.
    fn admit(&mut self, member: u64, access: Access, bytes: u64, now: Instant) -> Option<u64> {
        self.drain(now);
        let at = index(access);
        let queue = self.members.get_mut(&member)?;
        let free = self.count[at] == 0 && self.buckets.wait(access).is_zero();
        if free || queue.released > 0 {
            self.buckets.pour(access, bytes);
            (self.turn[at], self.last) = (member, at);
            return None;
        }
        self.next_number += 1;
        queue.waiting[at].push_back(Request {
            number: self.next_number,
            bytes,
            waker: None,
        });
        self.count[at] += 1;
        Some(self.next_number)
    }

    /// Lets pass what may pass now, and names who keeps the time for the rest. Returns who has to be woken.
    fn pump(&mut self, now: Instant) -> Vec<Waker> {
        let mut woken = Vec::new();
        if self.count == [0, 0] {
            self.alarms = [None; 2];
            return woken;
        }
        self.drain(now);
        let released = self.members.iter().filter(|(_, queue)| queue.released > 0);
        for member in released.map(|(id, _)| *id).collect::<Vec<_>>() {
            for access in DIRECTIONS {
                while self.pass(member, access, &mut woken) {}
            }
        }
        while let Some((member, access)) = self.may_pass() {
            self.pass(member, access, &mut woken);
        }
        for access in DIRECTIONS {
            woken.extend(self.set_alarm(access, now));
        }
        woken
    }

    /// The next one that need not wait any longer.
    fn may_pass(&self) -> Option<(u64, Access)> {
        let order = if self.last == index(Access::Read) {
            [Access::Write, Access::Read]
        } else {
            DIRECTIONS
        };
        let mut free = order
            .into_iter()
            .filter(|access| self.buckets.wait(*access).is_zero());
        free.find_map(|access| Some((self.next(access)?, access)))
    }

    /// The member whose turn it is.
    fn next(&self, access: Access) -> Option<u64> {
        let at = index(access);
        if self.count[at] == 0 {
            return None;
        }
        let behind = self.members.range(self.turn[at] + 1..);
        let mut all = behind.chain(self.members.range(..=self.turn[at]));
        all.find(|(_, queue)| !queue.waiting[at].is_empty())
            .map(|(member, _)| *member)
    }

    /// The member's oldest request passes, if there is one.
    fn pass(&mut self, member: u64, access: Access, woken: &mut Vec<Waker>) -> bool {
        let at = index(access);
        let queue = self.members.get_mut(&member);
        let Some(request) = queue.and_then(|queue| queue.waiting[at].pop_front()) else {
            return false;
        };
        self.count[at] -= 1;
        self.buckets.pour(access, request.bytes);
        (self.turn[at], self.last) = (member, at);
        woken.extend(request.waker);
        true
    }

    /// Whoever is next keeps the time; it is woken if it does not know that yet. A time that has moved on is met when
    /// the old one is over.
    fn set_alarm(&mut self, access: Access, now: Instant) -> Option<Waker> {
        let at = index(access);
        let before = self.alarms[at];
        let wait = self.buckets.wait(access);
        let first = self.next(access).and_then(|member| {
            let queue = self.members.get(&member)?;
            queue.waiting[at].front()
        });
        let Some(first) = first else {
            self.alarms[at] = None;
            return None;
        };
        let known = before.is_some_and(|alarm| alarm.number == first.number);
        let waker = if known { None } else { first.waker.clone() };
        self.alarms[at] = Some(Alarm {
            number: first.number,
            due: match before {
                // Not moved by a rounding error, for which it would be looked at again and again.
                Some(alarm) if known && alarm.due > now => alarm.due,
                _ => now + wait,
            },
        });
        waker
    }

    /// Where a request stands; it will be woken when that changes.
    fn look(&mut self, member: u64, access: Access, number: u64, waker: &Waker) -> Place {
        let at = index(access);
        let alarm = self.alarms[at];
        let Some(request) = self.request(member, at, number) else {
            return Place::Passed;
        };
        if request.waker.as_ref().is_none_or(|w| !w.will_wake(waker)) {
            request.waker = Some(waker.clone());
        }
        match alarm {
            Some(alarm) if alarm.number == number => Place::First(alarm.due),
            _ => Place::Behind,
        }
    }

    fn request(&mut self, member: u64, at: usize, number: u64) -> Option<&mut Request> {
        let waiting = &mut self.members.get_mut(&member)?.waiting[at];
        let found = waiting.binary_search_by_key(&number, |r| r.number).ok()?;
        waiting.get_mut(found)
    }

    /// Takes a request out that will not be polled again. False if it has passed already.
    fn forget(&mut self, member: u64, access: Access, number: u64) -> bool {
        let at = index(access);
        let Some(queue) = self.members.get_mut(&member) else {
            return false;
        };
        let waiting = &mut queue.waiting[at];
        let Ok(found) = waiting.binary_search_by_key(&number, |r| r.number) else {
            return false;
        };
        waiting.remove(found);
        self.count[at] -= 1;
        true
    }
}

#[cfg(test)]
mod tests;
