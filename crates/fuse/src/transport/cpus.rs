//! CPUs: how many there may ever be, and which of them a thread runs on.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// One more than the highest number of a CPU that there may ever be: the kernel has so many queues for FUSE over
/// io_uring.
///
/// Source: `fuse_uring_create()` in `fs/fuse/dev_uring.c` (num_possible_cpus), and
/// `Documentation/admin-guide/cputopology.rst`.
pub(crate) fn possible() -> io::Result<u16> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    count(&text).ok_or_else(|| {
        let message = format!("/sys/devices/system/cpu/possible says '{}'", text.trim());
        io::Error::new(io::ErrorKind::InvalidData, message)
    })
}

/// How many CPUs a list such as `0-3,8-11` names.
fn count(list: &str) -> Option<u16> {
    let mut all: u16 = 0;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u16, u16) = (first.parse().ok()?, last.parse().ok()?);
        all = all.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(all)
}

/// The CPUs that the process may use: those of its first thread, which nobody here ever moves. A thread that serves several
/// exports may have been moved by another one.
pub(crate) fn allowed() -> io::Result<CpuSet> {
    Ok(sched_getaffinity(Some(rustix::process::getpid()))?)
}

/// Lets this thread run on those of `wanted` that are among `allowed`; on all of `allowed` if none is.
pub(crate) fn run_on(allowed: &CpuSet, wanted: impl Fn(usize) -> bool) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu) && wanted(cpu)) {
        set.set(cpu);
    }
    let set = if set.count() == 0 { allowed } else { &set };
    // A CPU that went offline meanwhile makes it fail; the thread then stays where it is.
    Ok(sched_setaffinity(None, set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!(count("0\n"), Some(1));
        assert_eq!(count("0-1\n"), Some(2));
        assert_eq!(count("0-3,8-11,16"), Some(9));
        for wrong in ["", "x", "3-1", "0-", "0-70000"] {
            assert_eq!(count(wrong), None, "{wrong}");
        }
        assert!(possible().unwrap() >= 1);
    }

    #[test]
    fn a_thread_runs_where_it_may() {
        let all = allowed().unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|&cpu| all.is_set(cpu)).unwrap();
        run_on(&all, |cpu| cpu == first).unwrap();
        assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
        // A CPU that does not exist leaves it everywhere.
        run_on(&all, |cpu| cpu == 1000).unwrap();
        assert_eq!(sched_getaffinity(None).unwrap(), all);
    }
}
