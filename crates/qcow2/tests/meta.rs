//! The metadata store by itself: what it allocates, links, frees and commits is what `qemu-img` finds afterwards.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use diskfuse_block::drivers::{FileConfig, open_file};
use diskfuse_block::{Node, RangeQueue};
use diskfuse_qcow2::format::{Header, Mapping};
use diskfuse_qcow2::meta::{ActiveTable, Entry, Lookup, Meta};
use diskfuse_qcow2::node::Qcow2Config;
use diskfuse_ring::{Config, IoThread, Ring};

fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output();
    let output = output.expect("qemu-img cannot be run: install qemu-utils");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {text}{errors}"
    );
    text
}

fn create(path: &Path, options: &str, size: &str) {
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        options,
        path.to_str().unwrap(),
        size,
    ]);
}

async fn open(path: &Path, config: &Qcow2Config) -> Meta {
    let file: Arc<dyn Node> = open_file(&FileConfig {
        filename: path.to_owned(),
        ..FileConfig::default()
    })
    .unwrap();
    let header = Header::read(&*file).await.unwrap();
    let table = ActiveTable {
        l1_offset: header.l1_offset,
        l1_entries: header.l1_size,
        size: header.size,
    };
    Meta::open(file, None, &header, table, config)
        .await
        .unwrap()
}

async fn mapping(meta: &Meta, guest: u64) -> Mapping {
    loop {
        match meta.lookup(guest) {
            Lookup::Missing => meta.load(guest).await.unwrap(),
            Lookup::Unallocated { .. } => return Mapping::Unallocated,
            Lookup::Entry(entry) => {
                return Mapping::decode(entry.word, meta.geometry(), meta.version()).unwrap();
            }
        }
    }
}

/// Maps a guest cluster anew and frees what was there.
async fn remap(meta: &Meta, turns: &RangeQueue, guest: u64) {
    let _turn = turns.turn(guest, 1).await;
    let old = mapping(meta, guest).await;
    let run = meta.allocate(1).await.unwrap();
    let new = Mapping::Normal {
        host: run.host,
        copied: true,
    };
    let entry = Entry {
        word: new.encode(meta.geometry()),
        subclusters: u64::from(u32::MAX) * u64::from(meta.geometry().extended_l2()),
    };
    meta.link(guest, &[entry]).await.unwrap();
    meta.free(&old, false);
    assert_eq!(mapping(meta, guest).await, new);
}

async fn unmap(meta: &Meta, turns: &RangeQueue, guest: u64) {
    let _turn = turns.turn(guest, 1).await;
    let old = mapping(meta, guest).await;
    if old != Mapping::Unallocated {
        meta.link(guest, &[Entry::default()]).await.unwrap();
        meta.free(&old, true);
    }
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

async fn load(meta: Arc<Meta>, turns: Arc<RangeQueue>, seed: u64, operations: u64) {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let clusters = meta.size() / meta.geometry().cluster_size();
    for _ in 0..operations {
        let guest = dice.below(clusters) * meta.geometry().cluster_size();
        match dice.below(10) {
            0 => meta.commit().await.unwrap(),
            1 | 2 => unmap(&meta, &turns, guest).await,
            _ => remap(&meta, &turns, guest).await,
        }
    }
}

const KINDS: &[(&str, &str)] = &[
    ("cluster_size=64k", "1G"),
    ("cluster_size=512", "4M"),
    ("cluster_size=512,refcount_bits=64", "8M"),
    ("cluster_size=4k,refcount_bits=1", "64M"),
    ("cluster_size=2M", "8G"),
    ("cluster_size=16k,extended_l2=on", "256M"),
    ("compat=0.10", "1G"),
    ("lazy_refcounts=on", "64M"),
];

fn check(path: &Path) {
    qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
}

#[test]
fn after_a_clean_close_nothing_is_leaked_or_lost() {
    for (options, size) in KINDS {
        for small_cache in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("image.qcow2");
            create(&path, options, size);
            let config = Qcow2Config {
                l2_cache_size: small_cache.then_some(1),
                refcount_cache_size: small_cache.then_some(1),
                ..Qcow2Config::default()
            };
            let ring = Ring::new(&Config::default()).unwrap();
            ring.block_on(async {
                let meta = Arc::new(open(&path, &config).await);
                meta.prepare_to_write().await.unwrap();
                let turns = Arc::new(RangeQueue::default());
                let tasks: Vec<_> = (1..5)
                    .map(|seed| diskfuse_ring::spawn(load(meta.clone(), turns.clone(), seed, 400)))
                    .collect();
                for task in tasks {
                    task.await;
                }
                meta.close().await.unwrap();
            });
            eprintln!("{options} {size} small_cache={small_cache}");
            check(&path);
        }
    }
}

#[test]
fn several_threads_share_one_image() {
    for (options, size) in [KINDS[0], KINDS[1], KINDS[5]] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        create(&path, options, size);
        let ring = Ring::new(&Config::default()).unwrap();
        let meta = ring.block_on(async {
            let meta = Arc::new(open(&path, &Qcow2Config::default()).await);
            meta.prepare_to_write().await.unwrap();
            meta
        });
        let turns = Arc::new(RangeQueue::default());
        let threads: Vec<_> = (0..4)
            .map(|_| IoThread::spawn("queue", Config::default()).unwrap())
            .collect();
        let replies: Vec<_> = (1..)
            .zip(&threads)
            .map(|(seed, thread)| {
                let (meta, turns) = (meta.clone(), turns.clone());
                thread.mailbox().call(move || load(meta, turns, seed, 1500))
            })
            .collect();
        for reply in replies {
            reply.wait().unwrap();
        }
        ring.block_on(async { meta.close().await.unwrap() });
        eprintln!("{options} {size}");
        check(&path);
    }
}

/// Several allocations that all need the block of the next region, in the first cluster behind the file's end: whoever is
/// not the one to make it finds it made, and no contradiction.
#[test]
fn a_refcount_block_that_another_allocation_made_is_no_corruption() {
    // One block of an image with clusters of 512 bytes and 16 bits for each refcount counts so many bytes.
    const REGION: u64 = 256 * 512;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create(&path, "cluster_size=512", "64M");
    let image = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let len = image.metadata().unwrap().len();
    image.set_len(len.next_multiple_of(REGION)).unwrap();
    let ring = Ring::new(&Config::default()).unwrap();
    ring.block_on(async {
        let meta = Arc::new(open(&path, &Qcow2Config::default()).await);
        meta.prepare_to_write().await.unwrap();
        let allocate = |meta: Arc<Meta>| async move {
            let mut runs = Vec::new();
            for _ in 0..4000 {
                runs.push(meta.allocate(1).await.unwrap());
            }
            runs
        };
        let tasks = [(); 4].map(|()| diskfuse_ring::spawn(allocate(meta.clone())));
        let mut taken = std::collections::HashSet::new();
        let mut runs = Vec::new();
        for task in tasks {
            runs.extend(task.await);
        }
        for run in runs {
            assert!(taken.insert(run.host), "{:#x} was given twice", run.host);
            meta.release_unused(run);
        }
        meta.close().await.unwrap();
    });
    check(&path);
}

#[test]
fn the_disk_grows_beyond_its_l1_table() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.qcow2");
    create(&path, "cluster_size=512", "1M");
    let ring = Ring::new(&Config::default()).unwrap();
    ring.block_on(async {
        let meta = open(&path, &Qcow2Config::default()).await;
        meta.prepare_to_write().await.unwrap();
        let turns = RangeQueue::default();
        remap(&meta, &turns, 0).await;
        for size in [2 << 20, 64 << 20, 4 << 30] {
            meta.make_room_for(size).await.unwrap();
            meta.set_size(size).await.unwrap();
            remap(&meta, &turns, size - 512).await;
        }
        meta.close().await.unwrap();
    });
    check(&path);
    assert!(qemu_img(&["info", path.to_str().unwrap()]).contains("4 GiB"));
}
