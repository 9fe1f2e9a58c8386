//! What serving costs the daemon: system calls per request, and memory. The figures are promises to users; each test
//! prints what it saw (`cargo test -- --nocapture`).

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]
// Ratios of small counts.
#![allow(clippy::cast_precision_loss)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use diskfuse_e2e::{
    Bed, Daemon, EventLoop, Fio, Tool, Transport, everywhere, fio_report, process, wait_until,
};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

/// Counts are taken one after the other: a tracer slows the other one's daemon down.
static ALONE: Mutex<()> = Mutex::new(());

fn null(bed: &Bed, threads: u32) -> Daemon {
    let mountpoint = bed.mountpoint("m");
    let path = mountpoint.display();
    let export = format!("fuse,id=e,node-name=n,mountpoint={path},writable=on,threads={threads}");
    let node = "null-co,node-name=n,size=1G,read-zeroes=on";
    bed.qsd(&["--blockdev", node, "--export", &export], &[&mountpoint])
}

/// Runs fio for a fixed number of reads and returns how many there were.
fn reads(file: &Path, engine: &str, depth: u32, number: u64) -> u64 {
    let depth = format!("--iodepth={depth}");
    let engine = format!("--ioengine={engine}");
    let number = format!("--number_ios={number}");
    let options = [
        "--rw=randread",
        "--direct=1",
        "--bs=4k",
        "--size=1g",
        &depth,
        &engine,
        &number,
    ];
    fio_report(&Fio::new("reads", file, &options).run())["read"]["total_ios"]
        .as_u64()
        .unwrap()
}

/// System calls of the daemon while `work` runs, by name.
fn count_calls<T>(
    daemon: &Daemon,
    bed: &Bed,
    work: impl FnOnce() -> T,
) -> (BTreeMap<String, u64>, T) {
    let table = bed.path("calls");
    let tool = Tool::new("strace").args(["-f", "-c", "-p", &daemon.pid().to_string(), "-o"]);
    let mut strace = tool.arg(&table).start();
    let attached = || strace.stderr().contains("attached");
    wait_until("strace is attached", Duration::from_secs(10), attached);
    let result = work();
    strace.signal(Signal::INT);
    strace.finish(Duration::from_secs(10));
    let text = std::fs::read_to_string(table).unwrap();
    // % time, seconds, usecs/call, calls, [errors,] syscall
    let rows = text
        .lines()
        .skip(2)
        .take_while(|line| !line.starts_with("---"));
    let calls: BTreeMap<String, u64> = rows
        .map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            (
                fields[fields.len() - 1].to_owned(),
                fields[3].parse().unwrap(),
            )
        })
        .collect();
    assert!(!calls.is_empty(), "{text}");
    (calls, result)
}

/// System calls per request with `work`'s number of requests.
fn calls_per_request(bed: &Bed, daemon: &Daemon, what: &str, work: impl FnOnce() -> u64) -> f64 {
    let (calls, requests) = count_calls(daemon, bed, work);
    let total: u64 = calls.values().sum();
    let each = total as f64 / requests as f64;
    println!(
        "{what}, {}: {each:.2} system calls per request: {calls:?}",
        bed.ground.event_loop.name()
    );
    each
}

#[test]
fn a_request_at_depth_one_costs_two_system_calls_on_io_uring_and_no_more_at_depth() {
    const REQUESTS: u64 = 4000;
    /// Opening, closing, attributes, and what was under way when the count began.
    const AROUND: f64 = 80.0;
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    everywhere(|bed| {
        let daemon = null(bed, 1);
        let file = daemon.file();
        reads(file, "psync", 1, 500);
        let single = calls_per_request(bed, &daemon, "depth 1", || {
            reads(file, "psync", 1, REQUESTS)
        });
        let deep = calls_per_request(bed, &daemon, "depth 64", || {
            reads(file, "libaio", 64, 4 * REQUESTS)
        });
        // The promise is io_uring's; epoll has to ask the kernel for each thing one by one.
        let promised = 2.0 + AROUND / REQUESTS as f64;
        assert!(
            bed.ground.event_loop == EventLoop::Epoll || single <= promised,
            "{single:.3} per request at depth 1"
        );
        // On io_uring with the device each costs about one, so neither is surely the smaller one.
        let device = (EventLoop::Uring, Transport::Device);
        let slack = match (bed.ground.event_loop, bed.ground.transport) == device {
            true => 0.1,
            false => 0.0,
        };
        assert!(
            deep < single + slack,
            "{deep:.3} at depth, {single:.3} at depth 1"
        );
        daemon.stop();
    });
}

#[test]
fn an_idle_daemon_with_four_queues_takes_20_mib_at_most_and_64_under_load() {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    everywhere(|bed| {
        let image = bed.sparse("i", 64 << 20);
        let daemon = bed.mount(&image, &["-w", "--threads", "4"]);
        let file = daemon.open_read_only();
        let idle = process::memory(daemon.pid(), "VmRSS");
        load(daemon.file(), "randread", "4k", 64);
        load(daemon.file(), "randwrite", "4k", 64);
        let peak = process::memory(daemon.pid(), "VmHWM");
        let after = process::memory(daemon.pid(), "VmRSS");
        drop(file);
        let name = bed.ground.event_loop.name();
        println!(
            "{name}: idle {} KiB, peak {} KiB, afterwards {} KiB",
            idle >> 10,
            peak >> 10,
            after >> 10
        );
        assert!(idle <= 20 * MIB, "{} KiB idle", idle >> 10);
        assert!(peak <= 64 * MIB, "{} KiB at the peak", peak >> 10);
        daemon.stop();
    });
}

/// Four jobs at this depth for a second.
fn load(file: &Path, rw: &str, block: &str, depth: u32) {
    let (rw, block) = (format!("--rw={rw}"), format!("--bs={block}"));
    let depth = format!("--iodepth={depth}");
    let options = [
        "--ioengine=libaio",
        "--direct=1",
        "--numjobs=4",
        "--size=64m",
        "--time_based",
        "--runtime=1",
        &rw,
        &block,
        &depth,
    ];
    Fio::new("load", file, &options).run();
}

#[test]
fn memory_stays_bounded_under_large_requests() {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    everywhere(|bed| {
        let image = bed.sparse("i", 64 << 20);
        let daemon = bed.mount(&image, &["-w", "--threads", "4"]);
        for rw in ["read", "write"] {
            load(daemon.file(), rw, "1m", 32);
        }
        let first = process::memory(daemon.pid(), "VmHWM");
        for rw in ["read", "write", "randread", "randwrite"] {
            load(daemon.file(), rw, "1m", 32);
        }
        let later = process::memory(daemon.pid(), "VmHWM");
        let name = bed.ground.event_loop.name();
        println!(
            "{name}: 1 MiB at depth 32, 4 jobs: peak {} KiB, later {} KiB",
            first >> 10,
            later >> 10
        );
        // 128 requests of a MiB can be under way, each with its buffer.
        assert!(later <= (128 + 64) * MIB, "{} KiB at the peak", later >> 10);
        daemon.stop();
    });
}

#[test]
fn epoll_needs_no_io_uring_and_io_uring_no_epoll() {
    let _alone = ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", 1 << 20), &["--threads", "2"]);
        let (calls, ()) = count_calls(&daemon, bed, || {
            std::fs::read(daemon.file()).unwrap();
        });
        let has = |name: &str| calls.keys().any(|call| call.starts_with(name));
        let uring = bed.ground.event_loop == EventLoop::Uring;
        assert_eq!(
            (has("io_uring_enter"), has("epoll_")),
            (uring, !uring),
            "{calls:?}"
        );
        daemon.stop();
    });
}
