//! A job as its own driver and its places at nodes see it: how it goes through its states, and the gate before each piece of
//! I/O. Nothing here is for commands.

use std::time::{Duration, Instant};

use diskfuse_block::{Error, Kind, Result};

use super::{CANCELLED, Ending, Job, Pass, RETRY, State};
use crate::event::{ErrorAction, JobEvent, Operation};
use crate::policy::{self, OnError};
use crate::status::{Status, Verb};

impl Job {
    /// It is there from now on, and can be `completed` by hand or not. Once is enough.
    pub(crate) fn begins(&self, completes: bool) {
        if self.completes.set(completes).is_ok() {
            self.update(|state| state.go(Status::Created));
        }
    }

    /// It was there and comes to nothing before it has run.
    pub(crate) fn gives_up(&self) {
        self.update(|state| {
            for next in [Status::Aborting, Status::Concluded, Status::Null] {
                state.go(next);
            }
        });
    }

    /// It was cancelled along with its transaction.
    pub(crate) fn cancel_along(&self) {
        self.update(State::cancel);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.state.lock().cancelled
    }

    pub(crate) fn ending(&self) -> Option<Ending> {
        self.state.lock().ending
    }

    /// Its work is done: resolves when it is not paused any more and waits for its transaction. False, and it stays where it
    /// is, if it was cancelled meanwhile.
    pub(crate) async fn waits(&self) -> bool {
        let look = || {
            let mut state = self.state.lock();
            if state.cancelled {
                return Some(false);
            }
            if state.paused {
                return None;
            }
            state.go(Status::Waiting);
            self.post(&mut state);
            Some(true)
        };
        let waits = self.changed.until(look).await;
        self.outbox.deliver();
        waits
    }

    /// It failed or was cancelled.
    pub(crate) fn aborts(&self) {
        self.update(|state| {
            state.go_on();
            state.go(Status::Aborting);
        });
    }

    pub(crate) fn go(&self, next: Status) {
        self.update(|state| {
            state.go(next);
            if next == Status::Pending && !self.auto_finalize && self.kind.is_block_job() {
                state.events.push(JobEvent::Pending {
                    kind: self.kind,
                    id: self.id.clone(),
                });
            }
        });
    }

    /// It works from now on, and pauses if that was asked for before.
    pub(crate) fn runs(&self) {
        self.update(|state| {
            state.go(Status::Running);
            state.rest();
        });
    }

    /// What it makes is as good as done. What a guest has changed last is counted when it is copied: clients expect all to
    /// be done at this moment.
    pub(crate) fn ready(&self, _while_running: &Pass<'_>) {
        self.update(|state| {
            if state.status == Status::Running {
                state.go(Status::Ready);
                state.total = state.done;
                let data = self.data(state);
                state.events.push(JobEvent::Ready(data));
            }
        });
    }

    /// Why it fails; the first reason counts.
    pub(crate) fn fail(&self, error: &Error) {
        self.update(|state| {
            if !state.cancelled {
                let text = || match self.kind.is_block_job() {
                    true => error.reason_first(),
                    // Whoever makes an image has put it into words.
                    false => error.to_string(),
                };
                state.error.get_or_insert_with(text);
            }
        });
    }

    /// All is over, and everything in order. If nobody needs to dismiss it, nobody can: it is gone in the same step.
    pub(crate) fn conclude(&self, succeeded: bool) {
        self.update(|state| {
            // One that has failed by itself is cancelled by the others of its transaction, too.
            let completed = succeeded || state.error.is_some() || !state.cancelled;
            if !succeeded {
                state.error.get_or_insert_with(|| CANCELLED.to_owned());
            }
            if self.kind.is_block_job() {
                let job = self.data(state);
                state.events.push(match completed {
                    true => JobEvent::Completed {
                        job,
                        error: state.error.clone(),
                    },
                    false => JobEvent::Cancelled(job),
                });
            }
            state.go(Status::Concluded);
            if self.auto_dismiss {
                state.go(Status::Null);
            }
        });
    }

    pub(crate) async fn dismissed(&self) {
        let look = || (self.status() == Status::Null).then_some(());
        self.changed.until(look).await;
    }

    /// How far it is, in bytes.
    pub(crate) fn progress(&self, change: impl FnOnce(&mut u64, &mut u64)) {
        let mut state = self.state.lock();
        let State { done, total, .. } = &mut *state;
        change(done, total);
    }

    /// Bytes of one piece, `most` at most.
    pub(crate) fn piece(&self, most: u64) -> u64 {
        self.state.lock().pace.piece(most)
    }

    /// Waits until the speed lets it move this many bytes, then until it neither is paused nor drained. `None` if it was
    /// cancelled.
    pub(crate) async fn pass(&self, bytes: u64) -> Option<Pass<'_>> {
        self.keep_pace(bytes).await;
        self.gate().await
    }

    /// [`Job::pass`] for making the result the truth, whatever the speed; what is not done then must not be taken for done, so
    /// it is an error if the job was cancelled along with others.
    pub(crate) async fn settling_pass(&self) -> Result<Pass<'_>> {
        let pass = self.gate().await;
        pass.ok_or_else(|| Error::new(Kind::Os(libc::ECANCELED), CANCELLED))
    }

    async fn gate(&self) -> Option<Pass<'_>> {
        let look = || {
            let mut state = self.state.lock();
            if state.cancelled {
                return Some(None);
            }
            if state.paused || state.drains > 0 {
                return None;
            }
            state.in_flight += 1;
            Some(Some(Pass(self)))
        };
        self.changed.until(look).await
    }

    async fn keep_pace(&self, bytes: u64) {
        loop {
            let (wait, speed) = {
                let mut state = self.state.lock();
                if state.cancelled {
                    return;
                }
                (state.pace.ask(Instant::now(), bytes), state.pace.speed())
            };
            let Some(wait) = wait else { return };
            let look = || {
                let state = self.state.lock();
                (state.cancelled || state.pace.speed() != speed).then_some(())
            };
            self.changed.until_or(wait, look).await;
        }
    }

    /// The right to do I/O while the job is drained: for whoever drains it.
    pub(crate) fn force_pass(&self) -> Pass<'_> {
        self.update(|state| state.in_flight += 1);
        Pass(self)
    }

    /// Resolves when `look` finds something, looking again whenever the job's state changes.
    pub(crate) async fn until<T>(&self, look: impl FnMut() -> Option<T>) -> T {
        self.changed.until(look).await
    }

    /// [`Job::until`] for `limit` at most.
    pub(crate) async fn until_or<T>(&self, limit: Duration, look: impl FnMut() -> Option<T>) {
        self.changed.until_or(limit, look).await;
    }

    /// Something that the job's own tasks wait for has changed.
    pub(crate) fn notify(&self) {
        self.changed.notify();
    }

    /// It is a user of this node from now on, perhaps for a while only.
    pub(crate) fn takes_place(&self, node: &str) {
        self.state.lock().places.push(node.to_owned());
    }

    /// The nodes that it is or was a user of.
    pub(crate) fn places(&self) -> Vec<String> {
        self.state.lock().places.clone()
    }

    /// At how many of its places somebody drains the node.
    pub(crate) fn drained_places(&self) -> usize {
        self.state.lock().drains
    }

    /// One more of its nodes is being drained, or one less.
    pub(crate) fn drain(&self, begins: bool) {
        self.update(|state| match begins {
            true => state.drains += 1,
            false => state.drains -= 1,
        });
    }

    /// Resolves when it does no I/O.
    pub(crate) async fn quiet(&self) {
        let look = || (self.state.lock().in_flight == 0).then_some(());
        self.changed.until(look).await;
    }

    /// What to do about an error of the source or the target. Pauses the job if that is it.
    pub(crate) fn on_error(&self, on: OnError, operation: Operation, error: &Error) -> ErrorAction {
        let id = &self.id;
        self.update(|state| {
            let mut action = on.action(error);
            if action == ErrorAction::Stop && Verb::Resume.check(id, state.status).is_err() {
                // Nobody could make it go on.
                action = ErrorAction::Report;
            }
            tracing::warn!(id, operation = operation.name(), action = action.name(), %error, "a job met an error");
            state.events.push(JobEvent::Error {
                device: self.id.clone(),
                operation,
                action,
            });
            if action == ErrorAction::Stop {
                state.paused = true;
                state.io_status = policy::io_status(error);
                // The guest may have met it, with nothing of the job's own in flight.
                state.rest();
            }
            action
        })
    }

    /// Waits a little, after an error that is ignored.
    pub(crate) async fn breathe(&self) {
        let look = || self.is_cancelled().then_some(());
        self.changed.until_or(RETRY, look).await;
    }
}
