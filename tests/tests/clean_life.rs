//! The life of a daemon that others depend on: who is in the way of an unmount is said, idle exports go by themselves, the
//! service manager hears what it has to, and whatever happens on the way leaves nothing behind.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::{Duration, Instant};

use diskfuse_e2e::{
    Bed, LoopDevice, Tool, await_listed, everywhere, listed, mounts, once, pattern, process,
    wait_until,
};
use rustix::process::Signal;

const SIZE: usize = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

#[test]
fn who_uses_a_file_is_named_and_left_alone() {
    everywhere(|bed| {
        let mut daemon = bed.mount(&bed.image("i", SIZE), &["-w"]);
        await_listed(bed, daemon.file());
        let mut tail = Tool::new("tail").arg("-f").arg(daemon.file()).start();
        let path = daemon.file().to_owned();
        let umount = || bed.tool(["umount"]).arg(&path).output();
        let named = format!("process {} (tail) has it open", tail.pid());
        wait_until("tail has opened it", SOON, || has_open(tail.pid(), &path));
        umount().refused(1, &["is in use", &named, "--lazy", "--force"]);
        assert!(tail.is_alive() && daemon.is_alive());
        assert!(
            std::fs::read(&path).unwrap() == pattern(SIZE, 1),
            "it is as it was"
        );
        tail.signal(Signal::KILL);
        tail.finish(SOON);
        umount_soon(bed, &path);
        daemon.ends();
        bed.nothing_mounted();
    });
}

/// Whether a process has opened the file.
fn has_open(pid: u32, path: &Path) -> bool {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    entries
        .flatten()
        .any(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| to == path))
}

/// Unmounts; who has been killed holds the file for a moment still.
fn umount_soon(bed: &Bed, path: &Path) {
    bed.tool(["umount", "--wait", "--timeout", "20"])
        .arg(path)
        .run();
}

#[test]
fn mappings_and_loop_devices_are_named_too() {
    once(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &["-w"]);
        await_listed(bed, daemon.file());
        let device = LoopDevice::over(daemon.file());
        let output = bed.tool(["umount"]).arg(daemon.file()).output();
        output.refused(
            1,
            &[
                "is in use",
                &format!("loop device {}", device.path().display()),
            ],
        );
        drop(device);
        umount_soon(bed, daemon.file());
        daemon.ends();
    });
}

#[test]
fn umount_waits_for_the_users_if_it_is_told_to() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &[]);
        await_listed(bed, daemon.file());
        let file = daemon.open_read_only();
        let in_vain = ["umount", "--wait", "--timeout", "1"];
        let began = Instant::now();
        let output = bed.tool(in_vain).arg(daemon.file()).output();
        output.refused(1, &["is in use"]);
        assert!(
            began.elapsed() >= Duration::from_millis(800),
            "{:?}",
            began.elapsed()
        );
        let mut waiting = bed.tool(["umount", "--wait"]).arg(daemon.file()).start();
        assert!(
            waiting.wait(Duration::from_millis(300)).is_none(),
            "it waits"
        );
        drop(file);
        assert!(waiting.finish(SOON).status.success());
        daemon.ends();
        bed.nothing_mounted();
    });
}

#[test]
fn a_lazy_umount_takes_the_name_away_and_lets_users_finish() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let mut daemon = bed.mount(&image, &["-w"]);
        await_listed(bed, daemon.file());
        let file = daemon.open();
        bed.tool(["umount", "--lazy"]).arg(daemon.file()).run();
        bed.nothing_mounted();
        file.write_all_at(&[7; 4096], 0).unwrap();
        file.sync_all().unwrap();
        assert!(daemon.is_alive());
        drop(file);
        let ended = daemon.ends();
        assert!(ended.status().success(), "{}", ended.output);
        assert_eq!(ended.output.stderr, "", "nobody else took it away");
        assert_eq!(std::fs::read(&image).unwrap()[..4096], [7; 4096]);
    });
}

#[test]
fn a_forced_umount_keeps_what_was_written_and_fails_what_comes_after() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        await_listed(bed, daemon.file());
        let file = daemon.open();
        file.write_all_at(&[7; 4096], 0).unwrap();
        bed.tool(["umount", "--force"]).arg(daemon.file()).run();
        bed.nothing_mounted();
        assert!(file.read_at(&mut [0; 512], 0).is_err());
        daemon.ends();
        assert_eq!(std::fs::read(&image).unwrap()[..4096], [7; 4096]);
    });
}

#[test]
fn a_daemon_that_does_not_answer_is_cut_off_by_force_only() {
    everywhere(|bed| {
        let mut daemon = bed.mount(&bed.image("i", SIZE), &[]);
        let path = daemon.file().to_owned();
        await_listed(bed, &path);
        daemon.signal(Signal::STOP);
        let output = bed.tool(["umount"]).arg(&path).output();
        output.refused(1, &["does not answer"]);
        assert!(mounts::at(&path).is_some());
        let output = bed.tool(["umount", "--force"]).arg(&path).run();
        assert!(
            output.stderr.contains("cut off from its daemon"),
            "{output}"
        );
        bed.nothing_mounted();
        daemon.signal(Signal::CONT);
        daemon.ends();
    });
}

#[test]
fn an_export_that_nobody_uses_goes_by_itself() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &["-w", "--idle-timeout", "1"]);
        let file = daemon.open();
        let end = Instant::now() + Duration::from_millis(1800);
        while Instant::now() < end {
            file.read_at(&mut [0; 512], 0).unwrap();
            std::thread::sleep(Duration::from_millis(100));
        }
        // Open and silent is not idle.
        std::thread::sleep(Duration::from_millis(1500));
        assert!(mounts::at(daemon.file()).is_some());
        file.write_all_at(&[7; 512], 0).unwrap();
        drop(file);
        let closed = Instant::now();
        let ended = daemon.ends();
        assert!(ended.status().success(), "{}", ended.output);
        assert!(
            closed.elapsed() >= Duration::from_millis(500),
            "{:?}",
            closed.elapsed()
        );
        bed.nothing_mounted();
        assert!(!bed.path("m").exists());
        assert_eq!(std::fs::read(bed.path("i")).unwrap()[..512], [7; 512]);
    });
}

/// What the daemon tells the service manager, message by message.
struct Manager(UnixDatagram);

impl Manager {
    fn new(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        Self(socket)
    }

    fn hears(&self) -> String {
        let mut words = [0; 4096];
        let count = self.0.recv(&mut words).expect("the daemon says something");
        String::from_utf8_lossy(&words[..count]).into_owned()
    }
}

#[test]
fn the_service_manager_hears_of_readiness_life_and_end() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let manager = Manager::new(&bed.path("notify"));
        let notify = format!("NOTIFY_SOCKET={}", bed.path("notify").display());
        let tool = Tool::new("env").args([notify.as_str(), "WATCHDOG_USEC=400000"]);
        let tool = tool.arg(diskfuse_e2e::diskfuse()).args(["mount", "-f"]);
        let tool = tool.args(bed.ground.words()).arg(&image).arg(bed.path("m"));
        let mut daemon = bed.start(tool, vec![bed.path("m")]);
        let ready = manager.hears();
        assert!(ready.contains("READY=1\n"), "{ready}");
        assert!(
            ready.contains(&format!("MAINPID={}\n", daemon.pid())),
            "{ready}"
        );
        assert!(
            ready.contains(&format!("STATUS=Showing {} as ", image.display())),
            "{ready}"
        );
        for _ in 0..3 {
            assert_eq!(manager.hears(), "WATCHDOG=1\n");
        }
        daemon.signal(Signal::TERM);
        let mut said = manager.hears();
        while said == "WATCHDOG=1\n" {
            said = manager.hears();
        }
        assert!(said.starts_with("STOPPING=1\n"), "{said}");
        daemon.ends();
        std::fs::remove_file(bed.path("notify")).unwrap();
    });
}

#[test]
fn the_manager_never_hears_that_what_failed_is_ready() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let manager = Manager::new(&bed.path("notify"));
        let notify = format!("NOTIFY_SOCKET={}", bed.path("notify").display());
        let tool = Tool::new("env").arg(notify).arg(diskfuse_e2e::diskfuse());
        // Refused when the daemon is there already and the image is open.
        let tool = tool.args(["mount", "-f", "--mode", "640"]);
        let output = tool.arg(&image).arg(bed.path("m")).output();
        output.refused(1, &["allow-other"]);
        manager.0.set_nonblocking(true).unwrap();
        let mut words = [0; 4096];
        while let Ok(count) = manager.0.recv(&mut words) {
            let said = String::from_utf8_lossy(&words[..count]);
            assert!(!said.contains("READY"), "{said}");
        }
        std::fs::remove_file(bed.path("notify")).unwrap();
    });
}

#[test]
fn in_the_background_the_manager_hears_of_the_daemon() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let manager = Manager::new(&bed.path("notify"));
        let notify = format!("NOTIFY_SOCKET={}", bed.path("notify").display());
        let tool = Tool::new("env").arg(notify).arg(diskfuse_e2e::diskfuse());
        tool.arg("mount").arg(&image).arg(bed.path("m")).run();
        let pid = await_listed(bed, &bed.path("m")).number("pid") as u32;
        bed.adopt(pid);
        assert!(manager.hears().contains(&format!("MAINPID={pid}\n")));
        bed.tool(["umount"]).arg(bed.path("m")).run();
        assert!(manager.hears().starts_with("STOPPING=1\n"));
    });
}

#[test]
fn a_signal_at_any_moment_of_the_start_leaves_nothing() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        for delay in (0..40).map(|step| Duration::from_micros(step * 700)) {
            let tool = bed.tool(["mount", "-f"]).args(bed.ground.words());
            let mut daemon = tool.arg(&image).arg(bed.path("m")).start();
            std::thread::sleep(delay);
            daemon.signal(Signal::TERM);
            // The kernel's part of an unmount has been seen to take many seconds on a busy machine.
            daemon.finish(2 * SOON);
            bed.nothing_mounted();
            assert!(!bed.path("m").exists(), "after {delay:?}");
        }
    });
}

#[test]
fn the_log_goes_to_its_file_from_the_background_too() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let log = bed.path("log");
        let tool = bed.tool(["mount", "--log", "info", "--log-file"]).arg(&log);
        let output = tool.arg(&image).arg(bed.path("m")).run();
        assert_eq!(output.stderr, "");
        let pid = await_listed(bed, &bed.path("m")).number("pid") as u32;
        bed.adopt(pid);
        Tool::new("kill").arg(pid.to_string()).run();
        wait_until("the daemon has ended", SOON, || !process::is_alive(pid));
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("ending"), "{text}");
        assert!(!text.contains('\x1b'), "no colours in a file");
    });
}

#[test]
fn the_socket_of_a_dead_daemon_is_no_daemon() {
    once(|bed| {
        let mut daemon = bed.mount(&bed.image("i", SIZE), &[]);
        let path = daemon.file().to_owned();
        await_listed(bed, &path);
        let socket = format!("/run/diskfuse/{}.sock", daemon.pid());
        assert!(Path::new(&socket).exists());
        daemon.signal(Signal::KILL);
        daemon.ends();
        assert!(listed(bed, &path).is_none());
        assert!(
            !Path::new(&socket).exists(),
            "whoever asks first removes it"
        );
        wait_until("the mount is dead", SOON, || File::open(&path).is_err());
        bed.tool(["umount"]).arg(&path).run();
        bed.nothing_mounted();
        std::fs::remove_file(path).unwrap();
    });
}
