//! The table for the terminal: one block per cell, one line per contender.

use std::fmt::Write as _;

use crate::report::{Report, Row, short, short_or_dash, verdict};

/// The whole report.
pub fn render(report: &Report) -> String {
    let mut text = head(report);
    for row in &report.summary {
        block(&mut text, row);
    }
    tail(&mut text, report);
    text
}

fn head(report: &Report) -> String {
    let (machine, settings) = (&report.machine, &report.settings);
    format!(
        "{} · {} cores · kernel {} · {} · {} · {}\n{} rounds of {} s · median, min..max of the rounds · * the best peer, /peer: against it, \
         /bare: against the image file, /q1: against the same with one queue, /floor: against the best server that does nothing, \
         /own: against that with the same transport and queues; ratios are medians of paired rounds\n",
        machine.cpu,
        machine.cores,
        machine.kernel,
        machine.file_system,
        machine.fio,
        machine.date,
        settings.rounds,
        settings.seconds
    )
}

fn block(text: &mut String, row: &Row) {
    let _ = writeln!(
        text,
        "\n{:<28} {:>8} {:>17} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>6} {:>6} {:>6} {:>6} {:>6}",
        row.name,
        row.unit,
        "min..max",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "CPU µs",
        "switches",
        "idle M",
        "peak M",
        "/peer",
        "/bare",
        "/q1",
        "/floor",
        "/own"
    );
    for line in &row.lines {
        let mark = if row.best_peer.as_ref() == Some(&line.label) {
            "*"
        } else {
            ""
        };
        let _ = writeln!(
            text,
            "  {:<26} {:>8} {:>17} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>6} {:>6} {:>6} {:>6} {:>6}",
            format!("{}{mark}", line.label),
            short(line.score.median),
            format!("{}..{}", short(line.score.min), short(line.score.max)),
            short(line.p50_us),
            short(line.p99_us),
            short(line.p999_us),
            short_or_dash(line.cpu_us),
            short_or_dash(line.switches),
            short_or_dash(line.idle_mib),
            short_or_dash(line.peak_mib),
            short_or_dash(line.to_peer),
            short_or_dash(line.to_bare),
            short_or_dash(line.to_one_queue),
            short_or_dash(line.to_floor),
            short_or_dash(line.to_same_floor),
        );
    }
}

fn tail(text: &mut String, report: &Report) {
    let overall = verdict::overall(report);
    if !overall.is_empty() {
        let _ = writeln!(
            text,
            "\n{:<40} {:>6} {:>6} {:>6} {:>6} {:>6} {:>9}",
            "over all cells", "cells", "/peer", "worst", "/bare", "/floor", "p99 worse"
        );
    }
    for one in overall {
        let _ = writeln!(
            text,
            "  {:<38} {:>6} {:>6} {:>6} {:>6} {:>6} {:>9}",
            format!("{} {}", one.kind, one.label),
            one.cells,
            short_or_dash(one.to_peer),
            short_or_dash(one.worst_to_peer),
            short_or_dash(one.to_bare),
            short_or_dash(one.to_floor),
            one.worse_tails
        );
    }
    for loss in verdict::losses(report) {
        let _ = writeln!(text, "lost: {loss}");
    }
    for tail in verdict::tails(report) {
        let _ = writeln!(text, "tail: {tail}");
    }
    for failure in &report.results.failures {
        let (cell, label) = (
            report.cells[failure.cell].name(),
            &report.entrants[failure.contender].label,
        );
        let _ = writeln!(
            text,
            "FAILED: round {}, {cell}, {label}: {}",
            failure.round + 1,
            failure.reason
        );
    }
    if report.results.interrupted {
        let _ = writeln!(text, "interrupted: the last rounds are missing");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn every_contender_has_its_line_and_the_best_peer_is_marked() {
        let text = render(&sample::report());
        let line = text.lines().find(|line| line.contains("qemu q1*")).unwrap();
        assert!(
            line.contains("50.0") && line.contains("33.3..100"),
            "{line}"
        );
        assert_eq!(
            text.lines()
                .filter(|line| line.starts_with("  bare"))
                .count(),
            4
        );
    }

    #[test]
    fn losses_and_failures_are_not_hidden() {
        let mut report = sample::report();
        let reason = "ended with signal 6".to_owned();
        report.results.failures.push(crate::run::Failure {
            round: 1,
            cell: 0,
            contender: 2,
            reason,
        });
        report.results.interrupted = true;
        let text = render(&report);
        assert!(text.contains("lost: file aio j1 read seq: diskfuse q4 is 0.75 × qemu q1"));
        assert!(
            text.contains("FAILED: round 2, file aio j1 read seq, qemu q1: ended with signal 6")
        );
        assert!(text.contains("interrupted"));
    }

    #[test]
    fn the_floor_has_its_columns_and_its_place_in_the_verdict() {
        let text = render(&sample::floor_report());
        let line = text
            .lines()
            .find(|line| line.starts_with("  uring q1"))
            .unwrap();
        let columns: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(columns[columns.len() - 2..], ["0.75", "0.75"]);
        assert!(columns.contains(&"1200") && columns.contains(&"2400"));
        let over_all = text
            .lines()
            .find(|line| line.contains("null aio diskfuse q1"))
            .unwrap();
        let columns: Vec<&str> = over_all.split_whitespace().collect();
        assert_eq!(columns[columns.len() - 2..], ["0.50", "0"]);
        assert!(
            text.contains("tail: null aio j1 read seq: p99 of uring q1 is 1.50 × that of qemu q1")
        );
    }
}
