//! O_DIRECT with requests of any offset, length and memory: what is read is what was written, whoever else writes.

#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{
    BACKENDS, Loop, buffer, directory, file_config, image, message, pattern, read, run, threads,
    wait, write,
};
use diskfuse_block::drivers::{FileConfig, FileNode, open_file, open_host_device};
use diskfuse_block::{Aio, Node, Resize, Zeroes, io};
use diskfuse_ring::{Choice, yield_now};
use proptest::prelude::*;

/// One step of a random history. Offsets and lengths are cut to the disk.
#[derive(Clone, Debug)]
enum Step {
    Write { at: u64, len: usize, skew: usize },
    Read { at: u64, len: usize, skew: usize },
    Zero { at: u64, len: u64 },
    Resize { size: u64 },
}

const SPACE: u64 = 40_000;

fn place() -> impl Strategy<Value = (u64, usize)> {
    let at = prop_oneof![
        0..SPACE,
        (0..SPACE / 512).prop_map(|s| s * 512),
        (0..9u64).prop_map(|s| s * 4096)
    ];
    let len = prop_oneof![1..9000usize, (1..16usize).prop_map(|s| s * 512), 1..40usize];
    (at, len)
}

fn step(resizes: bool) -> impl Strategy<Value = Step> {
    let skew = || prop_oneof![Just(0usize), Just(512), 1..700usize];
    let write = (place(), skew()).prop_map(|((at, len), skew)| Step::Write { at, len, skew });
    let read = (place(), skew()).prop_map(|((at, len), skew)| Step::Read { at, len, skew });
    let zero = place().prop_map(|(at, len)| Step::Zero {
        at,
        len: len as u64,
    });
    let resize = (1..SPACE).prop_map(|size| Step::Resize { size });
    prop_oneof![5 => write, 4 => read, 1 => zero, u32::from(resizes) => resize]
}

async fn replay(node: &dyn Node, model: &mut Vec<u8>, steps: &[Step]) {
    for (n, step) in steps.iter().enumerate() {
        let cut = |at: u64, len: usize| {
            let at = at.min(model.len() as u64);
            (at, len.min(model.len() - at as usize))
        };
        match *step {
            Step::Write { at, len, skew } => {
                let (at, len) = cut(at, len);
                let bytes = pattern(len, n as u64 + 1);
                let (result, buf) = io::write(node, at, buffer(&bytes, skew)).await;
                result.unwrap();
                assert_eq!(buf.as_slice(), bytes, "the buffer changed");
                model[at as usize..][..len].copy_from_slice(&bytes);
            }
            Step::Read { at, len, skew } => {
                let (at, len) = cut(at, len);
                let (result, buf) = io::read(node, at, buffer(&vec![0xEE; len], skew)).await;
                result.unwrap();
                assert_eq!(buf.window(), skew..skew + len);
                assert!(
                    buf.as_slice() == &model[at as usize..][..len],
                    "step {n}: {step:?}"
                );
            }
            Step::Zero { at, len } => {
                let (at, len) = cut(at, len as usize);
                node.write_zeroes(at, len as u64, Zeroes::Keep)
                    .await
                    .unwrap();
                model[at as usize..][..len].fill(0);
            }
            Step::Resize { size } => {
                node.resize(size, Resize::Exactly, false).await.unwrap();
                // A file's new bytes are zeroes; so are those up to the end of the last sector.
                model.resize(size as usize, 0);
                model.resize(size.next_multiple_of(512) as usize, 0);
            }
        }
        assert_eq!(node.size(), model.len() as u64, "step {n}: {step:?}");
    }
    let all = read(node, 0, model.len()).await.unwrap();
    assert!(all == *model, "the whole differs");
}

fn direct(path: &Path, aio: Aio) -> FileConfig {
    FileConfig {
        direct: true,
        aio,
        ..file_config(path)
    }
}

/// A history on a file of an odd size, and what the file holds afterwards, byte for byte and to its last byte.
fn on_a_file(dir: &tempfile::TempDir, choice: Choice, aio: Aio, odd: usize, steps: &[Step]) {
    let bytes = pattern(24_000 + odd, 99);
    let path = image(dir, "direct.raw", &bytes);
    let node = open_file(&direct(&path, aio)).unwrap();
    let mut model = bytes;
    model.resize(model.len().next_multiple_of(512), 0);
    run(choice, replay(&*node, &mut model, steps));
    let size = node.host().size();
    drop(node);
    let outside = std::fs::read(&path).unwrap();
    assert_eq!(outside.len() as u64, size);
    assert!(model.len() - outside.len() < 512);
    assert!(outside == model[..outside.len()], "the file differs");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_history_on_a_file_reads_back(
        steps in prop::collection::vec(step(true), 1..40),
        odd in 0..600usize,
    ) {
        let dir = directory();
        on_a_file(&dir, Choice::Uring, Aio::IoUring, odd, &steps);
        on_a_file(&dir, Choice::Epoll, Aio::IoUring, odd, &steps);
        on_a_file(&dir, Choice::Uring, Aio::Threads, odd, &steps);
    }

    #[test]
    fn any_history_in_memory_reads_back(
        steps in prop::collection::vec(step(true), 1..40),
        odd in 0..600usize,
    ) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        for choice in BACKENDS {
            on_a_file(&dir, choice, Aio::IoUring, odd, &steps);
        }
    }
}

/// A file whose host wants 4096 where the disk's size is a multiple of 512 only: an ext4 on 4 KiB sectors.
struct Coarse {
    dir: tempfile::TempDir,
    device: Loop,
}

impl Coarse {
    fn new() -> Self {
        let dir = directory();
        let file = image(&dir, "device", &[]);
        std::fs::File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .set_len(32 << 20)
            .unwrap();
        let device = Loop::new(&file, 4096);
        Self { dir, device }
    }

    fn mount(&self) -> Mounted {
        let device = self.device.0.to_str().unwrap();
        common::must("mkfs.ext4", &["-q", "-F", device]);
        let at = self.dir.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        common::must("mount", &[device, at.to_str().unwrap()]);
        Mounted(at)
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn any_history_on_coarse_sectors_reads_back() {
    let coarse = Coarse::new();
    let mounted = coarse.mount();
    let path = mounted.0.join("coarse.raw");
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let strategy = (prop::collection::vec(step(true), 1..40), 0..5000usize);
    let check = |(steps, odd): (Vec<Step>, usize)| {
        for choice in BACKENDS {
            let bytes = pattern(20_000 + odd, 7);
            std::fs::write(&path, &bytes).unwrap();
            let node = open_file(&direct(&path, Aio::IoUring)).unwrap();
            assert_eq!(node.limits().request_alignment, 4096);
            let mut model = bytes;
            model.resize(model.len().next_multiple_of(512), 0);
            run(choice, replay(&*node, &mut model, &steps));
            let size = node.host().size();
            drop(node);
            let outside = std::fs::read(&path).unwrap();
            assert_eq!(outside.len() as u64, size);
            assert!(outside == model[..outside.len()], "the file differs");
        }
        Ok(())
    };
    runner.run(&strategy, check).unwrap();
}

#[test]
fn any_history_on_a_device_with_4k_sectors_reads_back() {
    let coarse = Coarse::new();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let check = |steps: Vec<Step>| {
        for choice in BACKENDS {
            for direct in [true, false] {
                let config = FileConfig {
                    direct,
                    ..file_config(&coarse.device.0)
                };
                let node = open_host_device(&config).unwrap();
                let wanted = if direct { 4096 } else { 1 };
                assert_eq!(node.limits().request_alignment, wanted);
                run(choice, async {
                    let mut model = read(&*node, 0, node.size() as usize).await.unwrap();
                    replay(&*node, &mut model, &steps).await;
                });
            }
        }
        Ok(())
    };
    runner
        .run(&prop::collection::vec(step(false), 1..30), check)
        .unwrap();
}

/// Several threads own every n-th stretch of 37 bytes; all of them share all sectors.
fn disjoint_writers(node: &Arc<FileNode>, choice: Choice) {
    const STRETCH: usize = 37;
    const LEN: usize = 12_000;
    let writers = threads(choice, 4);
    let replies: Vec<_> = writers
        .iter()
        .enumerate()
        .map(|(who, thread)| {
            let node = Arc::clone(node);
            thread.mailbox().call(move || async move {
                let mine = (0..LEN / STRETCH).filter(|n| n % 4 == who);
                // Two halves at once, so that one thread meets itself as well.
                let (low, high): (Vec<_>, Vec<_>) = mine.partition(|n| n % 8 < 4);
                let both = [low, high].map(|part| {
                    let node = Arc::clone(&node);
                    diskfuse_ring::spawn(async move {
                        for n in part {
                            let bytes = [who as u8 + 1; STRETCH];
                            write(&*node, (n * STRETCH) as u64, &bytes).await.unwrap();
                            yield_now().await;
                        }
                    })
                });
                for task in both {
                    task.await;
                }
            })
        })
        .collect();
    for reply in replies {
        wait(reply);
    }
    let node = Arc::clone(node);
    let reply = writers[0]
        .mailbox()
        .call(move || async move { read(&*node, 0, LEN).await });
    let found = wait(reply).unwrap();
    for (n, stretch) in found.chunks_exact(STRETCH).enumerate() {
        let owner = (n % 4) as u8 + 1;
        assert!(
            stretch.iter().all(|&b| b == owner),
            "stretch {n} lost bytes: {stretch:?}"
        );
    }
}

/// One thread writes whole sectors, another a few bytes in the middle of the same ones, at the same time.
fn whole_and_part(node: &Arc<FileNode>, choice: Choice) {
    const SECTORS: usize = 8;
    let sector = node.limits().request_alignment as usize;
    let writers = threads(choice, 2);
    for round in 0..60u8 {
        let (whole, part) = (round | 0x80, 0x7F - round);
        let start = |which: usize| {
            let node = Arc::clone(node);
            writers[which].mailbox().call(move || async move {
                let tasks: Vec<_> = (0..SECTORS)
                    .map(|n| {
                        let node = Arc::clone(&node);
                        let at = (n * sector) as u64;
                        diskfuse_ring::spawn(async move {
                            if which == 0 {
                                write(&*node, at, &vec![whole; sector]).await.unwrap();
                            } else {
                                write(&*node, at + 100, &[part; 100]).await.unwrap();
                            }
                        })
                    })
                    .collect();
                for task in tasks {
                    task.await;
                }
            })
        };
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for reply in order.map(start) {
            wait(reply);
        }
        let all = Arc::clone(node);
        let len = SECTORS * sector;
        let found = writers[0]
            .mailbox()
            .call(move || async move { read(&*all, 0, len).await });
        for (n, found) in wait(found).unwrap().chunks_exact(sector).enumerate() {
            let middle = &found[100..200];
            let one = middle.iter().all(|&b| b == part) || middle.iter().all(|&b| b == whole);
            assert!(one, "round {round}, sector {n}: a torn middle");
            let around = found[..100].iter().chain(&found[200..]);
            assert!(
                around.into_iter().all(|&b| b == whole),
                "round {round}, sector {n}: lost"
            );
        }
    }
}

#[test]
fn writers_of_one_sector_lose_nothing() {
    for choice in BACKENDS {
        let dir = directory();
        let path = image(&dir, "shared.raw", &[0; 12_100]);
        let node = open_file(&direct(&path, Aio::IoUring)).unwrap();
        assert!(
            node.limits().request_alignment >= 512,
            "no O_DIRECT to test"
        );
        disjoint_writers(&node, choice);
        whole_and_part(&node, choice);
    }
}

#[test]
fn writers_of_one_device_sector_lose_nothing() {
    let coarse = Coarse::new();
    for choice in BACKENDS {
        let node = open_host_device(&direct(&coarse.device.0, Aio::IoUring)).unwrap();
        disjoint_writers(&node, choice);
        whole_and_part(&node, choice);
    }
}

#[test]
fn an_image_truncated_by_somebody_else_is_an_error_not_zeroes() {
    for choice in BACKENDS {
        for direct in [false, true] {
            let dir = directory();
            let path = image(&dir, "cut.raw", &pattern(16_384, 3));
            let node = open_file(&FileConfig {
                direct,
                ..file_config(&path)
            })
            .unwrap();
            let cut = std::fs::File::options().write(true).open(&path).unwrap();
            cut.set_len(5_000).unwrap();
            run(choice, async {
                assert_eq!(
                    read(&*node, 0, 4096).await.unwrap(),
                    pattern(16_384, 3)[..4096]
                );
                for (at, len) in [(4096, 4096), (8192, 512), (4999, 3)] {
                    let result = read(&*node, at, len).await;
                    assert_eq!(result.as_ref().unwrap_err().errno(), libc::EIO);
                    let message = message(result);
                    assert!(message.contains("truncated it"), "{message}");
                }
                // Our own truncation is none.
                node.resize(600, Resize::Exactly, false).await.unwrap();
                node.resize(9000, Resize::Exactly, false).await.unwrap();
                let found = read(&*node, 512, 8192).await.unwrap();
                assert_eq!(found[..88], pattern(16_384, 3)[512..600]);
                assert!(found[88..].iter().all(|&b| b == 0));
            });
        }
    }
}
