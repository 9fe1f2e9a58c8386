//! Commands of a descriptor's driver (IORING_OP_URING_CMD): what they carry, and who hears of their answers. A command
//! may stay with the kernel for as long as the kernel likes, and cannot be cancelled; its memory is the ring's
//! meanwhile. What the commands mean is none of this crate's business.
//!
//! Source: `struct io_uring_sqe` in `include/uapi/linux/io_uring.h`.

use std::rc::Weak;

use crate::buf::Buf;
use crate::current;
use crate::fd::SharedFd;
use crate::op::CancelKey;

/// One command.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// `cmd_op`: which one.
    pub op: u32,
    /// The first bytes of `cmd`; the rest of its 80 bytes is zero.
    pub arguments: [u8; 24],
    /// Whether the driver is told where the memory is: `addr` points to two iovecs (and `len` is 2), of which the first
    /// covers the memory up to the second byte offset here, and the second the rest.
    pub memory: Option<usize>,
}

/// Hears of the answers of commands, on the ring's thread, in its loop, as they are found: it must not block. It may
/// start operations.
pub trait CommandSink {
    /// Command `name` was answered with `result` (a negative errno, or what the driver says); its memory comes back.
    fn completed(&self, name: u32, result: i32, buf: Buf);
}

/// Whether this thread's ring can carry commands: only io_uring can.
pub fn carries_commands() -> bool {
    current::backend() == crate::Backend::Uring
}

/// Gives a command to the driver of `fd`, with the whole of `buf` (bounds, not window) as its memory. `sink` has the
/// answer, under `name`, if it still exists then. On a ring that does not carry commands the answer is ENOSYS.
pub fn command(
    fd: &SharedFd,
    command: Command,
    buf: Buf,
    sink: Weak<dyn CommandSink>,
    name: u32,
) -> CancelKey {
    current::with(|ring| ring.start_command(command, fd, whole(buf), sink, name))
}

/// Gives the next command to the descriptor of one that was answered without an error, for the same sink under the same
/// name. Cheaper than [`command`]. Memory is not told again: `command.memory` is to be `None`.
pub fn command_again(key: CancelKey, command: Command, buf: Buf) {
    current::with(|ring| ring.command_again(key, command, whole(buf)));
}

/// Says that there will be no next command after one that was answered without an error. Does nothing on a thread whose
/// ring is gone.
pub fn end_commands(key: CancelKey) {
    current::try_with(|ring| ring.ops.borrow_mut().end_commands(key));
}

fn whole(mut buf: Buf) -> Buf {
    buf.set_window(0..buf.capacity());
    buf
}

/// Gives memory of a command in flight back to the kernel, from byte `from` on: it is not resident any more and reads as
/// zeroes, until the driver writes to it. False if that cannot be done now. Only for commands whose driver touches their
/// memory nowhere but on the thread that gave them, inside the system call that submits and waits, and which have been
/// submitted in an earlier turn.
pub fn release_command_memory(key: CancelKey, from: usize) -> bool {
    current::with(|ring| ring.release_command_memory(key, from))
}
