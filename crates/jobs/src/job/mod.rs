//! One job as everyone sees it: its state, what can be asked of it, and the gate through which it does I/O. Whoever asks for
//! something is answered at once; the job itself gets round to it on its own thread. It never does I/O, and calls nobody
//! with its lock held.

mod inside;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use diskfuse_block::{Error, Kind, Result};
use parking_lot::Mutex;

use crate::event::{BlockJobData, BlockJobInfo, IoStatus, JobEvent, JobInfo, Outbox};
use crate::mirror::CopyMode;
use crate::pace::Pace;
use crate::signal::Signal;
use crate::status::{JobType, Status, Verb};
use crate::transaction::Transaction;

/// What is said of a job that was cancelled, where an error is said (`strerror(ECANCELED)`, as QEMU has it).
const CANCELLED: &str = "Operation canceled";
/// How long a job that ignores errors waits before it tries again.
const RETRY: Duration = Duration::from_millis(100);

/// What all jobs are started with.
#[derive(Clone, Debug)]
pub struct JobConfig {
    /// Its name.
    pub id: String,
    /// Bytes a second; 0 for no limit.
    pub speed: u64,
    /// Whether it needs no `job-finalize`.
    pub auto_finalize: bool,
    /// Whether it needs no `job-dismiss`.
    pub auto_dismiss: bool,
    /// The jobs that succeed or fail together with it.
    pub transaction: Option<Arc<Transaction>>,
}

impl JobConfig {
    /// A job without limits that needs nobody.
    pub fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            speed: 0,
            auto_finalize: true,
            auto_dismiss: true,
            transaction: None,
        }
    }
}

/// How a job that is ready ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// As it was meant to.
    Complete,
    /// With its copy as it is, and everything else as it was.
    Leave,
}

/// A job. May be used from any thread.
pub struct Job {
    id: String,
    kind: JobType,
    auto_finalize: bool,
    auto_dismiss: bool,
    outbox: Arc<Outbox>,
    state: Mutex<State>,
    /// Whether it can be completed by hand; known when it begins.
    completes: OnceLock<bool>,
    changed: Signal,
    /// A mirror's writes are made to both sides before they are answered.
    write_blocking: AtomicBool,
    pub(crate) transaction: Arc<Transaction>,
}

struct State {
    id: String,
    status: Status,
    /// By somebody, or by an error.
    paused: bool,
    /// The nodes that it has a place at.
    places: Vec<String>,
    /// How many of those are being drained.
    drains: usize,
    in_flight: usize,
    cancelled: bool,
    ending: Option<Ending>,
    pace: Pace,
    done: u64,
    total: u64,
    error: Option<String>,
    io_status: IoStatus,
    events: Vec<JobEvent>,
    /// The outbox's number of the last one.
    posted: u64,
}

impl State {
    fn go(&mut self, next: Status) {
        if !self.status.may_become(next) {
            let (id, status) = (&self.id, self.status);
            tracing::error!(id, %status, %next, "a job went where it must not");
        }
        self.status = next;
        self.events.push(JobEvent::StatusChange {
            id: self.id.clone(),
            status: next,
        });
    }

    /// Stands still, if it is to and nothing is in flight any more.
    fn rest(&mut self) {
        if self.paused && self.in_flight == 0 {
            match self.status {
                Status::Running => self.go(Status::Paused),
                Status::Ready => self.go(Status::Standby),
                _ => {}
            }
        }
    }

    fn go_on(&mut self) {
        self.paused = false;
        self.io_status = IoStatus::Ok;
        match self.status {
            Status::Paused => self.go(Status::Running),
            Status::Standby => self.go(Status::Ready),
            _ => {}
        }
    }

    fn cancel(&mut self) {
        self.cancelled = true;
        self.go_on();
    }
}

/// The right to do I/O, until it is dropped: whoever pauses or drains the job waits for that.
#[must_use = "dropping it gives the right back"]
pub(crate) struct Pass<'j>(&'j Job);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.0.update(|state| {
            state.in_flight -= 1;
            state.rest();
        });
    }
}

impl Job {
    pub(crate) fn new(kind: JobType, config: JobConfig, outbox: Arc<Outbox>) -> Arc<Self> {
        let state = State {
            id: config.id.clone(),
            status: Status::Undefined,
            paused: false,
            places: Vec::new(),
            drains: 0,
            in_flight: 0,
            cancelled: false,
            ending: None,
            pace: Pace::new(config.speed),
            done: 0,
            total: 0,
            error: None,
            io_status: IoStatus::Ok,
            events: Vec::new(),
            posted: 0,
        };
        let job = Arc::new(Self {
            id: config.id,
            kind,
            auto_finalize: config.auto_finalize,
            auto_dismiss: config.auto_dismiss,
            outbox,
            state: Mutex::new(state),
            completes: OnceLock::new(),
            changed: Signal::default(),
            write_blocking: AtomicBool::new(false),
            transaction: config.transaction.unwrap_or_default(),
        });
        job.transaction.join(&job);
        job
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it does.
    pub fn kind(&self) -> JobType {
        self.kind
    }

    /// Where it is.
    pub fn status(&self) -> Status {
        self.state.lock().status
    }

    pub(crate) fn auto_finalize(&self) -> bool {
        self.auto_finalize
    }

    /// For `query-jobs`.
    pub fn info(&self) -> JobInfo {
        let state = self.state.lock();
        JobInfo {
            id: self.id.clone(),
            kind: self.kind,
            status: state.status,
            current_progress: state.done,
            total_progress: state.total,
            error: state.error.clone(),
        }
    }

    /// For `query-block-jobs`; `None` if it is none.
    pub fn block_info(&self) -> Option<BlockJobInfo> {
        if !self.kind.is_block_job() {
            return None;
        }
        let state = self.state.lock();
        let ready = matches!(state.status, Status::Ready | Status::Standby);
        let is_mirror = self.kind == JobType::Mirror;
        Some(BlockJobInfo {
            job: self.data(&state),
            busy: state.in_flight > 0,
            paused: state.paused,
            io_status: state.io_status,
            ready,
            status: state.status,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            error: state.error.clone(),
            actively_synced: is_mirror.then(|| ready && self.is_write_blocking()),
        })
    }

    fn data(&self, state: &State) -> BlockJobData {
        BlockJobData {
            kind: self.kind,
            device: self.id.clone(),
            len: state.total,
            offset: state.done,
            speed: state.pace.speed(),
        }
    }

    /// Changes the state, and tells everyone.
    fn update<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let result = {
            let mut state = self.state.lock();
            let result = change(&mut state);
            self.post(&mut state);
            result
        };
        self.changed.notify();
        self.outbox.deliver();
        result
    }

    fn post(&self, state: &mut State) {
        if !state.events.is_empty() {
            state.posted = self.outbox.post(state.events.drain(..));
        }
    }

    fn command<R>(&self, verb: Verb, act: impl FnOnce(&mut State) -> Result<R>) -> Result<R> {
        self.update(|state| {
            verb.check(&self.id, state.status)?;
            act(state)
        })
    }

    /// `job-pause`: it stands still when what is in flight is done.
    pub fn pause(&self) -> Result<()> {
        self.command(Verb::Pause, |state| {
            if state.paused {
                return Err(invalid("Job is already paused"));
            }
            state.paused = true;
            state.rest();
            Ok(())
        })
    }

    /// `job-resume`.
    pub fn resume(&self) -> Result<()> {
        self.command(Verb::Resume, |state| {
            if !state.paused {
                return Err(invalid("Can't resume a job that was not paused"));
            }
            state.go_on();
            Ok(())
        })
    }

    /// `block-job-set-speed`: bytes a second, 0 for no limit.
    pub fn set_speed(&self, speed: u64) -> Result<()> {
        self.command(Verb::SetSpeed, |state| {
            state.pace.set_speed(speed);
            Ok(())
        })
    }

    /// `block-job-change` of a mirror: from now on its writes are made to both sides before they are answered. There is no way
    /// back.
    pub fn change_copy_mode(&self, mode: CopyMode) -> Result<()> {
        self.command(Verb::Change, |_| {
            if self.kind != JobType::Mirror {
                return Err(invalid("Job type does not support change"));
            }
            match mode {
                CopyMode::WriteBlocking => self.begin_write_blocking(),
                CopyMode::Background if !self.is_write_blocking() => {}
                CopyMode::Background => {
                    let message = "Change to copy mode 'background' is not implemented";
                    return Err(invalid(message));
                }
            }
            Ok(())
        })
    }

    pub(crate) fn begin_write_blocking(&self) {
        self.write_blocking.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_write_blocking(&self) -> bool {
        self.write_blocking.load(Ordering::SeqCst)
    }

    /// `job-complete`: what is ready is made the truth.
    pub fn complete(&self) -> Result<()> {
        self.command(Verb::Complete, |state| {
            // Whoever has let it go is not told that the copy takes the place of the disk.
            let let_go = state.cancelled || state.ending == Some(Ending::Leave);
            if let_go || self.completes.get() != Some(&true) {
                let message = format!("The active block job '{}' cannot be completed", self.id);
                return Err(invalid(message));
            }
            state.ending.get_or_insert(Ending::Complete);
            Ok(())
        })
    }

    /// `job-cancel` (`force`), and `block-job-cancel`, which lets a mirror that is ready end with a copy that is complete.
    pub fn cancel(&self, force: bool) -> Result<()> {
        let settling = self.command(Verb::Cancel, |state| {
            if !force && state.paused {
                let id = &self.id;
                let message = format!("The block job for device '{id}' is currently paused");
                return Err(invalid(message));
            }
            match state.status {
                Status::Ready if !force && self.completes.get() == Some(&true) => {
                    state.ending.get_or_insert(Ending::Leave);
                    Ok(false)
                }
                Status::Waiting | Status::Pending => Ok(true),
                _ => {
                    state.cancel();
                    Ok(false)
                }
            }
        })?;
        if settling && !self.transaction.cancel(self) {
            let message = format!("Job '{}' is being finalized already", self.id);
            return Err(Error::new(Kind::Busy, message));
        }
        Ok(())
    }

    /// `job-finalize`: the results of all jobs of its transaction become the truth.
    pub fn finalize(&self) -> Result<()> {
        self.command(Verb::Finalize, |_| Ok(()))?;
        self.transaction.finalize();
        Ok(())
    }

    /// `job-dismiss`: it is forgotten when this returns, and its id is free.
    pub fn dismiss(&self) -> Result<()> {
        self.command(Verb::Dismiss, |state| {
            state.go(Status::Null);
            Ok(())
        })
    }

    /// Resolves when its work is over, for good or ill, and everybody has heard of it: to why it failed, if it did. From any
    /// thread that runs a ring.
    pub async fn over(&self) -> std::result::Result<(), String> {
        self.reaches(Status::is_over).await.map_or(Ok(()), Err)
    }

    /// Dismisses it as soon as its work is over, unless it does so by itself. Resolves when everybody has heard that it is gone.
    pub(crate) async fn ends(&self) {
        // It says why it failed to those who listen to its events.
        let _ = self.over().await;
        if !self.auto_dismiss {
            // Whoever was faster has done the same.
            let _ = self.dismiss();
        }
        let _ = self.reaches(|status| status == Status::Null).await;
    }

    /// Resolves when it has such a status and everybody has heard of it: to why it failed, if it did.
    async fn reaches(&self, is_there: impl Fn(Status) -> bool) -> Option<String> {
        let look = || {
            let state = self.state.lock();
            is_there(state.status).then(|| (state.posted, state.error.clone()))
        };
        let (posted, error) = self.changed.until(look).await;
        self.outbox.delivered(posted).await;
        error
    }
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Job").field(&self.info()).finish()
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, message)
}
