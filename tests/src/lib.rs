//! The harness of the end-to-end tests: starts the real program on real mounts, runs real tools against it with a time
//! limit each, and takes everything away again however a test ends. It must never wait without a limit, never skip a
//! test because a tool is missing, and never touch a process or a mount that a test of this run did not make.
//!
//! A test is written once and runs on every event loop and transport: see [`everywhere`].

// A harness speaks by panicking: that is how a test fails.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bed;
mod binary;
#[cfg(target_arch = "x86_64")]
mod captive;
mod daemon;
mod disks;
mod listing;
mod load;
mod machine;
pub mod mounts;
pub mod process;
mod qmp;
mod raw_io;
mod recipe;
mod stage;
mod terminal;
mod tool;
mod user;
mod writers;

pub use bed::{
    Bed, EventLoop, Ground, Transport, enable_uring, everywhere, on_each, once, once_within,
};
pub use binary::diskfuse;
#[cfg(target_arch = "x86_64")]
pub use captive::{Argument, Call, Captive};
pub use daemon::{Daemon, Ended};
pub use disks::{LoopDevice, SmallFs};
pub use listing::{Listed, await_listed, listed};
pub use load::{Fio, fio_report};
pub use machine::Machine;
pub use qmp::Qmp;
pub use raw_io::{Aligned, pattern};
pub use recipe::{Kitchen, Recipe};
pub use stage::{Stage, as_raw, await_let_go, check_background, check_image};
pub use terminal::Terminal;
pub use tool::{Output, Running, Tool};
pub use user::{Account, User, elsewhere, installed};
pub use writers::{Latencies, Writers};

use std::time::{Duration, Instant};

/// Looks until `done`, at most for `limit`; fails with `what` was waited for.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(
            Instant::now() < end,
            "waited {limit:?} in vain until {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
