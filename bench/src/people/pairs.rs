//! Two files that differ in one thing: a partition and the whole disk, or the same disk with and without the sandbox. Which of
//! the two is measured first changes from round to round.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

use super::{Subject, partition};
use crate::cli::People;
use crate::daemon::{Daemon, Launch, Messages};
use crate::error::{At, Error, Result};
use crate::fio::{self, Load};
use crate::image::write_raw;
use crate::plan::{Cell, Direction, Mode, Pattern, Target};
use crate::report::short;
use crate::stats;

/// Threads that serve.
const THREADS: u32 = 2;

/// One file in one cell of one round.
#[derive(Debug, Clone, Serialize)]
pub struct Run {
    subject: &'static str,
    cell: String,
    round: u32,
    /// 0 for the one that the other is compared with.
    side: usize,
    per_second: f64,
}

/// What is compared: the files, the first being the measure, and the daemons that show them.
struct Pair {
    title: &'static str,
    target: Target,
    files: [PathBuf; 2],
    /// Bytes that both have at least.
    size: u64,
    daemons: Vec<Daemon>,
}

/// Measures every cell in every round.
pub fn run(binary: &Path, subject: Subject, work: &Path, options: &People) -> Result<Vec<Run>> {
    let mut pair = match subject {
        Subject::Partition => partitions(binary, work, options.image_size)?,
        _ => sandboxes(binary, work)?,
    };
    let report = work.join("people-fio.json");
    let mut runs = Vec::new();
    for round in 0..options.rounds {
        for cell in cells(pair.target) {
            for turn in 0..2 {
                let side = (turn + round as usize) % 2;
                eprintln!("round {}: {}, {}", round + 1, pair.title, cell.name());
                let load = Load {
                    cell: &cell,
                    file: &pair.files[side],
                    size: pair.size,
                    direct: true,
                    warm: options.seconds / 8,
                    time: options.seconds,
                };
                let figures = fio::run(&load, &report).map_err(|error| blame(&mut pair, error))?;
                runs.push(Run {
                    subject: pair.title,
                    cell: cell.name(),
                    round,
                    side,
                    per_second: figures.iops,
                });
            }
        }
    }
    Ok(runs)
}

fn blame(pair: &mut Pair, error: Error) -> Error {
    let daemons = pair.daemons.iter_mut();
    daemons.fold(error, |error, daemon| daemon.blame(error))
}

fn cells(target: Target) -> Vec<Cell> {
    let cell = |direction, pattern, mode, jobs, block_size| Cell {
        target,
        direction,
        pattern,
        mode,
        depth: if mode == Mode::Aio { 32 } else { 1 },
        jobs,
        block_size,
        fsync: 0,
    };
    vec![
        cell(Direction::Read, Pattern::Rand, Mode::Sync, 1, 4096),
        cell(Direction::Read, Pattern::Rand, Mode::Aio, 1, 4096),
        cell(Direction::Read, Pattern::Rand, Mode::Aio, 4, 4096),
        cell(Direction::Write, Pattern::Rand, Mode::Aio, 1, 4096),
        cell(Direction::Read, Pattern::Seq, Mode::Aio, 1, 1 << 20),
    ]
}

/// `disk` and `p1` of one directory, of a raw image in the page cache.
fn partitions(binary: &Path, work: &Path, mebibytes: u64) -> Result<Pair> {
    let image = work.join("whole.raw");
    write_raw(&image, mebibytes)?;
    partition(&image, mebibytes, 1)?;
    let folder = work.join("whole.d");
    fs::create_dir(&folder).at("create", &folder)?;
    let mut command = Command::new(binary);
    command
        .args(["mount", "--dir", "-w", "-f", "--threads"])
        .arg(THREADS.to_string())
        .args([&image, &folder]);
    let files = ["disk", "p1"].map(|name| folder.join(name));
    let launch = Launch {
        name: "diskfuse mount --dir".to_owned(),
        command,
        mountpoints: vec![folder],
        size: mebibytes << 20,
    };
    let shown = vec![files[0].clone()];
    let (daemon, _) = Daemon::start_showing(launch, shown, Messages::Drop)?;
    Ok(Pair {
        title: "p1 to disk",
        target: Target::Cached,
        files,
        size: (mebibytes - 2) << 20,
        daemons: vec![daemon],
    })
}

/// A null disk behind two daemons.
fn sandboxes(binary: &Path, work: &Path) -> Result<Pair> {
    const SIZE: u64 = 1 << 30;
    let mut daemons = Vec::new();
    let files = ["off", "on"].map(|sandbox| work.join(format!("sandbox-{sandbox}")));
    for (sandbox, file) in ["off", "on"].iter().zip(&files) {
        let mut command = Command::new(binary);
        let export = format!(
            "fuse,id=e,node-name=n,writable=on,threads={THREADS},mountpoint={}",
            file.display()
        );
        command
            .args(["qsd", "--sandbox", sandbox])
            .args(["--blockdev", &format!("null-co,node-name=n,size={SIZE}")])
            .args(["--export", &export]);
        let launch = Launch {
            name: format!("diskfuse qsd --sandbox {sandbox}"),
            command,
            mountpoints: vec![file.clone()],
            size: SIZE,
        };
        daemons.push(Daemon::start(launch, Messages::Drop)?.0);
    }
    Ok(Pair {
        title: "sandbox on to off",
        target: Target::Null,
        files,
        size: SIZE,
        daemons,
    })
}

/// A row for each cell: medians of both, the median of the quotients of one round, and the smallest and largest of these.
pub fn table(runs: &[Run]) -> String {
    let mut text = String::new();
    let mut cells: Vec<(&str, &str)> = Vec::new();
    for run in runs {
        if !cells.contains(&(run.subject, &run.cell)) {
            cells.push((run.subject, &run.cell));
        }
    }
    for (subject, cell) in cells {
        let of = |side: usize| -> Vec<(u32, f64)> {
            let rounds = runs
                .iter()
                .filter(|run| run.subject == subject && run.cell == cell && run.side == side);
            rounds.map(|run| (run.round, run.per_second)).collect()
        };
        let middle = |side| {
            let values: Vec<f64> = of(side).into_iter().map(|(_, value)| value).collect();
            stats::median(&values).map_or_else(String::new, short)
        };
        let quotients: Vec<f64> = of(1)
            .iter()
            .zip(of(0))
            .map(|((_, value), (_, base))| value / base)
            .collect();
        if let Some(ratio) = stats::spread(&quotients) {
            let _ = writeln!(
                text,
                "{subject:<18} {cell:<28} {:>9}/s to {:>9}/s {:>7.3}× ({:.3} to {:.3})",
                middle(1),
                middle(0),
                ratio.median,
                ratio.min,
                ratio.max
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotients_are_those_of_one_round() {
        let run = |round, side, per_second| Run {
            subject: "p1 to disk",
            cell: "cell".to_owned(),
            round,
            side,
            per_second,
        };
        let runs = [
            run(0, 0, 100.0),
            run(0, 1, 90.0),
            // The machine is ten times slower meanwhile.
            run(1, 1, 9.5),
            run(1, 0, 10.0),
        ];
        let table = table(&runs);
        assert!(table.contains("0.925× (0.900 to 0.950)"), "{table}");
    }
}
