//! A disk that is full or fails in the midst of anything: the guest is told, nothing that was flushed is lost, the image
//! stays sound, and when the disk is well again so is the guest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod common;

use std::sync::Arc;

use common::case::Case;
use common::cases;
use common::disk::Disk;
use common::disk::libc_errno::{EIO, ENOSPC};
use common::guest::{FIRST, Guest};
use common::log::Op;
use common::rng::Rng;
use common::run::{Stage, on_ring};
use common::states;
use diskfuse_block::{Error, Kind, Node, Result};
use diskfuse_qcow2::format::Header;
use diskfuse_qcow2::node::{Children, Qcow2Node};
use diskfuse_ring::spawn;

/// States that are looked at after each run.
const STATES: usize = 40;

/// A case on one thread, without what makes faults hard to tell apart.
fn case(seed: u64) -> Case {
    Case {
        threads: 1,
        resizes: false,
        second_opinions: 6,
        ..Case::random(seed)
    }
}

/// All guests of a stage on the running ring; the errors that they saw.
async fn live(stage: &Stage, guest: &Guest, seed: u64) -> Vec<Error> {
    let mut guests = Vec::new();
    for each in 0..stage.case.guests {
        let (guest, case) = (guest.clone(), stage.case.clone());
        let mut rng = Rng::new(seed ^ (each + 1) << 20);
        guests.push(spawn(async move {
            let mut errors = Vec::new();
            for _ in 0..case.requests {
                let answer = guest.random(&case, case.hot, &mut rng).await;
                errors.extend(answer.err());
            }
            errors
        }));
    }
    let mut errors = Vec::new();
    for guest in guests {
        errors.extend(guest.await);
    }
    errors
}

/// Judges crashes at many moments, and the very end.
fn judge(stage: &Stage) {
    let log = stage.recorder.log();
    let mut rng = Rng::new(stage.case.seed ^ 0xC4A5);
    let mut choices = rng.clone();
    states::sample(&log, &stage.initial, &mut choices, STATES, |state| {
        if let Err(error) = stage.judge(&log, &state, &mut rng) {
            let before = log.show(state.time.saturating_sub(60), state.time);
            panic!(
                "{error}\n{}\nof {:#?}\nstorage:\n{before}",
                state.how, stage.case
            );
        }
    });
}

async fn close(guest: &Guest, stage: &Stage, node: Arc<Qcow2Node>) -> Result<()> {
    let began = stage.recorder.log().tick();
    node.close().await?;
    guest.promise(began);
    Ok(())
}

#[test]
fn a_full_disk_is_told_to_the_guest_and_writing_goes_on_when_there_is_room() {
    cases::run("full", 12, |seed| {
        let stage = Stage::new(case(seed));
        let mut rng = Rng::new(seed ^ 0xF011);
        on_ring(async {
            let node = stage.open().await.unwrap();
            let guest = Guest::new(node.clone(), &stage.recorder, FIRST);
            for round in 0..3 {
                let room = rng.below(256 << 10);
                stage.file.set_room(Some(room));
                if let Some(data) = &stage.data_file {
                    data.set_room(Some(rng.below(256 << 10)));
                }
                for error in live(&stage, &guest, seed + round).await {
                    assert_eq!(error.kind(), Kind::Os(ENOSPC), "{error}");
                }
                stage.file.set_room(None);
                if let Some(data) = &stage.data_file {
                    data.set_room(None);
                }
                guest.flush().await.unwrap();
                let errors = live(&stage, &guest, seed + 100 + round).await;
                assert!(errors.is_empty(), "there is room again, but: {errors:?}");
            }
            close(&guest, &stage, node).await.unwrap();
        });
        stage
            .second_opinion(&stage.file, "after it was full and closed")
            .unwrap();
        judge(&stage);
    });
}

#[test]
fn one_failed_write_is_told_to_whom_it_concerns_and_nothing_else_is_lost() {
    cases::run("failed write", 20, |seed| {
        let stage = Stage::new(case(seed));
        let mut rng = Rng::new(seed ^ 0xE10);
        // The n-th change fails, and perhaps some after it.
        let (first, count) = (rng.below(200), rng.pick(&[1, 1, 3, 20]));
        let mut seen = 0;
        stage.file.fail(move |op| {
            let counts = !matches!(op, Op::Flush);
            seen += u64::from(counts);
            (counts && (first..first + count).contains(&(seen - 1))).then_some(EIO)
        });
        on_ring(async {
            let Ok(node) = stage.open().await else { return };
            let guest = Guest::new(node.clone(), &stage.recorder, FIRST);
            for error in live(&stage, &guest, seed).await {
                assert_eq!(error.errno(), EIO, "{error}");
            }
            stage.file.heal();
            if guest.flush().await.is_ok() {
                let errors = live(&stage, &guest, seed + 1).await;
                assert!(
                    errors.is_empty(),
                    "the disk is well again and flushed, but: {errors:?}"
                );
                close(&guest, &stage, node).await.unwrap();
            }
        });
        stage
            .second_opinion(&stage.file, "after a failed write")
            .unwrap();
        judge(&stage);
    });
}

#[test]
fn an_image_that_cannot_be_opened_anew_goes_on_as_it_was() {
    cases::run("not opened anew", 8, |seed| {
        let stage = Stage::new(case(seed));
        let mut rng = Rng::new(seed ^ 0xA9E3);
        on_ring(async {
            let node = stage.open().await.unwrap();
            let guest = Guest::new(node.clone(), &stage.recorder, FIRST);
            for round in 0..6 {
                let errors = live(&stage, &guest, seed + round).await;
                assert!(errors.is_empty(), "round {round}: {errors:?}");
                let config = node.config().clone();
                match round % 3 {
                    // Closing fails at its n-th step, or is too short for that.
                    0 => {
                        let nth = rng.below(8);
                        let mut seen = 0;
                        stage.file.fail(move |_| {
                            seen += 1;
                            (seen == nth + 1).then_some(EIO)
                        });
                        match node.open_anew(&config, node.children()).await {
                            Ok(anew) => drop(anew),
                            Err(error) => assert_eq!(error.errno(), EIO, "{error}"),
                        }
                        stage.file.heal();
                    }
                    // There is no image where there should be one.
                    1 => {
                        let children = Children {
                            file: Disk::quiet(vec![0; 64 << 10]),
                            ..node.children()
                        };
                        node.open_anew(&config, children).await.err().unwrap();
                    }
                    // It was opened, and then something else went wrong.
                    _ => drop(node.open_anew(&config, node.children()).await.unwrap()),
                }
            }
            close(&guest, &stage, node).await.unwrap();
            let header = Header::read(&*stage.file).await.unwrap();
            assert!(!header.is_dirty(), "it was not left clean");
        });
        stage
            .second_opinion(&stage.file, "after it was not opened anew")
            .unwrap();
        judge(&stage);
    });
}

#[test]
fn after_a_failed_flush_nothing_is_promised_that_is_not_there() {
    cases::run("failed flush", 12, |seed| {
        let stage = Stage::new(Case {
            flushes: 20,
            ..case(seed)
        });
        let nth = Rng::new(seed ^ 0xF1).below(12);
        let mut seen = 0;
        stage.file.fail(move |op| {
            seen += u64::from(matches!(op, Op::Flush));
            (seen == nth + 1 && matches!(op, Op::Flush)).then_some(EIO)
        });
        on_ring(async {
            let Ok(node) = stage.open().await else { return };
            let guest = Guest::new(node.clone(), &stage.recorder, FIRST);
            for error in live(&stage, &guest, seed).await {
                assert_eq!(error.errno(), EIO, "{error}");
            }
            // A file in the page cache never flushes again.
            drop(node.close().await);
        });
        judge(&stage);
    });
}
