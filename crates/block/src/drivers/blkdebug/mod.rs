//! `blkdebug`: a filter that fails requests by rules, for tests of whatever is above it. What no rule speaks of goes on
//! to the node below as if it were not there.
//!
//! The rules are those of QEMU's driver of the same name (`docs/devel/testing/blkdebug.rst` there; what the text leaves
//! open was tried out on QEMU 10). In QEMU the node above says what it is about to do, so that `read_aio` is guest data
//! and `l2_load` is a table; here the node only sees what reaches it: every read is a `read_aio`, every write a
//! `write_aio` and a `pwritev`.

mod node;
mod rules;

pub use node::{BlkdebugConfig, BlkdebugNode, open_blkdebug};
pub use rules::{Event, InjectError, IoType, SetState};
