//! The daemon is killed under load, again and again: each time the image is sound, and what was synced is in it.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use diskfuse_e2e::{Bed, Tool, await_let_go, on_each, pattern, wait_until};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(120);
const BLOCK: usize = 4096;
const WRITERS: u64 = 4;
/// Blocks that one writer has for itself.
const BLOCKS: u64 = 2048;
/// Kills that one image survives.
const KILLS: u64 = 4;
/// What the random numbers begin with where `CI` is set.
const CI_SEED: u64 = 1_000_000;
/// Blocks of one request at most.
const MOST: u64 = 24;

/// The xorshift64* generator.
struct Rng(u64);

impl Rng {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}

/// One thread that writes to its part of the disk, and knows what each of its blocks may hold after a crash: what was
/// there at the last sync, and everything since. Generation 0 is zeroes.
struct Writer {
    number: u64,
    rng: Rng,
    generation: u64,
    blocks: Vec<Vec<u64>>,
}

impl Writer {
    fn new(number: u64, seed: u64) -> Self {
        Self {
            number,
            rng: Rng((seed ^ (number + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            generation: 0,
            blocks: vec![vec![0]; BLOCKS as usize],
        }
    }

    fn content(&self, block: u64, generation: u64) -> Vec<u8> {
        match generation {
            0 => vec![0; BLOCK],
            _ => pattern(BLOCK, (self.number << 56) + (block << 32) + generation),
        }
    }

    fn offset(&self, block: u64) -> u64 {
        (self.number * BLOCKS + block) * BLOCK as u64
    }

    /// Until the file is taken away.
    fn work(&mut self, file: &File, done: &AtomicU64) {
        loop {
            let answer = match self.rng.below(20) {
                0 => self.sync(file),
                1 | 2 => self.punch(file),
                _ => self.write(file),
            };
            if answer.is_err() {
                return;
            }
            done.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn run_of_blocks(&mut self) -> std::ops::Range<u64> {
        let count = 1 + self.rng.below(MOST);
        let first = self.rng.below(BLOCKS - count + 1);
        first..first + count
    }

    fn write(&mut self, file: &File) -> std::io::Result<()> {
        self.generation += 1;
        let (run, generation) = (self.run_of_blocks(), self.generation);
        let mut bytes = Vec::new();
        for block in run.clone() {
            bytes.extend(self.content(block, generation));
            self.blocks[block as usize].push(generation);
        }
        file.write_all_at(&bytes, self.offset(run.start))
    }

    fn punch(&mut self, file: &File) -> std::io::Result<()> {
        let run = self.run_of_blocks();
        for block in run.clone() {
            self.blocks[block as usize].push(0);
        }
        let len = (run.end - run.start) * BLOCK as u64;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(fallocate(file, flags, self.offset(run.start), len)?)
    }

    fn sync(&mut self, file: &File) -> std::io::Result<()> {
        file.sync_data()?;
        for block in &mut self.blocks {
            let newest = block.len() - 1;
            block.drain(..newest);
        }
        Ok(())
    }

    /// Compares with what is left, and goes on from there.
    fn check(&mut self, left: &File) {
        let mut there = vec![0; BLOCK];
        for block in 0..BLOCKS {
            left.read_exact_at(&mut there, self.offset(block)).unwrap();
            let may_be = &self.blocks[block as usize];
            let found = may_be
                .iter()
                .rev()
                .find(|&&g| there == self.content(block, g));
            let Some(&found) = found else {
                let (number, first) = (self.number, &there[..16]);
                panic!(
                    "writer {number}, block {block}: {first:02x?}…, not one of generations {may_be:?}"
                );
            };
            self.blocks[block as usize] = vec![found];
        }
    }
}

fn seed() -> u64 {
    let seed = std::env::var("DISKFUSE_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    // Where every run must do the same.
    let own = match std::env::var_os("CI") {
        Some(_) => CI_SEED,
        None => u64::from(std::process::id()),
    };
    let seed = seed.unwrap_or(own);
    eprintln!("again with DISKFUSE_SEED={seed}");
    seed
}

/// Leaks are allowed, corruption is not.
fn must_be_sound(image: &Path) {
    let check = Tool::new("qemu-img").args(["check", "-f", "qcow2"]);
    let check = check.arg(image).output();
    assert!([0, 3].contains(&check.code()), "{check}");
}

/// Mounts, writes, kills, looks; several times over.
fn kill_again_and_again(bed: &Bed, name: &str, create: &[&str], options: &[&str], is_lazy: bool) {
    let image = bed.path(name);
    let size = (WRITERS * BLOCKS * BLOCK as u64).to_string();
    Tool::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args(create)
        .arg(&image)
        .arg(&size)
        .current_dir(bed.root())
        .run();
    let seed = seed();
    let mut rng = Rng(seed | 1);
    let mut writers: Vec<Writer> = (0..WRITERS).map(|n| Writer::new(n, seed)).collect();
    for _ in 0..KILLS {
        let options = [&["-w", "--threads", "4"], options].concat();
        let daemon = bed.mount(&image, &options);
        let done = Arc::new(AtomicU64::new(0));
        let threads: Vec<JoinHandle<Writer>> = writers
            .drain(..)
            .map(|mut writer| {
                let (file, done) = (daemon.open(), Arc::clone(&done));
                std::thread::spawn(move || {
                    writer.work(&file, &done);
                    writer
                })
            })
            .collect();
        let enough = 20 + rng.below(400);
        wait_until(
            "the writers have got going",
            Duration::from_secs(20),
            || done.load(Ordering::SeqCst) >= enough,
        );
        let mountpoint = daemon.file().to_owned();
        daemon.end_by(Signal::KILL);
        let over = || threads.iter().all(JoinHandle::is_finished);
        wait_until("all writers are answered", Duration::from_secs(10), over);
        Tool::new("umount").arg("-l").arg(&mountpoint).output();
        writers.extend(threads.into_iter().map(|thread| thread.join().unwrap()));
        await_let_go(&image);
        if !is_lazy {
            must_be_sound(&image);
        }
        let raw = bed.path("raw");
        Tool::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .arg(&image)
            .arg(&raw)
            .run();
        let left = File::open(&raw).unwrap();
        for writer in &mut writers {
            writer.check(&left);
        }
    }
    // And it can still be used, and ended properly.
    let daemon = bed.mount(&image, &["-w"]);
    daemon.open().write_all_at(&[1; BLOCK], 0).unwrap();
    daemon.stop();
    must_be_sound(&image);
}

#[test]
fn a_killed_daemon_leaves_a_sound_image_with_all_that_was_synced() {
    on_each(LIMIT, |bed| {
        kill_again_and_again(bed, "plain", &[], &[], false);
        kill_again_and_again(bed, "small", &["-o", "cluster_size=4k"], &[], false);
    });
}

#[test]
fn a_killed_daemon_leaves_a_sound_image_around_the_page_cache_too() {
    on_each(LIMIT, |bed| {
        kill_again_and_again(bed, "plain", &[], &["--cache", "direct"], false);
    });
}

#[test]
fn lazy_refcounts_are_repaired_after_a_kill() {
    on_each(LIMIT, |bed| {
        let create = ["-o", "lazy_refcounts=on,cluster_size=16k"];
        kill_again_and_again(bed, "lazy", &create, &[], true);
    });
}

#[test]
fn subclusters_over_a_backing_file_survive_a_kill() {
    on_each(LIMIT, |bed| {
        let base = bed.sparse("base", 16 << 20);
        let create = [
            "-o",
            "extended_l2=on",
            "-F",
            "raw",
            "-b",
            base.to_str().unwrap(),
        ];
        kill_again_and_again(bed, "overlay", &create, &[], false);
    });
}
