//! Whatever was under way when the power failed, what was flushed is there and the image is sound: random loads on
//! random images, and for each many states that a crash can leave.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::pedantic)]

mod common;

use common::case::Case;
use common::cases;
use common::rng::Rng;
use common::run::Stage;
use common::states;

/// States that are looked at after each run.
const STATES: usize = 120;

/// Lives, crashes in many ways, and judges what is left.
fn crash(case: Case) {
    let seed = case.seed;
    let stage = Stage::new(case);
    stage.live(false);
    if stage.case.closes {
        stage
            .second_opinion(&stage.file, "after it was closed")
            .unwrap();
    }
    let log = stage.recorder.log();
    let mut rng = Rng::new(seed ^ 0xC4A5);
    let mut choices = rng.clone();
    let wanted = cases::env_number("DISKFUSE_STATES").map_or(STATES, |n| n as usize);
    states::sample(&log, &stage.initial, &mut choices, wanted, |state| {
        if let Err(error) = stage.judge(&log, &state, &mut rng) {
            if let Ok(path) = std::env::var("DISKFUSE_KEEP") {
                std::fs::write(path, &state.disks[0]).unwrap();
            }
            let before = log.show(state.time.saturating_sub(60), state.time);
            panic!(
                "{error}\n{}\nof {:#?}\nstorage:\n{before}",
                state.how, stage.case
            );
        }
    });
}

#[test]
fn a_crash_at_any_moment_leaves_a_sound_image_with_all_that_was_flushed() {
    cases::run("crash", 40, |seed| crash(Case::random(seed)));
}

/// Small clusters and wide refcounts: few clusters to a refcount block and few blocks to a table, so that both grow all the time.
fn narrow(seed: u64) -> Case {
    let mut case = Case::random(seed);
    if !case.extended_l2 {
        case.cluster_size = 512;
    }
    if case.v3 {
        case.refcount_bits = 64;
    }
    case.size = 8 << 20;
    case.hot = case.size;
    case.filled = [0, 20, 60][seed as usize % 3];
    case.most = 128 << 10;
    case.requests = 50;
    case.guests = 4;
    case.compressed = false;
    case
}

#[test]
fn a_crash_while_the_refcounts_themselves_grow_leaves_a_sound_image() {
    cases::run("crash", 8, |seed| crash(narrow(seed)));
}
