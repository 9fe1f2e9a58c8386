//! Arguments and answers of the commands that start and steer jobs (`qapi/job.json`, `qapi/block-core.json`).

use serde_json::Value;

use super::kind::{Arguments, Kind, Members, ReadableMember, record, words};
use super::shape::{Definition, MemberShape, STR, Shape};
use crate::error::Error;
use crate::fields::Fields;

words! {
    /// What a job does (`JobType`); those that are built.
    enum JobType {
        /// Writes what an image has into the one below it.
        Commit = "commit",
        /// Copies what is below an image into it.
        Stream = "stream",
        /// Makes another node a copy, and keeps it one.
        Mirror = "mirror",
        /// Copies what a node was at one moment.
        Backup = "backup",
        /// Makes an image.
        Create = "create",
    }
}

words! {
    /// Where a job stands (`JobStatus`).
    enum JobStatus {
        /// Not made yet.
        Undefined = "undefined",
        /// Made, not started.
        Created = "created",
        /// Works.
        Running = "running",
        /// Paused while it worked.
        Paused = "paused",
        /// Could be completed.
        Ready = "ready",
        /// Paused while it was ready.
        Standby = "standby",
        /// Waits for others of its transaction.
        Waiting = "waiting",
        /// Waits for `job-finalize`.
        Pending = "pending",
        /// Goes back.
        Aborting = "aborting",
        /// Has ended; `job-dismiss` forgets it.
        Concluded = "concluded",
        /// Is being forgotten.
        Null = "null",
    }
}

words! {
    /// What a job does after an error (`BlockdevOnError`).
    enum OnError {
        /// It fails.
        Report = "report",
        /// It goes on.
        Ignore = "ignore",
        /// It pauses if there is no space, else fails.
        Enospc = "enospc",
        /// It pauses.
        Stop = "stop",
        /// As the device does; here as report.
        Auto = "auto",
    }
}

words! {
    /// What a copy holds (`MirrorSyncMode`).
    enum SyncMode {
        /// What the topmost image has.
        Top = "top",
        /// Everything.
        Full = "full",
        /// What is written from now on.
        None = "none",
        /// What a bitmap says; the bitmap is cleared if the job succeeds.
        Incremental = "incremental",
        /// What a bitmap says.
        Bitmap = "bitmap",
    }
}

words! {
    /// What becomes of a backup's bitmap (`BitmapSyncMode`).
    enum BitmapSyncMode {
        /// It is cleared of what has been copied if all went well.
        OnSuccess = "on-success",
        /// It stays as it is.
        Never = "never",
        /// It is cleared of what has been copied in any case.
        Always = "always",
    }
}

words! {
    /// When a mirror copies (`MirrorCopyMode`).
    enum CopyMode {
        /// In the background only.
        Background = "background",
        /// Writes of the guest go to both sides before they are answered.
        WriteBlocking = "write-blocking",
    }
}

words! {
    /// What a backup does if what is about to be overwritten cannot be saved (`OnCbwError`).
    enum OnCbwError {
        /// It is not overwritten: the guest's write fails.
        BreakGuestWrite = "break-guest-write",
        /// It is overwritten: the backup fails.
        BreakSnapshot = "break-snapshot",
    }
}

record! {
    /// `block-stream`.
    args struct BlockStream {
        /// The job's id; by default the device's name.
        "job-id" job_id: Option<String>,
        /// The node that is to stand alone.
        "device" device: String,
        /// The name of the file that it keeps standing on.
        "base" base: Option<String>,
        /// The node that it keeps standing on.
        "base-node" base_node: Option<String>,
        /// What its header is to call that; by default its file name.
        "backing-file" backing_file: Option<String>,
        /// Whether a format found by probing is written as `raw`.
        "backing-mask-protocol" backing_mask_protocol: Option<bool>,
        /// The last node that is copied.
        "bottom" bottom: Option<String>,
        /// Bytes per second; by default no limit.
        "speed" speed: Option<i64>,
        /// After an error; by default report.
        "on-error" on_error: Option<OnError>,
        /// A name for the node that is put in between.
        "filter-node-name" filter_node_name: Option<String>,
        /// Whether it ends without `job-finalize`; by default yes.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it is forgotten without `job-dismiss`; by default yes.
        "auto-dismiss" auto_dismiss: Option<bool>,
    }
}

record! {
    /// `block-commit`.
    args struct BlockCommit {
        /// The job's id; by default the device's name.
        "job-id" job_id: Option<String>,
        /// The node at the top of the chain.
        "device" device: String,
        /// The node that is written to.
        "base-node" base_node: Option<String>,
        /// The file that is written to.
        "base" base: Option<String>,
        /// The topmost node that is copied.
        "top-node" top_node: Option<String>,
        /// The topmost file that is copied.
        "top" top: Option<String>,
        /// What the header of the image above is to call the base.
        "backing-file" backing_file: Option<String>,
        /// Whether a format found by probing is written as `raw`.
        "backing-mask-protocol" backing_mask_protocol: Option<bool>,
        /// Bytes per second; by default no limit.
        "speed" speed: Option<i64>,
        /// After an error; by default report.
        "on-error" on_error: Option<OnError>,
        /// A name for the node that is put in between.
        "filter-node-name" filter_node_name: Option<String>,
        /// Whether it ends without `job-finalize`; by default yes.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it is forgotten without `job-dismiss`; by default yes.
        "auto-dismiss" auto_dismiss: Option<bool>,
    }
}

record! {
    /// `blockdev-backup` (`BlockdevBackup`).
    args struct BlockdevBackup {
        /// The job's id; by default the device's name.
        "job-id" job_id: Option<String>,
        /// The node to copy.
        "device" device: String,
        /// The node that becomes the copy.
        "target" target: String,
        /// What is copied.
        "sync" sync: SyncMode,
        /// Bytes per second; by default no limit.
        "speed" speed: Option<i64>,
        /// The bitmap that says what is copied.
        "bitmap" bitmap: Option<String>,
        /// What becomes of it.
        "bitmap-mode" bitmap_mode: Option<BitmapSyncMode>,
        /// Whether the copy is compressed; by default not.
        "compress" compress: Option<bool>,
        /// After an error of the source; by default report.
        "on-source-error" on_source_error: Option<OnError>,
        /// After an error of the target; by default report.
        "on-target-error" on_target_error: Option<OnError>,
        /// After an error in the way of a guest's write; by default that fails.
        "on-cbw-error" on_cbw_error: Option<OnCbwError>,
        /// Whether it ends without `job-finalize`; by default yes.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it is forgotten without `job-dismiss`; by default yes.
        "auto-dismiss" auto_dismiss: Option<bool>,
        /// A name for the node that is put in between.
        "filter-node-name" filter_node_name: Option<String>,
    }
}

record! {
    /// `blockdev-mirror`.
    args struct BlockdevMirror {
        /// The job's id; by default the device's name.
        "job-id" job_id: Option<String>,
        /// The node to copy.
        "device" device: String,
        /// The node that becomes the copy.
        "target" target: String,
        /// The node that the copy takes the place of at the end; by default the device.
        "replaces" replaces: Option<String>,
        /// What is copied.
        "sync" sync: SyncMode,
        /// Bytes per second; by default no limit.
        "speed" speed: Option<i64>,
        /// Bytes that one bit of the record of changes stands for: a power of two from 512 to 64 MiB.
        "granularity" granularity: Option<u32>,
        /// Bytes in flight at most.
        "buf-size" buf_size: Option<i64>,
        /// After an error of the source; by default report.
        "on-source-error" on_source_error: Option<OnError>,
        /// After an error of the target; by default report.
        "on-target-error" on_target_error: Option<OnError>,
        /// A name for the node that is put in between.
        "filter-node-name" filter_node_name: Option<String>,
        /// When it copies; by default in the background.
        "copy-mode" copy_mode: Option<CopyMode>,
        /// Whether it ends without `job-finalize`; by default yes.
        "auto-finalize" auto_finalize: Option<bool>,
        /// Whether it is forgotten without `job-dismiss`; by default yes.
        "auto-dismiss" auto_dismiss: Option<bool>,
        /// Whether the target reads as zeroes already (10.1 and later); by default not.
        "target-is-zero" target_is_zero: Option<bool>,
    }
}

record! {
    /// One of what `query-jobs` answers (`JobInfo`).
    struct JobInfo {
        /// The job.
        "id" id: String,
        /// What it does.
        "type" kind: JobType,
        /// Where it stands.
        "status" status: JobStatus,
        /// What it has done, in units of its own.
        "current-progress" current_progress: i64,
        /// What there is to do as far as it is known.
        "total-progress" total_progress: i64,
        /// Why it failed.
        "error" error: Option<String>,
    }
}

words! {
    /// What stopped a block job (`BlockDeviceIoStatus`).
    enum IoStatus {
        /// Nothing.
        Ok = "ok",
        /// An error.
        Failed = "failed",
        /// No space.
        NoSpace = "nospace",
    }
}

record! {
    /// What `query-block-jobs` says of every job.
    struct AnyJobInfo {
        /// What it does.
        "type" kind: JobType,
        /// The job.
        "device" device: String,
        /// What there is to do, in bytes as far as it is known.
        "len" len: i64,
        /// What has been done of it.
        "offset" offset: i64,
        /// Whether it works right now.
        "busy" busy: bool,
        /// Whether it is paused.
        "paused" paused: bool,
        /// Bytes per second; 0: no limit.
        "speed" speed: i64,
        /// What stopped it.
        "io-status" io_status: IoStatus,
        /// Whether it could be completed.
        "ready" ready: bool,
        /// Where it stands.
        "status" status: JobStatus,
        /// Whether it ends without `job-finalize`.
        "auto-finalize" auto_finalize: bool,
        /// Whether it is forgotten without `job-dismiss`.
        "auto-dismiss" auto_dismiss: bool,
        /// Why it failed.
        "error" error: Option<String>,
    }
}

record! {
    /// What it says of a mirror besides (`BlockJobInfoMirror`).
    struct MirrorInfo {
        /// Whether every write reaches the target before it is answered.
        "actively-synced" actively_synced: bool,
    }
}

/// One of what `query-block-jobs` answers (`BlockJobInfo`).
#[derive(Debug, Clone, PartialEq)]
pub struct BlockJobInfo {
    /// What is said of every job.
    pub job: AnyJobInfo,
    /// Of a mirror only.
    pub mirror: Option<MirrorInfo>,
}

impl Kind for BlockJobInfo {
    fn shape() -> Shape {
        Shape::Named("BlockJobInfo", || {
            let every = match AnyJobInfo::shape() {
                Shape::Named(_, definition) => definition(),
                _ => Definition::object(Vec::new()),
            };
            let members = match every {
                Definition::Object { members, .. } => members,
                _ => Vec::new(),
            };
            let of = |(word, kind): &(&'static str, JobType)| match kind {
                JobType::Mirror => (*word, MirrorInfo::shape()),
                _ => (*word, <()>::shape()),
            };
            let variants = JobType::WORDS.iter().map(of).collect();
            Definition::Object {
                members,
                variants: Some(("type", variants)),
            }
        })
    }

    fn to_value(&self) -> Value {
        let mut value = self.job.to_value();
        if let (Some(Value::Object(more)), Value::Object(members)) =
            (self.mirror.as_ref().map(Kind::to_value), &mut value)
        {
            members.extend(more);
        }
        value
    }
}

record! {
    /// `block-job-cancel`.
    args struct BlockJobCancel {
        /// The job.
        "device" device: String,
        /// Whether a mirror that is ready is given up, too, and not completed; by default not.
        "force" force: Option<bool>,
    }
}

record! {
    /// `block-job-pause`, `-resume`, `-complete`.
    args struct BlockJobDevice {
        /// The job.
        "device" device: String,
    }
}

record! {
    /// `block-job-set-speed`.
    args struct BlockJobSetSpeed {
        /// The job.
        "device" device: String,
        /// Bytes per second; 0: no limit.
        "speed" speed: i64,
    }
}

record! {
    /// What can be changed of a mirror (`JobChangeOptionsMirror`).
    args struct MirrorChange {
        /// When it copies from now on.
        "copy-mode" copy_mode: CopyMode,
    }
}

record! {
    /// What can be changed of other jobs: nothing.
    args struct NoChange {}
}

/// `block-job-change` (`JobChangeOptions`).
#[derive(Debug, Clone, PartialEq)]
pub struct BlockJobChange {
    /// The job.
    pub id: String,
    /// What becomes of it, if it is a mirror.
    pub mirror: Option<MirrorChange>,
}

impl Arguments for BlockJobChange {
    fn arguments_shape() -> Shape {
        Shape::Named("BlockJobChange", || Definition::Object {
            members: vec![
                MemberShape::required("id", STR),
                MemberShape::required("type", JobType::shape()),
            ],
            variants: Some(("type", JobType::WORDS.iter().map(change_of).collect())),
        })
    }

    fn read_all(mut fields: Fields<'_>) -> Result<Self, Error> {
        let id = ReadableMember::read(&mut fields, "id")?;
        let mirror = match ReadableMember::read(&mut fields, "type")? {
            JobType::Mirror => Some(Members::read(&mut fields)?),
            _ => None,
        };
        fields.finish()?;
        Ok(Self { id, mirror })
    }
}

fn change_of((word, kind): &(&'static str, JobType)) -> (&'static str, Shape) {
    let shape = match kind {
        JobType::Mirror => MirrorChange::shape(),
        _ => NoChange::shape(),
    };
    (word, shape)
}
