//! Space and safety of host files: zeroes, holes, discards, growth, a full disk, and flushes that fail.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use common::{
    BACKENDS, SmallDisk, directory, file_config, image, message, must, open, pattern, read, run,
    write,
};
use diskfuse_block::drivers::{DetectZeroes, Discard, FileConfig, open_file, open_host_device};
use diskfuse_block::{Kind, Node, Resize, Zeroes};

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn written_zeroes_give_space_back_only_when_asked_to() {
    for choice in BACKENDS {
        for (detect_zeroes, discard, left) in [
            (DetectZeroes::Off, Discard::Unmap, 1 << 20),
            (DetectZeroes::On, Discard::Unmap, 1 << 20),
            (DetectZeroes::Unmap, Discard::Ignore, 1 << 20),
            (DetectZeroes::Unmap, Discard::Unmap, 512 << 10),
        ] {
            let dir = directory();
            let path = image(&dir, "zeroes.raw", &pattern(1 << 20, 2));
            must("sync", &[path.to_str().unwrap()]);
            let node = open_file(&FileConfig {
                detect_zeroes,
                discard,
                ..file_config(&path)
            })
            .unwrap();
            run(choice, async {
                write(&*node, 0, &vec![0; 512 << 10]).await.unwrap();
                node.flush().await.unwrap();
                write(&*node, 600 << 10, &pattern(4096, 3)).await.unwrap();
            });
            must("sync", &[path.to_str().unwrap()]);
            let found = node.allocated();
            assert_eq!(found, allocated(&path));
            let close = found.abs_diff(left) < 64 << 10;
            assert!(close, "{detect_zeroes:?} {discard:?}: {found}");
            let bytes = std::fs::read(&path).unwrap();
            assert!(bytes[..512 << 10].iter().all(|&b| b == 0));
            assert!(bytes[512 << 10..600 << 10] == pattern(1 << 20, 2)[512 << 10..600 << 10]);
            assert!(bytes[600 << 10..604 << 10] == pattern(4096, 3));
        }
    }
}

#[test]
fn zeroes_are_written_where_the_host_cannot_zero_a_range() {
    // tmpfs punches holes but has no FALLOC_FL_ZERO_RANGE.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    for choice in BACKENDS {
        let path = image(&dir, "tmpfs.raw", &pattern(3 << 20, 1));
        let node = open(&path);
        let before = node.allocated();
        run(choice, node.write_zeroes(4097, 2 << 20, Zeroes::Keep)).unwrap();
        assert_eq!(node.allocated(), before);
        let mut expected = pattern(3 << 20, 1);
        expected[4097..4097 + (2 << 20)].fill(0);
        assert!(std::fs::read(&path).unwrap() == expected);
    }
}

#[test]
fn discard_gives_space_back_only_when_asked_to() {
    for choice in BACKENDS {
        for (discard, left) in [(Discard::Ignore, 1 << 20), (Discard::Unmap, 512 << 10)] {
            let dir = directory();
            let path = image(&dir, "discard.raw", &pattern(1 << 20, 2));
            must("sync", &[path.to_str().unwrap()]);
            let node = open_file(&FileConfig {
                discard,
                ..file_config(&path)
            })
            .unwrap();
            run(choice, node.discard(0, 512 << 10)).unwrap();
            assert!(node.allocated().abs_diff(left) < 64 << 10);
            let same = read_all(choice, &*node) == pattern(1 << 20, 2);
            assert_eq!(same, discard == Discard::Ignore);
        }
    }
}

fn read_all(choice: diskfuse_ring::Choice, node: &dyn Node) -> Vec<u8> {
    run(choice, read(node, 0, node.size() as usize)).unwrap()
}

#[test]
fn a_device_zeroes_any_range_and_discards_whole_sectors() {
    for choice in BACKENDS {
        let dir = directory();
        let bytes = pattern(4 << 20, 4);
        let device = common::Loop::new(&image(&dir, "device", &bytes), 4096);
        let config = FileConfig {
            discard: Discard::Unmap,
            ..file_config(&device.0)
        };
        let node = open_host_device(&config).unwrap();
        assert_eq!((node.size(), node.driver()), (4 << 20, "host_device"));
        let mut expected = bytes;
        run(choice, async {
            for (at, len, how) in [
                (100, 50, Zeroes::Keep),
                (5000, 100_000, Zeroes::Keep),
                (1 << 20, 1 << 20, Zeroes::MayUnmap),
            ] {
                node.write_zeroes(at, len, how).await.unwrap();
                expected[at as usize..(at + len) as usize].fill(0);
            }
            node.discard((2 << 20) + 1, 8000).await.unwrap();
            node.flush().await.unwrap();
        });
        let found = read_all(choice, &*node);
        assert!(found[..2 << 20] == expected[..2 << 20]);
        assert!(found[(2 << 20) + 8192..] == expected[(2 << 20) + 8192..]);
        assert_eq!(found[2 << 20], expected[2 << 20]);
        let fixed = run(choice, node.resize(8 << 20, Resize::AtLeast, false));
        assert_eq!(fixed.unwrap_err().kind(), Kind::Unsupported);
    }
}

#[test]
fn growing_with_preallocation_takes_the_space_and_reads_as_zeroes() {
    for choice in BACKENDS {
        let dir = directory();
        let path = image(&dir, "grow.raw", &[3; 1000]);
        let node = open(&path);
        run(choice, async {
            node.resize(1 << 20, Resize::AtLeast, true).await.unwrap();
            assert!(node.allocated() >= 1 << 20);
            let found = read(&*node, 0, 1 << 20).await.unwrap();
            assert!(found[..1000] == [3; 1000] && found[1000..].iter().all(|&b| b == 0));
            node.resize(4096, Resize::AtLeast, false).await.unwrap();
            assert_eq!(node.size(), 1 << 20);
            node.resize(513, Resize::Exactly, false).await.unwrap();
            assert_eq!((node.size(), node.host().size()), (1024, 513));
        });
    }
}

/// A device whose bytes have no room on the disk below: writes reach the page cache and no further.
#[test]
fn a_failed_flush_is_never_forgotten() {
    for choice in BACKENDS {
        let dir = directory();
        let small = SmallDisk::new(&dir, 8 << 20);
        let backing = small.mountpoint.join("backing");
        let file = std::fs::File::create(&backing).unwrap();
        file.set_len(64 << 20).unwrap();
        let device = common::Loop::new(&backing, 512);
        let node = open_host_device(&file_config(&device.0)).unwrap();
        run(choice, async {
            write(&*node, 0, &pattern(1 << 20, 1)).await.unwrap();
            node.flush().await.unwrap();
            for at in 1..16 {
                write(&*node, at << 20, &pattern(1 << 20, at))
                    .await
                    .unwrap();
            }
            // Two at once: the kernel reports the error once only.
            let two = [0; 2].map(|_| {
                let node = Arc::clone(&node);
                diskfuse_ring::spawn(async move { node.flush().await })
            });
            for flush in two {
                let error = flush.await.unwrap_err();
                assert!(
                    [libc::EIO, libc::ENOSPC].contains(&error.errno()),
                    "{error}"
                );
            }
            let said = message(node.flush().await);
            assert!(said.contains("page cache is inconsistent"), "{said}");
        });
        drop(node);
        let careless = FileConfig {
            no_flush: true,
            ..file_config(&device.0)
        };
        let node = open_host_device(&careless).unwrap();
        run(choice, node.flush()).unwrap();
    }
}

#[test]
fn many_flushes_at_once_all_succeed() {
    for choice in BACKENDS {
        let dir = directory();
        let node = open(&image(&dir, "flush.raw", &[0; 4096]));
        let rings = common::threads(choice, 3);
        let replies: Vec<_> = (0..60)
            .map(|n: usize| {
                let node = Arc::clone(&node);
                rings[n % 3].mailbox().call(move || async move {
                    write(&*node, n as u64 * 64, &[n as u8; 64]).await?;
                    node.flush().await
                })
            })
            .collect();
        for reply in replies {
            common::wait(reply).unwrap();
        }
    }
}

#[test]
fn bytes_that_somebody_left_past_the_end_do_not_come_back() {
    for choice in BACKENDS {
        let dir = directory();
        let path = image(&dir, "left.raw", &[1; 512]);
        let node = open(&path);
        std::fs::write(&path, [1; 2048]).unwrap();
        run(choice, async {
            node.resize(4096, Resize::AtLeast, false).await.unwrap();
            let found = read(&*node, 0, 4096).await.unwrap();
            assert!(found[..512] == [1; 512] && found[512..].iter().all(|&b| b == 0));
        });
    }
}

/// The status of the whole disk as `(start, len, zero)`, neighbours joined.
async fn map(node: &dyn Node) -> Vec<(u64, u64, bool)> {
    let mut found: Vec<(u64, u64, bool)> = Vec::new();
    let mut at = 0;
    while at < node.size() {
        let status = node.block_status(at, node.size() - at).await.unwrap();
        assert_eq!(status.host_offset, Some(at));
        match found.last_mut() {
            Some(last) if last.2 == status.zero => last.1 += status.len,
            _ => found.push((at, status.len, status.zero)),
        }
        at += status.len;
    }
    found
}

#[test]
fn block_status_is_what_qemu_img_map_says() {
    use std::os::unix::fs::FileExt;
    for choice in BACKENDS {
        let dir = directory();
        let path = image(&dir, "holes.raw", &[]);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len((1 << 20) + 300).unwrap();
        for at in [0, 64 << 10, 300 << 10, (1 << 20) + 100] {
            file.write_all_at(&pattern(40 << 10, at), at).unwrap();
        }
        file.set_len((2 << 20) + 300).unwrap();
        file.sync_all().unwrap();
        let json = must(
            "qemu-img",
            &["map", "-f", "raw", "--output=json", path.to_str().unwrap()],
        );
        let field = |entry: &str, name: &str| {
            let (_, after) = entry.split_once(&format!("\"{name}\": ")).unwrap();
            let end = after.find([',', '}']).unwrap();
            after[..end].to_owned()
        };
        let expected: Vec<_> = json
            .lines()
            .map(|entry| {
                let number = |name| field(entry, name).parse::<u64>().unwrap();
                (
                    number("start"),
                    number("length"),
                    field(entry, "zero") == "true",
                )
            })
            .collect();
        assert!(expected.len() > 4, "{json}");
        let node = open(&path);
        assert_eq!(run(choice, map(&*node)), expected);
    }
}

#[test]
fn a_full_disk_says_so_and_what_was_there_still_works() {
    for choice in BACKENDS {
        for direct in [false, true] {
            let dir = directory();
            let small = SmallDisk::new(&dir, 8 << 20);
            let path = small.mountpoint.join(format!("full-{direct}.raw"));
            std::fs::write(&path, pattern(8192, 1)).unwrap();
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_len(64 << 20).unwrap();
            let node = open_file(&FileConfig {
                direct,
                ..file_config(&path)
            })
            .unwrap();
            run(choice, async {
                let mut at = 1 << 20;
                let error = loop {
                    match write(&*node, at, &vec![1; 1 << 20]).await {
                        Ok(()) => at += 1 << 20,
                        Err(error) => break error,
                    }
                };
                assert_eq!(error.errno(), libc::ENOSPC);
                let said = error.to_string();
                assert!(
                    said.contains("No space left on device") && said.contains("full-"),
                    "{said}"
                );
                write(&*node, 4096, &pattern(4096, 2)).await.unwrap();
                assert_eq!(read(&*node, 4096, 4096).await.unwrap(), pattern(4096, 2));
                let size = node.size();
                let error = node
                    .resize(128 << 20, Resize::AtLeast, true)
                    .await
                    .unwrap_err();
                assert_eq!((error.errno(), node.size()), (libc::ENOSPC, size));
            });
        }
    }
}
