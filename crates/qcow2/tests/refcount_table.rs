//! The refcount table: it moves while others allocate, is outgrown while it moves, and its blocks do not all stay in memory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod common;

use std::sync::Arc;

use common::disk::{Disk, Manners};
use common::log::{Op, Recorder};
use common::made::{filled, image, open as open_node};
use common::run::on_ring;
use diskfuse_block::Node;
use diskfuse_qcow2::check::{Repair, check};
use diskfuse_qcow2::format::Header;
use diskfuse_qcow2::meta::{ActiveTable, Meta};
use diskfuse_qcow2::node::Qcow2Config;
use diskfuse_ring::{spawn, yield_now};

const PATIENT: Manners = Manners {
    patience: 3,
    discarded: 0,
    read_only: false,
};

async fn open(node: Arc<dyn Node>) -> Arc<Meta> {
    let header = Header::read(&*node).await.unwrap();
    let table = ActiveTable {
        l1_offset: header.l1_offset,
        l1_entries: header.l1_size,
        size: header.size,
    };
    let config = Qcow2Config::default();
    let meta = Meta::open(node, None, &header, table, &config).await;
    let meta = Arc::new(meta.unwrap());
    meta.prepare_to_write().await.unwrap();
    meta
}

fn apply(disk: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write { offset, data } => {
            let (from, to) = (*offset as usize, *offset as usize + data.len());
            if disk.len() < to {
                disk.resize(to, 0);
            }
            disk[from..to].copy_from_slice(data);
        }
        Op::Fill { offset, len, fill } => {
            let to = (offset + len) as usize;
            if disk.len() < to {
                disk.resize(to, 0);
            }
            disk[*offset as usize..to].fill(*fill);
        }
        Op::Resize { size, grow } => {
            if !*grow || disk.len() < *size as usize {
                disk.resize(*size as usize, 0)
            }
        }
        Op::Flush => {}
    }
}

/// Whenever the header has come to name another table: as after the flush that follows.
#[test]
fn a_table_that_the_header_names_is_counted() {
    let mut moves = 0;
    for seed in 0..20 {
        let mut initial = image("cluster_size=512", "64M");
        initial.resize(initial.len().next_multiple_of(512), 0);
        let recorder = Recorder::default();
        let file = Disk::new(&recorder, 0, initial.clone(), seed + 1, PATIENT);
        on_ring(async {
            let meta = open(file.clone()).await;
            let running = std::rc::Rc::new(std::cell::Cell::new(2));
            for _ in 0..2 {
                let (meta, running) = (meta.clone(), running.clone());
                spawn(async move {
                    for _ in 0..600 + seed {
                        meta.allocate(64).await.unwrap();
                        yield_now().await;
                    }
                    running.set(running.get() - 1);
                });
            }
            while running.get() > 0 {
                meta.commit().await.unwrap();
                yield_now().await;
            }
        });
        let log = recorder.log();
        let table = |disk: &[u8]| u64::from_be_bytes(disk[48..56].try_into().unwrap());
        let mut disk = initial.clone();
        let mut at = table(&disk);
        for record in &log.records {
            assert!(record.ended.is_some() && record.ok);
            apply(&mut disk, &record.op);
            if table(&disk) == at {
                continue;
            }
            at = table(&disk);
            moves += 1;
            let mut crashed = disk.clone();
            crashed.resize(crashed.len().next_multiple_of(512), 0);
            let state = Disk::quiet(crashed);
            let found = on_ring(async { check(&*state, Repair::None, &mut |_, _| {}).await });
            let found = found.unwrap();
            let messages = &found.messages;
            assert_eq!(
                found.corruptions, 0,
                "seed {seed}, at {at:#x}: {messages:?}"
            );
        }
    }
    assert!(moves > 0, "it never moved");
}

#[test]
fn a_table_that_is_outgrown_while_the_header_goes_over_to_it_is_freed_once() {
    let bytes = image("cluster_size=512", "64M");
    let file = Disk::new(&Recorder::default(), 0, bytes, 1, PATIENT);
    on_ring(async {
        let meta = open(file.clone()).await;
        let mut taken = std::collections::HashSet::new();
        let mut take = async |until: u64| loop {
            let run = meta.allocate(64).await.unwrap();
            for n in 0..run.clusters {
                let host = run.host + n * 512;
                assert!(taken.insert(host), "{host:#x} is given twice");
            }
            if run.host >= until {
                return;
            }
        };
        take(9 << 20).await;
        // A slow disk: the header goes over to the longer table.
        file.hold(|op| matches!(op, Op::Write { offset: 0, .. }));
        let commit = spawn({
            let meta = meta.clone();
            async move { meta.commit().await.unwrap() }
        });
        while file.holding() == 0 {
            yield_now().await;
        }
        take(17 << 20).await;
        file.release();
        commit.await;
        meta.commit().await.unwrap();
        // The old tables are free now, and are used.
        take(18 << 20).await;
        meta.commit().await.unwrap();
        meta.commit().await.unwrap();
        take(19 << 20).await;
    });
}

/// With the smallest cache they are written now and then, not at each allocation.
#[test]
fn more_refcount_blocks_than_are_kept_cost_few_commits() {
    for lazy in [false, true] {
        let recorder = Recorder::default();
        let manners = Manners {
            patience: 0,
            ..PATIENT
        };
        let file = Disk::new(&recorder, 0, image("cluster_size=512", "7M"), 1, manners);
        on_ring(async {
            let config = Qcow2Config {
                lazy_refcounts: Some(lazy),
                refcount_cache_size: Some(1),
                ..Qcow2Config::default()
            };
            let node = open_node(file, &config).await;
            for at in (0..7 << 20).step_by(32 << 10) {
                node.write(at, filled(32 << 10, 1)).await.0.unwrap();
            }
            let flushes = {
                let log = recorder.log();
                let flushes = log.records.iter().filter(|r| matches!(r.op, Op::Flush));
                flushes.count()
            };
            assert!(flushes <= 7 * 6, "lazy {lazy}: {flushes} flushes for 7 MiB");
            node.close().await.unwrap();
        });
    }
}
