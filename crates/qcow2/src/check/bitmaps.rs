//! Persistent bitmaps as far as clusters and truth are concerned: where their tables are, and what to do when the disk
//! changes without them. What is in them is nobody's business here.

use diskfuse_block::Result;

use crate::format::{BitmapsExtension, bitmap};

use super::image::Image;

/// The bitmaps of an image, if its header says that they are true.
pub(super) fn extension(image: &Image<'_>) -> Option<BitmapsExtension> {
    image.header.true_bitmaps().cloned()
}

/// Where the bitmap tables are: byte offsets, and how many entries they have. [`Kind::Corrupt`](diskfuse_block::Kind::Corrupt)
/// if the directory ends too early.
pub(super) async fn tables(
    image: &Image<'_>,
    extension: &BitmapsExtension,
) -> Result<Vec<(u64, u64)>> {
    let directory = image
        .read(extension.directory_offset, extension.directory_size)
        .await?;
    let entries = bitmap::parse_directory(directory.as_slice(), extension.count)?.into_iter();
    let tables = entries.map(|entry| (entry.table_offset, entry.table_entries.into()));
    Ok(tables.collect())
}

/// The disk is about to change without its bitmaps: those that record writes must not be believed any more. On stable
/// storage when it returns.
pub(crate) async fn outdate(image: &Image<'_>) -> Result<()> {
    let Some(extension) = extension(image) else {
        return Ok(());
    };
    let place = extension.directory_offset;
    let mut directory = image.read(place, extension.directory_size).await?;
    if bitmap::mark_in_use(directory.as_mut_slice(), extension.count, bitmap::AUTO)? {
        image.write_buf(place, directory).await?;
        image.flush().await?;
    }
    Ok(())
}

/// Whether there are bitmaps that are said to be true.
pub(crate) fn are_there(image: &Image<'_>) -> bool {
    extension(image).is_some()
}
