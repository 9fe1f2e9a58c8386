//! `diskfuse check`: whether an image is consistent, and its repair.

use std::fmt::Write as _;
use std::process::ExitCode;

use diskfuse_block::Node;
use diskfuse_block::drivers::FileConfig;
use diskfuse_image::session::{FileSession, to_read};
use diskfuse_image::{Format, Probed, format, name};
use diskfuse_qcow2::check::{self, CheckResult};
use serde::Serialize;

use super::progress::Progress;
use super::{on_ring, say_json, text::percent};
use crate::cli::{CheckArgs, Repair};
use crate::error::{Plain, Result};
use crate::output;

/// Something is wrong that endangers data.
const CORRUPT: u8 = 2;
/// Clusters are kept for nothing.
const LEAKS: u8 = 3;
/// There is nothing to check in such images.
const NOTHING_TO_CHECK: u8 = 63;

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(flatten)]
    result: &'a CheckResult,
    filename: String,
    format: &'static str,
}

/// Carries the command out.
pub fn run(arguments: &CheckArgs) -> Result<ExitCode> {
    let Some(result) = on_ring(look(arguments))? else {
        output::complain(
            "diskfuse",
            format_args!(
                "'{}' is a raw image: there is nothing in it to check",
                arguments.image.display()
            ),
        );
        return Ok(ExitCode::from(NOTHING_TO_CHECK));
    };
    if arguments.json {
        say_json(&Answer {
            result: &result,
            filename: arguments.image.display().to_string(),
            format: "qcow2",
        })?;
    } else {
        output::say(&as_text(&result))?;
    }
    Ok(match &result {
        result if result.check_errors > 0 => ExitCode::FAILURE,
        result if result.corruptions > 0 => ExitCode::from(CORRUPT),
        result if result.leaks > 0 => ExitCode::from(LEAKS),
        _ => ExitCode::SUCCESS,
    })
}

/// `None` if the image is raw.
async fn look(arguments: &CheckArgs) -> diskfuse_block::Result<Option<CheckResult>> {
    let config = match arguments.repair {
        None => to_read(arguments.force_share),
        Some(_) => FileConfig::default(),
    };
    let named = name::parse_argument(&arguments.image)?;
    let file = FileSession::open(&named.filename, &config, "check")?;
    let is = match arguments.format.or(named.format) {
        Some(Format::Raw) => Probed::Raw,
        Some(Format::Qcow2) => Probed::Qcow2,
        None => format::probe(&**file.node()).await?,
    };
    match is {
        Probed::Raw => return Ok(None),
        Probed::Qcow2 => {}
        Probed::Other(format) => return Err(format::cannot_be_read(&named.filename, format)),
    }
    let repair = match arguments.repair {
        None => check::Repair::None,
        Some(Repair::Leaks) => check::Repair::Leaks,
        Some(Repair::All) => check::Repair::All,
    };
    let progress = Progress::steps();
    let mut tell = |done, total| progress.set(done, total);
    let result = check::check(&**file.node(), repair, &mut tell).await?;
    file.node().flush().await?;
    Ok(Some(result))
}

fn as_text(result: &CheckResult) -> String {
    let mut text = String::new();
    for message in &result.messages {
        let _ = writeln!(text, "{}", Plain(message));
    }
    if result.messages_left_out > 0 {
        let _ = writeln!(text, "… and {} more", result.messages_left_out);
    }
    if !text.is_empty() {
        text.push('\n');
    }
    let CheckResult {
        corruptions,
        leaks,
        check_errors,
        corruptions_fixed,
        leaks_fixed,
        ..
    } = *result;
    if corruptions_fixed + leaks_fixed > 0 {
        let _ = writeln!(
            text,
            "Repaired: {corruptions_fixed} corruptions, {leaks_fixed} leaked clusters."
        );
    }
    if corruptions > 0 {
        let _ = writeln!(
            text,
            "{corruptions} errors were found on the image. Data may be corrupted, or be by further writes."
        );
    }
    if leaks > 0 {
        let _ = writeln!(
            text,
            "{leaks} leaked clusters were found on the image. They take space, and do no harm to data."
        );
    }
    if check_errors > 0 {
        let _ = writeln!(text, "{check_errors} things could not be checked.");
    }
    if result.is_clean() {
        text.push_str("No errors were found on the image.\n");
    }
    if result.total_clusters > 0 {
        let (allocated, total) = (result.allocated_clusters, result.total_clusters);
        let _ = writeln!(
            text,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            percent(allocated, total),
            percent(result.fragmented_clusters, allocated),
            percent(result.compressed_clusters, allocated),
        );
    }
    let _ = writeln!(text, "Image end offset: {}", result.image_end_offset);
    text
}
