//! What a daemon can do when somebody else has taken it over: each of its threads is made to call what an attacker would, and the
//! kernel's answers are looked at. The same calls without the sandbox show that it is the sandbox that refuses.
//!
//! Whoever takes a process over writes registers, whose names are those of one architecture.
#![cfg(target_arch = "x86_64")]
// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{
    Argument, Bed, Call, Captive, User, everywhere, mounts, once, pattern, process, wait_until,
};
use rustix::process::Signal;

const SIZE: usize = 4 << 20;
const SOON: Duration = Duration::from_secs(20);

/// What an attacker would try. Without the sandbox it does nothing that would hurt the daemon, and the answer is never EPERM.
fn attacks() -> Vec<(&'static str, Call)> {
    let call = |number, arguments: &[Argument]| Call {
        number,
        arguments: arguments.to_vec(),
    };
    macro_rules! attack {
        ($name:literal: $number:expr $(, $argument:expr)*) => {
            ($name, call($number, &[$(Argument::from($argument)),*]))
        };
    }
    let nobody = 0x3fff_ffff_i64;
    let here = i64::from(libc::AT_FDCWD);
    vec![
        attack!("open a file": libc::SYS_openat, here, "/etc/passwd", 0),
        attack!("make a file": libc::SYS_openat, here, "/tmp",
            i64::from(libc::O_TMPFILE | libc::O_RDWR), 0o600),
        attack!("make a Unix socket": libc::SYS_socket, 1, 1, 0),
        attack!("make an internet socket": libc::SYS_socket, 2, 1, 0),
        attack!("connect": libc::SYS_connect, -1, 0, 0),
        attack!("send to somebody": libc::SYS_sendto, -1, 0, 0, 0, 1, 1),
        attack!("start a program": libc::SYS_execve, "/no/such/program", 0, 0),
        attack!("start a program by x32": X32 | 0x208, "/no/such/program", 0, 0),
        attack!("make a process": libc::SYS_clone, 0x800, 0, 0, 0, 0),
        attack!("debug a process": libc::SYS_ptrace, 16, nobody, 0, 0),
        attack!("read another's memory": libc::SYS_process_vm_readv, nobody, 0, 0, 0, 0, 0),
        attack!("signal a process": libc::SYS_kill, nobody, 0),
        attack!("make a ring": libc::SYS_io_uring_setup, 0, 0),
        attack!("change a ring": libc::SYS_io_uring_register, -1, 0, 0, 0),
        attack!("mount": libc::SYS_mount, 0, "/no/such", 0, 0, 0),
        attack!("unmount": libc::SYS_umount2, "/no/such", 0),
        attack!("remove a file": libc::SYS_unlinkat, here, "/no/such", 0),
        attack!("make memory code": libc::SYS_mmap, 0, 4096, 5, 0x22, -1, 0),
        attack!("load a program into the kernel": libc::SYS_bpf, 0, 0, 0),
    ]
}

/// What tells a system call of the x32 ABI from one of x86-64.
const X32: i64 = 0x4000_0000;

/// Makes every thread of a process try everything; what they were answered, 0 for success, by the attack's name.
fn attack(pid: u32) -> BTreeMap<&'static str, Vec<i32>> {
    let captive = Captive::take(pid);
    let answers = attacks().into_iter();
    answers
        .map(|(name, call)| (name, captive.call(&call)))
        .collect()
}

/// The values of a line of `/proc/PID/task/*/status`, one for each thread.
fn of_all_threads(pid: u32, field: &str) -> Vec<String> {
    let value = |text: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.unwrap().trim().to_owned()
    };
    let threads = process::threads(pid).into_iter();
    threads
        .map(|task| {
            value(&std::fs::read_to_string(format!("/proc/{pid}/task/{task}/status")).unwrap())
        })
        .collect()
}

/// In the foreground the file can be used a moment before the sandbox is closed.
#[track_caller]
fn is_sealed(pid: u32) {
    wait_until("the sandbox is closed", SOON, || {
        of_all_threads(pid, "Seccomp")[0] == "2"
    });
    for (field, expected) in [
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("CapEff", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapInh", "0000000000000000"),
    ] {
        let values = of_all_threads(pid, field);
        assert!(values.len() > 2, "threads: {values:?}");
        assert!(
            values.iter().all(|value| value == expected),
            "{field}: {values:?}"
        );
    }
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"))
        .unwrap();
    assert_eq!(
        core.split_whitespace().skip(4).collect::<Vec<_>>(),
        ["1", "1", "bytes"]
    );
}

/// The file is written, made larger, synchronised and read.
fn is_served(file: &Path) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(file)
        .unwrap();
    let (data, at) = (pattern(65536, 7), SIZE as u64 + 512);
    file.write_all_at(&data, at).unwrap();
    file.sync_all().unwrap();
    let mut back = vec![0; data.len()];
    file.read_exact_at(&mut back, at).unwrap();
    assert!(back == data);
}

#[test]
fn no_thread_of_a_daemon_that_was_taken_over_reaches_anything_else() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w", "--growable", "--threads", "2"]);
        is_served(daemon.file());
        is_sealed(daemon.pid());
        for (name, answers) in attack(daemon.pid()) {
            assert!(
                answers.iter().all(|&errno| errno == libc::EPERM),
                "{name}: {answers:?}"
            );
        }
        is_served(daemon.file());
        is_sealed(daemon.pid());
        daemon.stop();
        bed.nothing_mounted();
        assert!(!bed.path("m").exists());
    });
}

#[test]
fn the_same_calls_are_the_kernels_to_answer_without_the_sandbox() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w", "--growable", "--sandbox", "off"]);
        let answers = attack(daemon.pid());
        for name in [
            "open a file",
            "make a file",
            "make a Unix socket",
            "make memory code",
        ] {
            assert!(
                answers[name].iter().all(|&errno| errno == 0),
                "{name}: {answers:?}"
            );
        }
        for (name, answers) in answers {
            assert!(
                answers.iter().all(|&errno| errno != libc::EPERM),
                "{name}: {answers:?}"
            );
        }
        is_served(daemon.file());
        for (field, expected) in [("NoNewPrivs", "0"), ("Seccomp", "0")] {
            let values = of_all_threads(daemon.pid(), field);
            assert!(
                values.iter().all(|value| value == expected),
                "{field}: {values:?}"
            );
        }
        daemon.stop();
    });
}

#[test]
fn a_user_s_daemon_is_sealed_as_well_and_still_unmounts_by_fusermount3() {
    everywhere(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        let tool = user.tool(["mount", "-w", "-f"]).args(bed.ground.words());
        let daemon = bed.start(tool.args(["i", "m"]), vec![user.path("m")]);
        is_sealed(daemon.pid());
        daemon.stop();
        bed.nothing_mounted();
        assert!(!user.path("m").exists());
    });
}

#[test]
fn a_storage_daemon_is_sealed_unless_a_monitor_s_clients_need_more() {
    once(|bed| {
        let mountpoint = bed.mountpoint("m");
        let export = format!(
            "fuse,id=e,node-name=n,writable=on,growable=on,mountpoint={}",
            mountpoint.display()
        );
        let image = bed.image("i", SIZE);
        let node = format!("file,node-name=n,filename={}", image.display());
        let served = ["--blockdev", &node, "--export", &export];
        let pidfile = bed.path("pid");
        let with_pidfile = [&served[..], &["--pidfile", pidfile.to_str().unwrap()]].concat();
        let daemon = bed.qsd(&with_pidfile, &[&mountpoint]);
        wait_until("it is sealed", SOON, || {
            of_all_threads(daemon.pid(), "Seccomp")[0] == "2"
        });
        is_sealed(daemon.pid());
        is_served(&mountpoint);
        daemon.stop();
        bed.nothing_mounted();
        assert!(!pidfile.exists());

        let socket = format!(
            "socket,id=c,path={},server=on,wait=off",
            bed.path("qmp").display()
        );
        let watched = [
            &served[..],
            &["--chardev", &socket, "--monitor", "chardev=c"],
        ]
        .concat();
        let daemon = bed.qsd(&watched, &[&mountpoint]);
        wait_until("it is filtered", SOON, || {
            of_all_threads(daemon.pid(), "Seccomp")[0] == "2"
        });
        let forbidden = [
            "start a program",
            "start a program by x32",
            "make a process",
            "debug a process",
            "read another's memory",
        ];
        for (name, answers) in attack(daemon.pid()) {
            let refused = answers.iter().all(|&errno| errno == libc::EPERM);
            let expected = forbidden.contains(&name) || name.starts_with("load");
            assert_eq!(refused, expected, "{name}: {answers:?}");
        }
        is_served(&mountpoint);
        daemon.stop();
        bed.nothing_mounted();
    });
}

/// The helper of a daemon.
fn helper(bed: &Bed, daemon: u32) -> u32 {
    is_sealed(daemon);
    let children = format!("/proc/{daemon}/task/{daemon}/children");
    let children = std::fs::read_to_string(children).unwrap();
    let helper = children.trim().parse().unwrap();
    bed.adopt(helper);
    helper
}

fn send(pid: u32, signal: Signal) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Takes the dead mount away.
fn heal(bed: &Bed) {
    let path = bed.path("m");
    bed.tool(["umount".as_ref(), path.as_os_str()]).run();
}

#[test]
fn the_helper_outlives_a_signal_to_all_and_ends_with_its_daemon() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let its = helper(bed, daemon.pid());
        // As a service manager does to end a service.
        send(its, Signal::TERM);
        daemon.stop();
        bed.nothing_mounted();
        assert!(!bed.path("m").exists());
        wait_until("the helper has ended", SOON, || !process::is_alive(its));

        let daemon = bed.mount(&image, &["-w"]);
        let its = helper(bed, daemon.pid());
        daemon.end_by(Signal::KILL);
        wait_until("the helper has ended", SOON, || !process::is_alive(its));
        assert!(
            mounts::at(&bed.path("m")).is_some(),
            "a dead mount is for the next command"
        );
        heal(bed);
        bed.nothing_mounted();
    });
}

#[test]
fn without_its_helper_a_daemon_writes_everything_back_and_says_what_it_leaves() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let data = pattern(65536, 9);
        daemon.open().write_all_at(&data, 0).unwrap();
        send(helper(bed, daemon.pid()), Signal::KILL);
        let ended = daemon.end_by(Signal::TERM);
        assert_eq!(ended.status().code(), Some(1), "{}", ended.output);
        assert!(
            ended.output.stderr.contains("helper process"),
            "{}",
            ended.output
        );
        assert!(std::fs::read(&image).unwrap()[..data.len()] == data);
        heal(bed);
        bed.nothing_mounted();
    });
}
