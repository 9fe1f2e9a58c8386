//! What the kernel tells about a process: its memory, its processor time and its threads.
//!
//! Source: proc_pid_status(5), proc_pid_stat(5), proc_pid_task(5).

use std::time::Duration;

/// A line of /proc/PID/status in bytes: `VmRSS`, `VmHWM`. Fails when the process is gone.
pub fn memory(pid: u32, field: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {field} in the status of {pid}"));
    let kibibytes: u64 = line
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .expect("a number");
    kibibytes * 1024
}

/// Processor time that all threads of the process have used, in steps of 10 ms.
pub fn cpu_time(pid: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process lives");
    // The name in parentheses may hold blanks.
    let (_, rest) = text.rsplit_once(") ").expect("the name ends");
    let ticks = |index: usize| -> u64 {
        let field = rest.split(' ').nth(index).expect("a field");
        field.parse().expect("a number")
    };
    let per_second = rustix::param::clock_ticks_per_second();
    Duration::from_millis((ticks(11) + ticks(12)) * 1000 / per_second)
}

/// The share of one processor that the process uses during `time`, 1.0 for a whole one.
pub fn cpu_share(pid: u32, time: Duration) -> f64 {
    let before = cpu_time(pid);
    std::thread::sleep(time);
    cpu_time(pid).saturating_sub(before).as_secs_f64() / time.as_secs_f64()
}

/// Whether there is such a process, dead ones that nobody has waited for not counted.
pub fn is_alive(pid: u32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = text
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z' && state != 'X')
}

/// The numbers of the threads that run code of the process: the kernel's own workers for io_uring do not.
pub fn threads(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process lives");
    let tasks = tasks.map(|task| task.expect("an entry"));
    let tasks = tasks.filter(|task| {
        // It may have ended since.
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        !name.is_empty() && !name.starts_with("iou-wrk")
    });
    let number = |name: std::ffi::OsString| name.to_str().and_then(|name| name.parse().ok());
    tasks
        .map(|task| number(task.file_name()).expect("a number"))
        .collect()
}
