//! How a ring is made, and what it tells of itself.

use std::time::Duration;

use crate::polling::Polling;

/// Which way to the kernel to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// io_uring if the kernel lets us, else epoll.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// epoll and worker threads.
    Epoll,
}

/// Which way to the kernel is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// io_uring.
    Uring,
    /// epoll and worker threads.
    Epoll,
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Uring => "io_uring",
            Self::Epoll => "epoll",
        })
    }
}

/// How to make a ring.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The way to the kernel.
    pub choice: Choice,
    /// Busy-polling before a sleep.
    pub polling: Polling,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            choice: Choice::Auto,
            polling: Polling::OFF,
        }
    }
}

/// What a loop has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Turns of the loop.
    pub turns: u64,
    /// System calls to submit and to wait (io_uring) or to wait (epoll).
    pub enters: u64,
    /// Operations started.
    pub operations: u64,
    /// Time in which there was nothing to do, spent spinning or asleep.
    pub idle: Duration,
}
