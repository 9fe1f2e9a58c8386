//! How long the scheduler lets a thread run before others have their turn. A thread that asks for short slices gets a CPU sooner
//! when it wakes up, and has no more CPU time than before; that suits who answers people while other threads move data. It must
//! never reach threads that move data: they would be interrupted all the time.
//!
//! The kernel has it since Linux 6.12, for anybody, in `sched_runtime` of sched_setattr(2) for threads of the normal policy; an older
//! one ignores it. Children of a thread have the slice of their parent.
//!
//! Measured on two CPUs that fio and four queues use up (null disk, 4 jobs at depth 32), round trips of a command in the 99th
//! percentile, medians of six rounds: 0.68 ms, with this 0.36 ms; the guests' rate was the same. A lower nice value did the same, but
//! needs a privilege, and some rounds had answers that took 30 to 200 ms.
#![allow(unsafe_code)]

use std::io;

/// The shortest slice that there is, in nanoseconds.
const SHORT: u64 = 100_000;

/// `struct sched_attr` as Linux 3.14 had it, which all later ones take.
/// Source: `include/uapi/linux/sched/types.h`, `SCHED_ATTR_SIZE_VER0`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const SIZE: u32 = size_of::<Attributes>() as u32;

/// Asks for short slices for the calling thread: one that seldom has much to do, and that somebody waits for. What the kernel
/// or a container does not allow is left as it is.
pub fn take_short_slices() {
    change(|attributes| attributes.runtime = SHORT);
}

/// The calling thread moves data: it has the usual slices, also if it was made by a thread with short ones.
pub(crate) fn take_usual_slices() {
    change(|attributes| {
        if attributes.runtime == SHORT {
            attributes.runtime = 0;
        }
    });
}

fn change(what: impl FnOnce(&mut Attributes)) {
    let changed = get().and_then(|before| {
        let mut after = before;
        what(&mut after);
        // Whoever has chosen another policy for the process has decided.
        match before.policy == libc::SCHED_OTHER as u32 && after.runtime != before.runtime {
            true => set(&after),
            false => Ok(()),
        }
    });
    if let Err(error) = changed {
        tracing::debug!(%error, "the scheduler's slices stay as they are");
    }
}

fn get() -> io::Result<Attributes> {
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes at most `SIZE` bytes, which the value has. It is about the calling thread (0), without flags.
    let outcome =
        unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, SIZE, 0) };
    match outcome {
        0 => Ok(attributes),
        _ => Err(io::Error::last_os_error()),
    }
}

fn set(attributes: &Attributes) -> io::Result<()> {
    let attributes = Attributes {
        size: SIZE,
        ..*attributes
    };
    // SAFETY: the kernel reads `size` bytes, which the value has. It is about the calling thread (0), without flags.
    let outcome = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::{Config, IoThread};

    /// Whether the kernel has slices of one's own.
    fn slices() -> bool {
        thread::spawn(|| {
            take_short_slices();
            get().is_ok_and(|attributes| attributes.runtime == SHORT)
        })
        .join()
        .unwrap()
    }

    #[test]
    fn threads_with_rings_have_the_usual_slices_whoever_makes_them() {
        if !slices() {
            println!("the kernel has no slices of one's own (Linux 6.12 has)");
            return;
        }
        let usual = get().unwrap();
        assert_ne!(usual.runtime, SHORT);
        let made = thread::spawn(|| {
            take_short_slices();
            // Children have it by themselves.
            let child = thread::spawn(|| get().unwrap()).join().unwrap();
            assert_eq!(child.runtime, SHORT);
            IoThread::spawn("usual", Config::default()).unwrap()
        });
        let made = made.join().unwrap();
        let look = || async { get().unwrap() };
        let there = made.mailbox().call(look).wait().unwrap();
        assert_eq!((there.runtime, there.nice), (usual.runtime, usual.nice));
    }

    #[test]
    fn what_else_was_chosen_for_a_thread_stays() {
        let after = thread::spawn(|| {
            rustix::process::setpriority_process(None, 7).unwrap();
            take_short_slices();
            let short = get().unwrap();
            take_usual_slices();
            (short.nice, get().unwrap().nice)
        });
        assert_eq!(after.join().unwrap(), (7, 7));
    }
}
