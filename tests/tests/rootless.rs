//! What an ordinary user gets: everything but what the kernel keeps for root, by fusermount3 or in a namespace of his own;
//! and what he is told where something is missing, with nothing left behind.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{
    Bed, Output, Tool, User, await_let_go, elsewhere, everywhere, mounts, once, pattern, process,
    wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

const SIZE: usize = 4 << 20;
const SOON: Duration = Duration::from_secs(20);

/// `diskfuse mount` of `i` on `m`, both in his home; returns the daemon's process id.
fn mount(bed: &Bed, user: &User, options: &[&str]) -> u32 {
    let tool = user.tool(["mount"]).args(bed.ground.words()).args(options);
    let output = tool.args(["i", "m"]).run();
    assert_eq!(output.stderr, "");
    let daemon = list(user)[0]["pid"].as_u64().unwrap() as u32;
    bed.adopt(daemon);
    daemon
}

fn list(user: &User) -> Vec<Value> {
    let said = user.tool(["list", "--json"]).run().stdout;
    serde_json::from_str(&said).unwrap()
}

fn gone(daemon: u32) {
    wait_until("the daemon has ended", SOON, || !process::is_alive(daemon));
}

/// He was refused with each of `words`, and his home is as it was.
fn refused(bed: &Bed, user: &User, output: &Output, words: &[&str]) {
    output.refused(1, words);
    bed.nothing_mounted();
    assert!(!user.path("m").exists(), "left behind");
    assert_eq!(list(user), [Value::Null; 0]);
}

#[test]
fn a_user_shows_an_image_writes_to_it_and_takes_it_away() {
    everywhere(|bed| {
        let user = User::new(bed);
        let image = user.image("i", SIZE);
        let daemon = mount(bed, &user, &["-w", "--threads", "3"]);
        let shown = mounts::at(&user.path("m")).unwrap();
        assert_eq!(shown.kind, "fuse.diskfuse");
        for option in ["nosuid", "nodev", "noatime", "default_permissions"] {
            assert!(
                shown.options.split(',').any(|there| there == option),
                "{shown:?}"
            );
        }
        assert!(
            shown.options.contains(&format!("user_id={},", user.id)),
            "{shown:?}"
        );
        let export = &list(&user)[0];
        assert_eq!(export["image"].as_str(), image.to_str());
        assert_eq!(export["transport"], bed.ground.transport.name());
        assert_eq!(export["queues"], 3);
        let copy = ["dd", "if=m", "of=copy", "bs=64k", "status=none"];
        user.run(copy).run();
        assert!(std::fs::read(user.path("copy")).unwrap() == pattern(SIZE, 1));
        let write = [
            "dd",
            "if=copy",
            "of=m",
            "bs=64k",
            "skip=1",
            "count=1",
            "conv=notrunc,fsync",
        ];
        user.run(write).run();
        // Without allow-other the kernel keeps even root out.
        let root = std::fs::read(user.path("m")).unwrap_err();
        assert_eq!(root.kind(), std::io::ErrorKind::PermissionDenied);
        user.tool(["umount", "m"]).run();
        gone(daemon);
        bed.nothing_mounted();
        assert!(!user.path("m").exists(), "it was made, so it is removed");
        assert!(std::fs::read(&image).unwrap()[..65536] == pattern(SIZE, 1)[65536..131_072]);
    });
}

#[test]
fn signals_and_the_mount_taken_away_from_outside_end_a_users_daemon() {
    everywhere(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        for outside in [false, true] {
            let tool = user.tool(["mount", "-f"]).args(bed.ground.words());
            let mut daemon = bed.start(tool.args(["i", "m"]), vec![user.path("m")]);
            if outside {
                user.run(["fusermount3", "-u", "m"]).run();
            } else {
                daemon.signal(Signal::TERM);
            }
            let ended = daemon.ends();
            assert!(ended.status().success(), "{}", ended.output);
            bed.nothing_mounted();
            assert!(!user.path("m").exists());
        }
    });
}

#[test]
fn what_a_killed_daemon_left_is_taken_away_by_the_next_command() {
    everywhere(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        for command in ["mount", "umount m", "umount i"] {
            let daemon = mount(bed, &user, &["-w"]);
            Tool::new("kill").args(["-KILL", &daemon.to_string()]).run();
            // The kernel notices a moment after the process is gone.
            let dead = || {
                user.run(["stat", "m"])
                    .output()
                    .stderr
                    .contains("not connected")
            };
            wait_until("the mount is dead", SOON, dead);
            await_let_go(&user.path("i"));
            match command.split_once(' ') {
                Some((command, what)) => drop(user.tool([command, what]).run()),
                None => {
                    let next = mount(bed, &user, &[]);
                    assert_eq!(mounts::below(bed.root()).len(), 1, "only the new mount");
                    user.tool(["umount", "m"]).run();
                    gone(next);
                }
            }
            bed.nothing_mounted();
            let names = std::fs::read_dir(user.path("run/diskfuse")).unwrap();
            assert_eq!(names.count(), 0, "the dead daemon's socket is gone");
            let _ = std::fs::remove_file(user.path("m"));
        }
    });
}

#[test]
fn passthrough_is_roots_and_done_without_unless_asked_for_by_name() {
    once(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        let raw = ["mount", "--format", "raw", "--log", "info"];
        let output = user
            .tool(raw)
            .args(["--passthrough", "auto", "i", "m"])
            .run();
        bed.adopt(list(&user)[0]["pid"].as_u64().unwrap() as u32);
        assert!(output.stderr.contains("to root only"), "{output}");
        assert_eq!(list(&user)[0]["passthrough"], false);
        user.tool(["umount", "m"]).run();
        let output = user
            .tool(raw)
            .args(["--passthrough", "on", "i", "m"])
            .output();
        refused(bed, &user, &output, &["passthrough=on", "to root only"]);
    });
}

#[test]
fn without_the_control_files_requests_come_through_the_device() {
    once(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        diskfuse_e2e::enable_uring(true);
        let script = "mount -t tmpfs none /sys/fs/fuse/connections; \"$@\"";
        let there = user.words();
        let program = user.program().to_str().unwrap().to_owned();
        let inner = format!(
            "cd; {program} mount --log info i m && {program} list --json && {program} umount m
             if {program} mount --transport uring i m; then exit 9; fi"
        );
        let command = there.into_iter().chain(["sh".into(), "-ec".into(), inner]);
        let output = elsewhere(bed, script, command).run();
        assert!(
            output.stdout.contains("\"transport\": \"device\""),
            "{output}"
        );
        for words in [
            "through /dev/fuse: a connection by FUSE over io_uring",
            "transport=uring: ",
        ] {
            assert!(output.stderr.contains(words), "{output}");
        }
        assert!(!user.path("m").exists());
    });
}

#[test]
fn who_may_not_mount_is_told_what_to_do() {
    once(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        let program = user.program().to_str().unwrap().to_owned();
        let mount = |setup: &str, options: &[&str]| {
            let home = user.path("").display().to_string();
            let script = format!("{setup}\ncd {home}\nexec \"$@\"");
            let words = user
                .words()
                .into_iter()
                .chain([program.clone(), "mount".into()]);
            let options = options.iter().map(|&option| option.to_owned());
            elsewhere(
                bed,
                &script,
                words.chain(options).chain(["i".into(), "m".into()]),
            )
            .output()
        };
        let device = "mknod own/fuse c 10 229; chmod 600 own/fuse; mount --bind own/fuse /dev/fuse";
        let output = mount(device, &[]);
        refused(
            bed,
            &user,
            &output,
            &["Could not open '/dev/fuse'", "chmod 666 /dev/fuse"],
        );
        let hidden = "touch own/none; mount --bind own/none \"$(command -v fusermount3)\"";
        let output = mount(&format!("{hidden}; chmod 755 own/none"), &[]);
        refused(
            bed,
            &user,
            &output,
            &["Failed to mount FUSE on", "fusermount3"],
        );
        let output = mount(hidden, &[]);
        refused(bed, &user, &output, &["may not run it", "join the group"]);
        let plain = "cp -p \"$(command -v fusermount3)\" own/f; chmod 755 own/f; mount --bind own/f \"$(command -v fusermount3)\"";
        let output = mount(plain, &[]);
        refused(
            bed,
            &user,
            &output,
            &["Operation not permitted", "set-user-id", "unshare -Urm"],
        );
        let empty = "touch own/conf; mount --bind own/conf /etc/fuse.conf";
        for option in ["--allow-other", "--allow-root"] {
            let output = mount(empty, &[option]);
            refused(
                bed,
                &user,
                &output,
                &["user_allow_other", "/etc/fuse.conf as root"],
            );
        }
        let few = "echo mount_max = 0 >own/conf; mount --bind own/conf /etc/fuse.conf";
        let output = mount(few, &[]);
        refused(bed, &user, &output, &["mount_max"]);
        let output = user
            .run(["env", "PATH=/nowhere", &program, "mount", "i", "m"])
            .output();
        refused(bed, &user, &output, &["not installed", "apt install fuse3"]);
    });
}

#[test]
fn mountpoints_of_others_and_folders_that_are_closed_are_refused() {
    once(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        let theirs = bed.mountpoint("theirs");
        let output = user.tool(["mount", "i"]).arg(&theirs).output();
        refused(
            bed,
            &user,
            &output,
            &["Permission denied", "this user may write"],
        );
        assert!(theirs.exists());
        let output = user.tool(["mount", "i"]).arg(bed.path("new")).output();
        refused(
            bed,
            &user,
            &output,
            &["Could not make the mountpoint", "Permission denied"],
        );
        mount(bed, &user, &[]);
        let output = user.tool(["mount", "i", "m"]).output();
        output.refused(1, &["There already is a FUSE export on"]);
        user.tool(["umount", "m"]).run();
        bed.nothing_mounted();
    });
}

#[test]
fn two_users_cannot_write_to_one_image_and_each_sees_his_own() {
    once(|bed| {
        let (first, second) = (User::new(bed), User::new(bed));
        let image = first.image("i", SIZE);
        Tool::new("chmod").arg("666").arg(&image).run();
        let daemon = mount(bed, &first, &["-w"]);
        let write = second.tool(["mount", "-w"]).arg(&image).arg("m").output();
        write.refused(1, &["lock", "Is another process using the image"]);
        assert!(!second.path("m").exists());
        assert_eq!(list(&second), [Value::Null; 0]);
        let umount = second.tool(["umount"]).arg(first.path("m")).output();
        umount.refused(1, &["another user's"]);
        let umount = bed.tool(["umount"]).arg(first.path("m")).output();
        umount.refused(1, &["another user's"]);
        assert!(process::is_alive(daemon));
        first.tool(["umount", "m"]).run();
        gone(daemon);
        bed.nothing_mounted();
    });
}

#[test]
fn in_a_namespace_of_his_own_a_user_needs_no_fusermount3() {
    everywhere(|bed| {
        let user = User::new(bed);
        let image = user.image("i", SIZE);
        let program = user.program().display();
        let how = bed.ground.words().join(" ");
        let script = format!(
            "not() {{ if \"$@\"; then exit 9; fi; }}
             {program} mount -w {how} i m
             {program} list --json
             dd if=/dev/zero of=m bs=4k count=1 conv=notrunc,fsync status=none
             {program} mount --allow-other --uid 0 --mode 444 {how} copy shown
             cmp copy shown
             {program} umount copy
             {program} umount m
             not grep $PWD/m.fuse.diskfuse /proc/self/mounts
             {program} mount --idle-timeout 30 {how} i m
             kill -KILL $({program} list --json | grep pid | tr -dc 0-9)
             while cat m >own 2>&1; do sleep 0.01; done
             {program} umount m
             not grep $PWD/m.fuse.diskfuse /proc/self/mounts"
        );
        std::fs::copy(&image, user.path("copy")).unwrap();
        user.give(&user.path("copy"));
        let path = format!("PATH={}", path_without_fusermount3(&user));
        let shell = ["unshare", "-Urm", "env", &path, "sh", "-ec", &script];
        let output = user.run(shell).run();
        let transport = format!("\"transport\": \"{}\"", bed.ground.transport.name());
        assert!(output.stdout.contains(&transport), "{output}");
        assert_eq!(std::fs::read(&image).unwrap()[..4096], [0; 4096]);
        bed.nothing_mounted();
    });
}

/// A folder with links to the few programs that a script needs.
fn path_without_fusermount3(user: &User) -> String {
    let folder = user.path("bin");
    std::fs::create_dir(&folder).unwrap();
    for name in [
        "dd", "cmp", "grep", "tr", "cat", "sleep", "kill", "sh", "env",
    ] {
        let found = Tool::new("sh")
            .args([
                "-c",
                &format!("PATH=/usr/bin:/bin; command -v {name} || true"),
            ])
            .run();
        let found = found.stdout.trim();
        if found.starts_with('/') {
            std::os::unix::fs::symlink(found, folder.join(name)).unwrap();
        }
    }
    folder.display().to_string()
}

#[test]
fn nobody_keeps_a_user_without_a_runtime_folder_from_showing_a_disk() {
    once(|bed| {
        let user = User::new(bed);
        user.image("i", SIZE);
        assert!(!Path::new(&format!("/run/user/{}", user.id)).exists());
        let trap = Trap(format!("/tmp/diskfuse-{}", user.id).into());
        std::fs::create_dir(&trap.0).unwrap();
        let program = user.program().to_str().unwrap();
        let without = ["env", "-u", "XDG_RUNTIME_DIR", program];
        let tool = user.run(without).args(["mount", "-w", "-f"]);
        let tool = tool.args(bed.ground.words()).args(["i", "m"]);
        let daemon = bed.start(tool, vec![user.path("m")]);
        wait_until("it warns", SOON, || {
            let said = daemon.said();
            said.contains("XDG_RUNTIME_DIR") && said.contains("will not find this daemon")
        });
        let write = [
            "dd",
            "if=/dev/zero",
            "of=m",
            "bs=64k",
            "count=1",
            "conv=notrunc,fsync",
        ];
        user.run(write).run();
        user.run(["fusermount3", "-u", "m"]).run();
        assert!(daemon.ends().status().success());
        let written = std::fs::read(user.path("i")).unwrap();
        assert!(written[..64 << 10].iter().all(|&byte| byte == 0));
        // Those who ask are told why they find nothing.
        let list = user.run(without).arg("list").output();
        list.refused(1, &["is not a folder that only this user may enter"]);
        assert!(std::fs::read_dir(&trap.0).unwrap().next().is_none());
    });
}

/// A folder where somebody else looks for his own.
struct Trap(std::path::PathBuf);

impl Drop for Trap {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn the_control_socket_is_for_its_user_only() {
    once(|bed| {
        use std::os::unix::fs::MetadataExt;
        let user = User::new(bed);
        user.image("i", SIZE);
        let daemon = mount(bed, &user, &[]);
        let folder = user.path("run/diskfuse");
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        let socket = folder.join(format!("{daemon}.sock"));
        assert_eq!(
            (mode(&socket), socket.metadata().unwrap().uid()),
            (0o600, user.id)
        );
        user.tool(["umount", "m"]).run();
        gone(daemon);
        assert!(!socket.exists());
    });
}
