//! `throttle`: a filter that holds requests back until the limits of a group, which several nodes may share, allow them.
//! It never changes what a request does, and never blocks a thread.
//!
//! The limits are those of QEMU's `throttle-group` (its `docs/throttle.txt`): leaky buckets for bytes and for operations
//! a second, of all requests or of reads and writes on their own, with bursts. Discards and writes of zeroes count as
//! writes of their length; a flush is never held back.
//!
//! While a node is drained ([`Node::let_go`](crate::Node::let_go)) its requests pass at once, though they are counted: a
//! drain ends as soon as the disk allows.

mod bucket;
mod group;
mod node;

pub use bucket::{Rate, Rates, ThrottleLimits};
pub use group::ThrottleGroup;
pub use node::{ThrottleNode, open_throttle};
