//! `diskfuse create`: a new image.

use std::process::ExitCode;

use diskfuse_image::create::{NewImage, create};
use diskfuse_image::options::NewImageOptions;

use super::{format_of_new, on_ring};
use crate::cli::CreateArgs;
use crate::error::Result;

/// Carries the command out.
pub fn run(arguments: &CreateArgs) -> Result<ExitCode> {
    let format = match (arguments.format, &arguments.backing) {
        // Only qcow2 images have one.
        (None, Some(_)) => diskfuse_image::Format::Qcow2,
        (told, _) => format_of_new(&arguments.image, told),
    };
    let mut options = NewImageOptions::default();
    for text in &arguments.options {
        options.parse(text, format)?;
    }
    options.size = arguments.size.or(options.size);
    if let Some(backing) = &arguments.backing {
        options.parse(
            &format!("backing_file={}", backing.replace(',', ",,")),
            format,
        )?;
    }
    options.backing_fmt = arguments.backing_format.or(options.backing_fmt);
    let new = NewImage {
        path: arguments.image.clone(),
        format,
        options,
        force: arguments.force,
        unchecked_backing: arguments.unchecked,
    };
    on_ring(async {
        create(&new)
            .await
            .map(diskfuse_image::create::Created::keep)
    })?;
    Ok(ExitCode::SUCCESS)
}
