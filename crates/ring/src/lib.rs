//! The event loop of diskfuse: one thread, one ring, no sharing.
//!
//! A [`Ring`] belongs to the thread that made it. It owns an io_uring (or, where that is refused, an epoll
//! descriptor and a pool of worker threads), the operations in flight, the thread's tasks and its timers. Operations
//! are futures that own their buffers: see [`read_at`], [`write_at`], [`read_ready`] and their neighbours. Everything
//! that is started in one turn of the loop reaches the kernel with one system call, which also waits.
//!
//! What this crate does *not* do: it knows nothing of disks, image formats or FUSE, it never moves a task between
//! threads, and it never frees memory that the kernel may still write to.
//!
//! # Rules
//! * The free functions of this crate (`read_at`, `spawn`, `sleep`, …) act on the ring that runs on the calling
//!   thread. They panic when there is none, as that is a mistake of the program, not of its input.
//! * An operation starts when its function is called, not when it is first polled.
//! * Dropping the future of an operation that is in flight abandons it: the ring keeps its buffer and descriptor
//!   until the kernel is done with them, then drops both. What the operation did is then unknown.
//! * Other threads reach a ring through its [`Mailbox`] only.

mod awake;
mod buf;
mod command;
mod config;
mod current;
mod driver;
mod epoll;
mod error;
mod fd;
mod inner;
mod mail;
mod op;
mod polling;
mod pool;
mod ring;
mod slice;
mod table;
mod task;
mod thread;
mod timer;
mod uring;
mod waits;
mod words;

pub use buf::{Buf, PAGE};
pub use command::{
    Command, CommandSink, carries_commands, command, command_again, end_commands,
    release_command_memory,
};
pub use config::{Backend, Choice, Config, Counters};
pub use current::{
    backend, counters, is_moving, mailbox, recent_time, spawn, time, urgently, yield_now,
};
pub use error::{Error, Reason};
pub use fd::SharedFd;
pub use mail::{Mailbox, Reply};
pub use op::{
    BufOp, CancelKey, StatusOp, VecOp, cancel, fallocate, fdatasync, fsync, hurry, offload, poll,
    pool_read_at, pool_write_at, read_at, read_cached, read_now, read_ready, readv_at, write_at,
    write_now, writev_at,
};
pub use polling::Polling;
pub use pool::POOL_THREADS;
pub use ring::Ring;
pub use slice::take_short_slices;
pub use task::JoinHandle;
pub use thread::IoThread;
pub use timer::{Sleep, sleep};
pub use waits::Waits;
pub use words::Words;
