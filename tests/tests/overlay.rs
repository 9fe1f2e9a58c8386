//! `mount --overlay`: a disk that can be written above an image that is not.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use diskfuse_e2e::{Bed, LoopDevice, Output, SmallFs, Tool, everywhere, once, pattern};
use rustix::io::Errno;

const SIZE: usize = 4 << 20;

/// `diskfuse mount` of image `i` on `m` in the test's folder, in the background, which must fail.
#[track_caller]
fn refused(bed: &Bed, options: &[&str], words: &[&str]) {
    let names = bed.names();
    let tool = bed.tool(["mount"]).args(bed.ground.words()).args(options);
    let output: Output = tool.arg(bed.path("i")).arg(bed.path("m")).output();
    output.refused(1, words);
    assert_eq!(bed.names(), names, "nothing is left behind");
}

fn first(path: &Path) -> u8 {
    let mut byte = [0];
    File::open(path)
        .unwrap()
        .read_exact_at(&mut byte, 0)
        .unwrap();
    byte[0]
}

#[test]
fn what_is_written_is_gone_at_the_end() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let before = std::fs::read(&image).unwrap();
        let place = format!("--overlay-dir={}", bed.root().display());
        let daemon = bed.mount(&image, &["--overlay", &place]);
        assert_eq!(bed.names(), ["i", "m"], "the overlay has no name");
        let file = daemon.open();
        file.write_all_at(&pattern(1 << 20, 9), 4096).unwrap();
        file.sync_all().unwrap();
        let mut there = vec![0; 1 << 20];
        file.read_exact_at(&mut there, 4096).unwrap();
        assert_eq!(there, pattern(1 << 20, 9));
        // The image is locked as one that is read: others may read it, and nobody may write it.
        Tool::new("qemu-img")
            .args(["info", "-f", "raw"])
            .arg(&image)
            .run();
        let write = ["-f", "raw", "-c", "write 0 512"];
        let output = Tool::new("qemu-io").args(write).arg(&image).output();
        assert!(output.stderr.contains("lock"), "{output}");
        let listed = bed.diskfuse(["list", "--json"]);
        assert!(listed.stdout.contains(image.to_str().unwrap()), "{listed}");
        drop(file);
        daemon.stop();
        assert_eq!(bed.names(), ["i"]);
        assert_eq!(std::fs::read(&image).unwrap(), before);
        // Nor does anything stay of a daemon that is killed.
        let daemon = bed.mount(&image, &["--overlay", &place]);
        daemon.open().write_all_at(&[1; 512], 0).unwrap();
        daemon.end_by(rustix::process::Signal::KILL);
        assert_eq!(bed.names(), ["i", "m"]);
        assert_eq!(std::fs::read(&image).unwrap(), before);
    });
}

#[test]
fn a_kept_overlay_goes_on_and_is_merged_or_emptied() {
    everywhere(|bed| {
        let image = bed.sparse("i", SIZE as u64);
        let overlay = bed.path("o.qcow2");
        let option = format!("--overlay={}", overlay.display());
        let write = |byte: u8| {
            let daemon = bed.mount(&image, &[&option]);
            let file = daemon.open();
            file.write_all_at(&[byte; 4096], 0).unwrap();
            drop(file);
            daemon.stop();
        };
        let shown = || {
            let daemon = bed.mount(&image, &[&option]);
            let byte = first(&bed.path("m"));
            daemon.stop();
            byte
        };
        write(5);
        assert_eq!((first(&image), shown()), (0, 5));
        Tool::new("qemu-img")
            .args(["check", "-q"])
            .arg(&overlay)
            .run();
        let command = |word: &str| {
            let output = bed.diskfuse([Path::new(word), &overlay]);
            assert!(output.status.success(), "{output}");
        };
        command("discard");
        assert_eq!((first(&image), shown()), (0, 0));
        write(6);
        command("commit");
        assert_eq!((first(&image), shown()), (6, 6));
        write(7);
        assert_eq!((first(&image), shown()), (6, 7));
        // While it is shown nobody else can have it.
        let daemon = bed.mount(&image, &[&option]);
        bed.diskfuse([Path::new("discard"), &overlay])
            .refused(1, &["lock"]);
        daemon.stop();
        assert_eq!(shown(), 7);
    });
}

#[test]
fn a_base_that_has_changed_or_is_another_is_refused() {
    once(|bed| {
        let image = bed.sparse("i", SIZE as u64);
        let overlay = bed.path("o.qcow2");
        let option = format!("--overlay={}", overlay.display());
        bed.mount(&image, &[&option]).stop();
        File::options()
            .write(true)
            .open(&image)
            .unwrap()
            .write_all_at(&[1], 0)
            .unwrap();
        refused(
            bed,
            &[&option],
            &["/i' has changed since", "diskfuse discard"],
        );
        // Without a note the times tell; a copy by `cp` has none, and is newer.
        rustix::fs::removexattr(&overlay, "user.diskfuse.base").unwrap();
        Tool::new("touch")
            .args(["-d", "2001-01-01"])
            .arg(&overlay)
            .run();
        refused(bed, &[&option], &["/i' has changed since"]);
        Tool::new("touch").arg(&overlay).run();
        bed.mount(&image, &[&option]).stop();
        assert!(
            bed.diskfuse([Path::new("discard"), &overlay])
                .status
                .success()
        );
        bed.mount(&image, &[&option]).stop();

        bed.sparse("other", SIZE as u64);
        std::fs::rename(bed.path("other"), bed.path("i")).unwrap();
        refused(bed, &[&option], &["/i' has changed since"]);
        Tool::new("qemu-img")
            .args([
                "rebase",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                "/dev/null",
            ])
            .arg(&overlay)
            .run();
        refused(bed, &[&option], &["stands on '/dev/null', not on"]);
        Tool::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(bed.path("whole"))
            .arg("4M")
            .run();
        let whole = format!("--overlay={}", bed.path("whole").display());
        refused(bed, &[&whole], &["is a whole image, with no backing file"]);
    });
}

#[test]
fn on_a_block_device_no_overlay_is_kept_unseen() {
    once(|bed| {
        let device = LoopDevice::over(&bed.sparse("disk", SIZE as u64));
        std::os::unix::fs::symlink(device.path(), bed.path("i")).unwrap();
        let overlay = bed.path("o.qcow2");
        let option = format!("--overlay={}", overlay.display());
        refused(
            bed,
            &[&option],
            &["is no regular file", "diskfuse create", "--overlay"],
        );
        // What it says works.
        let place = format!("--overlay-dir={}", bed.root().display());
        let daemon = bed.mount(device.path(), &["--overlay", &place]);
        daemon.open().write_all_at(&[1; 4096], 0).unwrap();
        daemon.stop();
        let create = ["create", "-f", "qcow2", "-F", "raw", "-b"].map(Path::new);
        let words = create.into_iter().chain([device.path(), &*overlay]);
        let made = bed.diskfuse(words);
        assert!(made.status.success(), "{made}");
        let daemon = bed.mount(&overlay, &["--writable"]);
        daemon.open().write_all_at(&[1; 4096], 0).unwrap();
        daemon.stop();
        let before = std::fs::read(&overlay).unwrap();
        refused(bed, &[&option], &["is no regular file"]);
        assert!(std::fs::read(&overlay).unwrap() == before);
    });
}

#[test]
fn an_overlay_is_in_memory_only_if_that_is_said() {
    once(|bed| {
        let image = bed.image("i", SIZE);
        let memory = bed.path("memory");
        std::fs::create_dir(&memory).unwrap();
        Tool::new("mount")
            .args(["-t", "tmpfs", "none"])
            .arg(&memory)
            .run();
        std::fs::copy(&image, memory.join("i")).unwrap();
        let tool = Tool::new("env").arg(format!("TMPDIR={}", memory.display()));
        let tool = tool
            .arg(diskfuse_e2e::diskfuse())
            .args(["mount", "--overlay"]);
        let output = tool.arg(memory.join("i")).arg(bed.path("m")).output();
        output.refused(
            1,
            &[
                "There is no place for an overlay",
                "is in memory",
                "--overlay-dir",
            ],
        );
        let option = format!("--overlay-dir={}", memory.display());
        let daemon = bed.mount(&image, &["--overlay", &option]);
        daemon.open().write_all_at(&[1; 4096], 0).unwrap();
        daemon.stop();
        refused(
            bed,
            &["--overlay", "--overlay-dir=/no/such"],
            &["'/no/such'", "No such file"],
        );
    });
}

#[test]
fn a_full_disk_is_told_to_who_writes() {
    everywhere(|bed| {
        let image = bed.sparse("i", 64 << 20);
        let small = SmallFs::new(bed, "small", 16 << 20);
        let option = format!("--overlay-dir={}", small.folder().display());
        let daemon = bed.mount(&image, &["--overlay", &option]);
        let file = daemon.open();
        let full = (0..64).find_map(|n| {
            let wrote = file.write_all_at(&pattern(1 << 20, n), n << 20);
            wrote.and_then(|()| file.sync_data()).err()
        });
        assert_eq!(Errno::from_io_error(&full.unwrap()), Some(Errno::NOSPC));
        let mut there = vec![0; 1 << 20];
        file.read_exact_at(&mut there, 0).unwrap();
        assert_eq!(there, pattern(1 << 20, 0));
        drop(file);
        // That the last flush finds no room is said, and everything ends all the same.
        let ended = daemon.end_by(rustix::process::Signal::TERM);
        assert!([Some(0), Some(1)].contains(&ended.status().code()));
        assert!(std::fs::read(&image).unwrap().iter().all(|&byte| byte == 0));
        let left = std::fs::read_dir(small.folder()).unwrap();
        let names: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["lost+found"]);
    });
}

#[test]
fn an_overlay_works_with_a_directory() {
    everywhere(|bed| {
        let image = bed.sparse("i", 64 << 20);
        let command = format!("printf 'size=8MiB\\n' | sfdisk -q '{}'", image.display());
        Tool::new("sh").args(["-c", &command]).run();
        let before = std::fs::read(&image).unwrap();
        let daemon = bed.mount(&image, &["--overlay", "--dir"]);
        Tool::new("mkfs.ext4")
            .args(["-q", "-L", "x"])
            .arg(bed.path("m/p1"))
            .run();
        assert!(bed.path("m/by-label/x").exists());
        assert!(!bed.path("m/layers/1/by-label/x").exists());
        daemon.stop();
        assert_eq!(bed.names(), ["i"]);
        assert!(std::fs::read(&image).unwrap() == before);
    });
}
