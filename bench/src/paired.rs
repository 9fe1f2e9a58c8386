//! The table of runs that are compared round by round: a row for each subject and contender, and below each contender of ours its
//! ratio to each peer.

use std::fmt::Write as _;

use crate::report::short;
use crate::stats;

/// One run of one contender.
pub trait Run {
    /// What was measured.
    fn subject(&self) -> &str;
    /// By whom.
    fn contender(&self) -> &str;
    /// Whether that is a peer.
    fn is_peer(&self) -> bool;
    /// In which round.
    fn round(&self) -> u32;
}

/// A column of the table.
pub struct Column<R> {
    /// Its heading.
    pub name: &'static str,
    /// What it shows of a run; NaN if there is nothing.
    pub value: fn(&R) -> f64,
    /// Whether it shows the largest of the rounds, not the median.
    pub worst: bool,
}

/// Medians over the rounds, or the worst of all; the ratios are the medians of the quotients of one round.
pub fn table<R: Run>(subject: &str, columns: &[Column<R>], runs: &[R]) -> String {
    let mut text = format!("{subject:<8} {:<24}", "contender");
    for column in columns {
        let _ = write!(text, " {:>9}", column.name);
    }
    text.push('\n');
    let all = rows(runs);
    for &(subject, name, peer) in &all {
        let of = |name| of(runs, subject, name);
        row(&mut text, columns, subject, (name, of(name)), None);
        let peers = all.iter().filter(|(of, _, peer)| *of == subject && *peer);
        for (_, other, _) in peers.filter(|_| !peer) {
            let to = (*other, of(other));
            row(&mut text, columns, subject, (name, of(name)), Some(&to));
        }
    }
    text
}

/// What was measured by whom, and whether that is a peer, in the order of the measurements.
fn rows<R: Run>(runs: &[R]) -> Vec<(&str, &str, bool)> {
    let mut rows = Vec::new();
    for run in runs {
        let row = (run.subject(), run.contender(), run.is_peer());
        if !rows.contains(&row) {
            rows.push(row);
        }
    }
    rows
}

fn of<'r, R: Run>(runs: &'r [R], subject: &str, name: &str) -> Vec<&'r R> {
    let is_it = |run: &&R| run.subject() == subject && run.contender() == name;
    runs.iter().filter(is_it).collect()
}

fn row<R: Run>(
    text: &mut String,
    columns: &[Column<R>],
    subject: &str,
    (name, runs): (&str, Vec<&R>),
    to: Option<&(&str, Vec<&R>)>,
) {
    let label = to.map_or_else(|| name.to_owned(), |(peer, _)| format!("  to {peer}"));
    let _ = write!(text, "{subject:<8} {label:<24}");
    for column in columns {
        let by_round = |runs: &[&R]| -> Vec<(u32, f64)> {
            let one = |run: &&R| (run.round(), (column.value)(run));
            runs.iter().map(one).collect()
        };
        let values = || -> Vec<f64> { runs.iter().map(|run| (column.value)(run)).collect() };
        let shown = match to {
            Some((_, peer)) => stats::paired_ratio(&by_round(&runs), &by_round(peer))
                .map(|ratio| format!("{ratio:.2}×")),
            None if column.worst => stats::spread(&values()).map(|spread| short(spread.max)),
            None => stats::median(&values()).map(short),
        };
        let _ = write!(text, " {:>9}", shown.unwrap_or_else(|| "-".to_owned()));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Timed {
        contender: &'static str,
        peer: bool,
        round: u32,
        ms: f64,
    }

    impl Run for Timed {
        fn subject(&self) -> &'static str {
            "copy"
        }

        fn contender(&self) -> &'static str {
            self.contender
        }

        fn is_peer(&self) -> bool {
            self.peer
        }

        fn round(&self) -> u32 {
            self.round
        }
    }

    #[test]
    fn medians_and_the_worst_of_all_rounds_and_ratios_of_one_round() {
        let run = |contender, peer, round, ms| Timed {
            contender,
            peer,
            round,
            ms,
        };
        let runs = [
            run("diskfuse q4", false, 0, 2.0),
            run("qemu q4", true, 0, 4.0),
            run("diskfuse q4", false, 1, 30.0),
            run("qemu q4", true, 1, 60.0),
        ];
        let column = |name, value: fn(&Timed) -> f64, worst| Column { name, value, worst };
        let columns = [
            column("ms", |run| run.ms, false),
            column("worst", |run| run.ms, true),
            column("nothing", |_| f64::NAN, false),
        ];
        let table = table("job", &columns, &runs);
        let lines: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines.len(), 4, "{table}");
        assert_eq!(lines[0][2..], ["ms", "worst", "nothing"], "{table}");
        assert_eq!(lines[1], ["copy", "diskfuse", "q4", "16.0", "30.0", "-"]);
        assert_eq!(lines[2][1..5], ["to", "qemu", "q4", "0.50×"], "{table}");
        assert_eq!(lines[3][..3], ["copy", "qemu", "q4"], "{table}");
    }
}
