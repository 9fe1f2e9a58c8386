//! The table of the monitor: a row for each contender, and its ratio to each peer of the same rounds.

use std::fmt::Write as _;

use super::{Beside, Run};
use crate::report::short;
use crate::stats;

/// A column: its name, what it shows of a run, and whether it shows the worst of the rounds.
type Column = (&'static str, fn(&Run) -> f64, bool);

const COLUMNS: [Column; 9] = [
    ("answer ms", |run| run.answer.p50, false),
    ("p99", |run| run.answer.p99, false),
    ("worst", |run| run.answer.max, true),
    ("add ms", |run| run.add.p50, false),
    ("p99", |run| run.add.p99, false),
    ("worst", |run| run.add.max, true),
    ("del ms", |run| run.del.p50, false),
    ("worst", |run| run.del.max, true),
    ("guests/s", |run| run.iops.unwrap_or(f64::NAN), false),
];

/// Medians over the rounds, and the worst of all where that is said; below a contender of ours the median of the quotients of one
/// round to each peer.
pub fn table(runs: &[Run]) -> String {
    let mut text = format!("{:<8} {:<24}", "beside", "contender");
    for (name, ..) in COLUMNS {
        let _ = write!(text, " {name:>9}");
    }
    text.push('\n');
    let all = rows(runs);
    for &(beside, name, peer) in &all {
        row(&mut text, runs, beside, name, None);
        let peers = all
            .iter()
            .filter(|(of, _, is_peer)| *of == beside && *is_peer);
        for (_, other, _) in peers.filter(|_| !peer) {
            row(&mut text, runs, beside, name, Some(other));
        }
    }
    text
}

/// Who was measured beside whom, and whether it is a peer, in the order of the measurements.
fn rows(runs: &[Run]) -> Vec<(Beside, &str, bool)> {
    let mut rows = Vec::new();
    for run in runs {
        let row = (run.beside, run.contender.as_str(), run.peer);
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    rows
}

fn row(text: &mut String, runs: &[Run], beside: Beside, name: &str, to: Option<&str>) {
    let label = to.map_or_else(|| name.to_owned(), |peer| format!("  to {peer}"));
    let _ = write!(text, "{:<8} {label:<24}", beside.name());
    for (_, value, worst) in COLUMNS {
        let of = |name: &str| -> Vec<(u32, f64)> {
            let of_it = |run: &&Run| run.beside == beside && run.contender == name;
            let rounds = runs.iter().filter(of_it);
            rounds.map(|run| (run.round, value(run))).collect()
        };
        let values: Vec<f64> = of(name).into_iter().map(|(_, value)| value).collect();
        let shown = match to {
            Some(peer) => {
                let ratio = stats::paired_ratio(&of(name), &of(peer));
                ratio.map(|ratio| format!("{ratio:.2}×"))
            }
            None if worst => stats::spread(&values).map(|spread| short(spread.max)),
            None => stats::median(&values).map(short),
        };
        let _ = write!(text, " {:>9}", shown.unwrap_or_else(|| "-".to_owned()));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::super::Times;
    use super::*;

    fn run(contender: &str, peer: bool, round: u32, ms: f64) -> Run {
        let times = Times {
            p50: ms,
            p99: ms * 2.0,
            max: ms * 3.0,
        };
        Run {
            round,
            contender: contender.to_owned(),
            peer,
            beside: Beside::Nobody,
            answer: times,
            add: times,
            del: times,
            iops: None,
        }
    }

    #[test]
    fn medians_and_the_worst_of_all_rounds_and_ratios_of_one_round() {
        let runs = [
            run("diskfuse q4", false, 0, 2.0),
            run("qemu q4", true, 0, 4.0),
            run("diskfuse q4", false, 1, 30.0),
            run("qemu q4", true, 1, 60.0),
        ];
        let table = table(&runs);
        let lines: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines.len(), 4, "{table}");
        // nobody diskfuse q4: the median of 2 and 30, of twice that, the worst of three times that
        assert_eq!(lines[1][3..6], ["16.0", "32.0", "90.0"], "{table}");
        assert_eq!(lines[2][1..5], ["to", "qemu", "q4", "0.50×"], "{table}");
        // Nobody beside it has no rate.
        assert_eq!(lines[1].last(), Some(&"-"), "{table}");
    }
}
