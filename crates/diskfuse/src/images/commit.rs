//! `diskfuse commit`: an overlay merged into its backing file.

use std::process::ExitCode;

use diskfuse_image::commit::Commit;
use diskfuse_ring::{Config, Ring};

use super::convert::{carry_out, default_threads};
use crate::cli::CommitArgs;
use crate::error::Result;
use crate::overlay;

/// Carries the command out.
pub fn run(arguments: &CommitArgs) -> Result<ExitCode> {
    let ring = Ring::new(&Config::default())?;
    let commit = ring.block_on(Commit::start(&arguments.image, arguments.format))?;
    carry_out(
        &commit.copy,
        default_threads(),
        diskfuse_image::copy::IN_FLIGHT,
    )?;
    ring.block_on(commit.finish(arguments.keep))?;
    ring.block_on(overlay::committed(&arguments.image))?;
    Ok(ExitCode::SUCCESS)
}
