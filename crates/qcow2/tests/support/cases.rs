//! Runs many random cases, on two threads, and says of each that fails how to run it again:
//! `DISKFUSE_SEED=<seed> cargo test …`. `DISKFUSE_CASES` sets how many. Without a seed the first comes from the clock, so
//! that everybody who runs the tests looks somewhere else; in CI (`CI=true`) they are the same every time, so that what
//! fails there is the change's doing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Cases that may fail before the rest is given up.
const ENOUGH: usize = 8;

pub fn env_number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// The first seed in CI.
const CI_SEED: u64 = 1_000_000;

/// The seeds to run: the one that was asked for, or `count` neighbours of the clock, or of [`CI_SEED`].
pub fn seeds(count: u64) -> Vec<u64> {
    if let Some(seed) = env_number("DISKFUSE_SEED") {
        return vec![seed];
    }
    let count = env_number("DISKFUSE_CASES").unwrap_or(count);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let first = match std::env::var_os("CI") {
        Some(_) => CI_SEED,
        None => now.unwrap_or(Duration::ZERO).as_micros() as u64,
    };
    (first..first + count).collect()
}

/// Runs `case` for each seed; panics with the seeds of those that failed.
pub fn run(name: &str, count: u64, case: impl Fn(u64) + Sync) {
    let seeds = seeds(count);
    let next = AtomicU64::new(0);
    let failed = Mutex::new(Vec::new());
    let work = || {
        while let Some(&seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            if catch_unwind(AssertUnwindSafe(|| case(seed))).is_err() {
                eprintln!("{name}: failed; again with DISKFUSE_SEED={seed}");
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.push(seed);
                if failed.len() >= ENOUGH {
                    next.store(u64::from(u32::MAX), Ordering::Relaxed);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        scope.spawn(work);
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    assert!(
        failed.is_empty(),
        "{name}: {} of {} cases failed; run them again with DISKFUSE_SEED={failed:?}",
        failed.len(),
        seeds.len()
    );
}
