//! Copying disks in the background while they are used, as QEMU's block jobs do: backup, mirror, stream, commit, and making
//! images.
//!
//! What this crate does *not* do: it knows nothing of JSON, sockets or FUSE, and opens no files. It must never let a guest wait
//! for longer than one piece of its own, but for the last pause of a mirror or an active commit, and never leave an image that is not valid, whenever it is killed.
//!
//! # How a job works
//! * All jobs share one thread with a ring of its own; a job has a few pieces in flight, in buffers that are its own.
//! * A job is a user of its nodes, so the graph refuses what does not go together with it; whoever drains a node stops the
//!   job as well, between two pieces.
//! * What must see the guest's writes is *wrapped* around the node while it is drained, and taken away the same way.
//! * When a mirror or an active commit ends, the guest stands still until what is dirty then is copied and the target is
//!   flushed. That is 4 MiB at most, unless 16 more sweeps did not get there, though the guest waits for the target meanwhile;
//!   how long the flush takes is up to the target's disk.
//! * A job works (`run`), waits for those of its transaction, makes its result the truth (`prepare`) and puts things in
//!   order (`finish`).

mod backup;
mod chain;
mod commit;
mod copy;
mod create;
mod drive;
mod event;
mod job;
mod mirror;
mod pace;
mod policy;
mod registry;
mod seat;
mod signal;
mod status;
mod stream;
mod transaction;

pub use backup::{BackupConfig, BackupSync, BitmapMode, OnCbwError, backup};
pub use commit::{CommitConfig, commit, commit_hides, commit_writes};
pub use create::run;
pub use event::{BlockJobData, BlockJobInfo, ErrorAction, IoStatus, JobEvent, JobInfo, Operation};
pub use job::{Job, JobConfig};
pub use mirror::{CopyMode, MirrorConfig, MirrorSync, mirror};
pub use policy::OnError;
pub use registry::{Jobs, Start};
pub use status::{JobType, Status, Verb};
pub use stream::{StreamBase, StreamConfig, stream};
pub use transaction::Transaction;
