//! Which cells are lost, in which the tail is, and how ours does over all. Says what the figures say, good or bad.

use crate::contender::Role;
use crate::plan::word;
use crate::report::{Line, Report, Row, short};
use crate::stats;

/// Below this against the best peer a cell is lost: what would be printed as less than 1.00.
pub const PEER: f64 = 0.995;
/// Below this against the same with one queue, more queues cost something.
const ONE_QUEUE: f64 = 0.9;
/// Below this against the bare file the export is too far from the disk.
const BARE: f64 = 0.7;

/// Above this against the calmest peer a 99th percentile is worse: what would be printed as more than 1.00.
const TAIL: f64 = 1.005;

/// One configuration of ours over all cells of one kind (target and mode).
pub struct Overall {
    /// The contender's label.
    pub label: String,
    /// Target and mode, e.g. `null aio`.
    pub kind: String,
    /// Number of cells.
    pub cells: usize,
    /// Median over the cells of the ratio to the best peer.
    pub to_peer: Option<f64>,
    /// The smallest of these.
    pub worst_to_peer: Option<f64>,
    /// Median over the cells of the ratio to the bare file.
    pub to_bare: Option<f64>,
    /// Median over the cells of the ratio to the best bare server.
    pub to_floor: Option<f64>,
    /// Cells whose 99th percentile of latency is worse than the lowest of a peer.
    pub worse_tails: usize,
}

fn lines_of_ours(report: &Report) -> impl Iterator<Item = (&Row, &Line)> {
    report
        .summary
        .iter()
        .flat_map(|row| row.lines.iter().map(move |line| (row, line)))
        .filter(|(_, line)| line.role == Role::Ours)
}

/// One entry per configuration of ours and kind of cell, in the order of the table.
pub fn overall(report: &Report) -> Vec<Overall> {
    let mut groups: Vec<(String, String, Vec<&Line>)> = Vec::new();
    for (row, line) in lines_of_ours(report) {
        let kind = format!("{} {}", word(row.cell.target), word(row.cell.mode));
        match groups
            .iter_mut()
            .find(|(label, other, _)| *label == line.label && *other == kind)
        {
            Some((_, _, lines)) => lines.push(line),
            None => groups.push((line.label.clone(), kind, vec![line])),
        }
    }
    groups
        .into_iter()
        .map(|(label, kind, lines)| {
            let peer: Vec<f64> = lines.iter().filter_map(|line| line.to_peer).collect();
            let bare: Vec<f64> = lines.iter().filter_map(|line| line.to_bare).collect();
            let floor: Vec<f64> = lines.iter().filter_map(|line| line.to_floor).collect();
            Overall {
                label,
                kind,
                cells: lines.len(),
                to_peer: stats::median(&peer),
                worst_to_peer: stats::spread(&peer).map(|spread| spread.min),
                to_bare: stats::median(&bare),
                to_floor: stats::median(&floor),
                worse_tails: lines.iter().filter_map(|line| worse_tail(line)).count(),
            }
        })
        .collect()
}

/// Every loss, one line each; empty when there is none.
pub fn losses(report: &Report) -> Vec<String> {
    let mut losses = Vec::new();
    for (row, line) in lines_of_ours(report) {
        let mut lost = |ratio: Option<f64>, limit: f64, to: &str| {
            if let Some(ratio) = ratio.filter(|ratio| *ratio < limit) {
                losses.push(format!(
                    "{}: {} is {} × {to}",
                    row.name,
                    line.label,
                    short(ratio)
                ));
            }
        };
        lost(
            line.to_peer,
            PEER,
            row.best_peer.as_deref().unwrap_or("the best peer"),
        );
        lost(line.to_one_queue, ONE_QUEUE, "its own with one queue");
        lost(line.to_bare, BARE, "the bare file");
    }
    losses
}

fn worse_tail(line: &Line) -> Option<f64> {
    line.p99_to_peer.filter(|ratio| *ratio > TAIL)
}

/// Every cell where the 99th percentile of ours is worse than the lowest of a peer, one line each.
pub fn tails(report: &Report) -> Vec<String> {
    let tail = |(row, line): (&Row, &Line)| {
        let peer = row.calmest_peer.as_deref()?;
        let ratio = short(worse_tail(line)?);
        Some(format!(
            "{}: p99 of {} is {ratio} × that of {peer}",
            row.name, line.label
        ))
    };
    lines_of_ours(report).filter_map(tail).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn every_kind_of_loss_is_named_with_its_cell_and_nothing_else_is() {
        assert_eq!(
            losses(&sample::report()),
            [
                "file aio j1 read seq: diskfuse q4 is 0.75 × qemu q1",
                "file aio j1 read seq: diskfuse q4 is 0.50 × its own with one queue",
                "file aio j1 read seq: diskfuse q4 is 0.38 × the bare file",
            ]
        );
    }

    #[test]
    fn overall_is_the_median_over_the_cells_and_names_the_worst() {
        let overall = overall(&sample::report());
        assert_eq!(overall.len(), 2);
        let four = &overall[1];
        assert_eq!(
            (four.label.as_str(), four.kind.as_str(), four.cells),
            ("diskfuse q4", "file aio", 4)
        );
        assert!(four.to_peer.is_some_and(|ratio| (ratio - 3.0).abs() < 1e-9));
        assert!(
            four.worst_to_peer
                .is_some_and(|ratio| (ratio - 0.75).abs() < 1e-9)
        );
    }

    #[test]
    fn worse_tails_are_named_and_counted_and_equal_ones_are_not() {
        assert!(tails(&sample::report()).is_empty());
        let report = sample::floor_report();
        let tails = tails(&report);
        assert_eq!(tails.len(), 4);
        assert_eq!(
            tails[0],
            "null aio j1 read seq: p99 of uring q1 is 1.50 × that of qemu q1"
        );
        let counts: Vec<usize> = overall(&report).iter().map(|one| one.worse_tails).collect();
        assert_eq!(counts, [0, 4]);
    }

    #[test]
    fn overall_says_how_far_the_floor_is() {
        let ratios: Vec<Option<f64>> = overall(&sample::floor_report())
            .iter()
            .map(|one| one.to_floor)
            .collect();
        assert_eq!(ratios, [Some(0.5), Some(0.75)]);
        let without = overall(&sample::report());
        assert!(without.iter().all(|one| one.to_floor.is_none()));
    }
}
