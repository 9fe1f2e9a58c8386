//! `diskfuse commit`: an overlay merged into its backing file. Whatever becomes of it, the overlay and the file show together what
//! they showed before, and it is noted that they belong together.

use std::process::ExitCode;
use std::sync::Arc;

use diskfuse_image::commit::Overlay;
use diskfuse_ring::{Config, Ring};

use super::convert::{carry_out, default_threads};
use crate::cli::CommitArgs;
use crate::error::{Error, Result};
use crate::overlay::Committing;

/// Carries the command out.
pub fn run(arguments: &CommitArgs) -> Result<ExitCode> {
    let ring = Ring::new(&Config::default())?;
    let overlay = ring.block_on(Overlay::open(&arguments.image, arguments.format))?;
    let committing = Committing::begin(overlay.path(), overlay.base())?;
    let merged = merge(&ring, overlay, arguments.keep);
    committing.over(merged.is_ok());
    merged.map(|()| ExitCode::SUCCESS)
}

fn merge(ring: &Ring, overlay: Overlay, keep: bool) -> Result<()> {
    let path = overlay.path().to_owned();
    let commit = ring.block_on(overlay.commit())?;
    let copy = Arc::clone(&commit.copy);
    let threads = default_threads();
    carry_out(&copy, threads, diskfuse_image::copy::IN_FLIGHT)
        .and_then(|()| Ok(ring.block_on(commit.finish(keep))?))
        .map_err(|error| {
            let path = path.display();
            Error::Refused(format!(
                "{error}\nNothing is lost: when that is put right, `diskfuse commit '{path}'` goes on"
            ))
        })
}
