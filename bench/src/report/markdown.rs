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
    closer_look(&mut page, report);
    while page.ends_with("\n\n") {
        page.pop();
    }
    page
}

/// What the columns mean; a reader must not need the program's source for it.
const COLUMNS: &str = "\
* *Latency* is the time from submission to completion as the caller sees it (fio's `clat`), without the warm-up: median, 99th and
  99.9th percentile. With many requests in flight it is bounded by the rate; how much a daemon delays single requests shows in
  the cells of synchronous callers and in the percentiles. A short run has few requests beyond the 99.9th.
* *CPU* is the time of all threads of the daemon in its own code and in the kernel on its behalf, divided by the requests; that of fio
  and of the kernel's own threads is not in it. What a daemon needs per request is what the machine cannot give to others.
* *The floor* (`--floor`, null cells) is a server that does nothing: no formats, no options, reads answered from a buffer, writes thrown
  away. `bare-device` has a thread per queue that reads and writes `/dev/fuse`, `bare-uring` uses FUSE over io_uring. What lies
  between it and a daemon is the daemon's own, best seen in the CPU time; what lies below it is the kernel's. It blocks when it has
  nothing to do: a daemon that polls, or keeps its caller on another CPU, can have a ratio above 1.
";

/// How to find out where the time of a cell goes.
const FLAME_GRAPH: &str = "\
The release build keeps line tables. While a cell is being measured (a long `--seconds`), as root:

    cargo install inferno
    perf record -g -p PID -- sleep 10
    perf script | inferno-collapse-perf | inferno-flamegraph > flame.svg

PID is that of the daemon (`pgrep -f 'diskfuse qsd'`); with that of a bare server (`pgrep -f bare-server`) the graph shows the floor.
Where the CPU lends `perf` no counters, as in many virtual machines, add `-e cpu-clock`.

";

fn closer_look(page: &mut String, report: &Report) {
    let _ = writeln!(page, "## Floor, CPU and latencies\n\n{COLUMNS}");
    floor(page, report);
    tails(page, report);
    page.push_str(
        "### Latency\n\nMedian / 99th / 99.9th percentile of the completion latency in µs.\n\n",
    );
    matrix(page, report, &|_, line| {
        format!(
            "{} / {} / {}",
            short(line.p50_us),
            short(line.p99_us),
            short(line.p999_us)
        )
    });
    page.push_str("### Cost\n\nCPU time of the daemon per request in µs / its largest resident size in MiB.\n\n");
    matrix(page, report, &|_, line| {
        format!(
            "{} / {}",
            short_or_dash(line.cpu_us),
            short_or_dash(line.peak_mib)
        )
    });
    let _ = write!(page, "### How to take a flame graph\n\n{FLAME_GRAPH}");
}

/// Ours against the floor, in cells that have one.
fn floor(page: &mut String, report: &Report) {
    let mut rows = report.summary.iter().filter(|row| row.best_floor.is_some());
    let Some(first) = rows.next() else {
        return;
    };
    page.push_str(
        "### Against the floor\n\nRatio to the cell's best bare server; in brackets to the one with the same transport and as many \
         queues, where ours was told its transport.\n\n| cell | contender | to the best | its rate | CPU µs, ours | CPU µs, floor |\n\
         |---|---|---:|---|---:|---:|\n",
    );
    for row in std::iter::once(first).chain(rows) {
        let best = row
            .lines
            .iter()
            .find(|line| row.best_floor.as_ref() == Some(&line.label));
        for line in row.lines.iter().filter(|line| line.role == Role::Ours) {
            let own = line
                .to_same_floor
                .map_or_else(String::new, |ratio| format!(" ({})", short(ratio)));
            let rate = best.map_or_else(String::new, |best| {
                format!("{} {}, {}", short(best.score.median), row.unit, best.label)
            });
            let _ = writeln!(
                page,
                "| {} | {} | {}{own} | {rate} | {} | {} |",
                row.name,
                line.label,
                short_or_dash(line.to_floor),
                short_or_dash(line.cpu_us),
                short_or_dash(best.and_then(|best| best.cpu_us))
            );
        }
    }
    page.push('\n');
}

fn tails(page: &mut String, report: &Report) {
    if report.summary.iter().all(|row| row.calmest_peer.is_none()) {
        return;
    }
    let tails = verdict::tails(report);
    if tails.is_empty() {
        page.push_str(
            "In no cell is our 99th percentile of latency worse than the best peer's.\n\n",
        );
        return;
    }
    page.push_str("Cells where our 99th percentile of latency is worse than the best peer's:\n\n");
    for tail in tails {
        let _ = writeln!(page, "- {tail}");
    }
    page.push('\n');
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
    page.push_str("## Over all\n\nMedian over the cells of the ratio to the cell's best peer, to the bare file and to the best server that does nothing; cells whose 99th percentile of latency is worse than that of the best peer in it.\n\n");
    page.push_str("| cells | contender | number | to the best peer | worst cell | to the bare file | to the floor | p99 worse |\n|---|---|---|---|---|---|---|---|\n");
    for one in overall {
        let (peer, worst) = (short_or_dash(one.to_peer), short_or_dash(one.worst_to_peer));
        let _ = writeln!(
            page,
            "| {} | {} | {} | {peer} | {worst} | {} | {} | {} |",
            one.kind,
            one.label,
            one.cells,
            short_or_dash(one.to_bare),
            short_or_dash(one.to_floor),
            one.worse_tails
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
    fn the_floor_has_a_table_and_worse_tails_are_listed() {
        let page = render(&sample::floor_report(), "bench.svg");
        for expected in [
            "| null aio j1 read seq | uring q1 | 0.75 (0.75) | 200 kIOPS, bare-uring q1 | 2.50 | 2.50 |",
            "| null aio j1 read seq | diskfuse q1 | 0.50 | 200 kIOPS, bare-uring q1 | 2.50 | 2.50 |",
            "- null aio j1 read seq: p99 of uring q1 is 1.50 × that of qemu q1",
            "| 100 / 1200 / 2400 |",
            "| null aio | uring q1 | 4 | 3.00 | 3.00 | - | 0.75 | 4 |",
        ] {
            assert!(page.contains(expected), "{expected:?} in\n{page}");
        }
        let page = render(&sample::report(), "bench.svg");
        assert!(!page.contains("### Against the floor"));
        assert!(page.contains("In no cell is our 99th percentile"));
    }

    #[test]
    fn every_table_row_has_as_many_columns_as_its_head() {
        let mut columns = None;
        let page = render(&sample::floor_report(), "bench.svg");
        for line in page.lines() {
            let count = line.starts_with('|').then(|| line.matches('|').count());
            assert!(
                columns.is_none() || count.is_none() || columns == count,
                "{line}"
            );
            columns = count;
        }
        let page = render(&sample::report(), "bench.svg");
        assert!(
            page.contains(
                "| file aio j1 read seq | 75.0 (1.50×) | 37.5 (0.75×) | **50.0** | 25.0 | 100 |"
            ),
            "{page}"
        );
    }
}
