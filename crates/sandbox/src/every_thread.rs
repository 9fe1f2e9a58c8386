//! Has every thread of the process do something for itself: one after the other gets a signal, and does it in the handler. It
//! must never wait without a limit, nor miss a thread that is made meanwhile.
//!
//! The kernel's own workers for io_uring are listed as threads as well and never run a handler. They do what rings tell them,
//! and those are restricted to operations on open descriptors.
//!
//! Source: nptl(7), "NPTL and signals", proc_pid_stat(5), `PF_IO_WORKER` in `include/linux/sched.h`.

#![allow(unsafe_code)]

use std::collections::HashSet;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::Error;
use crate::step::Step;

/// How long one thread may take to get to its handler.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a wait looks again.
const TICK: Duration = Duration::from_micros(50);
/// `PF_IO_WORKER | PF_USER_WORKER`.
const KERNELS_OWN: u64 = 0x10 | 0x4000;

/// What the handler does; null while nobody waits for it.
static STEP: AtomicPtr<Step> = AtomicPtr::new(null_mut());
/// How many threads have done it.
static DONE: AtomicU32 = AtomicU32::new(0);

/// A thread, told from a later one of the same number by its start.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Thread {
    id: i32,
    start: u64,
}

/// Has every other thread perform `step`, then the calling one.
pub(crate) fn perform(step: &'static Step) -> Result<(), Error> {
    // Nothing else uses it: the C library keeps the first ones for itself.
    let signal = libc::SIGRTMAX();
    STEP.store(std::ptr::from_ref(step).cast_mut(), Ordering::Release);
    let before =
        handle(signal, on_signal as *const () as libc::sighandler_t).map_err(Error::Threads)?;
    let outcome = others(signal, step);
    STEP.store(null_mut(), Ordering::Release);
    outcome?;
    // On an error the handler stays: a late signal must not end the process in the middle of its end.
    handle(signal, before).map_err(Error::Threads)?;
    step.perform();
    check(step)
}

fn check(step: &Step) -> Result<(), Error> {
    step.failed()
        .map_or(Ok(()), |error| Err(Error::Step(error)))
}

/// Those that are made meanwhile by one that is through inherit what it did; those made by another are found by looking again.
fn others(signal: libc::c_int, step: &Step) -> Result<(), Error> {
    let ours = rustix::thread::gettid().as_raw_nonzero().get();
    let mut through = HashSet::new();
    loop {
        let mut all_through = true;
        for thread in threads().map_err(Error::Threads)? {
            if thread.id != ours && through.insert(thread) {
                all_through = false;
                one(signal, thread.id)?;
                check(step)?;
            }
        }
        if all_through {
            return Ok(());
        }
    }
}

/// Sends the signal to one thread and waits until it is through, or gone.
fn one(signal: libc::c_int, id: i32) -> Result<(), Error> {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    let before = DONE.load(Ordering::Acquire);
    let send = |signal: libc::c_int| {
        // SAFETY: no memory is passed, and the signal has a handler.
        match unsafe { libc::syscall(libc::SYS_tgkill, process, id, signal) } {
            0 => Ok(true),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
                error => Err(Error::Threads(error)),
            },
        }
    };
    let end = Instant::now() + PATIENCE;
    let mut is_there = send(signal)?;
    while is_there && DONE.load(Ordering::Acquire) == before {
        if Instant::now() > end {
            return Err(Error::Silent(id));
        }
        std::thread::sleep(TICK);
        is_there = send(0)?;
    }
    Ok(())
}

extern "C" fn on_signal(_: libc::c_int) {
    let step = STEP.load(Ordering::Acquire);
    if step.is_null() {
        return;
    }
    // SAFETY: the pointer is this thread's errno, which the interrupted code may be about to read.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: it is never freed.
    unsafe { (*step).perform() };
    DONE.fetch_add(1, Ordering::AcqRel);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Sets the handler of a signal and returns the one before.
fn handle(signal: libc::c_int, handler: libc::sighandler_t) -> io::Result<libc::sighandler_t> {
    // SAFETY: all zeroes is a `sigaction`: the default action, no flags, an empty mask.
    let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    new.sa_sigaction = handler;
    new.sa_flags = libc::SA_RESTART;
    // SAFETY: both live through the call; the handler keeps to what handlers may do.
    match unsafe { libc::sigaction(signal, &raw const new, &raw mut old) } {
        0 => Ok(old.sa_sigaction),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The threads that run code of ours.
fn threads() -> io::Result<Vec<Thread>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/task")? {
        let entry = entry?;
        // It may have ended since.
        let Ok(text) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let id = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let thread = id.and_then(|id| parse(id, &text));
        let (thread, flags) = thread.ok_or(io::Error::from(io::ErrorKind::InvalidData))?;
        if flags & KERNELS_OWN == 0 {
            found.push(thread);
        }
    }
    Ok(found)
}

/// What a line of `stat` says of the thread `id`, and its flags.
fn parse(id: i32, text: &str) -> Option<(Thread, u64)> {
    // The name in parentheses may hold anything.
    let (_, rest) = text.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let flags = fields.nth(6)?.parse().ok()?;
    let start = fields.nth(12)?.parse().ok()?;
    Some((Thread { id, start }, flags))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::ErrorKind::PermissionDenied;
    use std::net::TcpStream;
    use std::sync::mpsc::channel;

    use super::*;
    use crate::paths;

    /// Whether nothing is left of what paths and capabilities allowed. There is no filter of system calls in front of them here.
    fn is_shut_in() -> bool {
        let folder = std::env::temp_dir();
        let refused = [
            File::open("/etc/passwd").err(),
            tempfile::tempfile_in(folder).err(),
            TcpStream::connect("127.0.0.1:1").err(),
        ];
        let refused = refused.iter().flatten();
        let refused = refused.filter(|error| error.kind() == PermissionDenied);
        let left = rustix::thread::capabilities(None).unwrap();
        refused.count() == 3 && left.effective.is_empty() && left.permitted.is_empty()
    }

    /// The only test of this crate's library: the process can do nothing afterwards.
    #[test]
    fn all_threads_are_shut_in_whatever_they_wait_for_and_so_are_those_that_come_later() {
        let (answer, answers) = channel();
        let mut threads = Vec::new();
        for index in 0..8 {
            let (go, wait) = channel::<()>();
            let answer = answer.clone();
            threads.push(go);
            std::thread::spawn(move || {
                if index % 2 == 0 {
                    std::thread::sleep(Duration::from_millis(200));
                }
                wait.recv().unwrap();
                let later = std::thread::spawn(is_shut_in);
                answer.send((is_shut_in(), later.join().unwrap())).unwrap();
            });
        }
        assert!(!is_shut_in());
        let rules = paths::none().unwrap();
        assert!(rules.is_some(), "the kernel has no Landlock");
        let step: &Step = Box::leak(Box::new(Step::new(rules.as_ref(), true)));
        perform(step).unwrap();
        for thread in threads {
            thread.send(()).unwrap();
            assert_eq!(answers.recv_timeout(PATIENCE).unwrap(), (true, true));
        }
        assert!(is_shut_in());
    }
}
