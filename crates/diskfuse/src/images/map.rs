//! `diskfuse map`: where the data of a disk is.

use std::fmt::Write as _;
use std::process::ExitCode;

use diskfuse_block::{Error, Kind};
use diskfuse_image::OpenOptions;
use diskfuse_image::map::{MapEntry, map};
use diskfuse_image::session::{Session, to_read};

use super::on_ring;
use crate::cli::MapArgs;
use crate::error::{Plain, Result};
use crate::output;

/// Bytes of text that are collected before they are said.
const ENOUGH: usize = 64 << 10;

/// Carries the command out.
pub fn run(arguments: &MapArgs) -> Result<ExitCode> {
    let mut text = Text::begin(arguments.json);
    let options = OpenOptions {
        format: arguments.format,
        file: to_read(arguments.force_share),
        ..OpenOptions::default()
    };
    on_ring(async {
        let image = Session::open(&arguments.image, &options, "map").await?;
        let start = arguments.start_offset;
        let end = arguments
            .max_length
            .map_or(u64::MAX, |length| start.saturating_add(length));
        map(&image, start, end, |entry| text.add(&entry)).await?;
        image.close().await
    })?;
    text.end()?;
    Ok(ExitCode::SUCCESS)
}

/// A disk may have millions of parts: what is known is said early.
struct Text {
    json: bool,
    first: bool,
    /// Not said yet.
    pending: String,
}

impl Text {
    fn begin(json: bool) -> Self {
        let text = match json {
            true => "[".to_owned(),
            false => format!(
                "{:<16}{:<16}{:<16}{}\n",
                "Offset", "Length", "Mapped to", "File"
            ),
        };
        Self {
            json,
            first: true,
            pending: text,
        }
    }

    fn add(&mut self, entry: &MapEntry) -> diskfuse_block::Result<()> {
        let added = match self.json {
            true => self.add_json(entry),
            false => self.add_line(entry),
        };
        added?;
        self.first = false;
        if self.pending.len() >= ENOUGH {
            let said = output::say(&std::mem::take(&mut self.pending));
            return said.map_err(|error| Error::new(Kind::Ended, error.to_string()));
        }
        Ok(())
    }

    fn add_json(&mut self, entry: &MapEntry) -> diskfuse_block::Result<()> {
        if !self.first {
            self.pending.push_str(",\n");
        }
        let json = serde_json::to_string(entry)
            .map_err(|error| Error::new(Kind::Invalid, error.to_string()))?;
        self.pending.push_str(&json);
        Ok(())
    }

    /// Only data that is somewhere byte for byte.
    fn add_line(&mut self, entry: &MapEntry) -> diskfuse_block::Result<()> {
        if !entry.data || entry.zero {
            return Ok(());
        }
        let (Some(offset), Some(filename)) = (entry.offset, &entry.filename) else {
            let message = format!(
                "{} bytes at {} are compressed, so they are nowhere as they are; --json tells about them",
                entry.length, entry.start
            );
            return Err(Error::new(Kind::Unsupported, message));
        };
        let hex = |number: u64| match number {
            0 => "0".to_owned(),
            number => format!("{number:#x}"),
        };
        let _ = writeln!(
            self.pending,
            "{:<16}{:<16}{:<16}{}",
            hex(entry.start),
            hex(entry.length),
            hex(offset),
            Plain(filename)
        );
        Ok(())
    }

    fn end(mut self) -> Result<()> {
        if self.json {
            self.pending.push_str("]\n");
        }
        output::say(&self.pending)
    }
}
