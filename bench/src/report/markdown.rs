//! The page for the documentation: what the figures mean in all, then the tables, then how to repeat them.

use std::fmt::Write as _;

use crate::contender::Role;
use crate::report::{Line, Report, Row, short, short_or_dash, verdict};

/// The page; `chart` is the path of the SVG as seen from it.
pub fn render(report: &Report, chart: &str) -> String {
    let mut page = "# Benchmarks\n\n".to_owned();
    conditions(&mut page, report);
    overall(&mut page, report);
    let _ = writeln!(page, "![Requests per second in every cell]({chart})\n");
    page.push_str("## Speed\n\nkIOPS (MiB/s where the name says `1M`), median of the rounds; in brackets the ratio to the cell's best peer, which is bold.\n\n");
    matrix(
        &mut page,
        report,
        &|row, line| match (line.role, line.to_peer) {
            (Role::Ours, Some(ratio)) => {
                format!("{} ({}×)", short(line.score.median), short(ratio))
            }
            _ if row.best_peer.as_ref() == Some(&line.label) => {
                format!("**{}**", short(line.score.median))
            }
            _ => short(line.score.median),
        },
    );
    page.push_str("## Spread\n\nSmallest and largest round.\n\n");
    matrix(&mut page, report, &|_, line| {
        format!("{}–{}", short(line.score.min), short(line.score.max))
    });
    page.push_str("## Latency\n\nMedian / 99th percentile of the completion latency in µs.\n\n");
    matrix(&mut page, report, &|_, line| {
        format!("{} / {}", short(line.p50_us), short(line.p99_us))
    });
    page.push_str("## Cost\n\nCPU time of the daemon per request in µs / its largest resident size in MiB.\n\n");
    matrix(&mut page, report, &|_, line| {
        format!(
            "{} / {}",
            short_or_dash(line.cpu_us),
            short_or_dash(line.peak_mib)
        )
    });
    while page.ends_with("\n\n") {
        page.pop();
    }
    page
}

fn conditions(page: &mut String, report: &Report) {
    let (machine, settings) = (&report.machine, &report.settings);
    let _ = writeln!(
        page,
        "Made on {} from commit {} by\n\n    {}\n\non {}, {} cores, {} MiB of memory, kernel {}, {}, {}.\n\
         Every contender is measured right after the other in each cell of each round, with a fresh daemon: {} rounds of {} s after a warm-up of {} s,\n\
         files of {} MiB. Ratios are medians of the quotients of one round. A machine with few cores shares them with fio.\n",
        machine.date,
        machine.commit,
        settings.command,
        machine.cpu,
        machine.cores,
        machine.memory_mib,
        machine.kernel,
        machine.file_system,
        machine.fio,
        settings.rounds,
        settings.seconds,
        settings.warm_seconds,
        settings.size_mib
    );
    if report.results.interrupted {
        page.push_str("**The run was interrupted; its last rounds are missing.**\n\n");
    }
    page.push_str("| contender | version | configuration |\n|---|---|---|\n");
    let mut families: Vec<&str> = Vec::new();
    for entrant in &report.entrants {
        if !families.contains(&entrant.family.as_str()) {
            families.push(&entrant.family);
            let _ = writeln!(
                page,
                "| {} | {} | {} |",
                entrant.family, entrant.version, entrant.description
            );
        }
    }
    page.push('\n');
}

fn overall(page: &mut String, report: &Report) {
    let overall = verdict::overall(report);
    if overall.is_empty() {
        return;
    }
    page.push_str("## Over all\n\nMedian over the cells of the ratio to the cell's best peer and to the bare file.\n\n");
    page.push_str("| cells | contender | number | to the best peer | worst cell | to the bare file |\n|---|---|---|---|---|---|\n");
    for one in overall {
        let (peer, worst) = (short_or_dash(one.to_peer), short_or_dash(one.worst_to_peer));
        let _ = writeln!(
            page,
            "| {} | {} | {} | {peer} | {worst} | {} |",
            one.kind,
            one.label,
            one.cells,
            short_or_dash(one.to_bare)
        );
    }
    let losses = verdict::losses(report);
    if losses.is_empty() {
        page.push_str("\nNo cell is lost.\n\n");
    } else {
        page.push_str("\nLost cells:\n\n");
        for loss in losses {
            let _ = writeln!(page, "- {loss}");
        }
        page.push('\n');
    }
    for failure in &report.results.failures {
        let (cell, label) = (
            report.cells[failure.cell].name(),
            &report.entrants[failure.contender].label,
        );
        let _ = writeln!(
            page,
            "- failed: {label} in {cell}, round {}: {}",
            failure.round + 1,
            failure.reason
        );
    }
    if !report.results.failures.is_empty() {
        page.push('\n');
    }
}

/// A table with a row per cell and a column per contender.
fn matrix(page: &mut String, report: &Report, value: &dyn Fn(&Row, &Line) -> String) {
    let labels: Vec<&str> = report
        .entrants
        .iter()
        .map(|entrant| entrant.label.as_str())
        .collect();
    let _ = writeln!(page, "| cell | {} |", labels.join(" | "));
    let _ = writeln!(page, "|---|{}", "---:|".repeat(labels.len()));
    for row in &report.summary {
        let cell = |label: &&str| {
            let line = row.lines.iter().find(|line| line.label == **label);
            line.map_or_else(|| "–".to_owned(), |line| value(row, line))
        };
        let cells: Vec<String> = labels.iter().map(cell).collect();
        let _ = writeln!(page, "| {} | {} |", row.name, cells.join(" | "));
    }
    page.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn the_page_says_how_to_repeat_the_run_and_names_lost_cells() {
        let page = render(&sample::report(), "bench.svg");
        for expected in [
            "    cargo xtask bench\n",
            "kernel 6.18",
            "![Requests per second in every cell](bench.svg)",
            "- file aio j1 read seq: diskfuse q4 is 0.75 × qemu q1",
            "| file aio | diskfuse q1 | 4 | 2.00 | 1.50 |",
        ] {
            assert!(page.contains(expected), "{expected:?} in\n{page}");
        }
    }

    #[test]
    fn every_table_row_has_as_many_columns_as_its_head() {
        let page = render(&sample::report(), "bench.svg");
        let mut columns = None;
        for line in page.lines() {
            let count = line.starts_with('|').then(|| line.matches('|').count());
            assert!(
                columns.is_none() || count.is_none() || columns == count,
                "{line}"
            );
            columns = count;
        }
        assert!(
            page.contains(
                "| file aio j1 read seq | 75.0 (1.50×) | 37.5 (0.75×) | **50.0** | 25.0 | 100 |"
            ),
            "{page}"
        );
    }
}
