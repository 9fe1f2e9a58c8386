//! `diskfuse info`: what is to be said about an image, or about what is shown on a mountpoint: then also who shows it. An image
//! that a daemon has open is looked at without locks, as it is the daemon who has them.

mod shown;

use std::process::ExitCode;

use diskfuse_image::info::{ImageInfo, InfoOptions, Specific, info};

use super::text::{bytes, bytes_long, snapshot_table};
use super::{on_ring, say_json};
use crate::cli::InfoArgs;
use crate::error::{Plain, Result};
use crate::output;

/// Carries the command out.
pub fn run(arguments: &InfoArgs) -> Result<ExitCode> {
    match shown::find(&arguments.image)? {
        Some(export) => shown::run(arguments, &export),
        None => of_image(arguments),
    }
}

fn of_image(arguments: &InfoArgs) -> Result<ExitCode> {
    let options = InfoOptions {
        format: arguments.format,
        chain: arguments.chain,
        share: arguments.force_share,
    };
    let all = on_ring(info(&arguments.image, options))?;
    match (arguments.json, all.as_slice()) {
        (true, [one]) if !arguments.chain => say_json(one)?,
        (true, all) => say_json(&all)?,
        (false, all) => {
            output::say(&texts(all))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn texts(all: &[ImageInfo]) -> String {
    let texts: Vec<String> = all.iter().map(as_text).collect();
    texts.join("\n")
}

/// As `qemu-img info` says it.
fn as_text(info: &ImageInfo) -> String {
    let mut lines = vec![
        format!("image: {}", Plain(&info.filename)),
        format!("file format: {}", info.format),
        format!("virtual size: {}", bytes_long(info.virtual_size)),
        format!("disk size: {}", bytes(info.actual_size)),
    ];
    if info.encrypted == Some(true) {
        lines.push("encrypted: yes".to_owned());
    }
    if let Some(size) = info.cluster_size {
        lines.push(format!("cluster_size: {size}"));
    }
    if info.dirty_flag {
        lines.push("cleanly shut down: no".to_owned());
    }
    if let Some(name) = &info.backing_filename {
        let full = info
            .full_backing_filename
            .as_ref()
            .filter(|full| *full != name);
        let full = full.map_or(String::new(), |full| {
            format!(" (actual path: {})", Plain(full))
        });
        lines.push(format!("backing file: {}{full}", Plain(name)));
    }
    if let Some(format) = &info.backing_filename_format {
        lines.push(format!("backing file format: {}", Plain(format)));
    }
    if !info.snapshots.is_empty() {
        lines.push("Snapshot list:".to_owned());
        lines.push(snapshot_table(&info.snapshots));
    }
    if let Some(Specific::Qcow2(specific)) = &info.format_specific {
        lines.push("Format specific information:".to_owned());
        let mut say = |key: &str, value: &dyn std::fmt::Display| {
            lines.push(format!("    {key}: {value}"));
        };
        say("compat", &specific.compat);
        say("compression type", &specific.compression_type);
        if let Some(lazy) = specific.lazy_refcounts {
            say("lazy refcounts", &lazy);
        }
        if let Some(encrypt) = &specific.encrypt {
            say("encryption", &encrypt.format);
        }
        for bitmap in specific.bitmaps.iter().flatten() {
            let flags = bitmap.flags.join(", ");
            let (name, grain) = (Plain(&bitmap.name), bitmap.granularity);
            say("bitmap", &format!("{name} (granularity {grain}; {flags})"));
        }
        say("refcount bits", &specific.refcount_bits);
        if let Some(name) = &specific.data_file {
            say("data file", &Plain(name));
        }
        if let Some(raw) = specific.data_file_raw {
            say("data file raw", &raw);
        }
        if let Some(corrupt) = specific.corrupt {
            say("corrupt", &corrupt);
        }
        if let Some(extended) = specific.extended_l2 {
            say("extended l2", &extended);
        }
    }
    for child in &info.children {
        lines.push(format!("Child node '/{}':", child.name));
        let below = &child.info;
        lines.push(format!("    filename: {}", Plain(&below.filename)));
        lines.push(format!("    protocol type: {}", below.format));
        lines.push(format!(
            "    file length: {}",
            bytes_long(below.virtual_size)
        ));
        lines.push(format!("    disk size: {}", bytes(below.actual_size)));
    }
    lines.join("\n") + "\n"
}
