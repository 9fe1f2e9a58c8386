//! truncate(2), fallocate(2) and lseek(2): how large the disk is, where its data is, and what is given back.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{Tool, everywhere, pattern, wait_until};
use rustix::fs::{FallocateFlags as Flags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

const SIZE: usize = 4 << 20;
const END: u64 = SIZE as u64;
const PUNCH: Flags = Flags::PUNCH_HOLE.union(Flags::KEEP_SIZE);

fn allocated(path: &Path) -> u64 {
    path.metadata().unwrap().blocks() * 512
}

#[test]
fn truncate_makes_any_writable_disk_smaller_and_larger() {
    everywhere(|bed| {
        for options in [&["-w"][..], &["-w", "--growable"]] {
            let image = bed.image("i", SIZE);
            let daemon = bed.mount(&image, options);
            let file = daemon.open();
            for size in [1 << 20, 8 << 20, 0, 512, END] {
                file.set_len(size).unwrap();
                assert_eq!(file.metadata().unwrap().len(), size);
                assert_eq!(image.metadata().unwrap().len(), size);
            }
            let mut there = [1; 4096];
            file.read_exact_at(&mut there, 1 << 20).unwrap();
            assert_eq!(there, [0; 4096], "what was cut off does not come back");
            daemon.stop();
        }
    });
}

#[test]
fn a_disk_that_has_only_whole_sectors_refuses_other_sizes() {
    everywhere(|bed| {
        let mountpoint = bed.mountpoint("m");
        let export = format!(
            "fuse,id=e,node-name=n,mountpoint={},writable=on",
            mountpoint.display()
        );
        let arguments = [
            "--blockdev",
            "null-co,node-name=n,size=1M",
            "--export",
            &export,
        ];
        let daemon = bed.qsd(&arguments, &[&mountpoint]);
        let error = daemon.open().set_len(1000).unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::INVAL));
        daemon.stop();
    });
}

#[test]
fn plain_fallocate_is_refused_inside_and_preallocates_at_or_past_the_end() {
    everywhere(|bed| {
        // Not growable: fallocate grows any writable disk.
        let image = bed.sparse("i", END);
        let daemon = bed.mount(&image, &["-w"]);
        let file = daemon.open();
        for (offset, len) in [(0, 4096), (END - 4096, 4096), (1 << 20, 1 << 20)] {
            let inside = fallocate(&file, Flags::empty(), offset, len);
            assert_eq!(inside, Err(Errno::OPNOTSUPP), "{len} at {offset}");
        }
        assert_eq!(image.metadata().unwrap().len(), END);
        fallocate(&file, Flags::empty(), END, 1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), END + (1 << 20));
        assert!(allocated(&image) >= 1 << 20, "{}", allocated(&image));
        fallocate(&file, Flags::empty(), END + (2 << 20), 1 << 20).unwrap();
        assert_eq!(file.metadata().unwrap().len(), END + (3 << 20));
        let mut there = vec![1; 3 << 20];
        file.read_exact_at(&mut there, END).unwrap();
        assert!(there.iter().all(|&byte| byte == 0));
        daemon.stop();
        assert!(allocated(&image) >= 2 << 20, "`du` shows it");
    });
}

#[test]
fn a_punched_hole_reads_as_zeroes_gives_its_space_back_and_ends_at_the_end() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let file = daemon.open();
        file.sync_all().unwrap();
        let before = allocated(&image);
        fallocate(&file, PUNCH, 1 << 20, 1 << 20).unwrap();
        fallocate(&file, PUNCH, 1000, 100).unwrap();
        fallocate(&file, PUNCH, END - 65_536, 1 << 30).unwrap();
        fallocate(&file, PUNCH, END + 512, 512).unwrap();
        assert_eq!(file.metadata().unwrap().len(), END);
        daemon.stop();
        let mut expected = pattern(SIZE, 1);
        for hole in [1 << 20..2 << 20, 1000..1100, SIZE - 65_536..SIZE] {
            expected[hole].fill(0);
        }
        assert!(std::fs::read(&image).unwrap() == expected);
        let given_back = before - allocated(&image);
        assert!(given_back >= 1 << 20, "only {given_back} bytes");
    });
}

#[test]
fn zero_range_zeroes_and_grows_even_a_disk_that_is_not_growable() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let file = daemon.open();
        fallocate(&file, Flags::ZERO_RANGE, 8192, 100_000).unwrap();
        assert_eq!(file.metadata().unwrap().len(), END);
        fallocate(&file, Flags::ZERO_RANGE, END - 4096, 8192).unwrap();
        assert_eq!(file.metadata().unwrap().len(), END + 4096);
        daemon.stop();
        let mut expected = pattern(SIZE, 1);
        expected[8192..108_192].fill(0);
        expected[SIZE - 4096..].fill(0);
        expected.resize(SIZE + 4096, 0);
        assert!(std::fs::read(&image).unwrap() == expected);
    });
}

#[test]
fn zero_range_that_keeps_the_size_ends_at_the_end() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let file = daemon.open();
        let flags = Flags::ZERO_RANGE | Flags::KEEP_SIZE;
        fallocate(&file, flags, END - 4096, 1 << 20).unwrap();
        fallocate(&file, flags, 513, 1).unwrap();
        assert_eq!(file.metadata().unwrap().len(), END);
        daemon.stop();
        let mut expected = pattern(SIZE, 1);
        expected[513] = 0;
        expected[SIZE - 4096..].fill(0);
        assert!(std::fs::read(&image).unwrap() == expected);
    });
}

#[test]
fn other_modes_of_fallocate_are_not_supported_and_change_nothing() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let daemon = bed.mount(&image, &["-w"]);
        let file = daemon.open();
        for flags in [
            Flags::PUNCH_HOLE,
            Flags::KEEP_SIZE,
            Flags::COLLAPSE_RANGE,
            Flags::INSERT_RANGE,
            Flags::UNSHARE_RANGE,
        ] {
            let answer = fallocate(&file, flags, 65_536, 65_536);
            assert_eq!(answer, Err(Errno::OPNOTSUPP), "{flags:?}");
        }
        daemon.stop();
        assert!(std::fs::read(&image).unwrap() == pattern(SIZE, 1));
    });
}

#[test]
fn a_read_only_disk_cannot_be_allocated_punched_or_zeroed() {
    everywhere(|bed| {
        let daemon = bed.mount(&bed.image("i", SIZE), &[]);
        let file = daemon.open_read_only();
        for flags in [Flags::empty(), PUNCH, Flags::ZERO_RANGE] {
            // The kernel refuses a descriptor that is not open for writing, and the mount does not give another.
            assert_eq!(fallocate(&file, flags, END, 4096), Err(Errno::BADF));
        }
        daemon.stop();
    });
}

/// Where data is, according to SEEK_DATA and SEEK_HOLE.
fn data_by_seek(file: &File, size: u64) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => panic!("SEEK_DATA from {at}: {error}"),
        };
        let end = seek(file, SeekFrom::Hole(start)).unwrap();
        assert!(start >= at && end > start, "{start} to {end}");
        found.push((start, end));
        at = end;
    }
    found
}

/// The same according to `qemu-img map`.
fn data_by_qemu(image: &Path) -> Vec<(u64, u64)> {
    let tool = Tool::new("qemu-img").args(["map", "--output=json", "-f", "raw"]);
    let map = tool.arg(image).run().stdout;
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for extent in map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["data"] == true)
    {
        let start = extent["start"].as_u64().unwrap();
        let end = start + extent["length"].as_u64().unwrap();
        match found.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => found.push((start, end)),
        }
    }
    found
}

#[test]
fn seek_data_and_seek_hole_agree_with_qemu_img_map() {
    everywhere(|bed| {
        let places: [&[(u64, usize)]; 4] = [
            &[],
            &[(0, SIZE)],
            &[(65_536, 4096), (1 << 20, 1 << 20), (END - 4096, 4096)],
            &[(0, 4096), (131_072, 65_536), (3 << 20, 8192)],
        ];
        for data in places {
            let image = bed.patchy("i", END, data);
            let expected = data_by_qemu(&image);
            assert_eq!(expected.is_empty(), data.is_empty());
            let daemon = bed.mount(&image, &[]);
            let file = daemon.open_read_only();
            assert_eq!(data_by_seek(&file, END), expected, "{data:?}");
            daemon.stop();
        }
    });
}

#[test]
fn seeking_at_and_past_the_end_is_answered_as_the_manual_says() {
    everywhere(|bed| {
        let image = bed.patchy("i", END, &[(0, 65_536)]);
        let daemon = bed.mount(&image, &[]);
        let file = daemon.open_read_only();
        let nothing = Err(Errno::NXIO);
        assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(0));
        assert_eq!(
            seek(&file, SeekFrom::Data(131_072)),
            nothing,
            "data in the last hole"
        );
        assert_eq!(seek(&file, SeekFrom::Data(END)), nothing);
        assert_eq!(seek(&file, SeekFrom::Data(END + 1)), nothing);
        assert_eq!(seek(&file, SeekFrom::Hole(131_072)), Ok(131_072));
        assert_eq!(seek(&file, SeekFrom::Hole(END)), Ok(END));
        assert_eq!(seek(&file, SeekFrom::Hole(END + 1)), nothing);
        daemon.stop();
        let image = bed.image("full", SIZE);
        let daemon = bed.mount(&image, &[]);
        let file = daemon.open_read_only();
        assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(END), "the end is a hole");
        daemon.stop();
    });
}

#[test]
fn cp_keeps_holes() {
    everywhere(|bed| {
        let image = bed.patchy("i", 64 << 20, &[(8 << 20, 65_536)]);
        let daemon = bed.mount(&image, &[]);
        let copy = bed.path("copy");
        Tool::new("cp")
            .args(["--sparse=auto"])
            .arg(daemon.file())
            .arg(&copy)
            .run();
        Tool::new("cmp").arg(&image).arg(&copy).run();
        let small = || allocated(&copy) <= 1 << 20;
        wait_until(
            "the copy takes as little room as the image",
            Duration::from_secs(5),
            small,
        );
        daemon.stop();
    });
}
