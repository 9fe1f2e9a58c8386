//! Where a queue's thread runs while requests come by FUSE over io_uring. The kernel hands a request to the queue of the CPU
//! that its caller runs on, so a thread knows where its callers are: it can share their CPU, or leave it to them. What
//! serves most was measured on two CPUs (4 KiB reads of a null disk, two threads, in kIOPS):
//!
//! | | free | pinned to its callers' CPU | spread to another |
//! |---|---|---|---|
//! | one synchronous caller | 63 to 90 | 51 to 70 | 41 to 85 |
//! | four synchronous callers | 110 to 150 | 155 to 165 | 100 to 125 |
//! | depth 64 | 230 to 340 | 150 to 170 | 230 to 340 |
//! | four jobs at depth 64 | 260 to 290, p99 3 ms | 260 to 280, p99 2 ms | 255 to 340, p99 12 ms |
//!
//! So by default a thread is pinned while other threads have as much to do as it has, and free else. It must never take a CPU
//! that the process was not allowed to use.

use std::cell::{Cell, OnceCell};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::thread::CpuSet;

use super::Queue;
use crate::shared::bump;
use crate::transport::uring::queues_of;
use crate::transport::{Placement, cpus};

/// Requests between two looks at the clock.
const LOOK_EVERY: u32 = 64;
/// How long to count before judging.
const WINDOW: Duration = Duration::from_millis(10);
/// A window longer than this had hardly any load, and says nothing.
const SLOW: Duration = Duration::from_millis(100);
/// Another thread has as much to do if it had this share of this one's requests, in 1/100, and has not any more below the
/// second.
const AS_MUCH: (u64, u64) = (40, 20);
/// Windows in a row that must agree before the thread is moved.
const SURE: u8 = 3;

/// What is known of the load, and what was made of it.
#[derive(Default)]
pub(super) struct Whereabouts {
    /// The CPUs that the process may use.
    allowed: OnceCell<CpuSet>,
    requests: Cell<u32>,
    /// When the window began, with the requests of this thread and of the busiest other one by then.
    window: Cell<Option<(Instant, u64, u64)>>,
    pinned: Cell<bool>,
    otherwise: Cell<u8>,
}

impl Queue {
    /// Takes the place that the options say, or none yet.
    pub(super) fn take_place(&self) {
        match cpus::allowed() {
            // Set once: this runs once for each queue.
            Ok(allowed) => drop(self.whereabouts.allowed.set(allowed)),
            Err(error) => {
                tracing::debug!(%error, "cannot find out which CPUs may be used");
                return;
            }
        }
        match &self.shared.options.transport.placement {
            Placement::Auto | Placement::Free => {}
            Placement::Pinned => self.run_on(|cpu| self.serves(cpu)),
            Placement::Spread => self.run_on(|cpu| !self.serves(cpu)),
            Placement::Cpus(list) => {
                if let Some(&cpu) = list.get(self.index % list.len().max(1)) {
                    self.run_on(|other| other == usize::from(cpu));
                }
            }
        }
    }

    /// Gives the thread its freedom back: it may go on without this export.
    pub(super) fn leave_place(&self) {
        self.run_on(|_| true);
    }

    /// A request has come. Once in a while, judges.
    pub(super) fn count_for_placement(&self) {
        let here = &self.whereabouts;
        here.requests.set(here.requests.get() + 1);
        if here.requests.get() < LOOK_EVERY {
            return;
        }
        here.requests.set(0);
        bump(&self.lane().came, u64::from(LOOK_EVERY));
        if self.shared.lanes.len() > 1 && self.shared.options.transport.placement == Placement::Auto
        {
            self.judge_place(Instant::now());
        }
    }

    fn judge_place(&self, now: Instant) {
        let here = &self.whereabouts;
        let came = |index: usize| self.shared.lanes[index].came.load(Ordering::Relaxed);
        let mine = came(self.index);
        let others = (0..self.shared.lanes.len()).filter(|&index| index != self.index);
        let others: u64 = others.map(came).sum();
        let Some((since, my_past, past)) = here.window.get() else {
            here.window.set(Some((now, mine, others)));
            return;
        };
        let length = now - since;
        if length < WINDOW {
            return;
        }
        here.window.set(Some((now, mine, others)));
        let pinned = here.pinned.get();
        let (mine, others) = (mine - my_past, others - past);
        let share = if pinned { AS_MUCH.1 } else { AS_MUCH.0 };
        let crowded = length < SLOW && others * 100 >= mine * share;
        if crowded == pinned {
            here.otherwise.set(0);
            return;
        }
        here.otherwise.set(here.otherwise.get() + 1);
        if here.otherwise.get() >= SURE {
            here.otherwise.set(0);
            here.pinned.set(crowded);
            self.run_on(|cpu| !crowded || self.serves(cpu));
        }
    }

    fn serves(&self, cpu: usize) -> bool {
        let queues = self.shared.plan.ring.as_ref().map_or(0, |plan| plan.queues);
        queues_of(self.index, self.shared.lanes.len(), queues)
            .any(|queue| usize::from(queue) == cpu)
    }

    fn run_on(&self, wanted: impl Fn(usize) -> bool) {
        let Some(allowed) = self.whereabouts.allowed.get() else {
            return;
        };
        if let Err(error) = cpus::run_on(allowed, wanted) {
            // The thread stays where it is, which is right, only slower.
            tracing::debug!(%error, "cannot move a thread");
        }
    }
}
