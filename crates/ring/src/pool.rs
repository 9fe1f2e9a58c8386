//! Worker threads for what may block: file I/O where there is no io_uring (or where a node asks for threads), and
//! calls that have no asynchronous form. One pool for the whole process, grown on demand to a fixed size. Workers
//! never touch tasks or tables; they send what they did to the ring that asked.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::mail::{Letter, Postbox};
use crate::op::{Action, CancelKey};
use crate::table::Entry;

/// The most worker threads of one process. A disk is kept busy by a handful; QEMU's pool has 64, of which a file on
/// one disk gains nothing past this.
pub const POOL_THREADS: usize = 16;

/// Memory of an operation in flight, on its way to a worker.
struct Memory {
    base: *mut libc::c_void,
    len: usize,
}

// SAFETY: the memory belongs to the entry of an operation in flight, which nobody touches until the worker has sent
// `Letter::Done` for it; a ring outlives everything that is in flight.
unsafe impl Send for Memory {}

enum Job {
    Run(Box<dyn FnOnce() + Send>),
    Io {
        action: Action,
        fd: RawFd,
        memory: Memory,
        key: CancelKey,
        home: Arc<Postbox>,
    },
}

struct Shared {
    sender: Sender<Job>,
    receiver: Receiver<Job>,
    threads: AtomicUsize,
    /// Jobs that are queued or being done: never more than there are threads, unless there are as many as may be. So none waits
    /// behind one that blocks.
    jobs: AtomicUsize,
}

/// A ring's access to the pool of the process.
#[derive(Clone)]
pub(crate) struct Pool(&'static Shared);

static POOL: OnceLock<Shared> = OnceLock::new();

impl Pool {
    pub(crate) fn of_the_process() -> Self {
        Self(POOL.get_or_init(|| {
            let (sender, receiver) = unbounded();
            Shared {
                sender,
                receiver,
                threads: AtomicUsize::new(0),
                jobs: AtomicUsize::new(0),
            }
        }))
    }

    /// Runs a closure on a worker.
    pub(crate) fn run(&self, work: Box<dyn FnOnce() + Send>) {
        self.send(Job::Run(work));
    }

    /// Does a file operation on a worker, which then sends [`Letter::Done`].
    pub(crate) fn io(&self, key: CancelKey, entry: &Entry, home: &Arc<Postbox>) {
        let Some(fd) = &entry.fd else { return };
        let memory = match (&entry.buf, entry.iovecs.as_slice()) {
            (Some(buf), _) => Memory {
                base: buf.ptr().cast(),
                len: buf.len(),
            },
            (None, iovecs) => Memory {
                base: iovecs.as_ptr().cast_mut().cast(),
                len: iovecs.len(),
            },
        };
        self.send(Job::Io {
            action: entry.action,
            fd: fd.as_raw_fd(),
            memory,
            key,
            home: Arc::clone(home),
        });
    }

    fn send(&self, job: Job) {
        let jobs = self.0.jobs.fetch_add(1, Ordering::SeqCst) + 1;
        // The receiver lives as long as the process, so sending cannot fail.
        let _ = self.0.sender.send(job);
        if jobs > self.0.threads.load(Ordering::SeqCst) {
            self.grow();
        }
    }

    fn grow(&self) {
        let shared = self.0;
        let below = |n: usize| (n < POOL_THREADS).then_some(n + 1);
        if shared
            .threads
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, below)
            .is_err()
        {
            return;
        }
        let spawned = std::thread::Builder::new()
            .name("diskfuse-worker".into())
            .stack_size(256 << 10)
            .spawn(move || work(shared));
        if let Err(error) = spawned {
            let left = shared.threads.fetch_sub(1, Ordering::SeqCst) - 1;
            if left == 0 {
                tracing::error!(%error, "no worker thread can be made; blocking work is done in place");
                while let Ok(job) = shared.receiver.try_recv() {
                    shared.perform(job);
                }
            }
        }
    }
}

fn work(shared: &'static Shared) {
    while let Ok(job) = shared.receiver.recv() {
        shared.perform(job);
    }
}

impl Shared {
    fn perform(&self, job: Job) {
        do_job(job);
        self.jobs.fetch_sub(1, Ordering::SeqCst);
    }
}

fn do_job(job: Job) {
    match job {
        Job::Run(work) => work(),
        Job::Io {
            action,
            fd,
            memory,
            key,
            home,
        } => {
            let result = perform(action, fd, &memory);
            // A ring waits for everything in flight before it ends.
            let _ = home.send(Letter::Done(key, result));
        }
    }
}

/// Does one blocking file operation; a count or a negative errno.
fn perform(action: Action, fd: RawFd, memory: &Memory) -> i32 {
    let at = |offset: u64| i64::try_from(offset).map_err(|_| rustix::io::Errno::INVAL);
    // SAFETY: the entry of the operation keeps the descriptor open until the worker has answered.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let count = loop {
        // SAFETY: base and length describe the buffer (or the array of iovecs) of the operation in flight, which
        // stays valid and unaliased until the worker has answered; see `Memory`.
        let count = unsafe {
            match action {
                Action::Read { offset } => match at(offset) {
                    Ok(at) => libc::pread(fd, memory.base, memory.len, at),
                    Err(errno) => return -errno.raw_os_error(),
                },
                Action::Write { offset } => match at(offset) {
                    Ok(at) => libc::pwrite(fd, memory.base, memory.len, at),
                    Err(errno) => return -errno.raw_os_error(),
                },
                Action::ReadVec { offset } => match at(offset) {
                    Ok(at) => libc::preadv(fd, memory.base.cast(), memory.len as libc::c_int, at),
                    Err(errno) => return -errno.raw_os_error(),
                },
                Action::WriteVec { offset } => match at(offset) {
                    Ok(at) => libc::pwritev(fd, memory.base.cast(), memory.len as libc::c_int, at),
                    Err(errno) => return -errno.raw_os_error(),
                },
                Action::Sync { data_only: true } => libc::fdatasync(fd) as isize,
                Action::Sync { data_only: false } => libc::fsync(fd) as isize,
                Action::Fallocate { mode, offset, len } => {
                    let flags = rustix::fs::FallocateFlags::from_bits_retain(mode as u32);
                    return match rustix::fs::fallocate(borrowed, flags, offset, len) {
                        Ok(()) => 0,
                        Err(errno) => -errno.raw_os_error(),
                    };
                }
                Action::Poll { .. }
                | Action::ReadReady
                | Action::WriteNow { .. }
                | Action::Command(_) => {
                    return -libc::EINVAL;
                }
            }
        };
        let errno = std::io::Error::last_os_error()
            .raw_os_error()
            .unwrap_or(libc::EIO);
        match (count, errno) {
            (-1, libc::EINTR) => {}
            (-1, errno) => return -errno,
            (count, _) => break count,
        }
    };
    // One call moves at most 0x7fff_f000 bytes (read(2)).
    i32::try_from(count).unwrap_or(i32::MAX)
}
