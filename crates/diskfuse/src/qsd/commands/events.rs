//! Jobs in the words of QMP: their events and what queries say of them.

use diskfuse_jobs::{BlockJobData, JobEvent};
use diskfuse_monitor::Event;
use diskfuse_monitor::commands::{
    AnyJobInfo, BlockJobInfo, IoStatus, JobInfo, JobStatus, JobType, MirrorInfo,
};
use diskfuse_monitor::qmp::event::{
    BlockJobCancelled, BlockJobCompleted, BlockJobError, BlockJobPending, BlockJobReady,
    ErrorAction, IoOperation, JobStatusChange,
};

/// QMP's integers have a sign.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn kind(kind: diskfuse_jobs::JobType) -> JobType {
    match kind {
        diskfuse_jobs::JobType::Commit => JobType::Commit,
        diskfuse_jobs::JobType::Stream => JobType::Stream,
        diskfuse_jobs::JobType::Mirror => JobType::Mirror,
        diskfuse_jobs::JobType::Backup => JobType::Backup,
        diskfuse_jobs::JobType::Create | diskfuse_jobs::JobType::Amend => JobType::Create,
    }
}

fn status(status: diskfuse_jobs::Status) -> JobStatus {
    match status {
        diskfuse_jobs::Status::Undefined => JobStatus::Undefined,
        diskfuse_jobs::Status::Created => JobStatus::Created,
        diskfuse_jobs::Status::Running => JobStatus::Running,
        diskfuse_jobs::Status::Paused => JobStatus::Paused,
        diskfuse_jobs::Status::Ready => JobStatus::Ready,
        diskfuse_jobs::Status::Standby => JobStatus::Standby,
        diskfuse_jobs::Status::Waiting => JobStatus::Waiting,
        diskfuse_jobs::Status::Pending => JobStatus::Pending,
        diskfuse_jobs::Status::Aborting => JobStatus::Aborting,
        diskfuse_jobs::Status::Concluded => JobStatus::Concluded,
        diskfuse_jobs::Status::Null => JobStatus::Null,
    }
}

/// What clients are told of.
pub fn of_job(event: JobEvent) -> Event {
    match event {
        JobEvent::StatusChange { id, status: now } => JobStatusChange {
            id,
            status: status(now),
        }
        .into(),
        JobEvent::Ready(job) => BlockJobReady {
            kind: kind(job.kind),
            len: signed(job.len),
            offset: signed(job.offset),
            speed: signed(job.speed),
            device: job.device,
        }
        .into(),
        JobEvent::Completed { job, error } => BlockJobCompleted {
            kind: kind(job.kind),
            len: signed(job.len),
            offset: signed(job.offset),
            speed: signed(job.speed),
            device: job.device,
            error,
        }
        .into(),
        JobEvent::Cancelled(job) => BlockJobCancelled {
            kind: kind(job.kind),
            len: signed(job.len),
            offset: signed(job.offset),
            speed: signed(job.speed),
            device: job.device,
        }
        .into(),
        JobEvent::Pending { kind: what, id } => BlockJobPending {
            kind: kind(what),
            id,
        }
        .into(),
        JobEvent::Error {
            device,
            operation,
            action,
        } => BlockJobError {
            device,
            operation: match operation {
                diskfuse_jobs::Operation::Read => IoOperation::Read,
                diskfuse_jobs::Operation::Write => IoOperation::Write,
            },
            action: match action {
                diskfuse_jobs::ErrorAction::Ignore => ErrorAction::Ignore,
                diskfuse_jobs::ErrorAction::Report => ErrorAction::Report,
                diskfuse_jobs::ErrorAction::Stop => ErrorAction::Stop,
            },
        }
        .into(),
    }
}

/// Whether a job has given back what it used.
pub fn is_end(event: &JobEvent) -> bool {
    matches!(event, JobEvent::StatusChange { status, .. } if *status == diskfuse_jobs::Status::Concluded)
}

/// For `query-jobs`.
pub fn job_info(info: diskfuse_jobs::JobInfo) -> JobInfo {
    JobInfo {
        id: info.id,
        kind: kind(info.kind),
        status: status(info.status),
        current_progress: signed(info.current_progress),
        total_progress: signed(info.total_progress),
        error: info.error,
    }
}

/// For `query-block-jobs`.
pub fn block_job_info(info: diskfuse_jobs::BlockJobInfo) -> BlockJobInfo {
    let BlockJobData {
        kind: what,
        device,
        len,
        offset,
        speed,
    } = info.job;
    let job = AnyJobInfo {
        kind: kind(what),
        device,
        len: signed(len),
        offset: signed(offset),
        busy: info.busy,
        paused: info.paused,
        speed: signed(speed),
        io_status: match info.io_status {
            diskfuse_jobs::IoStatus::Ok => IoStatus::Ok,
            diskfuse_jobs::IoStatus::Failed => IoStatus::Failed,
            diskfuse_jobs::IoStatus::NoSpace => IoStatus::NoSpace,
        },
        ready: info.ready,
        status: status(info.status),
        auto_finalize: info.auto_finalize,
        auto_dismiss: info.auto_dismiss,
        error: info.error,
    };
    let mirror = |actively_synced| MirrorInfo { actively_synced };
    BlockJobInfo {
        job,
        mirror: info.actively_synced.map(mirror),
    }
}
