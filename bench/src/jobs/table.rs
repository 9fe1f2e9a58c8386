//! The table of the jobs: a row for each job and contender, the best peer's figures beside ours as a ratio.

use std::fmt::Write as _;

use super::Run;
use super::chain::Kind;
use crate::report::short;
use crate::stats;

/// A column: its name and what it shows of a run.
type Column = (&'static str, fn(&Run) -> f64);

const COLUMNS: [Column; 9] = [
    ("seconds", |run| run.seconds),
    ("reads/s", |run| run.reads.iops),
    ("writes/s", |run| run.writes.iops),
    ("r p99 ms", |run| run.reads.p99_ms),
    ("w p99 ms", |run| run.writes.p99_ms),
    ("r max ms", |run| run.reads.max_ms),
    ("w max ms", |run| run.writes.max_ms),
    ("QMP ms", |run| run.answer_p50_ms),
    ("QMP p99", |run| run.answer_p99_ms),
];

/// Medians over the rounds; below a contender of ours the median of the quotients of one round to each peer.
pub fn table(runs: &[Run]) -> String {
    let mut text = format!("{:<8} {:<24}", "job", "contender");
    for (name, _) in COLUMNS {
        let _ = write!(text, " {name:>9}");
    }
    text.push('\n');
    for (kind, ours_or_peer) in pairs(runs) {
        row(&mut text, runs, kind, ours_or_peer, None);
        let is_peer = |name: &str| runs.iter().any(|run| run.contender == name && run.peer);
        if is_peer(ours_or_peer) {
            continue;
        }
        for (_, peer) in pairs(runs)
            .iter()
            .filter(|(of, name)| *of == kind && is_peer(name))
        {
            row(&mut text, runs, kind, ours_or_peer, Some(peer));
        }
    }
    text
}

/// Each job with each contender, in the order in which they were measured.
fn pairs(runs: &[Run]) -> Vec<(Kind, &str)> {
    let mut pairs = Vec::new();
    for run in runs {
        let pair = (run.kind, run.contender.as_str());
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    pairs
}

fn row(text: &mut String, runs: &[Run], kind: Kind, name: &str, to: Option<&str>) {
    let label = to.map_or_else(|| name.to_owned(), |peer| format!("  to {peer}"));
    let _ = write!(text, "{:<8} {label:<24}", kind.name());
    for (_, value) in COLUMNS {
        let of = |name: &str| -> Vec<(u32, f64)> {
            let rounds = runs
                .iter()
                .filter(|run| run.kind == kind && run.contender == name);
            rounds.map(|run| (run.round, value(run))).collect()
        };
        let shown = match to {
            Some(peer) => {
                stats::paired_ratio(&of(name), &of(peer)).map(|ratio| format!("{ratio:.2}×"))
            }
            None => stats::median(
                &of(name)
                    .into_iter()
                    .map(|(_, value)| value)
                    .collect::<Vec<_>>(),
            )
            .map(short),
        };
        let _ = write!(text, " {:>9}", shown.unwrap_or_else(|| "-".to_owned()));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Latencies;

    fn run(contender: &str, peer: bool, round: u32, seconds: f64) -> Run {
        let side = Latencies {
            iops: 100.0,
            p99_ms: 1.0,
            max_ms: 2.0,
        };
        Run {
            round,
            contender: contender.to_owned(),
            peer,
            kind: Kind::Backup,
            seconds,
            reads: side,
            writes: side,
            answer_p50_ms: 0.5,
            answer_p99_ms: 1.5,
        }
    }

    #[test]
    fn ours_is_set_beside_each_peer_by_rounds() {
        let runs = [
            run("diskfuse q4", false, 0, 2.0),
            run("qemu q4", true, 0, 4.0),
            run("diskfuse q4", false, 1, 30.0),
            run("qemu q4", true, 1, 60.0),
        ];
        let table = table(&runs);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4, "{table}");
        assert!(
            lines[1].contains("16.0")
                && lines[2].contains("to qemu q4")
                && lines[2].contains("0.50×"),
            "{table}"
        );
    }
}
