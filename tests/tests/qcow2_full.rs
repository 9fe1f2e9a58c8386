//! The host's file system is full in the midst of allocations: the guest is told so, the image stays sound, and with
//! new room everything goes on.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use diskfuse_e2e::{Bed, SmallFs, Tool, everywhere, pattern};
use rustix::io::Errno;

const BLOCK: usize = 192 << 10;

/// Each block lies in clusters of its own, and leaves some of them partly unwritten.
fn place(block: u64) -> u64 {
    block * (256 << 10) + 512
}

fn write(file: &File, block: u64) -> std::io::Result<()> {
    file.write_all_at(&pattern(BLOCK, block), place(block))
}

/// Leaks are allowed, corruption is not.
fn must_be_sound(image: &Path) {
    // Without a lock, as the daemon may still run: it is idle and has flushed.
    let check = Tool::new("qemu-img")
        .args(["check", "-U", "-f", "qcow2"])
        .arg(image)
        .output();
    assert!([0, 3].contains(&check.code()), "{check}");
}

fn full_disk(bed: &Bed, create: &[&str], options: &[&str]) {
    let small = SmallFs::new(bed, "small", 24 << 20);
    let ballast = small.folder().join("ballast");
    std::fs::write(&ballast, vec![1; 8 << 20]).unwrap();
    File::open(&ballast).unwrap().sync_all().unwrap();
    let image = small.folder().join("i");
    Tool::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args(create)
        .arg(&image)
        .arg("64M")
        .run();
    let daemon = bed.mount(&image, &[&["-w"], options].concat());
    let file = daemon.open();
    let mut fitted = 0;
    let error = loop {
        match write(&file, fitted) {
            Ok(()) => fitted += 1,
            Err(error) => break error,
        }
        // A full disk may also show when what was written is to become durable.
        if fitted % 8 == 0
            && let Err(error) = file.sync_all()
        {
            break error;
        }
        assert!(fitted < 200, "there should be no room for this");
    };
    assert_eq!(
        Errno::from_io_error(&error),
        Some(Errno::NOSPC),
        "block {fitted}: {error}"
    );
    assert!(fitted >= 20, "only {fitted} blocks fitted");
    // Others are told the same, and what is there can be read and overwritten.
    for block in 210..220 {
        assert!(write(&file, block).is_err());
    }
    let mut there = vec![0; BLOCK];
    for block in 0..fitted {
        file.read_exact_at(&mut there, place(block)).unwrap();
        assert!(there == pattern(BLOCK, block), "block {block}");
    }
    write(&file, 0).unwrap();
    must_be_sound(&image);

    std::fs::remove_file(&ballast).unwrap();
    // Some file systems give the room back a little later.
    small.sync();
    for block in fitted..fitted + 20 {
        write(&file, block).unwrap();
    }
    file.sync_all().unwrap();
    must_be_sound(&image);
    drop(file);
    daemon.stop();
    must_be_sound(&image);
    let raw = bed.path("raw");
    Tool::new("qemu-img")
        .args(["convert", "-f", "qcow2", "-O", "raw"])
        .arg(&image)
        .arg(&raw)
        .run();
    let raw = File::open(&raw).unwrap();
    for block in 0..fitted + 20 {
        raw.read_exact_at(&mut there, place(block)).unwrap();
        assert!(
            there == pattern(BLOCK, block),
            "block {block}, in the image"
        );
    }
}

#[test]
fn a_full_file_system_is_told_to_the_writer_and_writing_goes_on_when_there_is_room() {
    everywhere(|bed| full_disk(bed, &[], &[]));
}

#[test]
fn a_full_file_system_is_told_around_the_page_cache_too() {
    everywhere(|bed| full_disk(bed, &[], &["--cache", "direct"]));
}

#[test]
fn small_clusters_need_room_for_their_tables_too() {
    everywhere(|bed| full_disk(bed, &["-o", "cluster_size=512"], &[]));
}
