//! `diskfuse rebase`: another backing file for an overlay.

use std::process::ExitCode;

use diskfuse_image::rebase::{Rebase, rebase};

use super::on_ring;
use super::progress::Progress;
use crate::cli::RebaseArgs;
use crate::error::Result;
use crate::overlay;

/// Carries the command out.
pub fn run(arguments: &RebaseArgs) -> Result<ExitCode> {
    let what = Rebase {
        image: &arguments.image,
        format: arguments.format,
        backing: Some(arguments.backing.as_str()).filter(|name| !name.is_empty()),
        backing_format: arguments.backing_format,
        header_only: arguments.header_only,
    };
    let progress = Progress::bytes(0);
    on_ring(async {
        let kept = overlay::Rebasing::begin(&arguments.image, arguments.header_only).await;
        rebase(&what, &mut |done, total| progress.set(done, total)).await?;
        kept.done().await;
        Ok(())
    })?;
    Ok(ExitCode::SUCCESS)
}
