//! From raw rounds to what a reader sees. Pure: takes figures, gives text; measures and decides nothing.

pub mod json;
pub mod markdown;
#[cfg(test)]
pub mod sample;
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
    /// The configuration of a peer with the lowest 99th percentile of latency.
    pub calmest_peer: Option<String>,
    /// The configuration of a bare server with the highest median, if one took part.
    pub best_floor: Option<String>,
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
    /// 99.9th percentile in µs.
    pub p999_us: f64,
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
    /// Against the best bare server's configuration, whatever its transport (paired).
    pub to_floor: Option<f64>,
    /// Against the bare server with the same transport and number of queues, where ours was told its transport (paired).
    pub to_same_floor: Option<f64>,
    /// 99th percentile of latency against the lowest of a peer's configurations (paired); above 1 is worse.
    pub p99_to_peer: Option<f64>,
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
    let series = |value: &dyn Fn(&Measurement) -> f64| -> Vec<Series> {
        let one = |contender| {
            of(contender)
                .iter()
                .map(|one| (one.round, value(one)))
                .collect()
        };
        (0..contenders.len()).map(one).collect()
    };
    let field = Field {
        contenders,
        scores: series(&|one| one.score(cell)),
        tails: series(&|one| one.p99_us),
    };
    let best_peer = field.ranked(Role::Peer, &field.scores).pop();
    let best_floor = field.ranked(Role::Floor, &field.scores).pop();
    let calmest_peer = field.ranked(Role::Peer, &field.tails).first().copied();
    let bare = field.find(|contender| contender.role == Role::Bare);
    let lines: Vec<Line> = (0..contenders.len())
        .filter_map(|number| {
            let mut line = line(&contenders[number], &of(number), cell)?;
            line.to_peer = field.ratio(number, best_peer);
            line.to_bare = field.ratio(number, bare);
            line.to_one_queue = field.ratio(number, field.one_queue(number));
            line.to_floor = field.ratio(number, best_floor);
            line.to_same_floor = field.ratio(number, field.same_floor(number));
            line.p99_to_peer = calmest_peer
                .and_then(|peer| stats::paired_ratio(&field.tails[number], &field.tails[peer]));
            Some(line)
        })
        .collect();
    let label = |number: Option<usize>| number.map(|number| contenders[number].label());
    (!lines.is_empty()).then(|| Row {
        cell: cell.clone(),
        name: cell.name(),
        unit: cell.unit(),
        best_peer: label(best_peer),
        calmest_peer: label(calmest_peer),
        best_floor: label(best_floor),
        lines,
    })
}

/// Everyone in one cell. Numbers are indices into all of its lists.
struct Field<'a> {
    contenders: &'a [Contender],
    scores: Vec<Series>,
    /// 99th percentiles of latency.
    tails: Vec<Series>,
}

impl Field<'_> {
    fn find(&self, wanted: impl Fn(&Contender) -> bool) -> Option<usize> {
        self.contenders.iter().position(wanted)
    }

    /// Those of a side that have figures, the one with the smallest median first.
    fn ranked(&self, role: Role, series: &[Series]) -> Vec<usize> {
        let median = |number: usize| {
            let values: Vec<f64> = series[number].iter().map(|(_, value)| *value).collect();
            stats::median(&values)
        };
        let mut medians: Vec<(usize, f64)> = (0..self.contenders.len())
            .filter(|number| self.contenders[*number].role == role)
            .filter_map(|number| Some((number, median(number)?)))
            .collect();
        medians.sort_by(|(_, one), (_, other)| one.total_cmp(other));
        medians.into_iter().map(|(number, _)| number).collect()
    }

    fn ratio(&self, of: usize, to: Option<usize>) -> Option<f64> {
        stats::paired_ratio(&self.scores[of], &self.scores[to?])
    }

    /// The same with one queue, for those with more.
    fn one_queue(&self, of: usize) -> Option<usize> {
        let one = &self.contenders[of];
        self.find(|other| other.family == one.family && other.queues == 1)
            .filter(|_| one.queues > 1)
    }

    /// The bare server that is configured like one of ours.
    fn same_floor(&self, of: usize) -> Option<usize> {
        let one = &self.contenders[of];
        let transport = one.transport().filter(|_| one.role == Role::Ours)?;
        self.find(|other| {
            other.role == Role::Floor
                && other.transport() == Some(transport)
                && other.queues == one.queues
        })
    }
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
        p999_us: median(&|round| round.p999_us)?,
        cpu_us: cost(&|cost| cost.cpu_us_per_request),
        switches: cost(&|cost| cost.switches_per_request),
        idle_mib: cost(&|cost| mebibytes(cost.resident_idle)),
        peak_mib: cost(&|cost| mebibytes(cost.resident_peak)),
        to_peer: None,
        to_bare: None,
        to_one_queue: None,
        to_floor: None,
        to_same_floor: None,
        p99_to_peer: None,
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
    fn ours_is_compared_with_the_best_floor_and_with_that_of_its_own_transport() {
        let report = sample::floor_report();
        let row = &report.summary[0];
        assert_eq!(row.best_floor.as_deref(), Some("bare-uring q1"));
        assert_eq!(row.best_peer.as_deref(), Some("qemu q1"));
        let (auto, uring, peer) = (&row.lines[0], &row.lines[1], &row.lines[2]);
        assert!(close(auto.to_floor, 0.5) && auto.to_same_floor.is_none());
        assert!(close(uring.to_floor, 0.75) && close(uring.to_same_floor, 0.75));
        assert!(close(peer.to_floor, 0.25) && peer.to_same_floor.is_none());
        assert_eq!(sample::report().summary[0].best_floor, None);
    }

    #[test]
    fn tails_are_compared_with_the_calmest_peer_and_not_with_the_floor() {
        let report = sample::floor_report();
        let row = &report.summary[0];
        assert_eq!(row.calmest_peer.as_deref(), Some("qemu q1"));
        assert!(close(row.lines[0].p99_to_peer, 0.75) && close(row.lines[1].p99_to_peer, 1.5));
        assert!((row.lines[1].p999_us - 2400.0).abs() < 1e-9);
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
