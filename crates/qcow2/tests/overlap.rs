//! Four threads write, zero, discard and read the same few clusters as fast as they can. A sector must be whole: what one
//! write put there, or zeroes; never older than the newest write of the same thread that was over before the read began;
//! and never what was written to another sector.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use diskfuse_block::{Node, Zeroes};
use diskfuse_qcow2::node::Qcow2Config;
use support::engine::{self, Below, wait};
use support::image::{Image, Options, SECTOR};
use support::model::{FIRST, Tag, ZERO, whose, write_bytes};
use support::rng::Rng;
use support::{cases, tools};

const THREADS: u64 = 4;
/// Tasks of each thread.
const TASKS: u64 = 2;
const WRITERS: u64 = THREADS * TASKS;
const CLUSTERS: u64 = 6;

/// For each sector and each writer the newest write that is over.
struct Progress {
    over: Vec<[AtomicU32; WRITERS as usize]>,
}

impl Progress {
    fn new(size: u64) -> Self {
        let over = (0..size / SECTOR).map(|_| Default::default()).collect();
        Self { over }
    }

    /// What every writer has done to these sectors.
    fn of(&self, offset: u64, len: u64) -> Vec<[Tag; WRITERS as usize]> {
        let load = |one: &[AtomicU32; WRITERS as usize]| {
            std::array::from_fn(|n| one[n].load(Ordering::SeqCst))
        };
        self.over[range(offset, len)].iter().map(load).collect()
    }

    fn set(&self, writer: u64, tag: Tag, offset: u64, len: u64) {
        for sector in &self.over[range(offset, len)] {
            sector[writer as usize].store(tag, Ordering::SeqCst);
        }
    }
}

fn range(offset: u64, len: u64) -> std::ops::Range<usize> {
    (offset / SECTOR) as usize..((offset + len) / SECTOR) as usize
}

/// The tags of one writer are those that leave its number when divided.
fn writer_of(tag: Tag) -> usize {
    ((tag - FIRST) % WRITERS as u32) as usize
}

#[derive(Clone)]
struct Fight {
    disk: Arc<dyn Node>,
    progress: Arc<Progress>,
    cluster: u64,
    size: u64,
    /// Whether zeroes may appear at any time.
    zeroes: bool,
    until: Instant,
}

impl Fight {
    async fn run(self, writer: u64, mut rng: Rng) -> Result<u64, String> {
        let mut sequence = 0;
        let mut done = 0;
        while Instant::now() < self.until {
            let (offset, len) = self.range(&mut rng);
            match rng.below(100) {
                0..45 => {
                    sequence += 1;
                    let tag = FIRST + (sequence * WRITERS + writer) as Tag;
                    let bytes = write_bytes(tag, offset, len);
                    let wrote = engine::write(&*self.disk, offset, &bytes).await;
                    wrote.map_err(|e| format!("write {len} at {offset}: {e}"))?;
                    self.progress.set(writer, tag, offset, len);
                }
                45..55 if self.zeroes => {
                    let zeroed = self.disk.write_zeroes(offset, len, Zeroes::MayUnmap).await;
                    zeroed.map_err(|e| format!("zero {len} at {offset}: {e}"))?;
                }
                55..70 if self.zeroes => {
                    let discarded = self.disk.discard(offset, len).await;
                    discarded.map_err(|e| format!("discard {len} at {offset}: {e}"))?;
                }
                70..72 => {
                    let flushed = self.disk.flush().await;
                    flushed.map_err(|e| format!("flush: {e}"))?;
                }
                _ => self.read(offset, len).await?,
            }
            done += 1;
        }
        Ok(done)
    }

    fn range(&self, rng: &mut Rng) -> (u64, u64) {
        let unit = if rng.chance(50) { self.cluster } else { SECTOR };
        let len = rng.length(unit, 2 * self.cluster).min(self.size);
        let at = rng.below(self.size - len + 1) / unit * unit;
        (at, len)
    }

    /// Through the page cache a read may see half of a write that is under way; then it is read again. A writer that is not
    /// scheduled stays under way for many reads.
    async fn read(&self, offset: u64, len: u64) -> Result<(), String> {
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            match self.read_once(offset, len).await {
                Err(Wrong::Torn(_)) if Instant::now() < end => std::thread::yield_now(),
                Err(Wrong::Torn(wrong) | Wrong::Stale(wrong)) => return Err(wrong),
                Ok(()) => return Ok(()),
            }
        }
    }

    async fn read_once(&self, offset: u64, len: u64) -> Result<(), Wrong> {
        let before = self.progress.of(offset, len);
        let found = engine::read(&*self.disk, offset, len).await;
        let found = found.map_err(|e| Wrong::Stale(format!("read {len} at {offset}: {e}")))?;
        for (n, (bytes, before)) in found.chunks(SECTOR as usize).zip(&before).enumerate() {
            self.judge(offset / SECTOR + n as u64, bytes, before)?;
        }
        Ok(())
    }

    fn judge(&self, sector: u64, bytes: &[u8], before: &[Tag]) -> Result<(), Wrong> {
        if bytes.iter().all(|&b| b == 0) {
            let written = before.iter().any(|&tag| tag != ZERO);
            let lost = written && !self.zeroes;
            return if lost {
                Err(Wrong::Stale(format!(
                    "sector {sector} lost what was written"
                )))
            } else {
                Ok(())
            };
        }
        match whose(bytes) {
            None => Err(Wrong::Torn(format!(
                "sector {sector} is not whole: {:02x?}",
                &bytes[..16]
            ))),
            Some((tag, of)) if of != sector => Err(Wrong::Stale(format!(
                "sector {sector} shows sector {of} of write {tag}"
            ))),
            Some((tag, _)) if tag < before[writer_of(tag)] => Err(Wrong::Stale(format!(
                "sector {sector} shows write {tag}, though {} of the same writer was over",
                before[writer_of(tag)]
            ))),
            Some(_) => Ok(()),
        }
    }
}

/// What is wrong with what was read.
enum Wrong {
    /// Neither of two writes.
    Torn(String),
    /// It cannot be there any more, or never.
    Stale(String),
}

fn fight(seed: u64, options: &Options, config: &Qcow2Config, zeroes: bool) {
    let mut rng = Rng::new(seed);
    let mut image = Image::empty();
    let size = CLUSTERS * options.cluster_size;
    let below = Below {
        direct: rng.chance(50),
        read_only: false,
    };
    image.create(options, size);
    let threads = engine::threads(engine::random_choice(&mut rng), THREADS);
    let (layers, to_open) = (image.layers.clone(), config.clone());
    let opened = threads[0]
        .mailbox()
        .call(move || async move { engine::open(&layers, &to_open, below).await });
    let node = wait(opened, &"open").unwrap();
    let fight = Fight {
        disk: node.clone(),
        progress: Arc::new(Progress::new(size)),
        cluster: options.cluster_size,
        size,
        zeroes,
        until: Instant::now() + Duration::from_millis(700),
    };
    let start = |writer: u64| {
        let (fight, rng) = (fight.clone(), Rng::new(seed ^ (writer + 1) << 32));
        let thread = &threads[(writer % THREADS) as usize];
        thread.mailbox().call(move || fight.run(writer, rng))
    };
    let replies: Vec<_> = (0..WRITERS).map(start).collect();
    let mut wrong = Vec::new();
    for reply in replies {
        wrong.extend(wait(reply, &"the fight").err());
    }
    assert!(wrong.is_empty(), "{wrong:#?}\n{options:?} {config:?}");
    // Nothing runs any more: what is there now is there after a close, too.
    let all = threads[1].mailbox().call(move || async move {
        let fight = fight;
        fight.read(0, fight.size).await?;
        engine::read(&*fight.disk, 0, fight.size)
            .await
            .map_err(|e| e.to_string())
    });
    let all = wait(all, &"read").unwrap();
    let closed = threads[2]
        .mailbox()
        .call(move || async move { node.close().await });
    wait(closed, &"close").unwrap();
    tools::must_be_clean(image.path(), &format!("{options:?} {config:?}"));
    tools::convert(image.path(), &image.raw(), None);
    let same = std::fs::read(image.raw()).unwrap() == all;
    assert!(same, "QEMU reads something else\n{options:?} {config:?}");
}

fn kinds() -> Vec<Options> {
    let plain = Options::plain();
    vec![
        Options {
            cluster_size: 512,
            ..plain.clone()
        },
        Options {
            cluster_size: 4096,
            refcount_bits: 1,
            ..plain.clone()
        },
        Options {
            cluster_size: 16384,
            extended_l2: true,
            ..plain.clone()
        },
        Options {
            lazy_refcounts: true,
            ..plain.clone()
        },
        Options {
            preallocation: "metadata",
            ..plain.clone()
        },
        Options {
            data_file: Some(false),
            ..plain.clone()
        },
        Options { v3: false, ..plain },
    ]
}

fn config() -> Qcow2Config {
    Qcow2Config {
        discard: true,
        ..Qcow2Config::default()
    }
}

#[test]
fn sectors_stay_whole_under_writes_zeroes_and_discards() {
    cases::run("overlap", 7, |seed| {
        let kinds = kinds();
        let options = &kinds[seed as usize % kinds.len()];
        fight(seed, options, &config(), true);
    });
}

#[test]
fn no_write_is_lost_among_overlapping_writes() {
    cases::run("overlapping writes", 7, |seed| {
        let kinds = kinds();
        let options = &kinds[seed as usize % kinds.len()];
        fight(seed, options, &config(), false);
    });
}

#[test]
fn sectors_stay_whole_while_clusters_are_compressed() {
    cases::run("overlapping compression", 2, |seed| {
        let config = Qcow2Config {
            compress: true,
            ..config()
        };
        fight(seed, &Options::plain(), &config, seed.is_multiple_of(2));
    });
}
