//! How requests come from the kernel: which way is chosen and what is said of it, every CPU is served by however many
//! threads there are, requests larger than an entry holds are split, and what goes wrong on the way falls back or is refused
//! with the reason, without a mount that hangs.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use diskfuse_e2e::{
    Bed, Daemon, Fio, Listed, Tool, await_listed, diskfuse, enable_uring, everywhere, mounts, once,
    pattern, process, wait_until,
};
use rustix::process::Signal;

const SIZE: usize = 4 << 20;
const SOON: Duration = Duration::from_secs(20);

/// What some tests change is the machine's: they run alone.
static MACHINE: RwLock<()> = RwLock::new(());

fn with_others() -> RwLockReadGuard<'static, ()> {
    let guard = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
    enable_uring(true);
    guard
}

fn alone() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write().unwrap_or_else(PoisonError::into_inner)
}

/// Puts something of the machine back, also when the test fails.
struct PutBack<F: FnMut()>(F);

impl<F: FnMut()> Drop for PutBack<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

fn transport(bed: &Bed, daemon: &Daemon) -> String {
    let listed: Listed = await_listed(bed, daemon.file());
    listed.text("transport").to_owned()
}

/// The numbers of the CPUs that are online.
fn cpus() -> Vec<usize> {
    let all = rustix::thread::sched_getaffinity(None).unwrap();
    (0..1024).filter(|&cpu| all.is_set(cpu)).collect()
}

/// Reads and writes from one CPU.
fn use_from(cpu: usize, file: &Path, offset: usize, bytes: &[u8]) {
    let of = format!("of={}", file.display());
    let dir = file.parent().unwrap();
    let (data, back) = (dir.join("data"), dir.join("back"));
    std::fs::write(&data, bytes).unwrap();
    let (len, at) = (bytes.len(), offset / bytes.len());
    let run = |arguments: &[&str]| {
        let tool = Tool::new("taskset").args(["-c", &cpu.to_string(), "dd", "status=none"]);
        tool.arg(format!("bs={len}"))
            .arg("count=1")
            .args(arguments)
            .run();
    };
    let input = format!("if={}", data.display());
    run(&[&input, &of, &format!("seek={at}"), "conv=notrunc"]);
    let (input, output) = (
        format!("if={}", file.display()),
        format!("of={}", back.display()),
    );
    run(&[&input, &output, &format!("skip={at}")]);
    assert_eq!(std::fs::read(&back).unwrap(), bytes, "from CPU {cpu}");
}

#[test]
fn auto_takes_the_ring_where_it_is_and_the_device_where_the_event_loop_is_epoll() {
    let _shared = with_others();
    once(|bed| {
        let image = bed.image("i", SIZE);
        for (event_loop, expected) in [("auto", "uring"), ("epoll", "device")] {
            let options = ["-f", "--event-loop", event_loop];
            let tool = bed
                .tool(["mount"])
                .args(options)
                .arg(&image)
                .arg(bed.path("m"));
            let daemon = bed.start(tool, vec![bed.path("m")]);
            assert_eq!(transport(bed, &daemon), expected);
            assert_eq!(std::fs::read(daemon.file()).unwrap(), pattern(SIZE, 1));
            daemon.stop();
        }
        let mountpoint = bed.path("m");
        let wish = ["mount", "--event-loop", "epoll", "--transport", "uring"];
        let output = bed.tool(wish).arg(&image).arg(&mountpoint).output();
        output.refused(1, &["transport=uring", "stand on io_uring"]);
        bed.nothing_mounted();
        assert!(!mountpoint.exists(), "it was made, so it is removed");
    });
}

#[test]
fn where_it_is_switched_off_the_device_is_used_and_the_remedy_said() {
    let _alone = alone();
    enable_uring(false);
    let _on_again = PutBack(|| enable_uring(true));
    once(|bed| {
        let image = bed.image("i", SIZE);
        let log = ["--transport", "auto", "--log", "info"];
        let daemon = bed.mount(&image, &log);
        assert_eq!(transport(bed, &daemon), "device");
        assert!(daemon.said().contains("echo Y > "), "{}", daemon.said());
        daemon.stop();
        let tool = bed.tool(["mount", "--transport", "uring"]);
        let output = tool.arg(&image).arg(bed.path("m")).output();
        output.refused(
            1,
            &[
                "switched off",
                "echo Y > /sys/module/fuse/parameters/enable_uring",
            ],
        );
        bed.nothing_mounted();
    });
}

#[test]
fn every_cpu_is_served_whether_threads_are_fewer_or_more_and_wherever_they_run() {
    let _shared = with_others();
    everywhere(|bed| {
        let placements: [&[&str]; 5] = [
            &[],
            &["--placement", "pinned"],
            &["--placement", "spread"],
            &["--placement", "free"],
            &["--cpus", "0"],
        ];
        for threads in ["1", "2", "7"] {
            for placement in placements {
                let image = bed.image("i", SIZE);
                let options = [&["-w", "--threads", threads], placement].concat();
                let daemon = bed.mount(&image, &options);
                for cpu in cpus() {
                    let bytes = pattern(64 << 10, cpu as u64 + 7);
                    use_from(cpu, daemon.file(), (cpu % 8) * (64 << 10), &bytes);
                }
                daemon.stop();
            }
        }
    });
}

#[test]
fn one_entry_and_the_smallest_payload_serve_large_requests_and_many_callers() {
    let _shared = with_others();
    everywhere(|bed| {
        for options in [
            ["--depth", "1"],
            ["--max-payload", "4k"],
            ["--max-payload", "1M"],
        ] {
            let image = bed.image("i", SIZE);
            let daemon = bed.mount(&image, &[&["-w"], options.as_slice()].concat());
            let file = daemon.open();
            assert_eq!(std::fs::read(daemon.file()).unwrap(), pattern(SIZE, 1));
            if options[1] == "4k" {
                let reads = await_listed(bed, daemon.file()).number("reads");
                assert!(reads >= SIZE as u64 / 4096, "{reads} reads are too large");
            }
            let bytes = pattern(3 << 20, 5);
            file.write_all_at(&bytes, 1 << 19).unwrap();
            let mut back = vec![0; bytes.len()];
            file.read_exact_at(&mut back, 1 << 19).unwrap();
            assert!(back == bytes, "{options:?}");
            let load = [
                "--rw=randrw",
                "--ioengine=libaio",
                "--iodepth=32",
                "--direct=1",
                "--bs=4k",
            ];
            let time = ["--numjobs=4", "--size=4m", "--time_based", "--runtime=1"];
            Fio::new("load", daemon.file(), &[load.as_slice(), &time].concat()).run();
            drop(file);
            daemon.stop();
        }
    });
}

#[test]
fn options_that_cannot_be_are_refused_and_nothing_is_mounted() {
    let _shared = with_others();
    once(|bed| {
        let image = bed.image("i", SIZE);
        let cases: [(&[&str], &str); 6] = [
            (&["--max-payload", "1000"], "multiple of 4096"),
            (&["--max-payload", "0"], "multiple of 4096"),
            (&["--max-payload", "3G"], "max_pages_limit"),
            (&["--cpus", "x"], "--cpus x"),
            (&["--cpus", "2-1"], "--cpus 2-1"),
            (&["--depth", "1025"], "1..=1024"),
        ];
        for (options, words) in cases {
            let tool = bed.tool(["mount"]).args(options);
            let output = tool.arg(&image).arg(bed.path("m")).output();
            assert!(!output.status.success(), "{options:?}: {output}");
            assert!(output.stderr.contains(words), "{options:?}: {output}");
            bed.nothing_mounted();
            assert_eq!(bed.names(), ["i"]);
        }
    });
}

#[test]
fn without_memory_for_the_entries_the_device_is_used_or_the_mount_refused() {
    let _shared = with_others();
    once(|bed| {
        let image = bed.image("i", SIZE);
        // Entries of all CPUs at this depth take more address space than the process has.
        let mount = |transport: &str| {
            let limit = Tool::new("prlimit")
                .arg("--as=1000000000:1000000000")
                .arg(diskfuse());
            let options = ["mount", "-f", "--depth", "1024", "--max-payload", "1M"];
            let ways = ["--threads", "2", "--transport", transport];
            limit
                .args(options)
                .args(ways)
                .arg(&image)
                .arg(bed.path("m"))
        };
        let daemon = bed.start(mount("auto"), vec![bed.path("m")]);
        assert_eq!(transport(bed, &daemon), "device");
        assert!(daemon.said().contains("no memory"), "{}", daemon.said());
        for cpu in cpus() {
            let read = Tool::new("taskset").args(["-c", &cpu.to_string(), "cmp"]);
            read.arg(&image).arg(daemon.file()).run();
        }
        daemon.stop();
        let output = mount("uring").output();
        output.refused(1, &["transport=uring", "no memory"]);
        bed.nothing_mounted();
    });
}

#[test]
fn a_cpu_that_is_offline_or_comes_online_is_served() {
    let _alone = alone();
    enable_uring(true);
    let switch = Path::new("/sys/devices/system/cpu/cpu1/online");
    assert!(
        switch.exists(),
        "this test needs a second CPU that can be switched off"
    );
    let _online_again = PutBack(|| drop(std::fs::write(switch, "1")));
    once(|bed| {
        for placement in ["auto", "pinned", "spread"] {
            let image = bed.image("i", SIZE);
            std::fs::write(switch, "0").unwrap();
            let options = [
                "-w",
                "--transport",
                "uring",
                "--threads",
                "2",
                "--placement",
                placement,
            ];
            let daemon = bed.mount(&image, &options);
            use_from(0, daemon.file(), 0, &pattern(64 << 10, 3));
            std::fs::write(switch, "1").unwrap();
            for cpu in [0, 1] {
                use_from(
                    cpu,
                    daemon.file(),
                    64 << 10,
                    &pattern(64 << 10, 4 + cpu as u64),
                );
            }
            std::fs::write(switch, "0").unwrap();
            use_from(0, daemon.file(), 128 << 10, &pattern(64 << 10, 9));
            std::fs::write(switch, "1").unwrap();
            daemon.stop();
        }
    });
}

#[test]
fn an_export_whose_mount_was_taken_away_lazily_ends_though_its_file_is_open() {
    let _shared = with_others();
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let file = daemon.open();
        Tool::new("umount").arg("-l").arg(daemon.file()).run();
        bed.nothing_mounted();
        let mut page = [0; 4096];
        file.read_exact_at(&mut page, 0).unwrap();
        assert!(page[..] == pattern(SIZE, 1)[..4096]);
        let ended = daemon.end_by(Signal::TERM);
        assert!(ended.status().success(), "{}", ended.output);
        assert!(file.read_at(&mut page, 0).is_err());
    });
}

#[test]
fn memory_of_large_requests_is_given_back_when_nothing_comes() {
    let _alone = alone();
    everywhere(|bed| {
        let image = bed.sparse("i", 64 << 20);
        let daemon = bed.mount(&image, &["-w", "--threads", "2"]);
        let options = [
            "--ioengine=libaio",
            "--direct=1",
            "--bs=1m",
            "--iodepth=16",
            "--numjobs=2",
        ];
        for rw in ["--rw=read", "--rw=write"] {
            Fio::new(
                "load",
                daemon.file(),
                &[options.as_slice(), &[rw, "--size=64m"]].concat(),
            )
            .run();
        }
        let resident = || process::memory(daemon.pid(), "VmRSS");
        let small = || resident() < 24 << 20;
        wait_until("memory is given back", SOON, small);
        // And what comes then is right.
        let file = daemon.open();
        let bytes = pattern(1 << 20, 3);
        file.write_all_at(&bytes, 0).unwrap();
        let mut back = vec![1; 2 << 20];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back[..1 << 20] == bytes[..]);
        drop(file);
        daemon.stop();
    });
}

#[test]
fn a_connection_that_is_aborted_again_and_again_under_load_never_hangs() {
    let _shared = with_others();
    everywhere(|bed| {
        for _ in 0..5 {
            let image = bed.sparse("i", 16 << 20);
            let daemon = bed.mount(&image, &["-w", "--threads", "2"]);
            let options = [
                "--rw=randrw",
                "--ioengine=libaio",
                "--iodepth=64",
                "--direct=1",
                "--bs=4k",
            ];
            let time = ["--numjobs=4", "--size=16m", "--time_based", "--runtime=30"];
            let load =
                Fio::new("load", daemon.file(), &[options.as_slice(), &time].concat()).start();
            std::thread::sleep(Duration::from_millis(300));
            assert!(mounts::abort(&mounts::at(daemon.file()).unwrap()));
            let load = load.finish(SOON);
            assert!(!load.status.success(), "{load}");
            let ended = daemon.ends();
            assert!(ended.status().success(), "{}", ended.output);
            bed.nothing_mounted();
        }
    });
}

#[test]
fn where_the_kernel_refuses_io_uring_altogether_everything_works_without_it() {
    const SYSCTL: &str = "/proc/sys/kernel/io_uring_disabled";
    let _alone = alone();
    enable_uring(true);
    let before = std::fs::read_to_string(SYSCTL).unwrap();
    std::fs::write(SYSCTL, "2").unwrap();
    let _allowed_again = PutBack(|| drop(std::fs::write(SYSCTL, before.trim())));
    once(|bed| {
        let image = bed.image("i", SIZE);
        let tool = bed.tool(["mount", "-f"]).arg(&image).arg(bed.path("m"));
        let daemon = bed.start(tool, vec![bed.path("m")]);
        assert_eq!(transport(bed, &daemon), "device");
        assert_eq!(std::fs::read(daemon.file()).unwrap(), pattern(SIZE, 1));
        daemon.stop();
        let tool = bed.tool(["mount", "--transport", "uring"]);
        let output = tool.arg(&image).arg(bed.path("m")).output();
        output.refused(1, &["transport=uring", "stand on io_uring"]);
        bed.nothing_mounted();
    });
}

#[test]
fn requests_are_as_large_as_the_kernel_allows() {
    const SYSCTL: &str = "/proc/sys/fs/fuse/max_pages_limit";
    let _alone = alone();
    let before = std::fs::read_to_string(SYSCTL).unwrap();
    std::fs::write(SYSCTL, "1024").unwrap();
    let _as_before = PutBack(|| drop(std::fs::write(SYSCTL, before.trim())));
    everywhere(|bed| {
        let image = bed.image("i", 8 << 20);
        let daemon = bed.mount(&image, &[]);
        let read = Tool::new("dd").args(["bs=4M", "iflag=direct", "status=none"]);
        let (from, to) = (daemon.file().display(), bed.path("copy"));
        read.arg(format!("if={from}"))
            .arg(format!("of={}", to.display()))
            .run();
        assert!(std::fs::read(&to).unwrap() == pattern(8 << 20, 1));
        let reads = await_listed(bed, daemon.file()).number("reads");
        assert_eq!(reads, 2, "of 4 MiB each; the end is known");
        daemon.stop();
    });
}

/// The CPUs that each queue's thread may run on, in the order of the queues.
fn places(daemon: &Daemon) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
    let status =
        tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let field = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap().trim().to_owned()
    };
    let queues = status.map(|text| (field(&text, "Name:"), field(&text, "Cpus_allowed_list:")));
    let mut queues: Vec<_> = queues
        .filter(|(name, _)| name.starts_with("queue"))
        .collect();
    queues.sort();
    queues.into_iter().map(|(_, list)| list).collect()
}

#[test]
fn threads_run_where_they_are_told_to() {
    let _alone = alone();
    enable_uring(true);
    once(|bed| {
        let (first, last) = (cpus()[0], *cpus().last().unwrap());
        assert!(first != last, "this test needs two CPUs");
        let run = |options: &[&str], expected: [&str; 2]| {
            let ways = ["--transport", "uring", "--threads", "2"];
            let daemon = bed.mount(&bed.image("i", SIZE), &[ways.as_slice(), options].concat());
            // They take their places when the kernel has been answered, which is after the mount.
            let what = format!("{options:?} gives {expected:?}");
            wait_until(&what, SOON, || places(&daemon) == expected);
            daemon.stop();
        };
        let (one, other) = (first.to_string(), last.to_string());
        run(&["--cpus", &other], [&other, &other]);
        run(&["--cpus", &format!("{other},{one}")], [&other, &one]);
        if cpus() == [0, 1] {
            run(&["--placement", "pinned"], ["0", "1"]);
            run(&["--placement", "spread"], ["1", "0"]);
            run(&["--placement", "free"], ["0-1", "0-1"]);
        }
    });
}

#[test]
fn threads_that_are_all_busy_are_pinned_by_themselves() {
    let _alone = alone();
    enable_uring(true);
    once(|bed| {
        let image = bed.sparse("i", 16 << 20);
        let daemon = bed.mount(&image, &["--transport", "uring", "--threads", "2"]);
        let before = places(&daemon);
        let options = [
            "--rw=randread",
            "--ioengine=psync",
            "--direct=1",
            "--bs=4k",
            "--size=16m",
        ];
        let time = [
            "--numjobs=4",
            "--time_based",
            "--runtime=20",
            "--cpus_allowed=0-1",
            "--cpus_allowed_policy=split",
        ];
        let load = Fio::new("load", daemon.file(), &[options.as_slice(), &time].concat()).start();
        wait_until("the threads are pinned", SOON, || {
            let now = places(&daemon);
            now.iter().all(|place| place.len() == 1) && now[0] != now[1]
        });
        assert!(before.iter().all(|place| place.len() > 1), "{before:?}");
        drop(load);
        daemon.stop();
    });
}
