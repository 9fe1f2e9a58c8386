//! Nobody writes an image that somebody else holds: QEMU's tools and this program keep each other out, in both
//! directions, and so do two of this program.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use diskfuse_e2e::{Bed, Output, Running, Tool, everywhere, mounts, wait_until};

const SIZE: usize = 1 << 20;

/// A qcow2 image. QEMU shares raw images with writers where it can; of an image with metadata it does not.
fn qcow2(bed: &Bed) -> PathBuf {
    let image = bed.path("i");
    let tool = Tool::new("qemu-img").args(["create", "-q", "-f", "qcow2"]);
    tool.arg(&image).arg("1M").run();
    image
}

fn qemu_io(format: &str, image: &Path, options: &[&str], command: &str) -> Output {
    let tool = Tool::new("qemu-io").args(["-f", format]).args(options);
    tool.args(["-c", command]).arg(image).output()
}

/// A QEMU that holds the image until it is dropped.
fn held_by_qemu(bed: &Bed, format: &str, image: &Path, writable: &str) -> Running {
    let socket = bed.path("nbd.sock");
    let read_only = if writable == "on" { "off" } else { "on" };
    let file = format!("file.driver=file,file.filename={}", image.display());
    let node =
        format!("{format},node-name=disk,read-only={read_only},file.read-only={read_only},{file}");
    let export = format!("nbd,id=e,node-name=disk,writable={writable},name=x");
    let server = format!("addr.type=unix,addr.path={}", socket.display());
    let tool = Tool::new("qemu-storage-daemon");
    let arguments = [
        "--blockdev",
        &node,
        "--nbd-server",
        &server,
        "--export",
        &export,
    ];
    let mut running = tool.args(arguments).start();
    let up = || {
        let alive = running.is_alive();
        assert!(alive, "QEMU did not start: {}", running.stderr());
        let url = format!("nbd+unix:///x?socket={}", socket.display());
        let info = Tool::new("qemu-img").arg("info").arg(url).output();
        info.status.success()
    };
    wait_until("QEMU holds the image", Duration::from_secs(10), up);
    running
}

/// Tries to mount it as raw; the daemon must not come up.
fn mount(bed: &Bed, image: &Path, options: &[&str]) -> Output {
    let tool = bed.tool([
        "mount",
        "--format",
        "raw",
        "--event-loop",
        bed.ground.event_loop.name(),
    ]);
    tool.args(options)
        .arg(image)
        .arg(bed.path("refused"))
        .output()
}

#[track_caller]
fn assert_refused(bed: &Bed, output: &Output, image: &Path, lock: &str) {
    let hint = format!("Is another process using the image [{}]?", image.display());
    output.refused(1, &[lock, &hint]);
    assert!(mounts::at(&bed.path("refused")).is_none());
    assert!(!bed.path("refused").exists(), "a mountpoint is left behind");
}

#[test]
fn qemu_refuses_what_we_hold_for_writing() {
    everywhere(|bed| {
        let image = qcow2(bed);
        let daemon = bed.mount(&image, &["-w", "--format", "raw"]);
        let hint = format!("Is another process using the image [{}]?", image.display());
        for format in ["raw", "qcow2"] {
            let writer = qemu_io(format, &image, &[], "write 0 512");
            writer.refused(1, &["Failed to get \"write\" lock", &hint]);
        }
        let reader = qemu_io("qcow2", &image, &["-r"], "read 0 512");
        reader.refused(1, &["Failed to get shared \"write\" lock", &hint]);
        let info = Tool::new("qemu-img")
            .args(["info", "-f", "qcow2"])
            .arg(&image)
            .output();
        info.refused(1, &["Failed to get shared \"write\" lock", &hint]);
        // Those who bear with writers may look.
        Tool::new("qemu-img")
            .args(["info", "-U", "-f", "qcow2"])
            .arg(&image)
            .run();
        daemon.stop();
        assert_eq!(
            qemu_io("qcow2", &image, &[], "write 0 512").code(),
            0,
            "free again"
        );
    });
}

#[test]
fn qemu_may_read_but_not_write_what_we_hold_for_reading() {
    everywhere(|bed| {
        let image = qcow2(bed);
        let daemon = bed.mount(&image, &["--format", "raw"]);
        for format in ["raw", "qcow2"] {
            assert_eq!(qemu_io(format, &image, &["-r"], "read 0 512").code(), 0);
            let writer = qemu_io(format, &image, &[], "write 0 512");
            writer.refused(1, &["Failed to get \"write\" lock"]);
        }
        daemon.stop();
    });
}

#[test]
fn we_refuse_what_qemu_holds_for_writing() {
    everywhere(|bed| {
        let image = qcow2(bed);
        let qemu = held_by_qemu(bed, "qcow2", &image, "on");
        let writable = mount(bed, &image, &["-w"]);
        assert_refused(bed, &writable, &image, "Failed to get \"write\" lock");
        let readable = mount(bed, &image, &[]);
        assert_refused(
            bed,
            &readable,
            &image,
            "Failed to get shared \"write\" lock",
        );
        drop(qemu);
        bed.mount(&image, &["-w", "--format", "raw"]).stop();
    });
}

#[test]
fn we_refuse_a_raw_image_that_qemu_writes_even_where_qemu_would_share_it() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let qemu = held_by_qemu(bed, "raw", &image, "on");
        for options in [&["-w"][..], &[]] {
            let refused = mount(bed, &image, options);
            assert_refused(bed, &refused, &image, "Failed to get");
        }
        drop(qemu);
    });
}

#[test]
fn we_read_but_do_not_write_what_qemu_holds_for_reading() {
    everywhere(|bed| {
        let image = qcow2(bed);
        let qemu = held_by_qemu(bed, "qcow2", &image, "off");
        let writable = mount(bed, &image, &["-w"]);
        assert_refused(bed, &writable, &image, "Failed to get \"write\" lock");
        bed.mount(&image, &["--format", "raw"]).stop();
        drop(qemu);
    });
}

#[test]
fn two_of_ours_keep_each_other_out_as_qemu_would() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let writer = bed.mount(&image, &["-w"]);
        let second = mount(bed, &image, &["-w"]);
        assert_refused(bed, &second, &image, "Failed to get \"write\" lock");
        let reader = mount(bed, &image, &[]);
        assert_refused(bed, &reader, &image, "Failed to get shared \"write\" lock");
        writer.stop();
        let reader = bed.mount(&image, &[]);
        let another = bed.mount_on(&image, &bed.path("m2"), &[]);
        let writer = mount(bed, &image, &["-w"]);
        assert_refused(bed, &writer, &image, "Failed to get \"write\" lock");
        another.stop();
        reader.stop();
    });
}

#[test]
fn an_image_under_its_own_export_is_still_locked() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let link = bed.path("link");
        std::fs::hard_link(&image, &link).unwrap();
        let daemon = bed.mount_on(&image, &image, &["-w"]);
        qemu_io("raw", &link, &[], "write 0 512").refused(1, &["Failed to get"]);
        daemon.stop();
        assert_eq!(qemu_io("raw", &link, &[], "write 0 512").code(), 0);
    });
}

#[test]
fn locking_can_be_turned_off() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let mountpoint = bed.mountpoint("m");
        let node = format!(
            "file,node-name=disk,filename={},locking=off",
            image.display()
        );
        let export = format!(
            "fuse,id=e,node-name=disk,mountpoint={},writable=on",
            mountpoint.display()
        );
        let daemon = bed.qsd(&["--blockdev", &node, "--export", &export], &[&mountpoint]);
        assert_eq!(qemu_io("raw", &image, &[], "write 0 512").code(), 0);
        daemon.stop();
    });
}

#[test]
fn the_file_below_a_backing_node_that_is_written_inside_the_image_s_is_held_while_it_is_shown() {
    everywhere(|bed| {
        let base = bed.image("base", SIZE);
        let overlay = bed.path("overlay");
        let create = Tool::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
        create.arg(&base).arg(&overlay).run();
        let mountpoint = bed.mountpoint("m");
        let node = format!(
            "qcow2,node-name=disk,file.driver=file,file.filename={},backing.driver=raw,backing.file.driver=file,backing.file.filename={}",
            overlay.display(),
            base.display()
        );
        let export = format!(
            "fuse,id=e,node-name=disk,mountpoint={}",
            mountpoint.display()
        );
        let daemon = bed.qsd(&["--blockdev", &node, "--export", &export], &[&mountpoint]);
        let written = qemu_io("raw", &base, &[], "write 0 512");
        assert!(!written.status.success(), "somebody else writes the base");
        assert!(written.stderr.contains("lock"), "{}", written.stderr);
        daemon.stop();
        let written = qemu_io("raw", &base, &[], "write 0 512");
        assert!(written.status.success(), "{}", written.stderr);
    });
}
