//! The chart: one panel per target, mode and number of jobs; in it a group of bars per workload, a bar per contender with a
//! whisker from its slowest to its fastest round. A writer of its own, because bars and text need no library.

use std::fmt::Write as _;

use crate::contender::Role;
use crate::report::{Entrant, Report, Row, short, verdict};

const PANEL_WIDTH: f64 = 680.0;
const PANEL_HEIGHT: f64 = 270.0;
const MARGIN: f64 = 20.0;
const AXIS_WIDTH: f64 = 52.0;
const PLOT_TOP: f64 = 30.0;
const LABELS_HEIGHT: f64 = 40.0;
const LEGEND_ENTRY: f64 = 170.0;
const LEGEND_LINE: f64 = 20.0;

// Hues that colour-blind readers can tell apart (Okabe and Ito's set), one per family.
const OURS: [&str; 3] = ["#0072b2", "#009e73", "#56b4e9"];
const PEERS: [&str; 4] = ["#d55e00", "#e69f00", "#cc79a7", "#8c6d31"];
const FLOORS: [&str; 2] = ["#222222", "#5b3a8c"];
const BARE: &str = "#777777";

/// The chart of the whole report.
pub fn render(report: &Report) -> String {
    let panels = panels(&report.summary);
    let columns = if panels.len() > 1 { 2 } else { 1 };
    let width = 2.0 * MARGIN + PANEL_WIDTH * columns as f64;
    let per_line = (((width - 2.0 * MARGIN) / LEGEND_ENTRY) as usize).max(1);
    let legend_height = LEGEND_LINE * report.entrants.len().div_ceil(per_line) as f64;
    let top = 62.0 + legend_height;
    let height = top + PANEL_HEIGHT * panels.len().div_ceil(columns) as f64 + MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"DejaVu Sans, Verdana, sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    head(&mut svg, report);
    for (index, entrant) in report.entrants.iter().enumerate() {
        let x = MARGIN + LEGEND_ENTRY * (index % per_line) as f64;
        let y = 56.0 + LEGEND_LINE * (index / per_line) as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{}\"/>",
            colour(entrant, &report.entrants)
        );
        text(&mut svg, x + 17.0, y + 10.0, "start", "", &entrant.label);
    }
    for (index, (name, rows)) in panels.iter().enumerate() {
        let x = MARGIN + PANEL_WIDTH * (index % columns) as f64;
        let y = top + PANEL_HEIGHT * (index / columns) as f64;
        panel(&mut svg, x, y, name, rows, &report.entrants);
    }
    svg.push_str("</svg>\n");
    svg
}

fn head(svg: &mut String, report: &Report) {
    let (machine, settings) = (&report.machine, &report.settings);
    let title = format!(
        "{}, {} cores, kernel {}",
        machine.cpu, machine.cores, machine.kernel
    );
    text(
        svg,
        MARGIN,
        26.0,
        "start",
        " font-size=\"15\" font-weight=\"bold\"",
        &title,
    );
    let note = format!(
        "median of {} rounds of {} s, whiskers: slowest and fastest round; below each group: our best configuration against the best peer",
        settings.rounds, settings.seconds
    );
    text(svg, MARGIN, 44.0, "start", " fill=\"#555\"", &note);
}

/// Rows by panel, both in the order of the table.
fn panels(rows: &[Row]) -> Vec<(String, Vec<&Row>)> {
    let mut panels: Vec<(String, Vec<&Row>)> = Vec::new();
    for row in rows {
        let name = row.cell.panel();
        match panels.iter_mut().find(|(other, _)| *other == name) {
            Some((_, rows)) => rows.push(row),
            None => panels.push((name, vec![row])),
        }
    }
    panels
}

fn panel(svg: &mut String, x: f64, y: f64, name: &str, rows: &[&Row], entrants: &[Entrant]) {
    let unit = rows.first().map_or("", |row| row.unit);
    let highest = rows
        .iter()
        .flat_map(|row| &row.lines)
        .map(|line| line.score.max)
        .fold(0.0, f64::max);
    let step = step(highest);
    let top_value = (highest / step).ceil().max(1.0) * step;
    let (left, bottom) = (x + AXIS_WIDTH, y + PANEL_HEIGHT - LABELS_HEIGHT);
    let plot_height = PANEL_HEIGHT - LABELS_HEIGHT - PLOT_TOP;
    let plot_width = PANEL_WIDTH - AXIS_WIDTH - MARGIN;
    let level = |value: f64| bottom - value / top_value * plot_height;
    text(
        svg,
        left,
        y + 18.0,
        "start",
        " font-size=\"13\" font-weight=\"bold\"",
        &format!("{name} ({unit})"),
    );
    for tick in 0..=(top_value / step).round() as u32 {
        let value = f64::from(tick) * step;
        let line = level(value);
        let _ = writeln!(
            svg,
            "<path d=\"M{left:.1} {line:.1}h{plot_width:.1}\" stroke=\"#ddd\"/>"
        );
        text(
            svg,
            left - 6.0,
            line + 4.0,
            "end",
            " fill=\"#555\"",
            &tick_label(value),
        );
    }
    let group_width = plot_width / rows.len() as f64;
    for (number, row) in rows.iter().enumerate() {
        let start = left + group_width * number as f64;
        group(svg, start, group_width, row, entrants, &level);
        let middle = start + group_width / 2.0;
        text(svg, middle, bottom + 15.0, "middle", "", &row.cell.group());
        let best = row
            .lines
            .iter()
            .filter(|line| line.role == Role::Ours)
            .filter_map(|line| line.to_peer)
            .max_by(f64::total_cmp);
        if let Some(best) = best {
            let colour = if best < verdict::PEER {
                "#c00"
            } else {
                "#0072b2"
            };
            text(
                svg,
                middle,
                bottom + 29.0,
                "middle",
                &format!(" fill=\"{colour}\" font-weight=\"bold\""),
                &format!("{}×", short(best)),
            );
        }
    }
    let _ = writeln!(
        svg,
        "<path d=\"M{left:.1} {bottom:.1}h{plot_width:.1}\" stroke=\"#333\"/>"
    );
}

fn group(
    svg: &mut String,
    start: f64,
    width: f64,
    row: &Row,
    entrants: &[Entrant],
    level: &dyn Fn(f64) -> f64,
) {
    // The places of those that do not take part in this cell are left out, not left empty.
    let bars: Vec<_> = entrants
        .iter()
        .filter_map(|entrant| {
            Some((
                entrant,
                row.lines.iter().find(|line| line.label == entrant.label)?,
            ))
        })
        .collect();
    let bar = (width * 0.86 / bars.len().max(1) as f64).min(40.0);
    let first = start + (width - bar * bars.len() as f64) / 2.0;
    for (number, (entrant, line)) in bars.into_iter().enumerate() {
        let x = first + bar * number as f64;
        let (top, bottom) = (level(line.score.median), level(0.0));
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"><title>{}: {} {} in {}</title></rect>",
            bar - 1.0,
            (bottom - top).max(0.0),
            colour(entrant, entrants),
            escape(&entrant.label),
            short(line.score.median),
            row.unit,
            escape(&row.name)
        );
        let middle = x + (bar - 1.0) / 2.0;
        let (low, high) = (level(line.score.min), level(line.score.max));
        let _ = writeln!(
            svg,
            "<path d=\"M{middle:.1} {low:.1}V{high:.1}\" stroke=\"#222\"/>"
        );
    }
}

/// A family has one hue; more queues are darker.
fn colour(entrant: &Entrant, entrants: &[Entrant]) -> String {
    if entrant.role == Role::Bare {
        return BARE.to_owned();
    }
    let mut families: Vec<&str> = entrants
        .iter()
        .filter(|other| other.role == entrant.role)
        .map(|other| other.family.as_str())
        .collect();
    families.dedup();
    let place = families
        .iter()
        .position(|family| *family == entrant.family)
        .unwrap_or(0);
    let palette: &[&str] = match entrant.role {
        Role::Ours => &OURS,
        Role::Floor => &FLOORS,
        _ => &PEERS,
    };
    let siblings: Vec<u32> = entrants
        .iter()
        .filter(|other| other.family == entrant.family)
        .map(|other| other.queues)
        .collect();
    let rank = siblings
        .iter()
        .filter(|queues| **queues > entrant.queues)
        .count();
    let lightness = if siblings.len() > 1 {
        0.6 * rank as f64 / (siblings.len() - 1) as f64
    } else {
        0.0
    };
    lighter(palette[place % palette.len()], lightness)
}

/// Mixes `#rrggbb` with white: 0 leaves it, 1 is white.
fn lighter(colour: &str, share: f64) -> String {
    let mut mixed = "#".to_owned();
    for start in [1, 3, 5] {
        let part = colour
            .get(start..start + 2)
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .unwrap_or(0);
        let part = f64::from(part);
        let _ = write!(
            mixed,
            "{:02x}",
            (part + (255.0 - part) * share).round() as u8
        );
    }
    mixed
}

/// Distance of the axis lines: 1, 2 or 5 times a power of ten, so that there are three to seven of them.
fn step(highest: f64) -> f64 {
    if highest <= 0.0 || !highest.is_finite() {
        return 1.0;
    }
    let rough = highest / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0]
        .into_iter()
        .find(|factor| factor * power >= rough)
        .unwrap_or(10.0);
    factor * power
}

fn tick_label(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, attributes: &str, content: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"{attributes}>{}</text>",
        escape(content)
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::sample;

    #[test]
    fn every_figure_has_its_bar_and_every_contender_its_colour() {
        let report = sample::report();
        let svg = render(&report);
        assert_eq!(svg.matches("<title>").count(), 4 * 5);
        let mut colours: Vec<String> = report
            .entrants
            .iter()
            .map(|entrant| colour(entrant, &report.entrants))
            .collect();
        colours.sort();
        colours.dedup();
        assert_eq!(colours.len(), 5);
    }

    #[test]
    fn names_from_outside_cannot_break_the_markup() {
        let svg = render(&sample::report());
        assert!(svg.contains("Some &lt;CPU&gt; &amp; more") && !svg.contains("<CPU>"));
    }

    #[test]
    fn more_queues_are_darker() {
        assert_eq!(lighter("#0072b2", 0.0), "#0072b2");
        assert_eq!(lighter("#0072b2", 1.0), "#ffffff");
        let report = sample::report();
        assert_eq!(colour(&report.entrants[1], &report.entrants), "#0072b2");
        assert_ne!(colour(&report.entrants[0], &report.entrants), "#0072b2");
    }

    #[test]
    fn axis_steps_are_round_numbers() {
        for (highest, expected) in [
            (100.0, 20.0),
            (7.0, 2.0),
            (240.0, 50.0),
            (0.9, 0.2),
            (0.0, 1.0),
            (99_999.0, 20_000.0),
        ] {
            assert!(
                (step(highest) - expected).abs() < expected * 1e-9,
                "{highest}: {}",
                step(highest)
            );
        }
        assert_eq!(
            [tick_label(0.2), tick_label(20.0), tick_label(0.0)],
            ["0.2", "20", "0"]
        );
    }
}
