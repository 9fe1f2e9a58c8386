//! Jobs that succeed or fail together (completion mode `grouped`). Each job is in one, most of them alone. Either all of
//! them make their results the truth, or none.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::job::Job;
use crate::signal::Signal;

/// A group of jobs. Give it to all of them before the first begins.
#[derive(Default)]
pub struct Transaction {
    state: Mutex<State>,
    changed: Signal,
}

#[derive(Default)]
struct State {
    members: Vec<Weak<Job>>,
    /// Members whose work is done,
    ran: usize,
    /// and those who have made their results the truth.
    prepared: usize,
    failed: bool,
    finalize: bool,
    /// From here on it is too late to cancel,
    finalizing: bool,
    /// and from here on to fail.
    committed: bool,
}

impl Transaction {
    /// An empty one.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn join(&self, job: &Arc<Job>) {
        self.state.lock().members.push(Arc::downgrade(job));
    }

    /// A member never began.
    pub(crate) fn leave(&self, job: &Job) {
        let is_job = |member: &Weak<Job>| std::ptr::eq(member.as_ptr(), job);
        self.state.lock().members.retain(|m| !is_job(m));
        self.changed.notify();
    }

    /// One fails, and so do all. False if it is too late.
    pub(crate) fn fail(&self, by: &Job) -> bool {
        let others: Vec<_> = {
            let mut state = self.state.lock();
            if state.committed {
                return false;
            }
            state.failed = true;
            let members = state.members.iter().filter_map(Weak::upgrade);
            members
                .filter(|job| !std::ptr::eq(&raw const **job, by))
                .collect()
        };
        for job in others {
            job.cancel_along();
        }
        self.changed.notify();
        true
    }

    /// A member that has done its work is cancelled. False if it is too late.
    pub(crate) fn cancel(&self, by: &Job) -> bool {
        if self.state.lock().finalizing {
            return false;
        }
        by.cancel_along();
        self.fail(by)
    }

    /// Somebody wants the results.
    pub(crate) fn finalize(&self) {
        self.state.lock().finalize = true;
        self.changed.notify();
    }

    /// A member's work is done: resolves when all are that far, or one has failed (false).
    pub(crate) async fn all_ran(&self) -> bool {
        self.state.lock().ran += 1;
        self.changed.notify();
        let look = || {
            let state = self.state.lock();
            match state.failed {
                true => Some(false),
                false => (state.ran >= state.members.len()).then_some(true),
            }
        };
        self.changed.until(look).await
    }

    /// Resolves when the results are wanted: at once unless a member waits to be told so. False if one has failed.
    pub(crate) async fn wanted(&self) -> bool {
        let look = || {
            let mut state = self.state.lock();
            if state.failed {
                return Some(false);
            }
            let members = state.members.iter().filter_map(Weak::upgrade);
            let asked = state.finalize || members.into_iter().all(|job| job.auto_finalize());
            state.finalizing |= asked;
            asked.then_some(true)
        };
        self.changed.until(look).await
    }

    /// A member's result is the truth: resolves when that is so for all, or one has failed (false).
    pub(crate) async fn all_prepared(&self) -> bool {
        self.state.lock().prepared += 1;
        self.changed.notify();
        let look = || {
            let mut state = self.state.lock();
            if state.failed {
                return Some(false);
            }
            state.committed |= state.prepared >= state.members.len();
            state.committed.then_some(true)
        };
        self.changed.until(look).await
    }
}

impl std::fmt::Debug for Transaction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let members = self.state.lock().members.len();
        f.debug_struct("Transaction")
            .field("members", &members)
            .finish_non_exhaustive()
    }
}
