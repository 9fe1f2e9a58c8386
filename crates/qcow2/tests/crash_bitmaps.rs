//! A bitmap that says that it is true is true, whenever the power fails and whatever disk is full: all that is not as it was is dirty
//! in it; and the image stays sound.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use common::case::{Case, RECORDING, STILL};
use common::cases;
use common::disk::Disk;
use common::disk::libc_errno::EIO;
use common::guest::{FIRST, Guest};
use common::log::Op;
use common::rng::Rng;
use common::run::{Stage, on_ring};
use common::states;
use diskfuse_block::Node;
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};

/// States that are looked at after each run.
const STATES: usize = 80;

/// A short life, so that its end is much of it.
fn case(seed: u64) -> Case {
    let mut case = Case::random(seed);
    case.v3 = true;
    case.bitmaps = true;
    case.size = case.size.min(4 << 20);
    case.hot = case.hot.min(case.size);
    case.requests = 1 + seed % 6;
    case.guests = 2;
    case.closes = true;
    case
}

/// Names of the bitmaps of an image that say that they are true.
fn true_ones(stage: &Stage) -> Vec<String> {
    let file = Disk::quiet(stage.file.bytes());
    let data_file = stage
        .data_file
        .as_ref()
        .map(|disk| Disk::quiet(disk.bytes()));
    let children = Children {
        file,
        data_file: data_file.map(|disk| disk as _),
        backing: None,
    };
    let config = Qcow2Config {
        read_only: true,
        read_bitmaps: true,
        ..Qcow2Config::default()
    };
    let node = on_ring(Qcow2Node::open(children, &config)).unwrap();
    let all = node.bitmaps().into_iter();
    let are_true = all.filter(|one| !one.bitmap.info().inconsistent);
    are_true.map(|one| one.name).collect()
}

/// Judges crashes at many moments, and the very end.
fn judge(stage: &Stage) {
    let log = stage.recorder.log();
    let mut rng = Rng::new(stage.case.seed ^ 0xC4A5);
    let mut choices = rng.clone();
    let wanted = cases::env_number("DISKFUSE_STATES").map_or(STATES, |n| n as usize);
    states::sample(&log, &stage.initial, &mut choices, wanted, |state| {
        if let Err(error) = stage.judge(&log, &state, &mut rng) {
            let before = log.show(state.time.saturating_sub(60), state.time);
            panic!(
                "{error}\n{}\nof {:#?}\nstorage:\n{before}",
                state.how, stage.case
            );
        }
    });
}

#[test]
fn a_crash_leaves_bitmaps_that_are_true_or_say_that_they_are_not() {
    cases::run("bitmaps", 24, |seed| {
        let stage = Stage::new(case(seed));
        stage.live(false);
        assert_eq!(true_ones(&stage), [RECORDING, STILL], "after it was closed");
        stage
            .second_opinion(&stage.file, "after it was closed")
            .unwrap();
        judge(&stage);
    });
}

/// Guests write, and then the image is closed on a disk in trouble. Returns whether that went well at once.
fn close_in_trouble(stage: &Stage, trouble: impl FnOnce(&Disk)) -> bool {
    on_ring(async {
        let node = stage.open().await.unwrap();
        let guest = Guest::new(node.clone(), &stage.recorder, FIRST);
        let mut rng = Rng::new(stage.case.seed);
        for _ in 0..stage.case.requests {
            let request = guest.random(&stage.case, stage.case.hot, &mut rng);
            request.await.unwrap();
        }
        guest.write(0, 1).await.unwrap();
        guest.flush().await.unwrap();
        let began = stage.recorder.log().tick();
        trouble(&stage.file);
        let at_once = node.close().await.is_ok();
        stage.file.heal();
        stage.file.set_room(None);
        node.close().await.unwrap();
        guest.promise(began);
        at_once
    })
}

fn lonely(seed: u64) -> Case {
    Case {
        threads: 1,
        resizes: false,
        ..case(seed)
    }
}

#[test]
fn what_finds_no_room_is_not_stored_or_stored_when_there_is_room() {
    let lost = AtomicU64::new(0);
    cases::run("bitmaps, full", 16, |seed| {
        let stage = Stage::new(lonely(seed));
        let room = (seed % 6) * (4 << 10);
        let at_once = close_in_trouble(&stage, |file| file.set_room(Some(room)));
        let there = true_ones(&stage);
        let all = [RECORDING, STILL];
        match at_once {
            // It is closed all the same, and what could not be stored says so.
            true => assert!(there == all || there.is_empty(), "{there:?}"),
            // Refcounts found no room either, so it was tried again.
            false => assert_eq!(there, all),
        }
        lost.fetch_add(there.is_empty().into(), Ordering::SeqCst);
        stage
            .second_opinion(&stage.file, "after it was closed")
            .unwrap();
        judge(&stage);
    });
    println!("{lost:?} images have lost their bitmaps");
}

#[test]
fn a_write_that_fails_while_bitmaps_are_stored_leaves_none_that_lies() {
    let at_once = AtomicU64::new(0);
    cases::run("bitmaps, failing", 16, |seed| {
        let stage = Stage::new(lonely(seed));
        let closed = close_in_trouble(&stage, |file| {
            let mut left = seed % 12;
            file.fail(move |op| match op {
                Op::Write { .. } if left == 0 => Some(EIO),
                Op::Write { .. } => {
                    left -= 1;
                    None
                }
                _ => None,
            });
        });
        at_once.fetch_add(closed.into(), Ordering::SeqCst);
        stage
            .second_opinion(&stage.file, "after it was closed")
            .unwrap();
        judge(&stage);
    });
    println!("{at_once:?} of them were closed at once");
}
