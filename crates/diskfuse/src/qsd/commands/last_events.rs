//! The order of what is said of jobs when everything ends. They are cancelled all at once, beside the exports, so that none waits
//! for a disk that is stuck; clients hear of it as QEMU says it: the exports first, then one job after the other, the
//! youngest first.

use diskfuse_jobs::{JobEvent, Jobs, Status};
use parking_lot::Mutex;

use super::events;
use crate::qsd::monitor::Monitors;

/// Passes the events of jobs on to clients, from any thread.
pub struct LastEvents {
    monitors: Monitors,
    end: Mutex<Option<End>>,
}

/// What is held back since the end has begun.
struct End {
    /// The ids of those jobs whose turn has not passed yet, in the order of their turns.
    turns: Vec<String>,
    held: Vec<JobEvent>,
    exports_gone: bool,
}

impl LastEvents {
    /// Everything is passed on to the clients of these.
    pub fn new(monitors: Monitors) -> Self {
        Self {
            monitors,
            end: Mutex::new(None),
        }
    }

    /// The end begins: from now on events have their turns.
    pub fn begin(&self, jobs: &Jobs) {
        let mut end = self.end.lock();
        let ids = jobs.list().into_iter().map(|job| job.id().to_owned());
        *end = Some(End {
            turns: ids.rev().collect(),
            held: Vec::new(),
            exports_gone: false,
        });
    }

    /// Something has happened to a job.
    pub fn pass(&self, event: JobEvent) {
        let mut end = self.end.lock();
        match &mut *end {
            None => self.tell(event),
            Some(end) => {
                end.held.push(event);
                self.take_turns(end);
            }
        }
    }

    /// Nothing more is to be said of exports.
    pub fn exports_are_gone(&self) {
        if let Some(end) = &mut *self.end.lock() {
            end.exports_gone = true;
            self.take_turns(end);
        }
    }

    /// Everything is over: what is still held back is told.
    pub fn let_all_go(&self) {
        if let Some(end) = self.end.lock().take() {
            for event in end.held {
                self.tell(event);
            }
        }
    }

    fn take_turns(&self, end: &mut End) {
        while end.exports_gone
            && let Some(id) = end.turns.first()
        {
            let (now, later): (Vec<_>, Vec<_>) =
                end.held.drain(..).partition(|event| event.job() == id);
            end.held = later;
            let passed = now.iter().any(is_last);
            for event in now {
                self.tell(event);
            }
            if !passed {
                return;
            }
            end.turns.remove(0);
        }
    }

    fn tell(&self, event: JobEvent) {
        self.monitors.emit(events::of_job(event));
    }
}

/// Whether nothing more is to be said of the job.
fn is_last(event: &JobEvent) -> bool {
    matches!(event, JobEvent::StatusChange { status, .. } if *status == Status::Null)
}
