//! Where a queue's thread runs while requests come by FUSE over io_uring. The kernel hands a request to the queue of the CPU
//! that its caller runs on, so a thread knows where its callers are: it can share their CPU, or leave it to them. What
//! serves most was measured on two CPUs (4 KiB reads of a null disk, two threads, in kIOPS):
//!
//! | | free | pinned to its callers' CPU | spread to another |
//! |---|---|---|---|
//! | one synchronous caller | 90 | 70 | 85 |
//! | four synchronous callers | 150 | 155 | 100 |
//! | depth 64 | 340 | 170 | 340 |
//! | four jobs at depth 64 | 260 | 265 | 340 |
//!
//! So by default a thread is spread while requests come in numbers, and free else. It must never take a CPU that the process
//! was not allowed to use.

use std::cell::{Cell, OnceCell};

use rustix::thread::CpuSet;

use super::Queue;
use crate::transport::uring::queues_of;
use crate::transport::{Placement, cpus};

/// Requests between two looks at how many there are at a time.
const LOOK_EVERY: u32 = 512;
/// Requests at a time, on average, from which on they come in numbers, and below which they do not any more.
const MANY: u64 = 6;
/// See [`MANY`].
const FEW: u64 = 3;
/// Looks in a row that must agree before the thread is moved.
const SURE: u8 = 4;

/// What is known of the load, and what was made of it.
#[derive(Default)]
pub(super) struct Whereabouts {
    /// Where the thread was allowed to run when it began to serve.
    allowed: OnceCell<CpuSet>,
    requests: Cell<u32>,
    /// The sum of the requests at a time over those.
    at_a_time: Cell<u64>,
    spread: Cell<bool>,
    otherwise: Cell<u8>,
}

impl Queue {
    /// Takes the place that the options say, or none yet.
    pub(super) fn take_place(&self) {
        match cpus::allowed() {
            // Set once: this runs once for each queue.
            Ok(allowed) => drop(self.whereabouts.allowed.set(allowed)),
            Err(error) => {
                tracing::debug!(%error, "cannot find out where this thread may run");
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

    /// A request has come, while so many are being served. Once in a while, judges.
    pub(super) fn count_for_placement(&self, at_a_time: usize) {
        let here = &self.whereabouts;
        here.at_a_time.set(here.at_a_time.get() + at_a_time as u64);
        here.requests.set(here.requests.get() + 1);
        if here.requests.get() < LOOK_EVERY {
            return;
        }
        here.requests.set(0);
        let average = here.at_a_time.replace(0) / u64::from(LOOK_EVERY);
        if self.shared.options.transport.placement != Placement::Auto {
            return;
        }
        let spread = here.spread.get();
        let other = if spread {
            average < FEW
        } else {
            average >= MANY
        };
        here.otherwise
            .set(if other { here.otherwise.get() + 1 } else { 0 });
        if here.otherwise.get() >= SURE {
            here.otherwise.set(0);
            here.spread.set(!spread);
            self.run_on(|cpu| spread || !self.serves(cpu));
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
