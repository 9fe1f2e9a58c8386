//! `mount --into`: any number of images in one daemon.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskfuse_e2e::{Bed, Tool, everywhere, listed, once, pattern, process, wait_until};

const SIZE: usize = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

/// Two raw images and a qcow2 image.
fn images(bed: &Bed) -> [PathBuf; 3] {
    let qcow2 = bed.path("c.qcow2");
    Tool::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&qcow2)
        .arg(SIZE.to_string())
        .run();
    [bed.image("a", SIZE), bed.image("b", SIZE), qcow2]
}

/// Mounts the images into a folder that is not there yet; the daemon's process id, and what was said.
fn mount_into(bed: &Bed, images: &[PathBuf], options: &[&str]) -> (u32, String) {
    let folder = bed.path("into");
    let tool = bed.tool(["mount"]).args(bed.ground.words());
    let tool = tool.args(options).arg("--into").arg(&folder);
    let said = tool.args(images).run().stdout;
    let first = PathBuf::from(said.lines().next().unwrap());
    let pid = listed(bed, &first).unwrap().number("pid") as u32;
    bed.adopt(pid);
    (pid, said)
}

fn write(path: &Path, offset: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[9; 4096], offset).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn each_image_is_a_file_and_all_are_served_by_one_process() {
    everywhere(|bed| {
        let images = images(bed);
        let (pid, said) = mount_into(bed, &images, &["-w", "--threads", "2"]);
        let shown = ["into/a.raw", "into/b.raw", "into/c.qcow2.raw"].map(|name| bed.path(name));
        let lines: Vec<&Path> = said.lines().map(Path::new).collect();
        assert_eq!(lines, shown);
        for (number, path) in (1..).zip(&shown) {
            let export = listed(bed, path).unwrap();
            assert_eq!(
                (export.number("pid"), export.number("queues")),
                (u64::from(pid), 2)
            );
            write(path, number * 8192);
        }
        // One goes, the others go on.
        bed.tool(["umount"]).arg(&images[0]).run();
        assert!(!shown[0].exists() && listed(bed, &shown[1]).is_some());
        assert!(process::is_alive(pid));
        let mut expected = pattern(SIZE, 1);
        expected[8192..8192 + 4096].fill(9);
        assert!(std::fs::read(&images[0]).unwrap() == expected);
        for path in &shown[1..] {
            bed.tool(["umount"]).arg(path).run();
        }
        wait_until("the daemon has ended", SOON, || !process::is_alive(pid));
        Tool::new("qemu-img").arg("check").arg(&images[2]).run();
        assert!(!bed.path("into").exists());
    });
}

#[test]
fn directories_and_overlays_are_each_images_own() {
    everywhere(|bed| {
        let images = images(bed);
        mount_into(bed, &images, &["--dir", "--overlay"]);
        for name in ["a.d", "b.d", "c.qcow2.d"] {
            write(&bed.path("into").join(name).join("disk"), 0);
        }
        assert!(std::fs::read(&images[0]).unwrap() == pattern(SIZE, 1));
        for image in &images {
            bed.tool(["umount"]).arg(image).run();
        }
        wait_until("the folder is gone", SOON, || !bed.path("into").exists());
        bed.nothing_mounted();
    });
}

#[test]
fn all_or_none_are_shown() {
    once(|bed| {
        let images = images(bed);
        let folder = bed.path("into");
        std::fs::create_dir(bed.path("other")).unwrap();
        let same_name = bed.path("other/a");
        std::fs::copy(&images[0], &same_name).unwrap();
        let refused = |more: &[&str], last: &Path, words: &[&str]| {
            let tool = bed.tool(["mount"]).args(more).arg("--into").arg(&folder);
            tool.args(&images).arg(last).output().refused(1, words);
            assert!(!folder.exists());
            bed.nothing_mounted();
        };
        refused(&[], &bed.path("missing"), &["missing'", "No such file"]);
        refused(&[], &same_name, &["would both be shown as", "/into/a.raw'"]);
        refused(
            &["--overlay=kept.qcow2"],
            &images[1],
            &["stands on one image"],
        );
        let tool = bed.tool(["mount"]).args(&images);
        tool.output().refused(2, &["--into"]);
    });
}
