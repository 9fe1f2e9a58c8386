//! `diskfuse qsd`, and the same program called `qemu-storage-daemon`: its callers find what they know.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskfuse_e2e::{
    Bed, Qmp, Tool, await_listed, diskfuse, everywhere, listed, mounts, on_each, once, pattern,
    process, wait_until,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

fn node(image: &Path) -> String {
    format!("file,node-name=disk,filename={}", image.display())
}

fn export(id: &str, mountpoint: &Path, more: &str) -> String {
    format!(
        "fuse,id={id},node-name=disk,mountpoint={}{more}",
        mountpoint.display()
    )
}

#[test]
fn an_export_is_usable_within_half_a_second_of_exec() {
    everywhere(|bed| {
        let (image, mountpoint) = (bed.image("i", SIZE), bed.mountpoint("m"));
        // Other tests run beside this one, so one start of many must do.
        let mut times = (0..20).map(|_| {
            let arguments = [
                "--blockdev",
                &node(&image),
                "--export",
                &export("e", &mountpoint, ",threads=4"),
            ];
            let daemon = bed.qsd(&arguments, &[&mountpoint]);
            assert_eq!(mountpoint.metadata().unwrap().len(), SIZE as u64);
            let time = daemon.started_in;
            daemon.stop();
            time
        });
        let is_quick = |time| time < Duration::from_millis(500);
        assert!(times.any(is_quick), "none of 20 starts was quick enough");
    });
}

#[test]
fn key_value_and_json_name_the_same_nodes() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let (a, b) = (bed.mountpoint("a"), bed.mountpoint("b"));
        let path = image.display();
        let first = format!(
            "raw,node-name=one,offset=4k,size=64k,file.driver=file,file.filename={path},file.node-name=below,file.cache.direct=on,read-only=on,file.read-only=on"
        );
        let second = r#"{"driver": "raw", "node-name": "two", "file": "below", "offset": 131072}"#;
        let export = |id: &str, node: &str, at: &Path| {
            format!(
                r#"{{"type": "fuse", "id": "{id}", "node-name": "{node}", "mountpoint": "{}"}}"#,
                at.display()
            )
        };
        let arguments = [
            "--blockdev",
            &first,
            "--blockdev",
            second,
            "--export",
            &export("a", "one", &a),
            "--export",
            &export("b", "two", &b),
        ];
        let daemon = bed.qsd(&arguments, &[&a, &b]);
        assert!(std::fs::read(&a).unwrap() == pattern(SIZE, 1)[4096..][..65_536]);
        assert!(std::fs::read(&b).unwrap() == pattern(SIZE, 1)[131_072..]);
        daemon.stop();
    });
}

#[test]
fn an_export_has_a_queue_for_each_of_its_iothreads() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let mountpoint = bed.mountpoint("m");
        let threads = [
            (",iothread=x", 1),
            (",iothread.0=x,iothread.1=y", 2),
            (
                ",iothread.0=y,iothread.1=x,iothread.2=x,fixed-iothread=on",
                3,
            ),
            (",threads=4", 4),
            ("", 1),
        ];
        for (more, queues) in threads {
            let arguments = [
                "--object",
                "iothread,id=x",
                "--object",
                "iothread,id=y,poll-max-ns=0",
                "--blockdev",
                &node(&image),
                "--export",
                &export("e", &mountpoint, &format!(",writable=on{more}")),
            ];
            let daemon = bed.qsd(&arguments, &[&mountpoint]);
            assert_eq!(
                await_listed(bed, &mountpoint).number("queues"),
                queues,
                "{more}"
            );
            let file = daemon.open();
            file.write_all_at(&[9; 8192], 0).unwrap();
            let mut there = [0; 8192];
            file.read_exact_at(&mut there, 0).unwrap();
            assert_eq!(there, [9; 8192], "{more}");
            drop(file);
            daemon.stop();
        }
    });
}

#[test]
fn called_as_qemu_storage_daemon_it_is_one() {
    everywhere(|bed| {
        let program = bed.path("qemu-storage-daemon");
        std::os::unix::fs::symlink(diskfuse(), &program).unwrap();
        let (image, mountpoint) = (bed.image("i", SIZE), bed.mountpoint("m"));
        let event_loop = format!("--event-loop={}", bed.ground.event_loop.name());
        let tool = Tool::new(&program).arg(event_loop);
        let tool = tool.args([
            "--blockdev",
            &node(&image),
            "--export",
            &export("e", &mountpoint, ""),
        ]);
        let daemon = bed.start(tool, vec![mountpoint.clone()]);
        assert!(std::fs::read(&mountpoint).unwrap() == pattern(SIZE, 1));
        daemon.stop();
        let version = Tool::new(&program).arg("--version").run().stdout;
        assert!(version.contains("qemu-storage-daemon"), "{version}");
        let help = Tool::new(&program).arg("--help").run().stdout;
        for option in [
            "--blockdev",
            "--export",
            "--object",
            "--pidfile",
            "--daemonize",
            "qemu-storage-daemon",
        ] {
            assert!(help.contains(option), "no {option} in {help}");
        }
        let refused = Tool::new(&program)
            .args(["--blockdev", "file,node-name=x"])
            .output();
        refused.refused(
            1,
            &["qemu-storage-daemon: --blockdev file,node-name=x: Parameter 'filename' is missing"],
        );
    });
}

/// Starts it with `--daemonize`; the parent is back, so all is up.
fn daemonize(bed: &Bed, pidfile: &Path) -> (PathBuf, u32) {
    let (image, mountpoint) = (bed.image("i", SIZE), bed.mountpoint("m"));
    let tool = bed.tool([
        "qsd",
        "--daemonize",
        "--event-loop",
        bed.ground.event_loop.name(),
        "--pidfile",
    ]);
    let tool = tool.arg(pidfile).args(["--blockdev", &node(&image)]);
    let output = tool
        .args(["--export", &export("e", &mountpoint, ",writable=on")])
        .run();
    let text =
        std::fs::read_to_string(pidfile).expect("the pidfile is there when the parent is back");
    let pid: u32 = text.trim_end().parse().unwrap();
    bed.adopt(pid);
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("", ""));
    (mountpoint, pid)
}

#[test]
fn daemonize_returns_when_all_is_up_and_the_pidfile_goes_with_the_daemon() {
    everywhere(|bed| {
        let pidfile = bed.path("pid");
        let (mountpoint, pid) = daemonize(bed, &pidfile);
        assert_eq!(mountpoint.metadata().unwrap().len(), SIZE as u64);
        assert_eq!(
            listed(bed, &mountpoint).unwrap().number("pid"),
            u64::from(pid)
        );
        kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::TERM).unwrap();
        wait_until("the daemon has ended", SOON, || !process::is_alive(pid));
        assert!(!pidfile.exists(), "removed at exit");
        bed.nothing_mounted();
    });
}

/// It goes to another folder when all is up.
#[test]
fn a_daemon_finds_again_what_is_named_by_a_relative_path_and_makes_nothing_for_everybody() {
    once(|bed| {
        let (base, top, pidfile) = (bed.path("base"), bed.path("top"), bed.path("pid"));
        let create = Tool::new("qemu-img").args(["create", "-q", "-f", "qcow2"]);
        create.arg(&base).arg("1M").run();
        let chardev = format!(
            "socket,id=c,path={},server=on,wait=off",
            bed.path("qmp").display()
        );
        let tool = bed.tool([
            "qsd",
            "--daemonize",
            "--chardev",
            &chardev,
            "--monitor",
            "c",
        ]);
        let node = "qcow2,node-name=disk,file.driver=file,file.filename=base";
        let tool = tool.args(["--blockdev", node, "--pidfile"]).arg(&pidfile);
        tool.current_dir(bed.root()).run();
        let pid = std::fs::read_to_string(&pidfile).unwrap();
        let pid: u32 = pid.trim_end().parse().unwrap();
        bed.adopt(pid);
        let mut qmp = Qmp::connect(&bed.path("qmp"));
        let snapshot =
            json!({"node-name": "disk", "snapshot-node-name": "top", "snapshot-file": top});
        qmp.run("blockdev-snapshot-sync", snapshot);
        // It is only read from now on.
        Tool::new("qemu-img").arg("check").arg(&base).run();
        let info = Tool::new("qemu-img")
            .args(["info", "-U", "--output=json"])
            .arg(&top);
        let info: Value = serde_json::from_str(&info.run().stdout).unwrap();
        assert_eq!(info["backing-filename"], base.to_str().unwrap());
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
        assert_eq!(mode(&pidfile), 0o600);
        assert_eq!(mode(&bed.path("qmp")), 0o750);
        assert_eq!(mode(&top), 0o640);
        qmp.run("quit", json!({}));
        wait_until("the daemon has ended", SOON, || !process::is_alive(pid));
    });
}

#[test]
fn errors_after_daemonize_reach_the_terminal_and_the_exit_code() {
    everywhere(|bed| {
        let (pidfile, mountpoint) = (bed.path("pid"), bed.mountpoint("m"));
        let tool = bed.tool(["qsd", "--daemonize", "--pidfile"]).arg(&pidfile);
        let tool = tool.args(["--blockdev", &node(&bed.path("missing"))]);
        let output = tool
            .args(["--export", &export("e", &mountpoint, "")])
            .output();
        output.refused(1, &["No such file or directory", "missing"]);
        assert!(!pidfile.exists());
        bed.nothing_mounted();
    });
}

#[test]
fn a_storage_daemon_goes_on_when_its_export_is_unmounted_by_command() {
    everywhere(|bed| {
        let (mountpoint, pid) = daemonize(bed, &bed.path("pid"));
        bed.tool(["umount"]).arg(&mountpoint).run();
        assert!(mounts::at(&mountpoint).is_none());
        assert!(process::is_alive(pid), "it waits for its own end");
    });
}

#[test]
fn two_hundred_exports_share_four_iothreads() {
    const EXPORTS: usize = 200;
    on_each(Duration::from_secs(120), |bed| {
        let mut arguments: Vec<String> = Vec::new();
        for thread in 0..4 {
            arguments.extend(["--object".into(), format!("iothread,id=t{thread}")]);
        }
        let image = bed.image("i", SIZE);
        let file = format!("{},discard=unmap", node(&image));
        arguments.extend(["--blockdev".into(), file]);
        let mut mountpoints = Vec::new();
        for number in 0..EXPORTS {
            let mountpoint = bed.mountpoint(&format!("m{number}"));
            let slice = format!(
                "raw,node-name=n{number},file=disk,offset={},size=4k",
                number * 4096
            );
            let path = mountpoint.display();
            let thread = number % 4;
            let export = format!(
                "fuse,id=e{number},node-name=n{number},mountpoint={path},writable=on,iothread=t{thread}"
            );
            arguments.extend(["--blockdev".into(), slice, "--export".into(), export]);
            mountpoints.push(mountpoint);
        }
        let paths: Vec<&Path> = mountpoints.iter().map(PathBuf::as_path).collect();
        let daemon = bed.qsd(&arguments, &paths);
        let before = process::memory(daemon.pid(), "VmRSS");
        let all = pattern(SIZE, 1);
        for (number, path) in paths.iter().enumerate() {
            assert!(
                std::fs::read(path).unwrap() == all[number * 4096..][..4096],
                "export {number}"
            );
            let file = std::fs::File::options().write(true).open(path).unwrap();
            file.write_all_at(&pattern(4096, 1000 + number as u64), 0)
                .unwrap();
        }
        let after = process::memory(daemon.pid(), "VmRSS");
        let (started, loop_name) = (daemon.started_in, bed.ground.event_loop.name());
        let ended = daemon.stop();
        println!(
            "{EXPORTS} exports on {loop_name}: up after {started:?}, down after {:?}, {} KiB each",
            ended.time,
            after / 1024 / EXPORTS as u64
        );
        assert!(before <= after);
        bed.nothing_mounted();
        let image = std::fs::read(&image).unwrap();
        for number in 0..EXPORTS {
            let there = &image[number * 4096..][..4096];
            assert!(
                there == pattern(4096, 1000 + number as u64),
                "export {number}"
            );
        }
        assert!(image[EXPORTS * 4096..] == all[EXPORTS * 4096..]);
    });
}
