//! What a job tells: its events, and its answers to queries, as plain data. Names and meanings are those of QEMU's
//! schema; putting them into JSON is somebody else's business.

use std::collections::VecDeque;

use parking_lot::Mutex;

use crate::signal::Signal;
use crate::status::{JobType, Status};

/// What `BLOCK_JOB_COMPLETED` and its like say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobData {
    /// `type`.
    pub kind: JobType,
    /// `device`: the id of the job.
    pub device: String,
    /// `len`: bytes that there are to do.
    pub len: u64,
    /// `offset`: bytes that are done.
    pub offset: u64,
    /// `speed`: bytes a second, 0 for no limit.
    pub speed: u64,
}

/// Which side of a job failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reading the source.
    Read,
    /// Writing the target.
    Write,
}

impl Operation {
    /// As in the schema (`IoOperationType`).
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What is done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// The job goes on, and tries again.
    Ignore,
    /// The job fails.
    Report,
    /// The job pauses; when it is resumed it tries again.
    Stop,
}

impl ErrorAction {
    /// As in the schema (`BlockErrorAction`).
    pub fn name(self) -> &'static str {
        match self {
            Self::Ignore => "ignore",
            Self::Report => "report",
            Self::Stop => "stop",
        }
    }
}

/// Something that happened to a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobEvent {
    /// `JOB_STATUS_CHANGE`.
    StatusChange {
        /// The job.
        id: String,
        /// Its state from now on.
        status: Status,
    },
    /// `BLOCK_JOB_READY`.
    Ready(BlockJobData),
    /// `BLOCK_JOB_COMPLETED`.
    Completed {
        /// The job.
        job: BlockJobData,
        /// Why it failed, if it did.
        error: Option<String>,
    },
    /// `BLOCK_JOB_CANCELLED`.
    Cancelled(BlockJobData),
    /// `BLOCK_JOB_PENDING`.
    Pending {
        /// `type`.
        kind: JobType,
        /// The job.
        id: String,
    },
    /// `BLOCK_JOB_ERROR`.
    Error {
        /// The job.
        device: String,
        /// What failed.
        operation: Operation,
        /// What is done about it.
        action: ErrorAction,
    },
}

impl JobEvent {
    /// The id of the job that it is about.
    pub fn job(&self) -> &str {
        match self {
            Self::StatusChange { id, .. } | Self::Pending { id, .. } => id,
            Self::Ready(job) | Self::Cancelled(job) | Self::Completed { job, .. } => &job.device,
            Self::Error { device, .. } => device,
        }
    }
}

/// `io-status` of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoStatus {
    /// No error stopped it.
    Ok,
    /// It was stopped by an error.
    Failed,
    /// It was stopped as there was no space.
    NoSpace,
}

impl IoStatus {
    /// As in the schema (`BlockDeviceIoStatus`).
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
            Self::NoSpace => "nospace",
        }
    }
}

/// An answer of `query-jobs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// The job.
    pub id: String,
    /// What it does.
    pub kind: JobType,
    /// Where it is.
    pub status: Status,
    /// Bytes done.
    pub current_progress: u64,
    /// Bytes to do, which may change.
    pub total_progress: u64,
    /// Why it failed, if it did.
    pub error: Option<String>,
}

/// An answer of `query-block-jobs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockJobInfo {
    /// What events say of it.
    pub job: BlockJobData,
    /// It has I/O under way.
    pub busy: bool,
    /// Somebody paused it, or an error did.
    pub paused: bool,
    /// Whether an error stopped it.
    pub io_status: IoStatus,
    /// It can be completed.
    pub ready: bool,
    /// Where it is.
    pub status: Status,
    /// It needs no `job-finalize`.
    pub auto_finalize: bool,
    /// It needs no `job-dismiss`.
    pub auto_dismiss: bool,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// Of a mirror: whether every write reaches the target before it is answered.
    pub actively_synced: Option<bool>,
}

type Listener = Box<dyn Fn(JobEvent) + Send + Sync>;

/// Hands events on, in the order in which they were posted, one at a time, and with no lock held.
pub(crate) struct Outbox {
    listener: Listener,
    queue: Mutex<Queue>,
    changed: Signal,
}

#[derive(Default)]
struct Queue {
    events: VecDeque<JobEvent>,
    /// Events that were ever posted, and handed on.
    posted: u64,
    delivered: u64,
    /// Somebody is handing them on.
    busy: bool,
}

impl Outbox {
    pub(crate) fn new(listener: Listener) -> Self {
        Self {
            listener,
            queue: Mutex::default(),
            changed: Signal::default(),
        }
    }

    /// To be called with the lock of the job held, so that the order is that of what happened. Returns a number for
    /// [`Outbox::delivered`].
    pub(crate) fn post(&self, events: impl ExactSizeIterator<Item = JobEvent>) -> u64 {
        let mut queue = self.queue.lock();
        queue.posted += events.len() as u64;
        queue.events.extend(events);
        queue.posted
    }

    /// To be called with no lock held.
    pub(crate) fn deliver(&self) {
        let mut queue = self.queue.lock();
        if queue.events.is_empty() || std::mem::replace(&mut queue.busy, true) {
            return;
        }
        while let Some(event) = queue.events.pop_front() {
            drop(queue);
            (self.listener)(event);
            queue = self.queue.lock();
            queue.delivered += 1;
        }
        queue.busy = false;
        drop(queue);
        self.changed.notify();
    }

    /// Resolves when what was posted up to this number was handed on.
    pub(crate) async fn delivered(&self, number: u64) {
        let look = || (self.queue.lock().delivered >= number).then_some(());
        self.changed.until(look).await;
    }
}
