//! `diskfuse list`: what is shown by this user's daemons, for people or for programs.

use std::process::ExitCode;

use crate::cli::ListArgs;
use crate::control::protocol::ExportStatus;
use crate::control::{self, client};
use crate::error::{Error, Plain, Result};
use crate::output;

/// Carries the command out. Daemons that do not answer are named on stderr, and left out.
pub fn run(arguments: &ListArgs) -> Result<ExitCode> {
    let found = client::find(&control::folder())?;
    for sentence in &found.silent {
        output::complain("diskfuse", sentence);
    }
    let exports: Vec<ExportStatus> = found
        .answering
        .into_iter()
        .flat_map(|daemon| daemon.exports)
        .collect();
    if arguments.json {
        let text = serde_json::to_string_pretty(&exports);
        let text = text.map_err(|error| Error::System {
            what: "Could not write JSON".to_owned(),
            source: error.into(),
        })?;
        output::say(&format!("{text}\n"))?;
    } else if exports.is_empty() {
        output::say("Nothing is shown at the moment.\n")?;
    } else {
        output::say(&table(&exports))?;
    }
    Ok(ExitCode::SUCCESS)
}

const HEADINGS: [&str; 10] = [
    "IMAGE",
    "MOUNTPOINT",
    "PID",
    "FORMAT",
    "MODE",
    "QUEUES",
    "TRANSPORT",
    "IN FLIGHT",
    "READ",
    "WRITTEN",
];

/// Which columns are numbers, and so stand at the right.
const NUMBERS: [bool; 10] = [
    false, false, true, false, false, true, false, true, true, true,
];

fn row(export: &ExportStatus) -> [String; 10] {
    let path = |path: &std::path::Path| Plain(&path.display().to_string()).to_string();
    let mode = match (export.stopping, export.writable) {
        (true, _) => "stopping",
        (false, true) => "rw",
        (false, false) => "ro",
    };
    [
        export
            .image
            .as_ref()
            .map_or("-".to_owned(), |image| path(&image.0)),
        path(&export.mountpoint.0),
        export.pid.to_string(),
        export.format.clone(),
        mode.to_owned(),
        export.queues.to_string(),
        match export.passthrough {
            true => format!("{}+passthrough", export.transport),
            false => export.transport.clone(),
        },
        export.in_flight.to_string(),
        size(export.read_bytes),
        size(export.written_bytes),
    ]
}

fn table(exports: &[ExportStatus]) -> String {
    let rows: Vec<[String; 10]> = std::iter::once(HEADINGS.map(str::to_owned))
        .chain(exports.iter().map(row))
        .collect();
    let widths: Vec<usize> = (0..HEADINGS.len())
        .map(|column| {
            rows.iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
        })
        .map(Option::unwrap_or_default)
        .collect();
    let mut text = String::new();
    for row in &rows {
        let cells =
            row.iter().zip(&widths).zip(NUMBERS).map(
                |((cell, &width), is_number)| match is_number {
                    true => format!("{cell:>width$}"),
                    false => format!("{cell:<width$}"),
                },
            );
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A number of bytes for people: three digits or so.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let tenths = |unit: usize| {
        let shift = 10 * (unit + 1);
        ((u128::from(bytes) * 10) + (1 << (shift - 1))) >> shift
    };
    let short = |&unit: &usize| tenths(unit) < 10_000;
    let unit = (0..UNITS.len()).find(short).unwrap_or(UNITS.len() - 1);
    let name = UNITS.get(unit).copied().unwrap_or_default();
    format!("{}.{} {name}", tenths(unit) / 10, tenths(unit) % 10)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn sizes_stay_short() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1 << 20, "1.0 MiB"),
            (1_048_000, "1.0 MiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn columns_are_aligned_and_paths_cannot_break_lines() {
        let export = |image: &str, pid| ExportStatus {
            image: Some(Path::new(image).into()),
            mountpoint: Path::new("/m").into(),
            pid,
            id: "mount".into(),
            node: "file".into(),
            format: "raw".into(),
            writable: true,
            stopping: false,
            queues: 2,
            transport: "uring".into(),
            passthrough: false,
            in_flight: 0,
            reads: 0,
            writes: 0,
            read_bytes: 4096,
            written_bytes: 0,
            flushes: 0,
            errors: 0,
            per_queue: Vec::new(),
            metadata_cache: None,
        };
        let text = table(&[export("/a\nb", 7), export("/long/name.img", 12345)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "IMAGE           MOUNTPOINT    PID  FORMAT  MODE  QUEUES  TRANSPORT  IN FLIGHT     READ  WRITTEN",
                "/a\\nb           /m              7  raw     rw         2  uring              0  4.0 KiB      0 B",
                "/long/name.img  /m          12345  raw     rw         2  uring              0  4.0 KiB      0 B",
            ]
        );
    }
}
