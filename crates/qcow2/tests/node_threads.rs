//! Several threads on one image: every sector holds what one of the writers of it wrote, none of it is lost, and the
//! image stays whole.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod node_support;

use std::sync::Arc;

use diskfuse_block::{Node, Zeroes};
use diskfuse_qcow2::node::{Qcow2Config, Qcow2Node};
use diskfuse_ring::spawn;
use node_support::*;

const SECTOR: u64 = 512;
const THREADS: usize = 4;
/// Requests that a thread has in flight, rounds, and requests of each in a round.
const IN_FLIGHT: usize = 4;
const ROUNDS: u64 = 8;
const REQUESTS: usize = 6;

/// One request: what it writes is the same in every sector. 0 means zeroes.
#[derive(Clone, Copy, Debug)]
struct Request {
    offset: u64,
    len: u64,
    stamp: u64,
    discard: bool,
}

fn stamped(request: &Request) -> Vec<u8> {
    request.stamp.to_le_bytes().repeat(request.len as usize / 8)
}

async fn send(node: &Qcow2Node, request: Request) {
    let Request {
        offset,
        len,
        stamp,
        discard,
    } = request;
    let result = match (stamp, discard) {
        (0, true) => node.discard(offset, len).await,
        (0, false) => node.write_zeroes(offset, len, Zeroes::MayUnmap).await,
        _ => write(node, offset, &stamped(&request)).await,
    };
    result.unwrap();
}

/// Requests of one round: overlapping all over.
fn requests(random: &mut Random, size: u64, next: &mut u64) -> Vec<Request> {
    let count = THREADS * IN_FLIGHT * REQUESTS;
    let request = |_| {
        let (offset, len) = random.range(size, 200 * KIB);
        let offset = offset / SECTOR * SECTOR;
        let len = len.next_multiple_of(SECTOR).min(size - offset);
        *next += 1;
        let kind = random.below(10);
        Request {
            offset,
            len,
            stamp: if kind < 2 { 0 } else { *next },
            discard: kind == 0,
        }
    };
    (0..count).map(request).collect()
}

fn run_round(threads: &[diskfuse_ring::IoThread], node: &Arc<Qcow2Node>, all: &[Request]) {
    let shares = all.chunks(IN_FLIGHT * REQUESTS);
    let started = threads.iter().zip(shares).map(|(thread, share)| {
        let (node, share) = (Arc::clone(node), share.to_vec());
        thread.mailbox().call(move || async move {
            let tasks = share.chunks(REQUESTS).map(|requests| {
                let (node, requests) = (Arc::clone(&node), requests.to_vec());
                spawn(async move {
                    for (n, request) in requests.into_iter().enumerate() {
                        send(&node, request).await;
                        if n == 3 {
                            node.flush().await.unwrap();
                        }
                    }
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                task.await;
            }
        })
    });
    started.collect::<Vec<_>>().into_iter().for_each(wait);
}

/// Every sector holds what it held, if nobody wrote it, or else what one of the writers wrote. A discarded one may hold
/// anything that is older, too.
fn check_round(before: &[u8], after: &[u8], all: &[Request], seed: u64, round: u64) {
    let sectors = (before.len() as u64 / SECTOR) as usize;
    let mut writers: Vec<Vec<Request>> = vec![Vec::new(); sectors];
    for request in all {
        for sector in request.offset / SECTOR..(request.offset + request.len) / SECTOR {
            writers[sector as usize].push(*request);
        }
    }
    for (sector, writers) in writers.iter().enumerate() {
        let range = sector * SECTOR as usize..(sector + 1) * SECTOR as usize;
        let (old, new) = (&before[range.clone()], &after[range]);
        let untouched = writers.iter().all(|w| w.discard);
        let holds = |w: &Request| new == w.stamp.to_le_bytes().repeat(SECTOR as usize / 8);
        assert!(
            (untouched && new == old) || writers.iter().any(holds),
            "seed {seed}, round {round}, sector {sector} at {:#x}: {:?} was {:?}; writers {writers:?}",
            sector as u64 * SECTOR,
            &new[..16],
            &old[..8],
        );
    }
}

fn stress(options: &str, config: &Qcow2Config, backed: bool, seed: u64) {
    let dir = directory();
    let size = 4 * MIB;
    let base = dir.path().join("base.raw");
    let stamp = Request {
        offset: 0,
        len: size,
        stamp: u64::MAX,
        discard: false,
    };
    let mut before = vec![0; size as usize];
    let mut options = options.to_owned();
    if backed {
        before = stamped(&stamp);
        std::fs::write(&base, &before).unwrap();
        options = format!("backing_file={},backing_fmt=raw,{options}", text(&base));
    }
    let path = create(&dir, "image.qcow2", options.trim_matches(','), size);
    let threads = threads(THREADS);
    let mut random = Random::new(seed);
    let mut next = 0;
    let mut children = children(&path);
    if backed {
        children.backing = Some(file(&base, false));
    }
    let config = config.clone();
    let open = threads[0]
        .mailbox()
        .call(move || async move { Qcow2Node::open(children, &config).await.unwrap() });
    let node = wait(open);
    for round in 0..ROUNDS {
        let all = requests(&mut random, size, &mut next);
        run_round(&threads, &node, &all);
        let reader = Arc::clone(&node);
        let after = threads[1]
            .mailbox()
            .call(move || async move { contents(&*reader, 100_000).await });
        let after = wait(after);
        check_round(&before, &after, &all, seed, round);
        before = after;
    }
    let closer = Arc::clone(&node);
    wait(
        threads[2]
            .mailbox()
            .call(move || async move { closer.close().await.unwrap() }),
    );
    assert_clean(&path);
    assert_same(&converted(&path), &before, "read by QEMU");
}

#[test]
fn overlapping_writes_of_four_threads_are_each_whole() {
    let config = Qcow2Config {
        discard: true,
        ..Qcow2Config::default()
    };
    stress("", &config, false, 1);
    stress("cluster_size=4k", &config, false, 2);
    stress("extended_l2=on", &config, false, 3);
    stress("cluster_size=512", &config, false, 4);
}

#[test]
fn overlapping_writes_to_an_overlay_lose_nothing_of_the_backing_file() {
    let config = Qcow2Config {
        discard: true,
        ..Qcow2Config::default()
    };
    stress("", &config, true, 11);
    stress("extended_l2=on", &config, true, 12);
}

#[test]
fn overlapping_compressed_writes_are_each_whole() {
    let config = Qcow2Config {
        discard: true,
        compress: true,
        ..Qcow2Config::default()
    };
    stress("cluster_size=16k", &config, false, 21);
    stress("", &config, true, 22);
}

#[test]
fn caches_that_are_too_small_are_slow_and_nothing_else() {
    let config = Qcow2Config {
        discard: true,
        l2_cache_size: Some(4096),
        refcount_cache_size: Some(4096),
        ..Qcow2Config::default()
    };
    stress("cluster_size=512", &config, false, 31);
}
