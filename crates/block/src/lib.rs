//! What a disk is: the [`Node`] contract (*resolve, then move*), the named [`graph`] with permissions and drain, image
//! locks that QEMU understands, the drivers `null`, `file`, `host_device` and `raw`, and the filters `throttle` and
//! `blkdebug`.
//!
//! What this crate does *not* do: it knows nothing of FUSE, sockets or command lines, and it starts no threads. I/O
//! runs on the ring ([`diskfuse_ring`]) of the thread that asks for it.
//!
//! # Rules
//! * A range of a disk is [resolved](Node::resolve) first and moved by whoever asked; [`io`] does both for callers
//!   that do not care.
//! * No lock is held across I/O. What must wait for other I/O waits with a waker, never by blocking a thread.
//! * A number that comes from outside is checked before it is used; a mistake in it is an error, never a panic.

pub mod bitmap;
pub mod drivers;
mod error;
pub mod graph;
mod hold;
mod host;
pub mod io;
mod lock;
mod node;
mod permissions;
mod range_queue;
mod threshold;
mod watch;

pub use bitmap::{DirtyBitmap, Recorder};
pub use error::{Error, Kind, Result};
pub use graph::Graph;
pub use hold::{Grace, Hold, Holds, LANES, lane};
pub use host::{Aio, Alignment, HostFile, Opener};
pub use lock::Locking;
pub use node::{
    Access, Allocation, BackingName, BlockStatus, CacheUse, Extent, LetGo, Limits, LocalFuture,
    Node, Resize, Wrap, Zeroes, downcast,
};
pub use permissions::Permissions;
pub use range_queue::{RangeQueue, Turn};
pub use threshold::{Exceeded, Threshold, WriteThreshold};
pub use watch::{Edit, Edited, Watch, Watched};

/// Bytes of a sector: the unit of every disk's size.
pub const SECTOR: u64 = 512;

/// The range `offset..offset + len`, if it lies within a disk of `size` bytes; else [`Kind::Invalid`].
pub(crate) fn check_range(size: u64, offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::new(
            Kind::Invalid,
            format!("{len} bytes at {offset} are not within the disk's {size} bytes"),
        )),
    }
}
