//! Events: what the monitor tells without being asked. Each is declared once; from that come its constructor's data and
//! what the schema says of it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::commands::kind::{Kind, record, words};
use crate::commands::shape::Shape;
use crate::commands::{JobStatus, JobType};

/// One event, without the time at which it happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name.
    pub name: &'static str,
    /// What it says.
    pub data: Value,
}

impl Event {
    /// The message, as of `time`. The order of the members is QEMU's.
    pub fn message(&self, time: SystemTime) -> Value {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        json!({
            "timestamp": {"seconds": since.as_secs(), "microseconds": since.subsec_micros()},
            "event": self.name,
            "data": self.data,
        })
    }
}

/// Declares the events: the type of what each says, and its name.
macro_rules! events {
    ($($data:ident = $name:literal,)*) => {
        /// The name of each event, and what it says.
        pub(crate) const ALL: &[(&str, fn() -> Shape)] = &[$(($name, <$data as Kind>::shape),)*];

        $(impl From<$data> for Event {
            fn from(data: $data) -> Self {
                Self { name: $name, data: data.to_value() }
            }
        })*
    };
}

events! {
    BlockExportDeleted = "BLOCK_EXPORT_DELETED",
    BlockImageCorrupted = "BLOCK_IMAGE_CORRUPTED",
    BlockIoError = "BLOCK_IO_ERROR",
    BlockJobCancelled = "BLOCK_JOB_CANCELLED",
    BlockJobCompleted = "BLOCK_JOB_COMPLETED",
    BlockJobError = "BLOCK_JOB_ERROR",
    BlockJobPending = "BLOCK_JOB_PENDING",
    BlockJobReady = "BLOCK_JOB_READY",
    BlockWriteThreshold = "BLOCK_WRITE_THRESHOLD",
    JobStatusChange = "JOB_STATUS_CHANGE",
}

words! {
    /// What failed.
    enum IoOperation {
        /// A read.
        Read = "read",
        /// A write.
        Write = "write",
    }
}

words! {
    /// What was done about it (`BlockErrorAction`).
    enum ErrorAction {
        /// Nothing.
        Ignore = "ignore",
        /// Whoever asked was told.
        Report = "report",
        /// Work was stopped.
        Stop = "stop",
    }
}

record! {
    /// An export has ended, however that came.
    struct BlockExportDeleted {
        /// The export.
        "id" id: String,
    }
}

record! {
    /// An image is damaged.
    struct BlockImageCorrupted {
        /// The device; empty here.
        "device" device: String,
        /// What was found.
        "msg" msg: String,
        /// Where, in bytes.
        "offset" offset: Option<i64>,
        /// The node.
        "node-name" node_name: Option<String>,
        /// Whether the image cannot be used any more.
        "fatal" fatal: bool,
        /// How many bytes.
        "size" size: Option<i64>,
    }
}

record! {
    /// A request failed.
    struct BlockIoError {
        /// The device's path; empty here.
        "qom-path" qom_path: String,
        /// The device; empty here.
        "device" device: String,
        /// The node.
        "node-name" node_name: Option<String>,
        /// What failed.
        "operation" operation: IoOperation,
        /// What was done about it.
        "action" action: ErrorAction,
        /// Whether it was for want of space.
        "nospace" nospace: Option<bool>,
        /// Why, for people.
        "reason" reason: String,
    }
}

record! {
    /// A job was given up.
    struct BlockJobCancelled {
        /// The job.
        "device" device: String,
        /// What there was to do, in bytes.
        "len" len: i64,
        /// What was done.
        "offset" offset: i64,
        /// Bytes per second; 0: no limit.
        "speed" speed: i64,
        /// What it did.
        "type" kind: JobType,
    }
}

record! {
    /// A job has ended by itself.
    struct BlockJobCompleted {
        /// The job.
        "device" device: String,
        /// What there was to do, in bytes.
        "len" len: i64,
        /// What was done.
        "offset" offset: i64,
        /// Bytes per second; 0: no limit.
        "speed" speed: i64,
        /// What it did.
        "type" kind: JobType,
        /// Why it failed, if it did.
        "error" error: Option<String>,
    }
}

record! {
    /// A job met an error.
    struct BlockJobError {
        /// The job.
        "device" device: String,
        /// What failed.
        "operation" operation: IoOperation,
        /// What was done about it.
        "action" action: ErrorAction,
    }
}

record! {
    /// A job waits for `job-finalize`.
    struct BlockJobPending {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        "id" id: String,
    }
}

record! {
    /// A job can be completed.
    struct BlockJobReady {
        /// The job.
        "device" device: String,
        /// What there was to do, in bytes.
        "len" len: i64,
        /// What was done.
        "offset" offset: i64,
        /// Bytes per second; 0: no limit.
        "speed" speed: i64,
        /// What it does.
        "type" kind: JobType,
    }
}

record! {
    /// A write went beyond the byte that `block-set-write-threshold` named; that is over now.
    struct BlockWriteThreshold {
        /// The node.
        "node-name" node_name: String,
        /// The byte.
        "write-threshold" write_threshold: u64,
        /// How far beyond it, in bytes.
        "amount-exceeded" amount_exceeded: u64,
    }
}

record! {
    /// A job stands elsewhere.
    struct JobStatusChange {
        /// Where.
        "status" status: JobStatus,
        /// The job.
        "id" id: String,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::qmp::to_text;

    #[test]
    fn events_have_their_members_in_order() {
        let event = Event::from(BlockExportDeleted { id: "e".to_owned() });
        let time = UNIX_EPOCH + Duration::from_micros(1_795_559_946_138_002);
        assert_eq!(
            to_text(&event.message(time), false),
            "{\"timestamp\": {\"seconds\": 1795559946, \"microseconds\": 138002}, \
             \"event\": \"BLOCK_EXPORT_DELETED\", \"data\": {\"id\": \"e\"}}\r\n"
        );
    }
}
