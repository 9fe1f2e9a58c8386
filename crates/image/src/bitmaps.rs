//! The persistent bitmaps of an image, as far as they are told about: their directory is read and nothing else.
//! (QEMU's qcow2 specification, "Bitmap directory".)

use diskfuse_block::{Error, Kind, Node, Result, io};
use diskfuse_qcow2::format::Header;
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

/// Bytes of an entry before its extra data and its name.
const ENTRY: usize = 24;

/// The bitmaps in the order of their directory.
pub(crate) async fn list(file: &dyn Node, header: &Header) -> Result<Vec<BitmapInfo>> {
    let Some(place) = &header.bitmaps else {
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
    parse(buf.as_slice(), place.count)
        .ok_or_else(|| corrupt(file, "the directory of its bitmaps is truncated"))
}

fn corrupt(file: &dyn Node, what: &str) -> Error {
    let name = file.filename().unwrap_or_default();
    Error::new(Kind::Corrupt, format!("'{name}': {what}"))
}

/// `None` if there are not so many entries in the directory.
fn parse(directory: &[u8], count: u32) -> Option<Vec<BitmapInfo>> {
    let mut all = Vec::new();
    let mut rest = directory;
    for _ in 0..count {
        let flags = u32::from_be_bytes(rest.get(12..16)?.try_into().ok()?);
        let bits = u32::from(*rest.get(17)?);
        let name_len = usize::from(u16::from_be_bytes(rest.get(18..20)?.try_into().ok()?));
        let extra = u32::from_be_bytes(rest.get(20..24)?.try_into().ok()?) as usize;
        let start = ENTRY.checked_add(extra)?;
        let end = start.checked_add(name_len)?;
        let name = rest.get(start..end)?;
        all.push(BitmapInfo {
            flags: [(1, "in-use"), (2, "auto")]
                .into_iter()
                .filter_map(|(bit, name)| (flags & bit != 0).then_some(name))
                .collect(),
            name: String::from_utf8_lossy(name).into_owned(),
            granularity: 1u64.checked_shl(bits)?,
        });
        rest = rest.get(end.checked_next_multiple_of(8)?..).unwrap_or(&[]);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(flags: u32, bits: u8, name: &str, extra: usize) -> Vec<u8> {
        let mut bytes = vec![0; 12];
        bytes.extend(flags.to_be_bytes());
        bytes.extend([1, bits]);
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend((extra as u32).to_be_bytes());
        bytes.resize(bytes.len() + extra, 0xee);
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn a_directory_is_read_to_its_last_entry() {
        let directory = [entry(2, 16, "one", 0), entry(3, 9, "the second", 8)].concat();
        let all = parse(&directory, 2).unwrap();
        assert_eq!(all[0].name, "one");
        assert_eq!(all[0].flags, ["auto"]);
        assert_eq!(all[1].name, "the second");
        assert_eq!(all[1].flags, ["in-use", "auto"]);
        assert_eq!(all[1].granularity, 512);
    }

    #[test]
    fn a_truncated_directory_is_found_out() {
        let directory = entry(0, 16, "one", 0);
        for len in 0..27 {
            assert_eq!(parse(&directory[..len], 1), None, "{len}");
        }
        assert_eq!(parse(&directory, 2), None);
        assert_eq!(parse(&entry(0, 64, "x", 0), 1), None);
    }
}
