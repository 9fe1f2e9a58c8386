//! `diskfuse info MOUNTPOINT`: the image behind it, and who shows it how. It asks the daemon over the control socket, and never
//! touches the mount itself, as whoever serves that may hang.

use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use diskfuse_image::Format;
use diskfuse_image::info::{ImageInfo, InfoOptions, info};
use serde::Serialize;

use super::{on_ring, say_json, texts};
use crate::cli::InfoArgs;
use crate::control::counters::{CacheCounters, QueueCounters};
use crate::control::protocol::{ExportStatus, WirePath};
use crate::control::{self, client};
use crate::error::{Error, Plain, Result};
use crate::images::text::bytes;
use crate::output;

/// What is said to programs: what `info --json IMAGE` says of an image, so that whoever reads it need not know which of the two was
/// asked for, and on the one that is shown by whom it is.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Said<'s> {
    #[serde(flatten)]
    image: Option<&'s ImageInfo>,
    /// Why nothing is said of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    image_unknown: Option<&'s str>,
    /// As `list --json` says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    export: Option<&'s ExportStatus>,
}

/// The export at `path`; `None` if nothing of diskfuse is mounted there.
pub(super) fn find(path: &Path) -> Result<Option<ExportStatus>> {
    let (Ok(absolute), Ok(mounts)) = (diskfuse_fuse::absolute(path), diskfuse_fuse::mounts())
    else {
        return Ok(None);
    };
    let topmost = mounts.iter().rfind(|mount| mount.mountpoint == absolute);
    if topmost.is_none_or(|mount| mount.fs_type != diskfuse_fuse::FS_TYPE) {
        return Ok(None);
    }
    let found = client::find(&control::folder())?;
    let mut exports = found
        .answering
        .into_iter()
        .flat_map(|daemon| daemon.exports);
    let export = exports.find(|export| export.mountpoint == WirePath(absolute.clone()));
    match (export, found.silent.first()) {
        (Some(export), _) => Ok(Some(export)),
        (None, None) => Err(Error::Refused(format!(
            "'{}' is shown by a daemon that this user cannot ask, or that is gone",
            path.display()
        ))),
        (None, Some(silent)) => Err(Error::Refused(format!(
            "Nobody says what '{}' shows: {silent}",
            path.display()
        ))),
    }
}

/// Says it.
pub(super) fn run(arguments: &InfoArgs, export: &ExportStatus) -> Result<ExitCode> {
    let images = images(arguments, export);
    if arguments.json {
        let all = all(&images, export);
        match all.as_slice() {
            [one] if !arguments.chain => say_json(one)?,
            all => say_json(&all)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let about = match &images {
        Ok(images) => texts(images),
        Err(why) => format!("image: {why}\n"),
    };
    output::say(&format!("{about}{}", as_text(export)))?;
    Ok(ExitCode::SUCCESS)
}

/// What is shown, then what lies below it.
fn all<'s>(
    images: &'s std::result::Result<Vec<ImageInfo>, String>,
    export: &'s ExportStatus,
) -> Vec<Said<'s>> {
    let unknown = images.as_ref().err().map(String::as_str);
    let mut images = images.iter().flatten();
    let shown = Said {
        image: images.next(),
        image_unknown: unknown,
        export: Some(export),
    };
    let below = images.map(|image| Said {
        image: Some(image),
        image_unknown: None,
        export: None,
    });
    std::iter::once(shown).chain(below).collect()
}

/// The image, and with `--chain` those below it; or why that cannot be said.
fn images(
    arguments: &InfoArgs,
    export: &ExportStatus,
) -> std::result::Result<Vec<ImageInfo>, String> {
    let Some(WirePath(image)) = &export.image else {
        return Err("none".to_owned());
    };
    let name = Plain(&image.display().to_string()).to_string();
    let hidden =
        diskfuse_fuse::mounts().is_ok_and(|all| all.iter().any(|mount| mount.mountpoint == *image));
    if hidden {
        return Err(format!("{name} (hidden by what is mounted over it)"));
    }
    let options = InfoOptions {
        format: arguments
            .format
            .or_else(|| Format::parse(&export.format).ok()),
        chain: arguments.chain,
        // The daemon has the locks.
        share: true,
    };
    on_ring(info(image, options)).map_err(|error| format!("{name} ({error})"))
}

fn as_text(export: &ExportStatus) -> String {
    let access = match (export.stopping, export.writable) {
        (true, _) => "stopping",
        (false, true) => "read and write",
        (false, false) => "read only",
    };
    let passthrough = match export.passthrough {
        true => ", the kernel reads and writes the image itself",
        false => "",
    };
    let mountpoint = export.mountpoint.0.display().to_string();
    let mut text = format!("shown as: {}\n", Plain(&mountpoint));
    let mut say = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "    {key}: {value}");
    };
    say("process", &export.pid);
    say("export", &Plain(&export.id));
    say("node", &Plain(&export.node));
    say("access", &access);
    say(
        "transport",
        &format_args!("{}{passthrough}", Plain(&export.transport)),
    );
    say("queues", &export.queues);
    say("in flight", &export.in_flight);
    say(
        "read",
        &format_args!("{} in {} requests", bytes(export.read_bytes), export.reads),
    );
    say(
        "written",
        &format_args!(
            "{} in {} requests",
            bytes(export.written_bytes),
            export.writes
        ),
    );
    say("flushes", &export.flushes);
    say("errors", &export.errors);
    let sum = QueueCounters::sum(&export.per_queue);
    for (kind, times) in &sum.requests {
        if let (Some(half), Some(most)) = (times.percentile(0.5), times.percentile(0.99)) {
            let micros = |nanoseconds: u64| nanoseconds / 1000;
            let (half, most) = (micros(half), micros(most));
            let key = format!("latency of {}", Plain(kind));
            say(&key, &format_args!("half in {half} µs, 99 % in {most} µs"));
        }
    }
    if let Some(rate) = export.metadata_cache.and_then(CacheCounters::rate) {
        say(
            "metadata cache",
            &format_args!("{:.1} % hits", rate * 100.0),
        );
    }
    text
}
