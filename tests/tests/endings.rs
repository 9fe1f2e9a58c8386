//! However an export ends, by a signal, from outside or by force, and however busy it is: what was acknowledged is in
//! the image, nothing is left mounted, nobody hangs and nobody spins.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diskfuse_e2e::{
    Bed, Daemon, Fio, Running, Tool, Writers, await_let_go, everywhere, listed, mounts, process,
    wait_until,
};
use rustix::io::Errno;
use rustix::process::Signal;

/// Threads that write, besides fio.
const WRITERS: u64 = 3;
/// Writes of each before something happens.
const UNDER_WAY: u64 = 200;
const SOON: Duration = Duration::from_secs(5);

/// An image with room for the writers, and for fio behind them.
fn image(bed: &Bed) -> PathBuf {
    bed.sparse("i", Writers::space(WRITERS) + (8 << 20))
}

/// fio, busy behind the writers' part for longer than any test.
fn fio(file: &Path) -> Running {
    let offset = format!("--offset={}", Writers::space(WRITERS));
    let options = [
        "--rw=randrw",
        "--ioengine=libaio",
        "--iodepth=16",
        "--direct=1",
        "--bs=4k",
        "--numjobs=2",
        "--size=8m",
        "--time_based",
        "--runtime=50",
        &offset,
    ];
    Fio::new("load", file, &options).start()
}

fn busy(daemon: &Daemon) -> (Running, Writers) {
    let load = fio(daemon.file());
    let writers = Writers::start(daemon.file(), WRITERS);
    writers.wait_for(UNDER_WAY);
    (load, writers)
}

fn qsd(bed: &Bed, image: &Path, threads: u32) -> Daemon {
    let mountpoint = bed.mountpoint("m");
    let node = format!("file,node-name=disk,filename={}", image.display());
    let path = mountpoint.display();
    let export =
        format!("fuse,id=e,node-name=disk,mountpoint={path},writable=on,threads={threads}");
    bed.qsd(&["--blockdev", &node, "--export", &export], &[&mountpoint])
}

fn umount_lazily(path: &Path) {
    Tool::new("umount").arg("-l").arg(path).run();
}

#[test]
fn sigterm_under_load_loses_nothing_and_leaves_nothing() {
    everywhere(|bed| {
        for (signal, threads) in [(Signal::TERM, "1"), (Signal::TERM, "4"), (Signal::INT, "4")] {
            let image = image(bed);
            let mut daemon = bed.mount(&image, &["-w", "--threads", threads]);
            let (load, writers) = busy(&daemon);
            daemon.signal(signal);
            let ended = daemon.ends();
            assert!(ended.status().success(), "{}", ended.output);
            bed.nothing_mounted();
            assert!(
                !bed.path("m").exists(),
                "the mountpoint was made, so it is removed"
            );
            let ends = writers.ended(&image);
            assert!(ends.iter().all(|end| end != "told to"), "{ends:?}");
            drop(load);
        }
    });
}

#[test]
fn sigterm_ends_the_storage_daemon_under_load_within_five_seconds() {
    everywhere(|bed| {
        let image = image(bed);
        let daemon = qsd(bed, &image, 4);
        let (load, writers) = busy(&daemon);
        let ended = daemon.stop();
        assert!(ended.time < SOON, "{:?}", ended.time);
        assert_eq!(ended.output.stdout, "", "silent unless something is wrong");
        assert_eq!(ended.output.stderr, "", "silent unless something is wrong");
        writers.finish(&image);
        drop(load);
        assert!(bed.path("m").exists(), "the mountpoint was there before");
    });
}

#[test]
fn sigterm_waits_for_slow_requests_in_flight() {
    everywhere(|bed| {
        let mountpoint = bed.mountpoint("m");
        let export = format!("fuse,id=e,node-name=n,mountpoint={}", mountpoint.display());
        let node = "null-co,node-name=n,size=1M,latency-ns=700000000";
        let daemon = bed.qsd(&["--blockdev", node, "--export", &export], &[&mountpoint]);
        let file = daemon.open_read_only();
        let reader = std::thread::spawn(move || file.read_at(&mut [1; 4096], 0));
        let in_flight = || listed(bed, &mountpoint).is_some_and(|e| e.number("in_flight") == 1);
        wait_until("the read is in flight", SOON, in_flight);
        daemon.stop();
        wait_until("the reader is answered", SOON, || reader.is_finished());
        assert_eq!(
            reader.join().unwrap().unwrap(),
            4096,
            "what was in flight is served"
        );
    });
}

#[test]
fn a_mount_that_is_taken_away_ends_the_daemon_at_once() {
    everywhere(|bed| {
        let daemon = bed.mount(&image(bed), &["-w"]);
        Tool::new("umount").arg(daemon.file()).run();
        let ended = daemon.ends();
        assert!(ended.time < SOON, "{:?}", ended.time);
        assert!(ended.status().success(), "{}", ended.output);
        assert!(
            ended.output.stderr.contains("unmounted from outside"),
            "{}",
            ended.output
        );
        bed.nothing_mounted();
        assert!(!bed.path("m").exists());
    });
}

#[test]
fn a_busy_mount_that_is_taken_away_serves_its_last_users_and_then_ends() {
    everywhere(|bed| {
        let image = image(bed);
        let mut daemon = bed.mount(&image, &["-w", "--threads", "4"]);
        let (load, writers) = busy(&daemon);
        umount_lazily(daemon.file());
        writers.wait_for(3 * UNDER_WAY);
        assert!(daemon.is_alive(), "those who have it open go on");
        drop(load);
        let ends = writers.finish(&image);
        assert!(ends.iter().all(|end| end == "told to"), "{ends:?}");
        let ended = daemon.ends();
        assert!(ended.status().success(), "{}", ended.output);
        assert!(
            ended.output.stderr.contains("unmounted from outside"),
            "{}",
            ended.output
        );
        bed.nothing_mounted();
    });
}

#[test]
fn a_storage_daemon_whose_mount_is_taken_away_goes_on_without_spinning() {
    everywhere(|bed| {
        let image = image(bed);
        let mut daemon = qsd(bed, &image, 4);
        let (load, writers) = busy(&daemon);
        umount_lazily(daemon.file());
        drop(load);
        let ends = writers.finish(&image);
        assert!(ends.iter().all(|end| end == "told to"), "{ends:?}");
        let path = daemon.file().to_owned();
        wait_until("the export has ended", SOON, || {
            listed(bed, &path).is_none()
        });
        let share = process::cpu_share(daemon.pid(), Duration::from_secs(1));
        assert!(share < 0.05, "uses {share:.2} of a processor for nothing");
        assert!(daemon.is_alive());
        assert!(
            daemon.said().contains("unmounted from outside"),
            "{}",
            daemon.said()
        );
        daemon.stop();
    });
}

#[test]
fn an_aborted_connection_ends_the_daemon_and_fails_its_users() {
    everywhere(|bed| {
        let image = image(bed);
        let daemon = bed.mount(&image, &["-w", "--threads", "4"]);
        let (load, writers) = busy(&daemon);
        assert!(
            mounts::abort(&mounts::at(daemon.file()).unwrap()),
            "no control file to abort with"
        );
        let ended = daemon.ends();
        assert!(
            ended.output.stderr.contains("unmounted from outside"),
            "{}",
            ended.output
        );
        let ends = writers.ended(&image);
        assert!(ends.iter().all(|end| end != "told to"), "{ends:?}");
        let load = load.finish(SOON);
        assert!(!load.status.success(), "{load}");
        bed.nothing_mounted();
    });
}

#[test]
fn a_storage_daemon_whose_connection_is_aborted_goes_on_without_spinning() {
    everywhere(|bed| {
        let image = image(bed);
        let mut daemon = qsd(bed, &image, 2);
        let (load, writers) = busy(&daemon);
        assert!(
            mounts::abort(&mounts::at(daemon.file()).unwrap()),
            "no control file to abort with"
        );
        writers.finish(&image);
        let load = load.finish(SOON);
        assert!(!load.status.success(), "{load}");
        wait_until("the dead mount is gone", SOON, || {
            mounts::below(bed.root()).is_empty()
        });
        let share = process::cpu_share(daemon.pid(), Duration::from_secs(1));
        assert!(share < 0.05, "uses {share:.2} of a processor for nothing");
        assert!(daemon.is_alive());
        daemon.stop();
    });
}

/// A mount whose daemon was killed while it was busy.
fn killed(bed: &Bed) -> PathBuf {
    let image = image(bed);
    let daemon = bed.mount(&image, &["-w", "--threads", "4"]);
    let (load, writers) = busy(&daemon);
    // Forgotten, so that the guard does not take the dead mount away.
    let ended = daemon.end_by(Signal::KILL);
    assert!(!ended.status().success());
    let ends = writers.ended(&image);
    assert!(ends.iter().all(|end| end != "told to"), "{ends:?}");
    let load = load.finish(SOON);
    assert!(!load.status.success(), "{load}");
    is_dead(&bed.path("m"));
    await_let_go(&image);
    image
}

/// Whoever asks while the connection is being taken down may hear another error first.
#[track_caller]
fn is_dead(mountpoint: &Path) {
    wait_until("the mount is dead", SOON, || {
        rustix::fs::stat(mountpoint).err() == Some(Errno::NOTCONN)
    });
}

#[test]
fn after_sigkill_under_load_the_next_mount_works_and_the_image_is_whole() {
    everywhere(|bed| {
        let image = killed(bed);
        let daemon = bed.tool(["mount", "-w"]).args(bed.ground.words());
        let output = daemon.arg(&image).arg(bed.path("m")).run();
        assert_eq!(output.stderr, "");
        bed.adopt(listed(bed, &bed.path("m")).unwrap().number("pid") as u32);
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(bed.path("m"))
            .unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        let mut there = [0; 4096];
        file.read_exact_at(&mut there, 0).unwrap();
        assert_eq!(there, [7; 4096]);
        drop(file);
        assert_eq!(mounts::below(bed.root()).len(), 1, "only the new mount");
        bed.tool(["umount"]).arg(bed.path("m")).run();
        bed.nothing_mounted();
    });
}

#[test]
fn after_sigkill_umount_by_mountpoint_and_by_image_take_the_dead_mount_away() {
    everywhere(|bed| {
        for by_image in [false, true] {
            let image = killed(bed);
            let what = if by_image {
                image.clone()
            } else {
                bed.path("m")
            };
            let output = bed.tool(["umount"]).arg(what).run();
            assert_eq!(output.stderr, "");
            bed.nothing_mounted();
            assert!(bed.path("m").metadata().unwrap().is_file());
            std::fs::remove_file(bed.path("m")).unwrap();
        }
    });
}

#[test]
fn after_sigkill_the_storage_daemon_takes_the_dead_mount_away_too() {
    everywhere(|bed| {
        let image = killed(bed);
        let mountpoint = bed.path("m");
        let node = format!("file,node-name=disk,filename={}", image.display());
        let export = format!(
            "fuse,id=e,node-name=disk,mountpoint={}",
            mountpoint.display()
        );
        let tool = bed.tool([
            "qsd",
            "--daemonize",
            "--event-loop",
            bed.ground.event_loop.name(),
        ]);
        tool.args(["--blockdev", &node, "--export", &export]).run();
        bed.adopt(listed(bed, &mountpoint).unwrap().number("pid") as u32);
        assert_eq!(
            mountpoint.metadata().unwrap().len(),
            image.metadata().unwrap().len()
        );
    });
}

#[test]
fn a_dead_mount_of_another_program_is_left_alone() {
    everywhere(|bed| {
        let image = image(bed);
        let mountpoint = bed.mountpoint("m");
        let node = format!("file,node-name=disk,filename={}", image.display());
        let export = format!(
            "fuse,id=e,node-name=disk,mountpoint={}",
            mountpoint.display()
        );
        let tool = Tool::new("qemu-storage-daemon");
        let mut qemu = tool
            .args(["--blockdev", &node, "--export", &export])
            .start();
        let theirs = || mounts::at(&mountpoint).is_some();
        wait_until("QEMU has mounted", SOON, theirs);
        qemu.signal(Signal::KILL);
        qemu.finish(SOON);
        is_dead(&mountpoint);
        let output = bed.tool(["umount"]).arg(&mountpoint).output();
        output.refused(1, &["is not ours"]);
        let output = bed.tool(["mount"]).arg(&image).arg(&mountpoint).output();
        output.refused(1, &[&*mountpoint.to_string_lossy()]);
        assert_eq!(mounts::at(&mountpoint).unwrap().kind, "fuse", "still there");
    });
}

#[test]
fn a_reader_that_is_killed_while_its_read_is_blocked_dies_and_the_export_goes_on() {
    everywhere(|bed| {
        let mountpoint = bed.mountpoint("m");
        let path = mountpoint.display();
        let export = format!("fuse,id=e,node-name=n,mountpoint={path},threads=2");
        let node = "null-co,node-name=n,size=1M,latency-ns=2000000000";
        let daemon = bed.qsd(&["--blockdev", node, "--export", &export], &[&mountpoint]);
        let source = format!("if={path}");
        let read = || {
            Tool::new("dd")
                .args([&source, "of=/dev/null", "bs=4k", "count=1"])
                .start()
        };
        for signal in [Signal::KILL, Signal::INT] {
            let mut reader = read();
            let in_flight = || listed(bed, &mountpoint).is_some_and(|e| e.number("in_flight") == 1);
            wait_until("the read is in flight", SOON, in_flight);
            let began = Instant::now();
            reader.signal(signal);
            let status = reader.wait(SOON).expect("a reader that can be killed");
            assert!(!status.success());
            assert!(began.elapsed() < SOON);
            let after = read().finish(SOON);
            assert!(after.status.success(), "{after}");
        }
        daemon.stop();
    });
}

#[test]
fn an_idle_daemon_uses_no_processor() {
    everywhere(|bed| {
        let daemon = bed.mount(&image(bed), &["-w", "--threads", "4"]);
        let (load, writers) = busy(&daemon);
        drop(load);
        writers.finish(&bed.path("i"));
        // Threads may look for more for a moment before they sleep.
        std::thread::sleep(Duration::from_millis(200));
        let share = process::cpu_share(daemon.pid(), Duration::from_secs(1));
        assert!(share < 0.05, "uses {share:.2} of a processor for nothing");
        daemon.stop();
    });
}

#[test]
fn a_daemon_that_only_has_its_images_to_close_is_nobody_that_does_not_answer() {
    everywhere(|bed| {
        let mountpoint = bed.mountpoint("m");
        let path = mountpoint.display();
        let export = format!("fuse,id=e,node-name=n,mountpoint={path},writable=on");
        // Each flush takes this long: one for the export, one for the node.
        let node = "null-co,node-name=n,size=1M,latency-ns=3000000000";
        let mut daemon = bed.qsd(&["--blockdev", node, "--export", &export], &[&mountpoint]);
        daemon.signal(Signal::TERM);
        wait_until("it is unmounted", SOON, || {
            mounts::at(&mountpoint).is_none()
        });
        let output = bed.tool(["umount"]).arg(&mountpoint).output();
        output.refused(1, &["is neither shown nor a mountpoint of ours"]);
        assert!(!output.stderr.contains("answer"), "{output}");
        let ended = daemon.ends();
        assert!(ended.status().success());
    });
}
