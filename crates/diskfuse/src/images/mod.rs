//! The commands on images themselves, a file each: from the command line to the library, and from its answer to text. No
//! logic that the library should have.

pub mod check;
pub mod commit;
pub mod convert;
pub mod create;
pub mod info;
pub mod map;
mod progress;
pub mod rebase;
pub mod resize;
pub mod snapshot;
mod text;

use std::future::Future;
use std::path::Path;

use diskfuse_image::Format;
use diskfuse_ring::{Config, Ring};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::output;

/// Does the command's work on this thread, on a ring of its own.
fn on_ring<T>(work: impl Future<Output = diskfuse_block::Result<T>>) -> Result<T> {
    let ring = Ring::new(&Config::default())?;
    Ok(ring.block_on(work)?)
}

/// The format of a new image: as told, else as the name's ending says.
fn format_of_new(path: &Path, told: Option<Format>) -> Format {
    told.unwrap_or_else(|| {
        let ending = path.extension().and_then(|ending| ending.to_str());
        match ending.map(str::to_ascii_lowercase).as_deref() {
            Some("qcow2" | "qcow") => Format::Qcow2,
            _ => Format::Raw,
        }
    })
}

/// Says it as JSON.
fn say_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::refused(format!("Could not write JSON: {error}")))?;
    output::say(&format!("{text}\n"))
}
