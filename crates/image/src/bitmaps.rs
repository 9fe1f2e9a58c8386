//! The persistent bitmaps of an image, as far as they are told about: their directory is read and nothing else.
//! (QEMU's qcow2 specification, "Bitmap directory".)

use diskfuse_block::{Error, Kind, Node, Result, io};
use diskfuse_qcow2::format::Header;
use diskfuse_qcow2::format::bitmap::{self, DirectoryEntry};
use diskfuse_ring::Buf;
use serde::Serialize;

/// One bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BitmapInfo {
    /// `in-use` (it may be out of date) and `auto` (it records what is written).
    pub flags: Vec<&'static str>,
    /// Its name.
    pub name: String,
    /// Bytes of the disk that one bit stands for.
    pub granularity: u64,
}

/// The bitmaps in the order of their directory.
pub(crate) async fn list(file: &dyn Node, header: &Header) -> Result<Vec<BitmapInfo>> {
    let Some(place) = header.true_bitmaps() else {
        return Ok(Vec::new());
    };
    let (start, len) = (place.directory_offset, place.directory_size);
    let end = start.checked_add(len);
    if end.is_none_or(|end| end > file.size()) {
        return Err(corrupt(
            file,
            "the directory of its bitmaps is past its end",
        ));
    }
    let room = usize::try_from(len).map_err(|_| corrupt(file, "its bitmaps are too many"))?;
    let buf = Buf::new(room).map_err(|error| Error::os("get memory", error))?;
    let (result, buf) = io::read(file, start, buf).await;
    result?;
    let entries = bitmap::parse_directory(buf.as_slice(), place.count)
        .map_err(|error| corrupt(file, &error.to_string()))?;
    let info = |entry: &DirectoryEntry| BitmapInfo {
        flags: [(bitmap::IN_USE, "in-use"), (bitmap::AUTO, "auto")]
            .into_iter()
            .filter_map(|(bit, name)| (entry.flags & bit != 0).then_some(name))
            .collect(),
        name: String::from_utf8_lossy(&entry.name).into_owned(),
        granularity: 1u64
            .checked_shl(entry.granularity_bits.into())
            .unwrap_or_default(),
    };
    Ok(entries.iter().map(info).collect())
}

fn corrupt(file: &dyn Node, what: &str) -> Error {
    let name = file.filename().unwrap_or_default();
    Error::new(Kind::Corrupt, format!("'{name}': {what}"))
}
