//! Writers that know what was acknowledged: whatever happens to the disk below them, it must have that, or something newer
//! that was under way, and never a mixture of two moments. They measure how long they are kept waiting. They must not hang on
//! a mount that is gone.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::raw_io::pattern;
use crate::wait_until;

/// Bytes of one write.
const BLOCK: usize = 4096;
/// Blocks that each writer goes through, again and again.
const BLOCKS: u64 = 64;
/// How many writes later a block is read again, and must be what was written.
const LATER: u64 = 17;

/// Where the blocks of each writer lie.
#[derive(Clone, Copy)]
struct Layout {
    /// From one block of a writer to its next.
    step: u64,
    /// From one writer to the next.
    apart: u64,
}

impl Layout {
    fn place(self, writer: u64, write: u64) -> u64 {
        writer * self.apart + write % BLOCKS * self.step
    }
}

/// What a writer tells.
#[derive(Default)]
struct Told {
    acknowledged: AtomicU64,
    latencies: Mutex<Vec<Duration>>,
}

/// How long requests took.
#[derive(Clone, Copy, Debug)]
pub struct Latencies {
    /// How many requests.
    pub count: usize,
    /// 99 of 100 took no longer.
    pub p99: Duration,
    /// The slowest.
    pub max: Duration,
}

/// Threads that write generation after generation, each to its own part of a file, read some of it again, and note what was
/// acknowledged.
pub struct Writers {
    stop: Arc<AtomicBool>,
    layout: Layout,
    told: Vec<Arc<Told>>,
    threads: Vec<JoinHandle<String>>,
}

impl Writers {
    /// `count` of them, from byte 0 of `file`, one behind the other.
    pub fn start(file: &Path, count: u64) -> Self {
        let step = BLOCK as u64;
        let apart = BLOCKS * step;
        Self::with_layout(file, count, Layout { step, apart })
    }

    /// `count` of them whose blocks lie side by side, and so in the same clusters, at every multiple of `step`.
    pub fn scattered(file: &Path, count: u64, step: u64) -> Self {
        let apart = BLOCK as u64;
        assert!(count * apart <= step, "writers would overlap");
        Self::with_layout(file, count, Layout { step, apart })
    }

    fn with_layout(file: &Path, count: u64, layout: Layout) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let told: Vec<Arc<Told>> = (0..count).map(|_| Arc::default()).collect();
        let threads = (0..count)
            .zip(&told)
            .map(|(writer, told)| {
                let mut options = File::options();
                let file = options.read(true).write(true).open(file);
                let file = file.expect("a usable export");
                let (stop, told) = (Arc::clone(&stop), Arc::clone(told));
                std::thread::spawn(move || write(&file, layout, writer, &stop, &told))
            })
            .collect();
        Self {
            stop,
            layout,
            told,
            threads,
        }
    }

    /// Bytes that a file needs for `count` writers that are not scattered.
    pub fn space(count: u64) -> u64 {
        count * BLOCKS * BLOCK as u64
    }

    /// Bytes that a file needs for scattered writers.
    pub const fn scattered_space(step: u64) -> u64 {
        BLOCKS * step
    }

    /// How many writes of each were acknowledged.
    pub fn acknowledged(&self) -> Vec<u64> {
        let told = self.told.iter();
        told.map(|told| told.acknowledged.load(Ordering::SeqCst))
            .collect()
    }

    /// Waits until every writer has been acknowledged at least `writes` times.
    #[track_caller]
    pub fn wait_for(&self, writes: u64) {
        self.wait_from(&vec![0; self.told.len()], writes);
    }

    /// Waits until every writer has been acknowledged `writes` times more.
    #[track_caller]
    pub fn go_on(&self, writes: u64) {
        self.wait_from(&self.acknowledged(), writes);
    }

    #[track_caller]
    fn wait_from(&self, from: &[u64], writes: u64) {
        let all = || {
            let now = self.acknowledged();
            let mut both = now.iter().zip(from);
            both.all(|(now, from)| *now >= from + writes)
        };
        let over = || all() || self.any_ended();
        wait_until("all writers have gone on", Duration::from_secs(20), over);
        assert!(all(), "a writer has ended");
    }

    /// How long requests took since this was asked last.
    pub fn latencies(&self) -> Latencies {
        let mut all = Vec::new();
        for told in &self.told {
            let mut own = told
                .latencies
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            all.append(&mut own);
        }
        all.sort_unstable();
        let at = |place: usize| all.get(place).copied().unwrap_or_default();
        Latencies {
            count: all.len(),
            p99: at((all.len() * 99 / 100).min(all.len().saturating_sub(1))),
            max: at(all.len().saturating_sub(1)),
        }
    }

    /// Stops the writers and waits for them: each ends because it was told to or because of an error, which is returned. Nobody
    /// who writes to a mount that is gone may hang.
    #[track_caller]
    pub fn stop(&mut self) -> Vec<String> {
        self.stop.store(true, Ordering::SeqCst);
        let threads = std::mem::take(&mut self.threads);
        let over = || threads.iter().all(JoinHandle::is_finished);
        wait_until("all writers are answered", Duration::from_secs(10), over);
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().expect("a writer"));
        ends.collect()
    }

    /// Stops the writers, and fails unless `image` has what was acknowledged. Why each ended is returned.
    #[track_caller]
    pub fn finish(mut self, image: &Path) -> Vec<String> {
        let ends = self.stop();
        self.check(image);
        ends
    }

    /// The same of writers that end by themselves, because what they write to has: none is told to stop before it has met the
    /// error, however long it was not scheduled.
    #[track_caller]
    pub fn ended(self, image: &Path) -> Vec<String> {
        let over = || self.threads.iter().all(JoinHandle::is_finished);
        wait_until("all writers have ended", Duration::from_secs(10), over);
        self.finish(image)
    }

    /// Whether some writer has ended.
    pub fn any_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Fails unless `image` has all that is acknowledged now, when nobody writes any more.
    #[track_caller]
    pub fn check(&self, image: &Path) {
        let done = self.acknowledged();
        self.check_moment(image, &done, &done);
    }

    /// Fails unless `image` is what the disk was at one moment between those when `from` and `to` were acknowledged.
    #[track_caller]
    pub fn check_moment(&self, image: &Path, from: &[u64], to: &[u64]) {
        let file = File::open(image).expect("the image");
        for (writer, (&from, &to)) in (0..).zip(from.iter().zip(to)) {
            let blocks = self.blocks(&file, writer);
            let done = blocks.iter().map(|block| stamp(block)).max().unwrap_or(0);
            assert!(
                (from..=to + 1).contains(&done),
                "{}: writer {writer} is there up to write {done}, not between {from} and {to}",
                image.display()
            );
            for (block, there) in (0..).zip(&blocks) {
                assert!(
                    *there == after(writer, block, done),
                    "{}: writer {writer}, block {block}: not as it was after {done} writes (it says {})",
                    image.display(),
                    stamp(there)
                );
            }
        }
    }
}

impl Writers {
    /// Fails unless each block of `image` is what it was when `synced` were acknowledged, or something newer that was written:
    /// what a crash may leave.
    #[track_caller]
    pub fn check_after_crash(&self, image: &Path, synced: &[u64]) {
        let file = File::open(image).expect("the image");
        let done = self.acknowledged();
        for (writer, (&synced, &done)) in (0..).zip(synced.iter().zip(&done)) {
            for (block, there) in (0..).zip(self.blocks(&file, writer)) {
                let mut candidates = (synced..=done + 1).filter(|written| {
                    *written == synced || written % BLOCKS == (block + 1) % BLOCKS
                });
                assert!(
                    candidates.any(|written| there == after(writer, block, written)),
                    "{}: writer {writer}, block {block} says {} with {synced} synced and {done} acknowledged",
                    image.display(),
                    stamp(&there)
                );
            }
        }
    }

    fn blocks(&self, file: &File, writer: u64) -> Vec<Vec<u8>> {
        let read = |block| {
            let mut there = vec![0; BLOCK];
            let read = file.read_exact_at(&mut there, self.layout.place(writer, block));
            read.expect("the image is whole");
            there
        };
        (0..BLOCKS).map(read).collect()
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

/// What is in a block of a writer after so many writes.
fn after(writer: u64, block: u64, written: u64) -> Vec<u8> {
    match written > block {
        true => content(writer, written - 1 - (written - 1 - block) % BLOCKS),
        false => vec![0; BLOCK],
    }
}

/// The number of a write, counted from 1, comes first in what it wrote.
fn stamp(block: &[u8]) -> u64 {
    let first = block.first_chunk().copied();
    u64::from_le_bytes(first.unwrap_or_default())
}

fn content(writer: u64, write: u64) -> Vec<u8> {
    let mut bytes = pattern(BLOCK, (writer << 40) + write + 1);
    bytes[..8].copy_from_slice(&(write + 1).to_le_bytes());
    bytes
}

/// Why it ended.
fn write(file: &File, layout: Layout, writer: u64, stop: &AtomicBool, told: &Told) -> String {
    for write in 0.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let content_now = content(writer, write);
        let began = Instant::now();
        match file.write_at(&content_now, layout.place(writer, write)) {
            Ok(BLOCK) => told.acknowledged.store(write + 1, Ordering::SeqCst),
            Ok(short) => return format!("a short write of {short} bytes"),
            Err(error) => return error.to_string(),
        }
        note(told, began);
        if let Some(earlier) = write.checked_sub(LATER)
            && let Err(why) = read_again(file, layout, writer, earlier, told)
        {
            return why;
        }
    }
    "told to".to_owned()
}

fn note(told: &Told, began: Instant) {
    let mut latencies = told
        .latencies
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    latencies.push(began.elapsed());
}

fn read_again(
    file: &File,
    layout: Layout,
    writer: u64,
    write: u64,
    told: &Told,
) -> Result<(), String> {
    let mut there = vec![0; BLOCK];
    let began = Instant::now();
    let read = file.read_exact_at(&mut there, layout.place(writer, write));
    read.map_err(|error| error.to_string())?;
    note(told, began);
    if there == content(writer, write) {
        return Ok(());
    }
    let seen = stamp(&there);
    Err(format!(
        "writer {writer} read what is stale or foreign: {seen} instead of {}",
        write + 1
    ))
}
