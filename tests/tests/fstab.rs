//! Images in `/etc/fstab` and as services: by the real mount(8), as both types, and by the unit file as it is installed.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskfuse_e2e::{Bed, Output, Tool, diskfuse, installed, once, pattern};
use rustix::process::Signal;

const SIZE: usize = 1 << 20;
/// By this name umount(8) calls us.
const UMOUNT: &str = "umount.fuse.diskfuse";
const SOON: Duration = Duration::from_secs(20);

/// Runs a script in a place where the program is installed with its mount helpers; `$1` is the test's folder.
fn in_place(bed: &Bed, helpers: &[&str], script: &str) -> Output {
    let root = bed.root().display().to_string();
    let script = format!(
        "cd own; cp ../i .
        # Whatever is left mounted is ended before this place goes.
        trap 'cd /; for f in m n; do diskfuse umount --force '$1'/own/$f 2>/dev/null || true; done' EXIT
        {script}"
    );
    installed(bed, helpers, &script, [root]).output()
}

#[track_caller]
fn worked(output: &Output) {
    assert!(output.status.success(), "{output}");
}

#[test]
fn mount_all_shows_what_fstab_names_as_type_diskfuse() {
    once(|bed| {
        bed.image("i", SIZE);
        let script = "cp i j; touch m
            cat >tab <<END
$1/own/i $1/own/m diskfuse defaults,nofail,_netdev,x-systemd.automount,queues=2,cpus=0:0,uid=7,gid=8,mode=640,allow_other 0 0
$1/own/j $1/own/n diskfuse ro,noauto,transport=device 0 0
END
            mount -a -T tab
            stat -c '%u %g %a' m
            cmp i m; test ! -e n
            head -c 4096 /dev/zero | dd of=m conv=notrunc,fsync status=none
            cmp i m
            mount -a -T tab
            grep -c $1/own/m.fuse.diskfuse /proc/self/mounts
            mount -T tab n
            cmp j n
            if dd if=/dev/zero of=n count=1 conv=notrunc; then exit 9; fi
            umount n
            diskfuse umount m
            test -e m";
        let output = in_place(bed, &["mount.diskfuse"], script);
        worked(&output);
        assert_eq!(output.stdout, "7 8 640\n1\n", "shown once, however often");
        assert!(output.stderr.contains("Read-only file system"), "{output}");
    });
}

#[test]
fn the_type_of_fuse_works_with_our_helper_and_by_way_of_libfuses() {
    once(|bed| {
        bed.image("i", SIZE);
        for helpers in [&["mount.fuse.diskfuse"][..], &[]] {
            let script = "echo $1/own/i $1/own/m fuse.diskfuse ro,nofail,_netdev,x-systemd.automount,format=raw 0 0 >tab
                mount -a -T tab
                cmp i m
                grep ' fuse.diskfuse ro,' /proc/self/mounts
                umount m
                mount -t fuse.diskfuse -o rw,threads=1 i m
                diskfuse list
                diskfuse umount m
                test ! -e m";
            let output = in_place(bed, helpers, script);
            worked(&output);
            assert!(output.stdout.contains(" rw "), "{output}");
        }
    });
}

#[test]
fn a_plain_umount_returns_when_the_image_is_closed() {
    once(|bed| {
        bed.image("i", SIZE);
        let script = "qemu-img create -q -f qcow2 q 64M
            for round in 1 2 3 4 5 6 7 8; do
                mount -t diskfuse q m
                dd if=/dev/urandom of=m bs=1M count=8 conv=notrunc status=none
                umount m
                qemu-img check -q q
            done
            # A daemon with other exports stays.
            diskfuse qsd --blockdev file,node-name=f,filename=i --blockdev qcow2,node-name=q,file.driver=file,file.filename=q \
                --export fuse,id=f,node-name=f,mountpoint=i,writable=on --export fuse,id=q,node-name=q,mountpoint=q,writable=on \
                --daemonize --pidfile pid
            umount q
            umount i
            kill $(cat pid)";
        worked(&in_place(bed, &["mount.diskfuse", UMOUNT], script));
    });
}

#[test]
fn umount_is_refused_or_goes_its_own_way_as_it_would_without_us() {
    once(|bed| {
        bed.image("i", SIZE);
        let script = "mount -t diskfuse i m
            exec 9<m
            if umount m 2>said; then exit 9; fi
            grep -q 'in use' said; grep -q ' has it open' said
            cmp i m
            exec 9<&-
            # Another name of it, and what another namespace has of it.
            touch n; mount --bind m n; umount n
            unshare -m --propagation private umount m
            cmp i m
            diskfuse list | grep -cw $1/own/m
            umount -l m; test ! -s m
            # Its daemon is dead.
            touch m
            mount -t diskfuse -o ro i m
            kill -KILL $(diskfuse list | awk -v m=$1/own/m '$2 == m { print $3 }')
            umount m
            if mountpoint -q m; then exit 9; fi";
        let output = in_place(bed, &["mount.diskfuse", UMOUNT], script);
        worked(&output);
        assert_eq!(output.stdout, "1\n");
    });
}

#[test]
fn what_is_wrong_in_fstab_is_said_and_mount_fails() {
    once(|bed| {
        bed.image("i", SIZE);
        let helpers = &["mount.diskfuse"];
        let cases = [
            (
                "mount -t diskfuse -o alow_other i m",
                1,
                "did you mean 'allow_other'",
            ),
            (
                "mount -t diskfuse -o bogus i m",
                1,
                "option 'bogus' is not known; known are",
            ),
            (
                "mount -t diskfuse -o queues i m",
                1,
                "option 'queues' needs a value",
            ),
            ("mount -t diskfuse -o threads=0 i m", 1, "--threads"),
            (
                "mount -t diskfuse $1/own/none m",
                32,
                "No such file or directory",
            ),
            ("mount -t diskfuse -o format=qcow2 i m", 32, "qcow2"),
            ("diskfuse i m -o bogus", 1, "option 'bogus' is not known"),
        ];
        for (command, code, words) in cases {
            let script = format!("code=0; {command} || code=$?; test ! -e m; exit $code");
            in_place(bed, helpers, &script).refused(code, &[words]);
        }
        let script = "mount -t diskfuse -s -o bogus i m; cmp i m; diskfuse umount m; mount -f -t diskfuse i m; test ! -e m";
        worked(&in_place(bed, helpers, script));
    });
}

fn unit() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd/diskfuse@.service")
}

/// The value of a key of the unit.
fn value(key: &str) -> String {
    let text = std::fs::read_to_string(unit()).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{key}=")));
    line.unwrap_or_else(|| panic!("no {key}")).to_owned()
}

#[test]
fn systemd_understands_the_unit() {
    once(|bed| {
        let installed = std::fs::read_to_string(unit()).unwrap();
        let here = installed.replace("/usr/bin/diskfuse", diskfuse().to_str().unwrap());
        let copy = bed.path("diskfuse@.service");
        std::fs::write(&copy, here).unwrap();
        let output = Tool::new("systemd-analyze")
            .args(["verify", "--man=no"])
            .arg(&copy)
            .run();
        assert_eq!(output.stderr, "");
    });
}

#[test]
fn the_command_of_the_unit_is_ready_when_the_file_is_and_ends_as_the_unit_says() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        assert_eq!(value("Type"), "notify");
        let seconds: u64 = value("WatchdogSec").parse().unwrap();
        let (image, mountpoint) = (image.display().to_string(), bed.path("m"));
        let words: Vec<String> = value("ExecStart")
            .split(' ')
            .flat_map(|word| match word {
                "$OPTIONS" => vec!["--writable".to_owned(), "--mode".into(), "600".into()],
                "${IMAGE}" => vec![image.clone()],
                "${MOUNTPOINT}" => vec![mountpoint.display().to_string()],
                word => vec![word.replace("/usr/bin/diskfuse", diskfuse().to_str().unwrap())],
            })
            .collect();
        let manager = UnixDatagram::bind(bed.path("notify")).unwrap();
        manager.set_read_timeout(Some(SOON)).unwrap();
        let notify = format!("NOTIFY_SOCKET={}", bed.path("notify").display());
        let watchdog = format!("WATCHDOG_USEC={}", seconds * 1_000_000);
        let tool = Tool::new("env").args([notify, watchdog]).args(words);
        let mut running = tool.start();
        let mut said = [0; 4096];
        let count = manager.recv(&mut said).expect("it becomes ready");
        assert!(String::from_utf8_lossy(&said[..count]).contains("READY=1\n"));
        assert!(std::fs::read(&mountpoint).unwrap() == pattern(SIZE, 1));
        // What systemd stops a service with.
        running.signal(Signal::TERM);
        let output = running.finish(SOON);
        assert!(output.status.success(), "{output}");
        bed.nothing_mounted();
        std::fs::remove_file(bed.path("notify")).unwrap();
    });
}
