//! `diskfuse resize`: another size for a disk.

use std::process::ExitCode;

use diskfuse_image::OpenOptions;
use diskfuse_image::resize::resize;
use diskfuse_image::session::Session;

use super::on_ring;
use crate::cli::ResizeArgs;
use crate::error::Result;

/// Carries the command out.
pub fn run(arguments: &ResizeArgs) -> Result<ExitCode> {
    let options = OpenOptions {
        format: arguments.format,
        writable: true,
        ..OpenOptions::default()
    };
    on_ring(async {
        let image = Session::open(&arguments.image, &options, "resize").await?;
        let resized = resize(
            &image,
            arguments.size,
            arguments.shrink,
            arguments.preallocation,
        );
        let resized = resized.await;
        let closed = image.close().await;
        resized.and(closed)
    })?;
    Ok(ExitCode::SUCCESS)
}
