//! Nothing is lost or mixed up: file systems and fio's checksums through the export, on one queue and on four.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{Bed, Fio, SmallFs, Tool, on_each, pattern, wait_until};

const LONG: Duration = Duration::from_secs(120);

/// Makes a file system on `disk`, fills it through a loop device, and checks it.
fn live_on(bed: &Bed, disk: &Path) {
    Tool::new("mkfs.ext4").args(["-q", "-F"]).arg(disk).run();
    let folder = bed.path("fs");
    std::fs::create_dir_all(&folder).unwrap();
    Tool::new("mount")
        .args(["-o", "loop"])
        .arg(disk)
        .arg(&folder)
        .run();
    for number in 0..100 {
        let sub = folder.join(format!("d{}", number % 7));
        std::fs::create_dir_all(&sub).unwrap();
        let bytes = pattern(number * 1009, number as u64);
        std::fs::write(sub.join(format!("f{number}")), bytes).unwrap();
    }
    for number in (0..100).step_by(3) {
        std::fs::remove_file(folder.join(format!("d{}/f{number}", number % 7))).unwrap();
    }
    Tool::new("umount").arg(&folder).run();
    Tool::new("fsck.ext4").args(["-f", "-n"]).arg(disk).run();
}

/// Whether the files that [`live_on`] left are on `disk`, which is mounted read-only.
fn look_at(bed: &Bed, disk: &Path) {
    let folder = bed.path("fs");
    Tool::new("mount")
        .args(["-o", "loop,ro"])
        .arg(disk)
        .arg(&folder)
        .run();
    for number in (0..100).filter(|number| number % 3 != 0) {
        let file = folder.join(format!("d{}/f{number}", number % 7));
        let there = std::fs::read(&file).unwrap();
        assert!(
            there == pattern(number * 1009, number as u64),
            "{}",
            file.display()
        );
    }
    Tool::new("umount").arg(&folder).run();
}

#[test]
fn a_file_system_lives_on_the_export_and_is_whole_in_the_image() {
    on_each(LONG, |bed| {
        for options in [&["-w"][..], &["-w", "--cache", "direct"]] {
            let image = bed.sparse("i", 64 << 20);
            let daemon = bed.mount(&image, options);
            live_on(bed, daemon.file());
            look_at(bed, daemon.file());
            // The loop device lets go of the file a little after the umount.
            wait_until(
                "nothing is mounted but the export",
                Duration::from_secs(5),
                || diskfuse_e2e::mounts::below(bed.root()).len() == 1,
            );
            daemon.stop();
            Tool::new("fsck.ext4").args(["-f", "-n"]).arg(&image).run();
            look_at(bed, &image);
        }
    });
}

#[test]
fn a_file_system_lives_on_a_block_device_that_is_exported() {
    on_each(LONG, |bed| {
        let disk = bed.sparse("disk", 64 << 20);
        let device = diskfuse_e2e::LoopDevice::over(&disk);
        let daemon = bed.mount(device.path(), &["-w"]);
        live_on(bed, daemon.file());
        daemon.stop();
        look_at(bed, device.path());
    });
}

#[test]
fn an_image_on_a_small_file_system_is_served_like_any_other() {
    on_each(LONG, |bed| {
        let small = SmallFs::new(bed, "small", 96 << 20);
        let image = small.folder().join("i");
        std::fs::File::create(&image)
            .unwrap()
            .set_len(32 << 20)
            .unwrap();
        let daemon = bed.mount(&image, &["-w"]);
        live_on(bed, daemon.file());
        daemon.stop();
        look_at(bed, &image);
    });
}

/// Four jobs on parts of their own, each block with a checksum of its own, read back and compared.
fn verify(bed: &Bed, options: &[&str], more: &[&str]) {
    let image = bed.sparse("i", 32 << 20);
    let daemon = bed.mount(&image, &[&["-w", "--threads", "4"], options].concat());
    let common = [
        "--numjobs=4",
        "--size=8m",
        "--offset_increment=8m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randseed=7",
    ];
    let run = Fio::new("verify", daemon.file(), &[&common, more].concat()).run();
    let report = diskfuse_e2e::fio_report(&run);
    assert_eq!(report["error"], 0, "{run}");
    // The first pass writes all blocks, the second reads them all.
    let bytes = |way: &str| report[way]["io_bytes"].as_u64().unwrap();
    assert_eq!(
        (bytes("write"), bytes("read")),
        (32 << 20, 32 << 20),
        "{run}"
    );
    let export = std::fs::read(daemon.file()).unwrap();
    daemon.stop();
    assert!(
        export == std::fs::read(&image).unwrap(),
        "the image holds what was verified"
    );
    // And once more from the image alone.
    Fio::new(
        "again",
        &image,
        &[&common, more, &["--verify_only=1"]].concat(),
    )
    .run();
}

#[test]
fn four_jobs_on_four_queues_keep_every_checksum_through_the_page_cache() {
    on_each(LONG, |bed| {
        let more = [
            "--rw=randwrite",
            "--ioengine=libaio",
            "--iodepth=16",
            "--bs=4k",
            "--direct=1",
        ];
        verify(bed, &["--cache", "page"], &more);
    });
}

#[test]
fn four_jobs_on_four_queues_keep_every_checksum_with_direct_io() {
    on_each(LONG, |bed| {
        let more = [
            "--rw=randwrite",
            "--ioengine=libaio",
            "--iodepth=16",
            "--bs=4k",
            "--direct=1",
        ];
        verify(bed, &["--cache", "direct"], &more);
    });
}

#[test]
fn requests_of_odd_sizes_keep_every_checksum() {
    on_each(LONG, |bed| {
        // Blocks that begin and end inside sectors, and large ones that the kernel splits.
        for (cache, size) in [
            ("page", "--bs=3000"),
            ("direct", "--bs=3000"),
            ("direct", "--bs=2m"),
        ] {
            let image = bed.sparse("odd", (24 << 20) + 512 * 5);
            let daemon = bed.mount(&image, &["-w", "--threads", "4", "--cache", cache]);
            let options = [
                size,
                "--rw=randwrite",
                "--ioengine=psync",
                "--numjobs=4",
                "--size=6m",
                "--offset_increment=6m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--do_verify=1",
            ];
            Fio::new("odd", daemon.file(), &options).run();
            daemon.stop();
        }
    });
}

#[test]
fn worker_threads_keep_every_checksum_too() {
    on_each(LONG, |bed| {
        let more = [
            "--rw=randwrite",
            "--ioengine=libaio",
            "--iodepth=16",
            "--bs=16k",
            "--direct=1",
        ];
        verify(bed, &["--cache", "direct", "--aio", "threads"], &more);
    });
}
