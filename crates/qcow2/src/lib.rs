//! The qcow2 format: *resolve, then move*, on every queue at once, and consistent after a crash.
//!
//! What this crate does *not* do: it opens no files by name (it is handed nodes), starts no threads, and knows nothing
//! of FUSE. I/O runs on the ring of the thread that asks for it.
//!
//! Source of all format facts: QEMU's `docs/interop/qcow2` specification.

pub mod bitmaps;
pub mod check;
pub mod create;
pub mod format;
pub mod meta;
pub mod node;
pub mod snapshots;
