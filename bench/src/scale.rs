//! Many exports in one daemon: how long until all are usable, I/O on each, what one more export costs, how long the end takes.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::cli::Exports;
use crate::contender::{Contender, Ground, Role};
use crate::daemon::{Daemon, Messages};
use crate::error::{At, Error, Result};
use crate::line_up;
use crate::machine::Machine;
use crate::report::{mebibytes, short};
use crate::stats;

/// Bytes read from and written to each export.
const BLOCK: usize = 4096;
/// Size of each export in bytes; null nodes need no space.
const SIZE: u64 = 1 << 30;
/// How long I/O on all exports may take.
const IO_LIMIT: Duration = Duration::from_secs(60);

/// One daemon with many exports, from start to end.
#[derive(Debug, Clone, Serialize)]
struct Life {
    round: u32,
    contender: String,
    exports: u32,
    start_ms: f64,
    io_ms: f64,
    stop_ms: f64,
    clean_stop: bool,
    resident_started: u64,
    resident_after_io: u64,
    resident_peak: u64,
    threads: u64,
}

#[derive(Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    iothreads: u32,
    lives: &'a [Life],
}

/// Runs the measurement and prints its table; the raw figures go to `exports.json`.
pub fn run(options: &Exports) -> Result<()> {
    let work = line_up::work(&options.select)?;
    let out = line_up::out(&options.select)?;
    let ground = Ground {
        work: work.path(),
        size: SIZE,
        read_zeroes: true,
    };
    let machine = Machine::look(work.path(), &line_up::tree())?;
    let contenders =
        line_up::contenders(&options.select, &[options.iothreads], &[false], work.path())?;
    let mut lives = Vec::new();
    for round in 0..options.rounds {
        for contender in &contenders {
            // The daemon with one export is the base from which the price of one more is counted.
            for count in [1, options.count] {
                eprintln!(
                    "round {}/{}: {}, {count} exports",
                    round + 1,
                    options.rounds,
                    contender.label()
                );
                match live(contender, round, count, &ground) {
                    Ok(life) => lives.push(life),
                    Err(Error::Daemon { name, reason }) if contender.role == Role::Peer => {
                        println!("failed {name} with {count} exports: {reason}");
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    print!("{}", table(&lives, options.count));
    let document = Document {
        machine: &machine,
        iothreads: options.iothreads,
        lives: &lives,
    };
    line_up::write(&out, "exports.json", &document)
}

fn live(contender: &Contender, round: u32, count: u32, ground: &Ground<'_>) -> Result<Life> {
    let Some(launch) = contender.launch_many(count, ground) else {
        return Err(Error::Usage(format!(
            "{} is not a daemon",
            contender.label()
        )));
    };
    let points = launch.mountpoints.clone();
    let (mut daemon, start) = Daemon::start(launch, Messages::Keep)?;
    let started = daemon.usage()?;
    let began = Instant::now();
    daemon.call("answer I/O on all exports", IO_LIMIT, move |stop| {
        points
            .iter()
            .take_while(|_| !stop.load(Ordering::Relaxed))
            .try_for_each(touch)
    })??;
    let io = began.elapsed();
    let after = daemon.usage()?;
    let ending = daemon.stop();
    Ok(Life {
        round,
        contender: contender.label(),
        exports: count,
        start_ms: milliseconds(start),
        io_ms: milliseconds(io),
        stop_ms: milliseconds(ending.time),
        clean_stop: ending.clean,
        resident_started: started.resident,
        resident_after_io: after.resident,
        resident_peak: after.peak_resident,
        threads: after.threads,
    })
}

/// Reads and writes one block in the middle of an export.
fn touch(point: &PathBuf) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(point)
        .at("open", point)?;
    let mut block = [0xa5u8; BLOCK];
    file.read_exact_at(&mut block, SIZE / 2).at("read", point)?;
    if block.iter().any(|byte| *byte != 0) {
        return Err(Error::Usage(format!(
            "{} does not read as zeroes",
            Path::new(point).display()
        )));
    }
    file.write_all_at(&block, SIZE / 2).at("write", point)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn table(lives: &[Life], count: u32) -> String {
    let mut text = format!(
        "{:<18} {:>8} {:>9} {:>9} {:>9} {:>8} {:>9} {:>9} {:>9} {:>11} {:>11}\n",
        "contender",
        "exports",
        "start ms",
        "I/O ms",
        "stop ms",
        "threads",
        "RSS MiB",
        "after I/O",
        "peak",
        "KiB/export",
        "ms/export"
    );
    let mut labels: Vec<&str> = lives.iter().map(|life| life.contender.as_str()).collect();
    labels.dedup();
    let mut seen: Vec<&str> = Vec::new();
    for label in labels {
        if seen.contains(&label) {
            continue;
        }
        seen.push(label);
        for exports in [1, count] {
            let of = |value: &dyn Fn(&Life) -> f64, exports: u32| {
                let rounds = lives
                    .iter()
                    .filter(|life| life.contender == label && life.exports == exports);
                stats::median(&rounds.map(value).collect::<Vec<_>>()).unwrap_or(f64::NAN)
            };
            let more = |value: &dyn Fn(&Life) -> f64| {
                let price = (of(value, exports) - of(value, 1)) / f64::from(count - 1);
                if exports == 1 {
                    "-".to_owned()
                } else {
                    short(price)
                }
            };
            let mib = |value: fn(&Life) -> u64| short(of(&|life| mebibytes(value(life)), exports));
            let _ = writeln!(
                text,
                "{label:<18} {exports:>8} {:>9} {:>9} {:>9} {:>8} {:>9} {:>9} {:>9} {:>11} {:>11}",
                short(of(&|life| life.start_ms, exports)),
                short(of(&|life| life.io_ms, exports)),
                short(of(&|life| life.stop_ms, exports)),
                of(&|life| life.threads as f64, exports),
                mib(|life| life.resident_started),
                mib(|life| life.resident_after_io),
                mib(|life| life.resident_peak),
                more(&|life| life.resident_after_io as f64 / 1024.0),
                more(&|life| life.start_ms),
            );
        }
        if lives
            .iter()
            .any(|life| life.contender == label && !life.clean_stop)
        {
            let _ = writeln!(text, "{label}: SIGTERM did not end it cleanly every time");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(exports: u32, start_ms: f64, resident: u64) -> Life {
        Life {
            round: 0,
            contender: "diskfuse q4".to_owned(),
            exports,
            start_ms,
            io_ms: 1.0,
            stop_ms: 2.0,
            clean_stop: true,
            resident_started: resident,
            resident_after_io: resident,
            resident_peak: resident,
            threads: 5,
        }
    }

    #[test]
    fn the_price_of_one_more_export_leaves_the_base_out() {
        let table = table(&[life(1, 10.0, 8 << 20), life(201, 110.0, 18 << 20)], 201);
        let last = table.lines().last().unwrap();
        let fields: Vec<&str> = last.split_whitespace().rev().take(2).collect();
        // (18 - 8) MiB and (110 - 10) ms over 200 more exports.
        assert_eq!(fields, ["0.50", "51.2"]);
    }

    #[test]
    fn an_unclean_end_is_told() {
        let mut bad = life(1, 1.0, 1);
        bad.clean_stop = false;
        assert!(table(&[bad], 200).contains("SIGTERM did not end it cleanly"));
    }
}
