//! The figures as cells of a table, for the live view and for `--batch` alike. Cells are short, and free of what a terminal would
//! take for more than text.

use super::figures::{Figures, Row};
use crate::error::Plain;

/// A column: its heading, its width in the live view, and what stands in it.
pub(super) struct Column {
    pub heading: &'static str,
    pub width: u16,
    of: fn(&Figures) -> String,
}

const fn column(heading: &'static str, width: u16, of: fn(&Figures) -> String) -> Column {
    Column { heading, width, of }
}

/// The columns behind the name, the most important ones first: a narrow terminal shows the first [`NARROW`] of them.
pub(super) const COLUMNS: &[Column] = &[
    column("R/s", 6, |f| number(f.reads)),
    column("W/s", 6, |f| number(f.writes)),
    column("R MiB/s", 7, |f| mebibytes(f.read_bytes)),
    column("W MiB/s", 7, |f| mebibytes(f.written_bytes)),
    column("P50", 5, |f| latency(f, 0)),
    column("P99", 5, |f| latency(f, 1)),
    column("DEPTH", 5, |f| f.in_flight.to_string()),
    column("CACHE", 5, |f| known(f, |d| percent(d.cache))),
    column("POLL", 4, |f| known(f, |d| percent(Some(d.polling)))),
    column("P99.9", 5, |f| latency(f, 2)),
    column("SPINS", 5, |f| known(f, |d| percent(d.spins))),
    column("ERR/s", 6, |f| number(f.errors)),
];

/// See [`COLUMNS`].
pub(super) const NARROW: usize = 9;

/// The cells of a row behind its name.
pub(super) fn cells(figures: &Figures) -> impl Iterator<Item = String> {
    COLUMNS.iter().map(|column| (column.of)(figures))
}

/// The name of a row, or of one of its queues.
pub(super) fn name(row: &Row, queue: Option<usize>) -> String {
    match queue {
        None => Plain(&row.name).to_string(),
        Some(queue) => format!("  queue {queue}"),
    }
}

/// The lines of a table: each export, and with `queues` each of its queues.
pub(super) fn lines(rows: &[Row], queues: bool) -> Vec<(String, Figures)> {
    let mut lines = Vec::new();
    for row in rows {
        lines.push((name(row, None), row.whole));
        let each = row.queues.iter().enumerate().filter(|_| queues);
        lines.extend(each.map(|(index, figures)| (name(row, Some(index)), *figures)));
    }
    lines
}

/// The whole table as text, or a sentence if it is empty.
pub(super) fn text(rows: &[Row], queues: bool) -> String {
    if rows.is_empty() {
        return "Nothing is shown at the moment.\n".to_owned();
    }
    let lines = lines(rows, queues);
    let width = lines.iter().map(|(name, _)| name.chars().count()).max();
    let width = width.unwrap_or_default().max("MOUNTPOINT".len());
    let headings = COLUMNS.iter().map(|column| column.heading.to_owned());
    let mut text = line("MOUNTPOINT", width, headings);
    for (name, figures) in &lines {
        text.push_str(&line(name, width, cells(figures)));
    }
    text
}

fn line(name: &str, width: usize, cells: impl Iterator<Item = String>) -> String {
    let cells = cells.zip(COLUMNS).map(|(cell, column)| {
        let width = usize::from(column.width);
        format!("  {cell:>width$}")
    });
    format!("{name:<width$}{}\n", cells.collect::<String>())
}

/// A number with three digits or so.
fn number(value: f64) -> String {
    match value {
        v if v < 9.95 => format!("{v:.1}"),
        v if v < 9_999.5 => format!("{v:.0}"),
        v if v < 999_950.0 => format!("{:.1}k", v / 1e3),
        v => format!("{:.1}M", v / 1e6),
    }
}

fn mebibytes(bytes: f64) -> String {
    let value = bytes / f64::from(1 << 20);
    if value < 999.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

fn known(figures: &Figures, of: impl Fn(&super::figures::Detail) -> String) -> String {
    figures.detail.as_ref().map_or_else(|| "?".to_owned(), of)
}

fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.0}%", share * 100.0))
}

fn latency(figures: &Figures, which: usize) -> String {
    known(figures, |detail| {
        match detail.latency.get(which).copied().flatten() {
            None => "-".to_owned(),
            Some(nanoseconds) => time(nanoseconds),
        }
    })
}

/// A time with its unit, in five letters at most.
fn time(nanoseconds: u64) -> String {
    let micros = nanoseconds / 1000;
    match micros {
        0..1_000 => format!("{micros}µ"),
        1_000..10_000 => format!("{}.{}m", micros / 1000, micros % 1000 / 100),
        10_000..1_000_000 => format!("{}m", micros / 1000),
        1_000_000..1_000_000_000 => format!("{}s", micros / 1_000_000),
        // The last class has no limit.
        _ => ">17s".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::{between, export};
    use super::*;

    #[test]
    fn cells_fit_their_columns() {
        for value in [0.0, 9.94, 9.96, 9_999.4, 12_345.0, 999_949.0, 5e7] {
            assert!(number(value).len() <= 6, "{}", number(value));
        }
        for nanoseconds in [
            0,
            999_999,
            1_000_000,
            9_999_999,
            10_000_000,
            999_999_999,
            17_179_869_184,
            u64::MAX,
        ] {
            assert!(
                time(nanoseconds).chars().count() <= 5,
                "{}",
                time(nanoseconds)
            );
        }
        assert_eq!(
            (time(1_500_000), time(u64::MAX)),
            ("1.5m".to_owned(), ">17s".to_owned())
        );
    }

    #[test]
    fn the_text_has_a_line_for_each_export_and_queue() {
        let rows = between(
            vec![export("/a\u{1b}[2J", 0)],
            vec![export("/a\u{1b}[2J", 200)],
        );
        let text = text(&rows, true);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[0].starts_with("MOUNTPOINT") && lines[2].starts_with("  queue 0"));
        let fields: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(
            fields[1..],
            [
                "100", "0.0", "0.4", "0.0", "2µ", "2µ", "2", "75%", "10%", "2µ", "50%", "0.0"
            ]
        );
        assert!(!text.contains('\u{1b}'));
    }
}
