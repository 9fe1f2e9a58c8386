//! How long the hot path takes: resolving 4 KiB at random places of a 10 GiB image whose tables are in memory, by one
//! thread and by two at once.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use diskfuse_block::drivers::{FileConfig, open_file};
use diskfuse_block::{Access, Extent, Node, io};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use diskfuse_ring::{Buf, Config, Ring};

const SIZE: u64 = 10 << 30;
const PAGE: u64 = 4096;
const CLUSTER: u64 = 65536;

fn make(path: &Path) {
    let size = SIZE.to_string();
    let mut create = Command::new("qemu-img");
    create.args([
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "preallocation=metadata",
    ]);
    let made = create.arg(path).arg(size).status();
    assert!(made.expect("qemu-img is missing: install it").success());
}

/// An open image, all of its tables in memory, ready to be written.
fn open(path: &Path) -> Arc<Qcow2Node> {
    let file = FileConfig {
        filename: path.to_owned(),
        ..FileConfig::default()
    };
    let children = Children {
        file: open_file(&file).unwrap(),
        data_file: None,
        backing: None,
    };
    let ring = Ring::new(&Config::default()).unwrap();
    ring.block_on(async {
        let node = Qcow2Node::open(children, &Qcow2Config::default())
            .await
            .unwrap();
        let mut buf = Buf::new(512).unwrap();
        for at in (0..SIZE).step_by((CLUSTER * 256) as usize) {
            let result;
            (result, buf) = io::read(&*node, at, buf).await;
            result.unwrap();
        }
        io::write(&*node, 0, buf).await.0.unwrap();
        node
    })
}

/// Resolves `count` pages at random places.
fn resolve(node: &dyn Node, access: Access, count: u64, seed: u64) -> Duration {
    let mut state = seed | 1;
    let start = Instant::now();
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = (state >> 8) % (SIZE / PAGE) * PAGE;
        match node.resolve(access, at, PAGE) {
            Extent::Host { offset, hold, .. } => {
                black_box(offset);
                drop(hold);
            }
            other => panic!("{other:?} at {at} is not hot"),
        }
    }
    start.elapsed()
}

fn bench(criterion: &mut Criterion) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("hot.qcow2");
    make(&path);
    let node = open(&path);
    for (name, access) in [("read", Access::Read), ("write", Access::Write)] {
        criterion.bench_function(&format!("resolve a {name}, 1 thread"), |bencher| {
            bencher.iter_custom(|count| resolve(&*node, access, count, 1));
        });
        // The time per request and thread: as much as with one thread, if they do not disturb each other.
        criterion.bench_function(&format!("resolve a {name}, 2 threads"), |bencher| {
            bencher.iter_custom(|count| {
                std::thread::scope(|scope| {
                    let node = &*node;
                    let both =
                        [1, 2].map(|seed| scope.spawn(move || resolve(node, access, count, seed)));
                    let times = both.map(|thread| thread.join().unwrap());
                    times.into_iter().max().unwrap()
                })
            });
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
