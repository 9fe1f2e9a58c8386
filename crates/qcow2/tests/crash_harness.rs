//! The tools of the crash tests, tested: a wrong order of writes is found, a right one is not blamed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

#[allow(dead_code)]
#[path = "common"]
mod common {
    pub mod disk;
    pub mod log;
    pub mod model;
    #[path = "../support/rng.rs"]
    pub mod rng;
    pub mod states;
    pub const SECTOR: u64 = 512;
}

use std::collections::BTreeSet;
use std::sync::Arc;

use common::disk::{Disk, Manners, libc_errno};
use common::log::{Log, Op, Recorder};
use common::model::{Ask, Model, stamp, version_of};
use common::rng::Rng;
use common::{SECTOR, states};
use diskfuse_block::{Kind, Node, Resize, Zeroes};
use diskfuse_ring::{Buf, Config, Ring, spawn, yield_now};

fn run<F: Future>(future: F) -> F::Output {
    Ring::new(&Config::default()).unwrap().block_on(future)
}

fn filled(len: usize, byte: u8) -> Buf {
    let mut buf = Buf::new(len).unwrap();
    buf.as_mut_slice().fill(byte);
    buf
}

/// An operation that is over at once.
fn done(log: &mut Log, op: Op) {
    let id = log.begin(0, op);
    log.end(id, true, None);
}

fn write(offset: u64, len: usize, byte: u8) -> Op {
    let data: Arc<[u8]> = vec![byte; len].into();
    Op::Write { offset, data }
}

/// Bytes 0..512 point (1) to data at 512.. that must then be there (2).
fn dangling(log: &Log) -> usize {
    let mut wrong = 0;
    states::exhaust(log, &[vec![0; 2048]], |state| {
        let disk = &state.disks[0];
        wrong += usize::from(disk[0] == 1 && disk[512..1536].iter().any(|&b| b != 2));
    });
    wrong
}

#[test]
fn a_pointer_written_before_its_data_is_durable_is_found() {
    let mut right = Log::default();
    done(&mut right, write(512, 1024, 2));
    done(&mut right, Op::Flush);
    done(&mut right, write(0, 512, 1));
    assert_eq!(dangling(&right), 0);

    let mut without_flush = Log::default();
    done(&mut without_flush, write(512, 1024, 2));
    done(&mut without_flush, write(0, 512, 1));
    assert!(dangling(&without_flush) > 0);

    let mut before_the_flush_has_ended = Log::default();
    done(&mut before_the_flush_has_ended, write(512, 1024, 2));
    let flush = before_the_flush_has_ended.begin(0, Op::Flush);
    done(&mut before_the_flush_has_ended, write(0, 512, 1));
    before_the_flush_has_ended.end(flush, true, None);
    assert!(dangling(&before_the_flush_has_ended) > 0);

    let mut failed_flush = Log::default();
    done(&mut failed_flush, write(512, 1024, 2));
    let flush = failed_flush.begin(0, Op::Flush);
    failed_flush.end(flush, false, None);
    done(&mut failed_flush, write(0, 512, 1));
    assert!(dangling(&failed_flush) > 0);

    let mut ended_within_the_flush = Log::default();
    let data = ended_within_the_flush.begin(0, write(512, 1024, 2));
    let flush = ended_within_the_flush.begin(0, Op::Flush);
    ended_within_the_flush.end(data, true, None);
    ended_within_the_flush.end(flush, true, None);
    done(&mut ended_within_the_flush, write(0, 512, 1));
    assert!(dangling(&ended_within_the_flush) > 0);
}

#[test]
fn a_sample_finds_the_wrong_order_too() {
    let mut log = Log::default();
    for round in 0..40 {
        done(&mut log, write(1024 + round * 512, 512, 3));
        if round == 20 {
            // In the middle between two flushes.
            done(&mut log, write(512, 512, 2));
            done(&mut log, write(0, 512, 1));
        }
        if round % 7 == 0 {
            done(&mut log, Op::Flush);
        }
    }
    for seed in 0..20 {
        let mut wrong = 0;
        states::sample(
            &log,
            &[vec![0; 64 << 10]],
            &mut Rng::new(seed),
            400,
            |state| {
                wrong += usize::from(state.disks[0][0] == 1 && state.disks[0][512] != 2);
            },
        );
        assert!(wrong > 0, "seed {seed}");
    }
}

#[test]
fn states_keep_what_was_flushed_and_tear_what_was_not() {
    let mut log = Log::default();
    done(&mut log, write(0, 1024, 1));
    done(&mut log, Op::Flush);
    done(&mut log, write(0, 1024, 2));
    let mut seen = BTreeSet::new();
    states::exhaust(&log, &[vec![0; 1024]], |state| {
        let disk = &state.disks[0];
        seen.insert((state.time >= 4, disk[0], disk[512]));
        assert!([0, 1, 2].contains(&disk[0]) && disk[..512].iter().all(|&b| b == disk[0]));
    });
    // After the flush has ended at 4.
    let after: Vec<_> = seen.iter().filter(|s| s.0).map(|s| (s.1, s.2)).collect();
    assert!(after.iter().all(|&(a, b)| a > 0 && b > 0), "{after:?}");
    assert!(
        after.contains(&(1, 2)) || after.contains(&(2, 1)),
        "{after:?}"
    );
}

#[test]
fn sizes_are_operations_as_well() {
    let mut log = Log::default();
    done(
        &mut log,
        Op::Resize {
            size: 2048,
            grow: true,
        },
    );
    done(&mut log, write(1024, 512, 7));
    let mut sizes = BTreeSet::new();
    states::exhaust(&log, &[vec![0; 1024]], |state| {
        sizes.insert(state.disks[0].len());
    });
    assert_eq!(sizes, BTreeSet::from([1024, 1536, 2048]));
}

#[test]
fn the_model_promises_what_was_flushed_and_allows_what_is_under_way() {
    let mut model = Model::new(vec![1, 1, 0]);
    let first = model.begin(1, Ask::Write(2), 0, 2);
    model.end(2, first, true);
    let _under_way = model.begin(3, Ask::Write(3), 0, 1);
    model.flushed(5, 4);
    let later = model.begin(6, Ask::Write(0), 1, 1);
    model.end(7, later, true);
    let discard = model.begin(8, Ask::Discard, 2, 1);
    model.end(9, discard, true);
    let at = |sector, time| Vec::from_iter(model.allowed(sector, model.promised(time), time).0);
    assert_eq!(at(0, 1), [1, 2]);
    assert_eq!(at(0, 4), [1, 2, 3], "the flush has not ended");
    assert_eq!(at(0, 5), [2, 3]);
    assert_eq!(at(1, 5), [2]);
    assert_eq!(at(1, 7), [0, 2]);
    assert_eq!(at(2, 9), [0]);
}

#[test]
fn the_model_keeps_both_of_two_writes_that_overlap_in_time() {
    let mut model = Model::new(vec![0]);
    let a = model.begin(1, Ask::Write(1), 0, 1);
    let b = model.begin(2, Ask::Write(2), 0, 1);
    model.end(3, b, true);
    model.end(4, a, true);
    let failed = model.begin(5, Ask::Write(3), 0, 1);
    model.end(6, failed, false);
    model.flushed(8, 7);
    assert_eq!(Vec::from_iter(model.allowed(0, 7, 8).0), [1, 2, 3]);
    let mut bytes = [0; 512];
    stamp(0, 2, &mut bytes);
    assert!(model.compare(0, &bytes, 7, 8).is_ok());
    stamp(0, 4, &mut bytes);
    assert!(model.compare(0, &bytes, 7, 8).is_err());
    stamp(1, 2, &mut bytes);
    assert!(
        model
            .compare(0, &bytes, 7, 8)
            .unwrap_err()
            .contains("of sector 1")
    );
    bytes[100] ^= 1;
    assert!(version_of(1, &bytes).unwrap_err().contains("garbage"));
}

#[test]
fn the_model_knows_sizes() {
    let mut model = Model::new(vec![1; 4]);
    let cut = model.begin_resize(1, 2048, 1024);
    model.end_resize(2, cut, true);
    assert_eq!(Vec::from_iter(model.sizes(0, 2)), [1024, 2048]);
    model.flushed(4, 3);
    let grown = model.begin_resize(5, 1024, 2048);
    model.end_resize(6, grown, true);
    assert_eq!(Vec::from_iter(model.sizes(3, 4)), [1024]);
    assert_eq!(Vec::from_iter(model.sizes(3, 6)), [1024, 2048]);
    assert_eq!(Vec::from_iter(model.allowed(3, 3, 6).0), [0]);
}

#[test]
fn the_disk_notes_everything_and_holds_what_it_is_told_to() {
    let recorder = Recorder::default();
    let disk = Disk::new(&recorder, 0, vec![0; 8192], 3, Manners::default());
    run(async {
        disk.hold(|op| matches!(op, Op::Write { offset: 0, .. }));
        let held = Arc::clone(&disk);
        let held = spawn(async move { held.write(0, filled(512, 1)).await.0 });
        while disk.holding() == 0 {
            yield_now().await;
        }
        disk.write(4096, filled(512, 2)).await.0.unwrap();
        disk.flush().await.unwrap();
        assert_eq!((disk.bytes()[0], disk.bytes()[4096]), (0, 2));
        disk.release();
        held.await.unwrap();
        disk.write_zeroes(0, 512, Zeroes::MayUnmap).await.unwrap();
        disk.resize(16384, Resize::AtLeast, false).await.unwrap();
        disk.resize(12288, Resize::AtLeast, false).await.unwrap();
        assert_eq!(disk.size(), 16384);
    });
    let log = recorder.log();
    assert_eq!(log.records.len(), 5);
    assert!(log.records.iter().all(|r| r.ok));
    assert!(
        log.records[0].ended > log.records[2].ended,
        "{}",
        log.show(0, 99)
    );
}

#[test]
fn the_disk_fails_and_is_full_on_demand() {
    let recorder = Recorder::default();
    let disk = Disk::new(&recorder, 0, vec![0; 64 << 10], 3, Manners::default());
    run(async {
        let mut writes = 0;
        disk.fail(move |op| {
            writes += u32::from(matches!(op, Op::Write { .. }));
            (writes == 2).then_some(libc_errno::EIO)
        });
        disk.write(0, filled(4096, 1)).await.0.unwrap();
        let error = disk.write(4096, filled(4096, 1)).await.0.unwrap_err();
        assert_eq!(error.kind(), Kind::Os(libc_errno::EIO));
        disk.fail(|op| matches!(op, Op::Flush).then_some(libc_errno::EIO));
        disk.flush().await.unwrap_err();
        disk.fail(|_| None);
        disk.flush().await.unwrap_err();
        disk.heal();
        disk.flush().await.unwrap();

        disk.set_room(Some(4096));
        disk.write(8192, filled(4096, 1)).await.0.unwrap();
        let error = disk.write(16384, filled(512, 1)).await.0.unwrap_err();
        assert_eq!(error.kind(), Kind::Os(libc_errno::ENOSPC));
        disk.write(8192, filled(4096, 2)).await.0.unwrap();
        disk.discard(8192, 4096).await.unwrap();
        disk.write(16384, filled(512, 1)).await.0.unwrap();
    });
    let log = recorder.log();
    let failed: Vec<_> = log.records.iter().filter(|r| !r.ok).collect();
    assert_eq!(failed.len(), 4, "{}", log.show(0, 999));
    assert!(failed[0].op.range().end - failed[0].op.range().start <= 4096);
    assert_eq!(SECTOR, 512);
}
