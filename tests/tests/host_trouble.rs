//! When the disk behind the image fails, the one whose request it was hears of it, and nobody else.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::Error;
use std::os::unix::fs::FileExt;

use diskfuse_e2e::{Bed, LoopDevice, SmallFs, everywhere, pattern};
use rustix::io::Errno;

const BLOCK: usize = 256 << 10;

fn errno(error: &Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

/// Writes blocks until there is no room; returns how many fitted.
fn fill(file: &File) -> u64 {
    for block in 0.. {
        let bytes = pattern(BLOCK, block);
        match file.write_all_at(&bytes, block * BLOCK as u64) {
            Ok(()) => assert!(block < 1000, "there should be no room for this"),
            Err(error) => {
                assert_eq!(errno(&error), Some(Errno::NOSPC), "block {block}: {error}");
                return block;
            }
        }
    }
    unreachable!("the range has no end")
}

fn full_disk(bed: &Bed, size: u64, options: &[&str]) {
    let small = SmallFs::new(bed, "small", 16 << 20);
    let ballast = small.folder().join("ballast");
    std::fs::write(&ballast, vec![1; 4 << 20]).unwrap();
    File::open(&ballast).unwrap().sync_all().unwrap();
    let image = small.folder().join("i");
    File::create(&image).unwrap().set_len(size).unwrap();
    let daemon = bed.mount(&image, options);
    let file = daemon.open();
    let fitted = fill(&file);
    assert!(fitted >= 20, "only {fitted} blocks fitted");
    std::fs::remove_file(&ballast).unwrap();
    // Some file systems give the room back a little later.
    small.sync();
    for block in fitted..fitted + 8 {
        file.write_all_at(&pattern(BLOCK, block), block * BLOCK as u64)
            .unwrap();
    }
    file.sync_all().unwrap();
    let mut there = vec![0; BLOCK];
    for block in 0..fitted + 8 {
        file.read_exact_at(&mut there, block * BLOCK as u64)
            .unwrap();
        assert!(there == pattern(BLOCK, block), "block {block}");
    }
    drop(file);
    daemon.stop();
}

#[test]
fn a_full_file_system_is_told_to_the_writer_and_writing_goes_on_when_there_is_room() {
    everywhere(|bed| full_disk(bed, 64 << 20, &["-w"]));
}

#[test]
fn a_full_file_system_is_told_to_the_direct_writer_too() {
    everywhere(|bed| full_disk(bed, 64 << 20, &["-w", "--cache", "direct"]));
}

#[test]
fn a_growable_disk_that_cannot_grow_any_more_is_full() {
    everywhere(|bed| full_disk(bed, 0, &["-w", "--growable"]));
}

#[test]
fn an_image_that_is_truncated_under_us_gives_eio_there_and_works_elsewhere_and_again_later() {
    everywhere(|bed| {
        for cache in ["page", "direct"] {
            let image = bed.image("i", 1 << 20);
            let daemon = bed.mount(&image, &["-w", "--cache", cache]);
            let file = daemon.open();
            let host = File::options().write(true).open(&image).unwrap();
            host.set_len(512 << 10).unwrap();
            let mut bytes = [0; 4096];
            for offset in [512 << 10, 800_000, (1 << 20) - 4096] {
                let error = file.read_at(&mut bytes, offset).unwrap_err();
                assert_eq!(errno(&error), Some(Errno::IO), "at {offset}, {cache}");
            }
            assert!(daemon.said().contains("truncated"), "{}", daemon.said());
            file.read_exact_at(&mut bytes, 256 << 10).unwrap();
            assert!(bytes == pattern(1 << 20, 1)[256 << 10..][..4096]);
            host.set_len(1 << 20).unwrap();
            file.read_exact_at(&mut bytes, 800_000).unwrap();
            assert_eq!(bytes, [0; 4096]);
            file.write_all_at(&[3; 4096], 800_000).unwrap();
            file.read_exact_at(&mut bytes, 800_000).unwrap();
            assert_eq!(bytes, [3; 4096]);
            daemon.stop();
        }
    });
}

#[test]
fn an_io_error_of_the_device_reaches_the_reader_and_the_writer_and_later_requests_work() {
    everywhere(|bed| {
        let disk = bed.image("disk", 8 << 20);
        let device = LoopDevice::over(&disk);
        let daemon = bed.mount(device.path(), &["-w", "--cache", "direct"]);
        let file = daemon.open();
        let mut bytes = vec![0; 65_536];
        // The device keeps its size, but has nothing behind its second half any more.
        let host = File::options().write(true).open(&disk).unwrap();
        host.set_len(4 << 20).unwrap();
        let error = file.read_at(&mut bytes, 6 << 20).unwrap_err();
        assert_eq!(errno(&error), Some(Errno::IO), "{error}");
        file.read_exact_at(&mut bytes, 1 << 20).unwrap();
        assert!(
            bytes == pattern(8 << 20, 1)[1 << 20..][..65_536],
            "elsewhere all is well"
        );
        host.set_len(8 << 20).unwrap();
        file.read_exact_at(&mut bytes, 6 << 20).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0), "and later there too");
        daemon.stop();
    });
}
