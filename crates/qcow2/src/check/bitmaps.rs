//! Persistent bitmaps as far as clusters and truth are concerned: where their tables are, and what to do when the disk
//! changes without them. What is in them is nobody's business here.

use diskfuse_block::{Error, Kind, Result};

use crate::format::{BitmapsExtension, bitmap, features};

use super::image::Image;

/// Bytes of a directory entry before its extra data and name (specification, "Bitmap directory").
const ENTRY: usize = 24;

/// The bitmaps of an image, if its header says that they are true.
pub(super) fn extension(image: &Image<'_>) -> Option<BitmapsExtension> {
    let is_true = image.header.autoclear & features::BITMAPS != 0;
    image.header.bitmaps.clone().filter(|_| is_true)
}

/// Where the bitmap tables are: byte offsets, and how many entries they have. [`Kind::Corrupt`] if the directory ends
/// too early.
pub(super) async fn tables(
    image: &Image<'_>,
    extension: &BitmapsExtension,
) -> Result<Vec<(u64, u64)>> {
    let directory = image
        .read(extension.directory_offset, extension.directory_size)
        .await?;
    let mut rest = directory.as_slice();
    let mut tables = Vec::new();
    for _ in 0..extension.count {
        let ([a, b, c, ..], true) = (rest.as_chunks::<8>().0, rest.len() >= ENTRY) else {
            return Err(Error::new(
                Kind::Corrupt,
                "it ends in the midst of an entry",
            ));
        };
        let offset = u64::from_be_bytes(*a);
        let [e0, e1, e2, e3, ..] = *b;
        // type (1), granularity (1), name size (2), extra data size (4)
        let [_, _, n0, n1, x0, x1, x2, x3] = *c;
        let entries = u32::from_be_bytes([e0, e1, e2, e3]);
        let name = usize::from(u16::from_be_bytes([n0, n1]));
        let extra = u32::from_be_bytes([x0, x1, x2, x3]) as usize;
        tables.push((offset, u64::from(entries)));
        let len = (ENTRY + name + extra).next_multiple_of(8);
        rest = rest.get(len..).unwrap_or_default();
    }
    Ok(tables)
}

/// The disk is about to change without its bitmaps: those that record writes must not be believed any more. On stable
/// storage when it returns.
pub(crate) async fn outdate(image: &Image<'_>) -> Result<()> {
    let Some(extension) = extension(image) else {
        return Ok(());
    };
    let place = extension.directory_offset;
    let mut directory = image.read(place, extension.directory_size).await?;
    if bitmap::mark_recording_in_use(directory.as_mut_slice(), extension.count)? {
        image.write_buf(place, directory).await?;
        image.flush().await?;
    }
    Ok(())
}

/// Whether there are bitmaps that are said to be true.
pub(crate) fn are_there(image: &Image<'_>) -> bool {
    extension(image).is_some()
}
