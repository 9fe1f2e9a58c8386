//! The io_uring backend: everything that one turn of the loop starts goes to the kernel in one `io_uring_enter(2)`,
//! which also waits. It must never be used from another thread (IORING_SETUP_SINGLE_ISSUER).
//!
//! Source of the facts: `include/uapi/linux/io_uring.h`, `io_uring_setup(2)`, `io_uring_enter(2)`.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::squeue::{Entry128 as Sqe, Flags};
use io_uring::types::{CancelBuilder, Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};

use crate::driver::{Done, Nap};
use crate::mail::Postbox;
use crate::op::{Action, CancelKey};
use crate::table::{GENERATIONS, Table};

/// Submission slots. A turn that starts more than this simply enters the kernel twice.
const ENTRIES: u32 = 256;
/// Completion slots; the kernel keeps what does not fit (IORING_FEAT_NODROP).
const COMPLETIONS: u32 = 1024;

/// The two top bits of `user_data`.
const TAG_SHIFT: u32 = 62;
/// An operation of the table.
const TAG_OP: u64 = 0;
/// The poll that an operation's read is linked behind.
const TAG_GATE: u64 = 1;
/// The read of the mailbox's eventfd.
const TAG_BELL: u64 = 2;
/// Answers that nobody waits for (cancellations).
const TAG_NOBODY: u64 = 3;

fn user_data(tag: u64, key: CancelKey) -> u64 {
    tag << TAG_SHIFT | u64::from(key.generation) << 32 | u64::from(key.index)
}

fn key_of(user_data: u64) -> CancelKey {
    CancelKey {
        index: user_data as u32,
        generation: (user_data >> 32) as u32 & GENERATIONS,
    }
}

/// Sets the field `len` of a command, for which the `io-uring` crate has no name.
fn with_length(mut sqe: Sqe, len: u32) -> Sqe {
    /// Where `len` lies in `struct io_uring_sqe`, in bytes.
    const LEN: usize = 24;
    const { assert!(size_of::<Sqe>() == 128) };
    let words: *mut u32 = (&raw mut sqe).cast();
    // SAFETY: the entry is 128 bytes of plain data laid out as the kernel's struct, which is aligned as its u64 fields
    // are, so the u32 at byte 24 is its `len`.
    unsafe { words.add(LEN / size_of::<u32>()).write(len) };
    sqe
}

/// Lets the ring do what [`Uring`] asks of it and nothing else, for ever: system calls that a filter forbids (opening a file,
/// a socket) have operations here that the filter does not see. Then the ring, which was made disabled, may be used.
///
/// Source: io_uring_register(2), `IORING_REGISTER_RESTRICTIONS` (Linux 5.10).
fn restrict(ring: &IoUring<Sqe, cqueue::Entry>) -> io::Result<()> {
    const OPERATIONS: [u8; 9] = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::UringCmd80::CODE,
        opcode::AsyncCancel2::CODE,
    ];
    let flags = Flags::IO_LINK | Flags::SKIP_SUCCESS;
    let mut allowed: Vec<Restriction> = OPERATIONS.map(Restriction::sqe_op).into();
    allowed.push(Restriction::sqe_flags_allowed(flags.bits()));
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()
}

pub(crate) struct Uring {
    ring: IoUring<Sqe, cqueue::Entry>,
    bell: Box<[u8; 8]>,
    bell_armed: bool,
    /// Operations whose cancellation found nothing.
    missed: Vec<CancelKey>,
    /// Writes whose completions nobody waits for, that have not been reaped. They complete as they are submitted.
    unhurried: u32,
    /// The kernel does this ring's work in our system calls only (IORING_SETUP_DEFER_TASKRUN).
    deferred: bool,
    pub(crate) enters: u64,
}

impl Uring {
    /// Sets a ring up with the best flags that this kernel has; entries are of the long kind, which commands need (Linux
    /// 5.19). Measured on 6.18: with DEFER_TASKRUN completions of
    /// other CPUs do not interrupt this one, and TASKRUN_FLAG lets a spinning loop see them without a system call.
    pub(crate) fn new() -> io::Result<Self> {
        let best = IoUring::<Sqe, cqueue::Entry>::builder()
            .setup_cqsize(COMPLETIONS)
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_r_disabled()
            .build(ENTRIES);
        let deferred = best.is_ok();
        let ring = match best {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::<Sqe, cqueue::Entry>::builder()
                    .setup_cqsize(COMPLETIONS)
                    .setup_r_disabled()
                    .build(ENTRIES)?
            }
            other => other?,
        };
        // Linux 5.5, 5.11 and 5.17: without the last a wait for /dev/fuse cannot be linked to its read.
        let has = ring.params();
        if !has.is_feature_nodrop()
            || !has.is_feature_ext_arg()
            || !has.is_feature_skip_cqe_on_success()
        {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        restrict(&ring)?;
        Ok(Self {
            ring,
            bell: Box::new([0; 8]),
            bell_armed: false,
            missed: Vec::new(),
            unhurried: 0,
            deferred,
            enters: 0,
        })
    }

    /// Repeats cancellations that fell between two steps of the kernel: the gate was open, and the read behind it had
    /// not begun to wait.
    /// True if there was one.
    fn cancel_again(&mut self, table: &mut Table) -> bool {
        let mut again = false;
        for key in std::mem::take(&mut self.missed) {
            if table.still_waits(key) {
                self.cancel(key, table);
                again = true;
            }
        }
        again
    }

    /// Queues entries so that they reach the kernel in one submission (links must).
    fn push(&mut self, entries: &[Sqe]) {
        while self.room() < entries.len() {
            // EBUSY and EINTR leave the queue as it is; completions are reaped in the next turn and kept by the
            // kernel until then, so trying again ends.
            if let Err(error) = self.flush() {
                tracing::debug!(%error, "io_uring submission");
            }
        }
        // SAFETY: the memory and descriptors of every entry are owned by the table of operations (or by `self`, for
        // the bell) until the kernel has completed it.
        let pushed = unsafe { self.ring.submission().push_multiple(entries) };
        debug_assert!(pushed.is_ok(), "room was made above");
    }

    fn room(&mut self) -> usize {
        let queue = self.ring.submission();
        queue.capacity() - queue.len()
    }

    pub(crate) fn start(&mut self, key: CancelKey, table: &mut Table) {
        let Some(entry) = table.get(key) else { return };
        let Some(fd) = entry.fd.as_ref().map(|fd| Fd(fd.as_raw_fd())) else {
            return;
        };
        let (base, len) = match &entry.buf {
            Some(buf) => (buf.ptr(), buf.len() as u32),
            None => (std::ptr::null_mut(), 0),
        };
        let (iovecs, count) = (entry.iovecs.as_ptr(), entry.iovecs.len() as u32);
        let sqe = match entry.action {
            Action::Read { offset } => opcode::Read::new(fd, base, len).offset(offset).build(),
            Action::Write { offset } => opcode::Write::new(fd, base, len).offset(offset).build(),
            Action::ReadVec { offset } => {
                opcode::Readv::new(fd, iovecs, count).offset(offset).build()
            }
            Action::WriteVec { offset } => opcode::Writev::new(fd, iovecs, count)
                .offset(offset)
                .build(),
            Action::Sync { data_only } => {
                let flags = if data_only {
                    FsyncFlags::DATASYNC
                } else {
                    FsyncFlags::empty()
                };
                opcode::Fsync::new(fd).flags(flags).build()
            }
            Action::Fallocate { mode, offset, len } => opcode::Fallocate::new(fd, len)
                .offset(offset)
                .mode(mode)
                .build(),
            Action::Poll { events } => opcode::PollAdd::new(fd, events).build(),
            // A position of -1 means the file's own, as read(2) and write(2) have it; pollable files have none.
            Action::WriteNow { urgent } => {
                self.unhurried += u32::from(!urgent);
                opcode::Write::new(fd, base, len).offset(u64::MAX).build()
            }
            Action::ReadReady => {
                let events = (libc::EPOLLIN | libc::EPOLLEXCLUSIVE) as u32;
                let gate = opcode::PollAdd::new(fd, events)
                    .build()
                    .user_data(user_data(TAG_GATE, key))
                    .flags(Flags::IO_LINK | Flags::SKIP_SUCCESS);
                let read = opcode::Read::new(fd, base, len).offset(u64::MAX).build();
                let read = read.user_data(user_data(TAG_OP, key));
                self.push(&[gate.into(), read.into()]);
                return;
            }
            Action::Command(command) => {
                let mut cmd = [0; 80];
                cmd[..command.arguments.len()].copy_from_slice(&command.arguments);
                let sqe = opcode::UringCmd80::new(fd, command.op).cmd(cmd);
                let sqe = match command.memory {
                    None => sqe.build(),
                    Some(_) => with_length(sqe.addr(Some(iovecs.addr() as u64)).build(), count),
                };
                self.push(&[sqe.user_data(user_data(TAG_OP, key))]);
                return;
            }
        };
        self.push(&[sqe.user_data(user_data(TAG_OP, key)).into()]);
    }

    pub(crate) fn cancel(&mut self, key: CancelKey, table: &mut Table) {
        let cancel = |tag| {
            let which = CancelBuilder::user_data(user_data(tag, key));
            let sqe = opcode::AsyncCancel2::new(which).build();
            sqe.user_data(user_data(TAG_NOBODY, key)).into()
        };
        match table.get(key).map(|e| e.action) {
            // The kernel gives a command back when its driver does.
            None | Some(Action::Command(_)) => {}
            // Once the gate is open the read stands alone. If another queue was faster then, it waits by a poll of its
            // own, in spite of O_NONBLOCK.
            Some(Action::ReadReady) => self.push(&[cancel(TAG_GATE), cancel(TAG_OP)]),
            Some(_) => self.push(&[cancel(TAG_OP)]),
        }
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        self.enters += 1;
        self.ring.submit().map(drop)
    }

    /// With DEFER_TASKRUN the kernel does what it has to do for this ring on this thread, in `io_uring_enter` alone.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.deferred
            && self.ring.completion().is_empty()
            && self.ring.submission().is_empty()
            && !self.ring.submission().cq_overflow()
    }

    pub(crate) fn has_news(&mut self) -> bool {
        self.has_completions() || self.ring.submission().taskrun()
    }

    /// Whether something has completed that somebody waits for.
    fn has_completions(&mut self) -> bool {
        self.ring.completion().len() > self.unhurried as usize
    }

    /// Somebody waits for the writes after all.
    pub(crate) fn hurry(&mut self) {
        self.unhurried = 0;
    }

    fn arm_bell(&mut self, home: &Arc<Postbox>) {
        if self.bell_armed {
            return;
        }
        self.bell_armed = true;
        let nobody = CancelKey {
            index: 0,
            generation: 0,
        };
        // Through a poll, as the eventfd is non-blocking and a plain read of it would answer EAGAIN.
        let sqe = opcode::PollAdd::new(Fd(home.bell().as_raw_fd()), libc::POLLIN as u32).build();
        self.push(&[sqe.user_data(user_data(TAG_BELL, nobody)).into()]);
    }

    pub(crate) fn turn(
        &mut self,
        nap: Nap,
        table: &mut Table,
        home: &Arc<Postbox>,
        done: &mut Done,
    ) -> io::Result<()> {
        self.arm_bell(home);
        let mut nap = nap;
        if !self.missed.is_empty() && self.cancel_again(table) {
            nap = Nap::None;
        }
        let has_news = self.has_completions();
        let want = 1 + self.unhurried as usize;
        let entered = match nap {
            _ if has_news => self.flush(),
            Nap::None => {
                if self.ring.submission().is_empty() && !self.ring.submission().taskrun() {
                    Ok(())
                } else {
                    self.enters += 1;
                    self.ring.submit().map(drop)
                }
            }
            Nap::For(time) => {
                self.enters += 1;
                let timespec = Timespec::from(time);
                let args = SubmitArgs::new().timespec(&timespec);
                self.ring
                    .submitter()
                    .submit_with_args(want, &args)
                    .map(drop)
            }
            Nap::Forever => {
                self.enters += 1;
                self.ring.submit_and_wait(want).map(drop)
            }
        };
        match entered.as_ref().err().and_then(io::Error::raw_os_error) {
            // A timer is due, a signal came, or completions must be reaped first: none of them is an error here.
            None | Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
            Some(_) => return entered,
        }
        let mut rang = false;
        self.unhurried = 0;
        for cqe in self.ring.completion() {
            match cqe.user_data() >> TAG_SHIFT {
                TAG_NOBODY if cqe.result() == -libc::ENOENT => {
                    self.missed.push(key_of(cqe.user_data()));
                }
                // A gate speaks only when it fails, and then the kernel says nothing of the read behind it (a failed
                // request with CQE_SKIP_SUCCESS silences its links).
                TAG_OP | TAG_GATE => done.push((key_of(cqe.user_data()), cqe.result())),
                TAG_BELL => rang = true,
                _ => {}
            }
        }
        if rang {
            self.bell_armed = false;
            let _ = rustix::io::read(home.bell(), &mut *self.bell);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use io_uring::types::OpenHow;

    use super::*;

    /// What the ring answers to an entry that no function of [`Uring`] makes.
    fn answer(uring: &mut Uring, sqe: Sqe) -> i32 {
        uring.push(&[sqe]);
        uring.ring.submit_and_wait(1).unwrap();
        let cqe = uring.ring.completion().next();
        cqe.unwrap().result()
    }

    #[test]
    fn a_ring_opens_no_file_makes_no_socket_and_cannot_be_let_loose() {
        let mut uring = Uring::new().unwrap();
        let path = c"/dev/null".as_ptr();
        let at = Fd(libc::AT_FDCWD);
        let how = OpenHow::new();
        let entries: [Sqe; 6] = [
            opcode::OpenAt::new(at, path).build().into(),
            opcode::OpenAt2::new(at, path, &raw const how)
                .build()
                .into(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0)
                .build()
                .into(),
            opcode::UnlinkAt::new(at, path).build().into(),
            opcode::Nop::new().build().into(),
            // A flag that is not ours.
            opcode::PollAdd::new(Fd(0), 0)
                .build()
                .flags(Flags::ASYNC)
                .into(),
        ];
        for sqe in entries {
            assert_eq!(answer(&mut uring, sqe), -libc::EACCES);
        }
        let refused = uring.ring.submitter().register_personality().unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        assert!(restrict(&uring.ring).is_err());
    }
}
