//! What a process has used so far, read from outside of it. Knows nothing about what the process is.

use std::fs;
use std::path::{Path, PathBuf};

use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::error::{At, Result};

/// A moment's reading. Differences of two readings of one process are meaningful, except for the sizes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Usage {
    /// CPU time in ns, user and system, of all threads including those that have ended (the process's CPU-time clock,
    /// `clock_getcpuclockid(3)`: as exact as the scheduler).
    pub cpu_ns: u64,
    /// Voluntary context switches of the threads that live now.
    pub voluntary_switches: u64,
    /// Resident size in bytes (`VmRSS`).
    pub resident: u64,
    /// Largest resident size so far in bytes (`VmHWM`).
    pub peak_resident: u64,
    /// Number of threads.
    pub threads: u64,
}

/// Reads the usage of process `pid`.
pub fn of(pid: u32) -> Result<Usage> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(pid as i32))
        .at("find the CPU clock of", &directory)?;
    let time = clock_gettime(clock).at("read the CPU clock of", &directory)?;
    let status_path = directory.join("status");
    let status = fs::read_to_string(&status_path).at("read", &status_path)?;
    Ok(Usage {
        cpu_ns: time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64,
        voluntary_switches: switches(&directory)?,
        resident: kib(&status, "VmRSS"),
        peak_resident: kib(&status, "VmHWM"),
        threads: number(&status, "Threads"),
    })
}

fn switches(directory: &Path) -> Result<u64> {
    let tasks = directory.join("task");
    let mut sum = 0;
    for task in fs::read_dir(&tasks).at("list", &tasks)? {
        // A thread may end between the listing and the reading.
        let Ok(status) = task
            .at("list", &tasks)
            .map(|task| fs::read_to_string(task.path().join("status")))
        else {
            continue;
        };
        sum += status.map_or(0, |status| number(&status, "voluntary_ctxt_switches"));
    }
    Ok(sum)
}

/// A field of `/proc/PID/status` that counts KiB, in bytes; 0 when it is not there.
fn kib(status: &str, field: &str) -> u64 {
    number(status, field) * 1024
}

fn number(status: &str, field: &str) -> u64 {
    status
        .lines()
        .find_map(|line| {
            line.strip_prefix(field)?
                .strip_prefix(':')?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let status =
            "VmHWM:\t  2048 kB\nnonvoluntary_ctxt_switches:\t9\nvoluntary_ctxt_switches:\t7\n";
        assert_eq!(kib(status, "VmHWM"), 2048 * 1024);
        assert_eq!(number(status, "voluntary_ctxt_switches"), 7);
        assert_eq!(number(status, "VmRSS"), 0);
    }

    #[test]
    fn cpu_time_of_a_thread_that_has_ended_is_still_counted() {
        let before = of(std::process::id()).unwrap();
        let spin = || {
            let end = Instant::now() + Duration::from_millis(60);
            while Instant::now() < end {
                std::hint::spin_loop();
            }
        };
        std::thread::spawn(spin).join().unwrap();
        let after = of(std::process::id()).unwrap();
        // A busy machine may give the thread less than its 60 ms, but not nearly nothing.
        assert!(
            after.cpu_ns - before.cpu_ns > 5_000_000,
            "{} ns",
            after.cpu_ns - before.cpu_ns
        );
        assert!(after.peak_resident >= after.resident && after.resident > 0);
        assert!(after.threads >= 1);
    }

    #[test]
    fn a_process_that_does_not_exist_is_an_error() {
        assert!(of(u32::MAX / 4).is_err());
    }
}
