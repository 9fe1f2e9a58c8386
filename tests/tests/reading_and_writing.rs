//! The exported file behaves as the image does: what is read and written, at the end of the disk and past it, through
//! the page cache, maps and O_DIRECT, and by two exports at once.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::io::{Error, ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{
    Aligned, Bed, Daemon, Fio, Tool, await_listed, everywhere, mounts, pattern, wait_until,
};
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

const SIZE: usize = 1 << 20;
const END: u64 = SIZE as u64;

fn read_all(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

fn errno(error: &Error) -> Errno {
    Errno::from_io_error(error).unwrap()
}

#[test]
fn the_export_is_the_image_byte_for_byte() {
    everywhere(|bed| {
        // More than one request, and not a whole number of them.
        let image = bed.image("i", 5 * SIZE + 512 * 7);
        for options in [&["--cache", "page"], &["--cache", "direct"]] {
            let daemon = bed.mount(&image, options);
            assert!(read_all(daemon.file()) == read_all(&image), "{options:?}");
            let file = daemon.open_read_only();
            for (offset, len) in [(0, 1), (511, 2), (4095, 8194), (1_000_001, 333_333)] {
                let mut there = vec![0; len];
                file.read_exact_at(&mut there, offset).unwrap();
                let all = pattern(5 * SIZE + 512 * 7, 1);
                let start = offset as usize;
                assert!(
                    there == all[start..start + len],
                    "{len} bytes at {offset}, {options:?}"
                );
            }
            daemon.stop();
        }
    });
}

#[test]
fn what_is_written_is_in_the_image_and_nothing_else_changes() {
    everywhere(|bed| {
        for options in [&["-w", "--cache", "page"], &["-w", "--cache", "direct"]] {
            let image = bed.image("i", SIZE);
            let mut expected = read_all(&image);
            let daemon = bed.mount(&image, options);
            let file = daemon.open();
            for (seed, (offset, len)) in (2..).zip([
                (0, 512),
                (513, 1),
                (4000, 200),
                (65_536, 131_072),
                (SIZE - 1, 1),
                (300_001, 99_999),
            ]) {
                let new = pattern(len, seed);
                file.write_all_at(&new, offset as u64).unwrap();
                expected[offset..offset + len].copy_from_slice(&new);
            }
            file.sync_all().unwrap();
            assert!(read_all(&image) == expected, "before the end, {options:?}");
            assert!(
                read_all(daemon.file()) == expected,
                "through the export, {options:?}"
            );
            daemon.stop();
            assert!(read_all(&image) == expected, "after the end, {options:?}");
        }
    });
}

#[test]
fn reads_are_short_over_the_end_and_empty_past_it() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &[]);
        let file = daemon.open_read_only();
        let mut bytes = [0; 100];
        assert_eq!(file.read_at(&mut bytes, END - 10).unwrap(), 10);
        assert_eq!(bytes[..10], pattern(SIZE, 1)[SIZE - 10..]);
        assert_eq!(file.read_at(&mut bytes, END).unwrap(), 0);
        assert_eq!(file.read_at(&mut bytes, END + 12_345).unwrap(), 0);
        assert_eq!(file.read_at(&mut bytes, i64::MAX as u64 - 100).unwrap(), 0);
    });
}

#[test]
fn writes_to_a_disk_of_fixed_size_are_short_over_the_end_and_meet_enospc_past_it() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let file = daemon.open();
        assert_eq!(file.write_at(&[7; 100], END - 10).unwrap(), 10);
        for offset in [END, END + 1, END + 4096, 1 << 40] {
            let error = file.write_at(&[7; 100], offset).unwrap_err();
            assert_eq!(errno(&error), Errno::NOSPC, "at {offset}");
        }
        assert_eq!(file.metadata().unwrap().len(), END);
        daemon.stop();
        assert_eq!(image.metadata().unwrap().len(), END);
        assert_eq!(
            read_all(&image)[SIZE - 11..],
            [&pattern(SIZE, 1)[SIZE - 11..][..1], &[7; 10]].concat()
        );
    });
}

#[test]
fn a_growable_disk_grows_and_the_gap_reads_as_zeroes() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w", "--growable"]);
        let file = daemon.open();
        assert_eq!(
            file.write_at(&[7; 100], END - 10).unwrap(),
            100,
            "over the end"
        );
        assert_eq!(
            file.write_at(&[8; 512], END + 65_536).unwrap(),
            512,
            "past the end"
        );
        let size = END + 65_536 + 512;
        assert_eq!(file.metadata().unwrap().len(), size);
        let expected = [
            &pattern(SIZE, 1)[..SIZE - 10],
            &[7; 100],
            &vec![0; 65_536 - 90],
            &[8; 512],
        ]
        .concat();
        assert!(read_all(daemon.file()) == expected);
        daemon.stop();
        assert!(read_all(&image) == expected);
    });
}

#[test]
fn an_empty_disk_is_served_and_a_growable_one_can_be_filled() {
    everywhere(|bed| {
        let image = bed.image("i", 0);
        let daemon = bed.mount(&image, &["-w"]);
        assert_eq!(daemon.file().metadata().unwrap().len(), 0);
        assert_eq!(read_all(daemon.file()), b"");
        let error = daemon.open().write_at(&[1; 512], 0).unwrap_err();
        assert_eq!(errno(&error), Errno::NOSPC);
        daemon.stop();
        let daemon = bed.mount(&image, &["-w", "--growable"]);
        let bytes = pattern(10_240, 3);
        daemon.open().write_all_at(&bytes, 0).unwrap();
        daemon.stop();
        assert!(read_all(&image) == bytes);
    });
}

#[test]
fn the_last_partial_sector_is_readable_and_the_rest_of_it_reads_as_zeroes() {
    everywhere(|bed| {
        let image = bed.image("i", 5000);
        for options in [&["--cache", "page"], &["--cache", "direct"]] {
            let daemon = bed.mount(&image, options);
            let there = read_all(daemon.file());
            assert_eq!(there.len(), 5120, "{options:?}");
            assert_eq!(there[..5000], pattern(5000, 1), "{options:?}");
            assert!(there[5000..].iter().all(|&byte| byte == 0), "{options:?}");
            daemon.stop();
            assert_eq!(
                image.metadata().unwrap().len(),
                5000,
                "reading changes nothing"
            );
        }
    });
}

#[test]
fn opening_with_o_trunc_empties_only_a_growable_disk() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let new = pattern(SIZE, 9);
        // What `cat new > export` does.
        std::fs::write(daemon.file(), &new[..4096]).unwrap();
        assert_eq!(daemon.file().metadata().unwrap().len(), END);
        daemon.stop();
        assert!(read_all(&image) == [&new[..4096], &pattern(SIZE, 1)[4096..]].concat());

        let daemon = bed.mount(&image, &["-w", "--growable"]);
        std::fs::write(daemon.file(), &new[..8192]).unwrap();
        assert_eq!(daemon.file().metadata().unwrap().len(), 8192);
        daemon.stop();
        assert!(read_all(&image) == new[..8192]);
    });
}

#[test]
fn a_part_of_an_image_is_shown_and_nothing_outside_of_it_is_touched() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w", "--offset", "64k", "--size", "128k"]);
        assert!(read_all(daemon.file()) == pattern(SIZE, 1)[65_536..][..131_072]);
        let file = daemon.open();
        let error = file.write_at(&[1; 512], 131_072).unwrap_err();
        assert_eq!(errno(&error), Errno::NOSPC);
        file.write_all_at(&vec![5; 131_072], 0).unwrap();
        daemon.stop();
        let all = pattern(SIZE, 1);
        let expected = [&all[..65_536], &vec![5; 131_072], &all[65_536 + 131_072..]].concat();
        assert!(read_all(&image) == expected);
    });
}

#[test]
fn direct_io_works_on_the_export() {
    everywhere(|bed| {
        for cache in ["page", "direct"] {
            let image = bed.image("i", SIZE);
            let daemon = bed.mount(&image, &["-w", "--cache", cache]);
            let direct = File::options()
                .read(true)
                .write(true)
                .custom_flags(OFlags::DIRECT.bits().cast_signed())
                .open(daemon.file())
                .unwrap();
            let new = Aligned::copy_of(&pattern(65_536, 4));
            direct.write_all_at(new.bytes(), 131_072).unwrap();
            let mut back = Aligned::zeroes(65_536);
            direct.read_exact_at(back.bytes_mut(), 131_072).unwrap();
            assert!(back.bytes() == new.bytes(), "{cache}");
            daemon.stop();
            assert!(
                read_all(&image)[131_072..][..65_536] == *new.bytes(),
                "{cache}"
            );
        }
    });
}

#[test]
fn what_is_written_through_a_shared_map_is_in_the_image_after_msync() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let options = [
            "--ioengine=mmap",
            "--rw=write",
            "--bs=4k",
            "--size=512k",
            "--buffer_pattern=0xa55a",
            "--end_fsync=1",
        ];
        Fio::new("map", daemon.file(), &options).run();
        // Not ended yet: msync alone has to do it.
        let there = read_all(&image);
        assert!(
            there[..512 << 10]
                .chunks(2)
                .all(|pair| pair == [0xa5, 0x5a])
        );
        assert!(there[512 << 10..] == pattern(SIZE, 1)[512 << 10..]);
        daemon.stop();
    });
}

#[test]
fn flock_keeps_a_second_opener_out() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &["-w"]);
        let (first, second) = (daemon.open(), daemon.open());
        flock(&first, FlockOperation::NonBlockingLockExclusive).unwrap();
        let refused = flock(&second, FlockOperation::NonBlockingLockShared);
        assert_eq!(refused, Err(Errno::WOULDBLOCK));
        flock(&first, FlockOperation::Unlock).unwrap();
        flock(&second, FlockOperation::NonBlockingLockExclusive).unwrap();
    });
}

#[test]
fn close_fsync_and_fdatasync_flush_the_disk() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &["-w"]);
        let flushes = || await_listed(bed, daemon.file()).number("flushes");
        // A program of its own, because every child of this one closes what it inherits, and that flushes as well.
        let flushes_of = |conversion: &str| {
            let before = flushes();
            let target = format!("of={}", daemon.file().display());
            let tool = Tool::new("dd").args(["if=/dev/zero", "bs=4k", "count=1", &target]);
            tool.arg(format!("conv={conversion}")).run();
            flushes() - before
        };
        let close = flushes_of("notrunc");
        assert!(close >= 1);
        assert_eq!(flushes_of("notrunc,fsync"), close + 1);
        assert_eq!(flushes_of("notrunc,fdatasync"), close + 1);
        daemon.stop();
    });
}

/// `mmap` reads through the export as well: the pages are filled by READ.
#[test]
fn a_read_only_export_can_be_mapped_for_reading() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &[]);
        let options = [
            "--ioengine=mmap",
            "--rw=read",
            "--bs=4k",
            "--size=1m",
            "--readonly",
        ];
        Fio::new("map", daemon.file(), &options).run();
    });
}

/// A file, opened twice and exported twice.
fn twice(bed: &Bed) -> (Daemon, File, File) {
    let image = bed.image("i", SIZE);
    let (a, b) = (bed.mountpoint("a"), bed.mountpoint("b"));
    let export = |id: &str, at: &Path| {
        let at = at.display();
        format!("fuse,id={id},node-name=disk,mountpoint={at},writable=on")
    };
    let node = format!("file,node-name=disk,filename={}", image.display());
    let arguments = [
        "--blockdev",
        &node,
        "--export",
        &export("a", &a),
        "--export",
        &export("b", &b),
    ];
    let daemon = bed.qsd(&arguments, &[&a, &b]);
    let open = |path| File::options().read(true).write(true).open(path).unwrap();
    let (a, b) = (open(&a), open(&b));
    (daemon, a, b)
}

#[test]
fn two_exports_of_one_node_see_each_others_writes() {
    everywhere(|bed| {
        let (daemon, a, b) = twice(bed);
        for turn in 0..32_u64 {
            let (from, to) = if turn % 2 == 0 { (&a, &b) } else { (&b, &a) };
            let new = pattern(4096, turn + 100);
            from.write_all_at(&new, turn * 4096).unwrap();
            let mut there = [0; 4096];
            to.read_exact_at(&mut there, turn * 4096).unwrap();
            assert!(there == *new, "write {turn}");
        }
        daemon.stop();
    });
}

#[test]
fn two_exports_of_one_node_see_each_others_size() {
    everywhere(|bed| {
        let (daemon, a, b) = twice(bed);
        a.set_len(2 * END).unwrap();
        let sees = || b.metadata().unwrap().len() == 2 * END;
        wait_until(
            "the other export has the new size",
            Duration::from_secs(5),
            sees,
        );
        b.write_all_at(&[3; 512], 2 * END - 512).unwrap();
        let mut there = [0; 512];
        a.read_exact_at(&mut there, 2 * END - 512).unwrap();
        assert_eq!(there, [3; 512]);
        daemon.stop();
    });
}

#[test]
fn mounting_over_the_image_itself_works_and_its_name_shows_the_image_again_afterwards() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount_on(&image, &image, &["-w"]);
        assert!(read_all(&image) == pattern(SIZE, 1));
        daemon.open().write_all_at(&[9; 4096], 8192).unwrap();
        assert_eq!(mounts::at(&image).unwrap().kind, "fuse.diskfuse");
        daemon.stop();
        let all = pattern(SIZE, 1);
        assert!(read_all(&image) == [&all[..8192], &[9; 4096], &all[12_288..]].concat());
    });
}

#[test]
fn an_export_that_is_gone_leaves_the_file_that_was_there() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let mountpoint = bed.path("m");
        std::fs::write(&mountpoint, "what was there").unwrap();
        let daemon = bed.mount(&image, &["-w"]);
        assert_eq!(mountpoint.metadata().unwrap().len(), END);
        daemon.stop();
        assert_eq!(read_all(&mountpoint), b"what was there");
    });
}

#[test]
fn a_file_that_is_still_open_when_the_export_ends_answers_with_an_error_at_once() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &["-w"]);
        let mut file = daemon.open();
        daemon.stop();
        let error = file.read(&mut [0; 512]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotConnected);
    });
}
