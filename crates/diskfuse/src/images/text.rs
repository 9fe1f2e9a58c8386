//! How numbers and times are written for people.

use diskfuse_image::info::Snapshot;

use crate::error::Plain;

/// Hundredths of `whole` that `part` is; 0 of nothing.
#[expect(clippy::cast_precision_loss, reason = "two digits are shown")]
pub fn percent(part: u64, whole: u64) -> f64 {
    match whole {
        0 => 0.0,
        whole => part as f64 * 100.0 / whole as f64,
    }
}

/// Bytes with a unit: `196 KiB`, `1.5 GiB`. Three digits that count, as `qemu-img` has it.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn bytes(number: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = number as f64;
    // What would be written as 1000 is one of the next unit.
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits: usize = match value {
        _ if unit == 0 => 0,
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{value:.digits$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    format!("{text} {}", UNITS.get(unit).unwrap_or(&"B"))
}

/// The same with the exact number.
pub fn bytes_long(number: u64) -> String {
    format!("{} ({number} bytes)", bytes(number))
}

/// A table of snapshots, the columns of `qemu-img snapshot -l`. Times are in UTC.
pub fn snapshot_table(snapshots: &[Snapshot]) -> String {
    let heading = [
        "ID".to_owned(),
        "TAG".to_owned(),
        "VM_SIZE".to_owned(),
        "DATE (UTC)".to_owned(),
        "VM_CLOCK".to_owned(),
        "ICOUNT".to_owned(),
    ];
    let mut rows = vec![heading];
    rows.extend(snapshots.iter().map(|snapshot| {
        let clock = snapshot.vm_clock_sec;
        [
            Plain(&snapshot.id).to_string(),
            Plain(&snapshot.name).to_string(),
            bytes(snapshot.vm_state_size),
            date(snapshot.date_sec),
            format!(
                "{:04}:{:02}:{:02}.{:03}",
                clock / 3600,
                clock / 60 % 60,
                clock % 60,
                snapshot.vm_clock_nsec / 1_000_000
            ),
            snapshot
                .icount
                .map_or("--".to_owned(), |count| count.to_string()),
        ]
    }));
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &[String; 6]| {
        let mut text = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Names to the left, numbers to the right.
            let cell = match column {
                0 | 1 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            };
            text = match column {
                0 => cell,
                _ => format!("{text}  {cell}"),
            };
        }
        text.trim_end().to_owned()
    };
    let lines: Vec<String> = rows.iter().map(line).collect();
    lines.join("\n")
}

/// Seconds since 1970 as a date and a time of day, in UTC.
fn date(seconds: u64) -> String {
    let (days, time) = (seconds / 86400, seconds % 86400);
    // The civil calendar from a count of days, in eras of 400 years that begin on a 1st of March.
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}",
        time / 3600,
        time / 60 % 60,
        time % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_that_count() {
        let cases = [
            (0, "0 B"),
            (512, "512 B"),
            (1024, "1 KiB"),
            (200_704, "196 KiB"),
            (1_610_612_736, "1.5 GiB"),
            (10 << 20, "10 MiB"),
            (10_737_418, "10.2 MiB"),
            (8 << 40, "8 TiB"),
        ];
        for (number, text) in cases {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_795_487_617), "2026-11-24 02:33:37");
        assert_eq!(date(u64::from(u32::MAX)), "2106-02-07 06:28:15");
    }
}
