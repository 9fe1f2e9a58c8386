//! The FUSE export: shows a block node as one regular file, mounted on a regular file, or several as the files of a
//! directory (`tree.rs`), with one queue per thread.
//!
//! What this crate does *not* do: it knows no image formats and no command lines, it makes no threads, and it never
//! answers success before it is true.
//!
//! # The way of a request
//! The fetcher of a queue (`queue/fetch.rs`) reads it from `/dev/fuse` into a slot (`slot.rs`), parses it
//! (`request.rs`) and wakes the slot's task (`queue/serve.rs`), which performs it (`ops/`) and writes the reply. With FUSE
//! over io_uring it arrives in an entry (`transport/uring.rs`), whose memory the slot borrows until the answer has gone
//! back (`queue/ring.rs`). All of that happens on one thread; queues share only what is in `shared.rs`.

pub mod abi;
mod attributes;
mod content;
mod error;
mod export;
mod file;
mod fusermount;
mod handshake;
mod latency;
mod mount;
mod ops;
mod passthrough;
mod queue;
mod request;
mod right;
mod shared;
mod shown;
mod slot;
mod transport;
mod tree;
mod trouble;
mod unmount;
mod watch;

pub use attributes::Ownership;
pub use error::{Error, Result};
pub use export::Export;
pub use latency::{Latencies, LatencyClass, RequestKind};
pub use mount::{FS_TYPE, MountEntry, abort, absolute, heal, is_dead, mounts};
pub use passthrough::Passthrough;
pub use request::{Malformed, Name, Operation, Request, Setattr, parse};
pub use shared::{AllowOther, DEFAULT_MAX_BACKGROUND, End, ExportOptions, QueueStats, Stats};
pub use transport::{Placement, Transport, TransportOptions};
pub use tree::{Entry, MOST_FILES, Refresh, Tree};
pub use trouble::OnError;
pub use unmount::{Manner, Unmounter, unmount};
pub use watch::{Watch, When};
