//! Disk images as people name them: what format a file has, the chain of images below an overlay, and what is done with
//! whole images: told about, mapped, created, converted, resized, committed, rebased.
//!
//! What this crate does *not* do: it prints nothing and starts no threads. I/O runs on the ring of the thread that
//! asks; whoever wants progress told hands in a function.
//!
//! # Rules
//! * An image whose format was guessed is never treated as something that its guest could have made of it: see
//!   [`probed_raw`] and the rules of [`mod@open`].
//! * Every file of a chain is opened through a [`Graph`](diskfuse_block::Graph), so that permissions and image locks
//!   hold for all of them.

pub mod bitmaps;
mod chain;
pub mod commit;
pub mod convert;
pub mod copy;
pub mod create;
pub mod format;
mod header;
pub mod info;
pub mod map;
pub mod name;
pub mod open;
pub mod options;
mod preallocation;
pub mod probed_raw;
pub mod rebase;
pub mod resize;
pub mod session;

pub use format::{Format, Probed};
pub use open::{OpenOptions, Opened, open, open_backing};
pub use preallocation::Preallocation;
