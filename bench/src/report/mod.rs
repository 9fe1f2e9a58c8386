//! From raw rounds to what a reader sees. Pure: takes figures, gives text; measures and decides nothing.

pub mod json;
pub mod markdown;
pub mod svg;
pub mod text;
pub mod verdict;

use serde::Serialize;

use crate::contender::{Contender, Role};
use crate::machine::Machine;
use crate::plan::Cell;
use crate::run::{Cost, Measurement, Results};
use crate::stats::{self, Spread};

/// A contender as reports name it.
#[derive(Debug, Clone, Serialize)]
pub struct Entrant {
    /// Unique name.
    pub label: String,
    /// Name shared by all its numbers of queues.
    pub family: String,
    /// Whose side it is on.
    pub role: Role,
    /// Number of queues; 0 for the bare file.
    pub queues: u32,
    /// What its program says about its version.
    pub version: String,
    /// How it was configured.
    pub description: String,
}

/// How the figures were made.
#[derive(Debug, Clone, Serialize)]
pub struct Settings {
    /// Number of rounds asked for.
    pub rounds: u32,
    /// Seconds of one measurement.
    pub seconds: f64,
    /// Seconds of the warm-up before it.
    pub warm_seconds: f64,
    /// Size of image and null nodes in MiB.
    pub size_mib: u64,
    /// The command that was given.
    pub command: String,
}

/// A whole run, ready to be written down.
pub struct Report {
    /// Where it took place.
    pub machine: Machine,
    /// How.
    pub settings: Settings,
    /// Who took part.
    pub entrants: Vec<Entrant>,
    /// What was measured.
    pub cells: Vec<Cell>,
    /// All rounds.
    pub results: Results,
    /// One entry per cell that has figures.
    pub summary: Vec<Row>,
}

/// One cell of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The workload.
    #[serde(skip)]
    pub cell: Cell,
    /// Its name.
    pub name: String,
    /// Unit of the scores.
    pub unit: &'static str,
    /// The configuration of a peer with the highest median, if a peer took part.
    pub best_peer: Option<String>,
    /// One line per contender that has figures.
    pub lines: Vec<Line>,
}

/// One contender in one cell: medians over the rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Line {
    /// The contender's label.
    pub label: String,
    /// Its side.
    #[serde(skip)]
    pub role: Role,
    /// kIOPS or MiB/s.
    pub score: Spread,
    /// Median completion latency in µs.
    pub p50_us: f64,
    /// 99th percentile in µs.
    pub p99_us: f64,
    /// CPU time of the daemon per request in µs.
    pub cpu_us: Option<f64>,
    /// Voluntary context switches of the daemon per request.
    pub switches: Option<f64>,
    /// Resident size before the first request in MiB.
    pub idle_mib: Option<f64>,
    /// Largest resident size in MiB.
    pub peak_mib: Option<f64>,
    /// Against the best peer's configuration (paired).
    pub to_peer: Option<f64>,
    /// Against the bare file (paired).
    pub to_bare: Option<f64>,
    /// Against the same family with one queue (paired).
    pub to_one_queue: Option<f64>,
}

/// A series of (round, value).
type Series = Vec<(u32, f64)>;

/// Brings the rounds of each cell together.
pub fn summarise(
    cells: &[Cell],
    contenders: &[Contender],
    measurements: &[Measurement],
) -> Vec<Row> {
    let row = |(index, cell)| summarise_cell(index, cell, contenders, measurements);
    cells.iter().enumerate().filter_map(row).collect()
}

fn summarise_cell(
    index: usize,
    cell: &Cell,
    contenders: &[Contender],
    measurements: &[Measurement],
) -> Option<Row> {
    let of = |contender: usize| -> Vec<&Measurement> {
        measurements
            .iter()
            .filter(|one| one.cell == index && one.contender == contender)
            .collect()
    };
    let series: Vec<Series> = (0..contenders.len())
        .map(|contender| {
            of(contender)
                .iter()
                .map(|one| (one.round, one.score(cell)))
                .collect()
        })
        .collect();
    let find = |wanted: &dyn Fn(&Contender) -> bool| {
        contenders
            .iter()
            .position(wanted)
            .map(|found| &series[found])
    };
    let best = best_peer(contenders, &series);
    let bare = find(&|contender| contender.role == Role::Bare);
    let lines: Vec<Line> = contenders
        .iter()
        .enumerate()
        .filter_map(|(number, contender)| {
            let one_queue = find(&|other| other.family == contender.family && other.queues == 1);
            let mut line = line(contender, &of(number), cell)?;
            let ratio = |base: Option<&Series>| stats::paired_ratio(&series[number], base?);
            line.to_peer = ratio(best.map(|best| &series[best]));
            line.to_bare = ratio(bare);
            line.to_one_queue = ratio(one_queue.filter(|_| contender.queues > 1));
            Some(line)
        })
        .collect();
    let best_peer = best.map(|best| contenders[best].label());
    (!lines.is_empty()).then(|| Row {
        cell: cell.clone(),
        name: cell.name(),
        unit: cell.unit(),
        best_peer,
        lines,
    })
}

fn best_peer(contenders: &[Contender], series: &[Series]) -> Option<usize> {
    let median = |index: usize| {
        stats::median(
            &series[index]
                .iter()
                .map(|(_, score)| *score)
                .collect::<Vec<_>>(),
        )
    };
    (0..contenders.len())
        .filter(|index| contenders[*index].role == Role::Peer)
        .filter_map(|index| Some((index, median(index)?)))
        .max_by(|(_, one), (_, other)| one.total_cmp(other))
        .map(|(index, _)| index)
}

fn line(contender: &Contender, rounds: &[&Measurement], cell: &Cell) -> Option<Line> {
    let median = |value: &dyn Fn(&Measurement) -> f64| {
        stats::median(&rounds.iter().map(|round| value(round)).collect::<Vec<_>>())
    };
    let cost = |value: &dyn Fn(&Cost) -> f64| {
        stats::median(
            &rounds
                .iter()
                .filter_map(|round| round.cost.as_ref().map(value))
                .collect::<Vec<_>>(),
        )
    };
    Some(Line {
        label: contender.label(),
        role: contender.role,
        score: stats::spread(
            &rounds
                .iter()
                .map(|round| round.score(cell))
                .collect::<Vec<_>>(),
        )?,
        p50_us: median(&|round| round.p50_us)?,
        p99_us: median(&|round| round.p99_us)?,
        cpu_us: cost(&|cost| cost.cpu_us_per_request),
        switches: cost(&|cost| cost.switches_per_request),
        idle_mib: cost(&|cost| mebibytes(cost.resident_idle)),
        peak_mib: cost(&|cost| mebibytes(cost.resident_peak)),
        to_peer: None,
        to_bare: None,
        to_one_queue: None,
    })
}

/// Bytes as MiB.
pub fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A figure with about three significant digits.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size < 9.995 => format!("{value:.2}"),
        size if size < 99.95 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// The same, or a dash.
pub fn short_or_dash(value: Option<f64>) -> String {
    value.map_or_else(|| "-".to_owned(), short)
}

#[cfg(test)]
pub mod sample {
    //! A small run for the tests of the reports.

    use crate::contender::Program;
    use crate::plan::{Filter, Mode, Rows, Target, cells};

    use super::*;

    fn contender(family: &str, role: Role, queues: u32) -> Contender {
        Contender {
            family: family.to_owned(),
            role,
            queues,
            program: Program::None,
        }
    }

    /// Ours with 1 and 4 queues, a peer with 1 and 4 threads, the bare file.
    pub fn contenders() -> Vec<Contender> {
        vec![
            contender("diskfuse", Role::Ours, 1),
            contender("diskfuse", Role::Ours, 4),
            contender("qemu", Role::Peer, 1),
            contender("qemu", Role::Peer, 4),
            Contender::bare(),
        ]
    }

    fn measurement(round: u32, cell: usize, contender: usize, kiops: f64) -> Measurement {
        let cost = Cost {
            cpu_us_per_request: 2.5,
            switches_per_request: 0.5,
            resident_idle: 10 << 20,
            resident_peak: 20 << 20,
            start_ms: 30.0,
            clean_stop: true,
        };
        Measurement {
            round,
            cell,
            contender,
            iops: kiops * 1000.0,
            mib_per_second: kiops * 4.0,
            p50_us: 100.0,
            p99_us: 900.0,
            requests: 1000,
            cost: (contender != 4).then_some(cost),
        }
    }

    /// Four file cells, three rounds in each of which the machine is slower than before. In the first cell ours with one
    /// queue is 1.5 times the best peer and with four queues 0.75 times; in the others all is well.
    pub fn report() -> Report {
        let filter = Filter {
            rows: vec![Rows::Small],
            targets: vec![Target::File],
            modes: vec![Mode::Aio],
            jobs: vec![1],
            ..Filter::default()
        };
        let (cells, contenders) = (cells(&filter), contenders());
        let mut measurements = Vec::new();
        for cell in 0..cells.len() {
            for round in 0..3 {
                let speed = 100.0 / f64::from(round + 1);
                let scores = if cell == 0 {
                    [1.5, 0.75, 1.0, 0.5, 2.0]
                } else {
                    [2.0, 3.0, 1.0, 0.5, 2.5]
                };
                for (contender, score) in scores.iter().enumerate() {
                    measurements.push(measurement(round, cell, contender, score * speed));
                }
            }
        }
        let summary = summarise(&cells, &contenders, &measurements);
        Report {
            machine: Machine {
                cpu: "Some <CPU> & more".to_owned(),
                cores: 2,
                memory_mib: 4096,
                kernel: "6.18".to_owned(),
                file_system: "ext4".to_owned(),
                fio: "fio-3.33".to_owned(),
                date: "2026-11-23 00:00 UTC".to_owned(),
                commit: "none".to_owned(),
            },
            settings: Settings {
                rounds: 3,
                seconds: 2.0,
                warm_seconds: 0.25,
                size_mib: 1024,
                command: "cargo xtask bench".to_owned(),
            },
            entrants: contenders
                .iter()
                .map(|contender| Entrant {
                    label: contender.label(),
                    family: contender.family.clone(),
                    role: contender.role,
                    queues: contender.queues,
                    version: "1.0".to_owned(),
                    description: contender.describe(),
                })
                .collect(),
            cells,
            results: Results {
                measurements,
                failures: Vec::new(),
                interrupted: false,
            },
            summary,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(value: Option<f64>, expected: f64) -> bool {
        value.is_some_and(|value| (value - expected).abs() < 1e-9)
    }

    #[test]
    fn ratios_are_paired_by_round_although_the_machine_drifts() {
        let report = sample::report();
        let row = &report.summary[0];
        assert_eq!(row.best_peer.as_deref(), Some("qemu q1"));
        let (one, four) = (&row.lines[0], &row.lines[1]);
        assert!(close(one.to_peer, 1.5) && close(four.to_peer, 0.75));
        assert!(close(one.to_bare, 0.75) && close(four.to_one_queue, 0.5));
        assert_eq!(one.to_one_queue, None);
        assert!((one.score.median - 75.0).abs() < 1e-9 && (one.score.max - 150.0).abs() < 1e-9);
    }

    #[test]
    fn the_bare_file_has_no_cost() {
        let report = sample::report();
        let bare = report.summary[0].lines.last().unwrap();
        assert_eq!(
            (bare.label.as_str(), bare.cpu_us, bare.peak_mib),
            ("bare", None, None)
        );
    }

    #[test]
    fn a_cell_without_a_figure_has_no_row() {
        let report = sample::report();
        assert!(summarise(&report.cells, &sample::contenders(), &[]).is_empty());
    }

    #[test]
    fn figures_keep_three_digits() {
        assert_eq!(
            [short(1.234), short(9.996), short(45.67), short(1234.5)],
            ["1.23", "10.0", "45.7", "1234"]
        );
        assert_eq!(short_or_dash(None), "-");
    }
}
