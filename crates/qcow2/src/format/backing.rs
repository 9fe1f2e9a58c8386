//! Another backing file's name in the header of an image that is in use. Whatever the header's first sector does not name may
//! be written at any time; the first sector itself is written at once. So, as far as there is room, the new name gets a place
//! where nothing is, and a crash leaves the old header or the new one.

use diskfuse_block::{Error, Kind, Result};

use super::extensions::{BACKING_FORMAT, END};
use super::header::MAX_BACKING_NAME;
use super::{Backing, Header};

/// Byte offsets of fields (specification, "Header").
const NAME_OFFSET: usize = 8;
const NAME_LEN: usize = 16;

/// The extensions as they lie in the first cluster.
struct Places {
    /// Where the format of the backing file is said: the extension's first byte, and bytes that it may have.
    format: Option<(usize, usize)>,
    /// The first byte after the end mark.
    end: usize,
}

impl Header {
    /// The first cluster of an image, `old`, with another backing file, or none.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if it does not fit; [`Kind::Corrupt`] if `old` is not the beginning of an image.
    pub(crate) fn with_backing(
        old: &[u8],
        file_size: u64,
        backing: Option<&Backing>,
    ) -> Result<Vec<u8>> {
        let mut header = Self::parse(old, file_size)?;
        let length = header.length;
        header.backing = backing.cloned();
        match in_place(old, length, backing) {
            Some(new) => Ok(new),
            None => {
                let mut new = header.encode()?;
                let rest = old.get(new.len()..);
                new.extend_from_slice(rest.ok_or_else(no_room)?);
                Ok(new)
            }
        }
    }
}

fn no_room() -> Error {
    let message = "the name of the backing file does not fit into the header of the image";
    Error::new(Kind::Invalid, message)
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
    usize::try_from(u32::from_be_bytes(bytes)).ok()
}

/// With everything else where it is; `None` if there is no room for that.
fn in_place(old: &[u8], length: usize, backing: Option<&Backing>) -> Option<Vec<u8>> {
    let mut new = old.to_vec();
    let Some(backing) = backing else {
        // What is said of the format of no file is of no meaning.
        new.get_mut(NAME_OFFSET..NAME_LEN + 4)?.fill(0);
        return Some(new);
    };
    let places = places(old, length)?;
    match (&backing.format, places.format) {
        (Some(format), Some((at, room))) if format.len() <= room => {
            let len = u32::try_from(format.len()).ok()?;
            new.get_mut(at + 4..at + 8)?
                .copy_from_slice(&len.to_be_bytes());
            let data = new.get_mut(at + 8..at + 8 + room)?;
            data.fill(0);
            data.get_mut(..format.len())?
                .copy_from_slice(format.as_bytes());
        }
        (None, None) => {}
        _ => return None,
    }
    let name = backing.name.as_bytes();
    if name.len() > MAX_BACKING_NAME {
        return None;
    }
    let start = word(old, NAME_OFFSET + 4)?;
    let end = start + word(old, NAME_LEN)?;
    let at = match start < places.end + name.len() && places.end < end {
        true => end.next_multiple_of(8),
        false => places.end,
    };
    new.get_mut(at..at + name.len())?.copy_from_slice(name);
    let offset = u64::try_from(at).ok()?.to_be_bytes();
    new.get_mut(NAME_OFFSET..NAME_LEN)?.copy_from_slice(&offset);
    let len = u32::try_from(name.len()).ok()?.to_be_bytes();
    new.get_mut(NAME_LEN..NAME_LEN + 4)?.copy_from_slice(&len);
    Some(new)
}

fn places(bytes: &[u8], length: usize) -> Option<Places> {
    let mut places = Places {
        format: None,
        end: length,
    };
    loop {
        let kind = word(bytes, places.end)?;
        let len = word(bytes, places.end + 4)?.checked_next_multiple_of(8)?;
        if kind == END as usize {
            places.end += 8;
            return Some(places);
        }
        if kind == BACKING_FORMAT as usize {
            places.format = Some((places.end, len));
        }
        places.end = places.end.checked_add(8)?.checked_add(len)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Geometry;

    fn backing(name: &str, format: Option<&str>) -> Backing {
        Backing {
            name: name.to_owned(),
            format: format.map(str::to_owned),
        }
    }

    /// The first cluster of a new image of 64 KiB clusters.
    fn cluster(below: Option<Backing>) -> Vec<u8> {
        let geometry = Geometry::new(16, 4, false).unwrap();
        let mut header = Header::new(3, geometry, 1 << 20);
        header.refcount_table_offset = 1 << 16;
        header.backing = below;
        let mut bytes = header.encode().unwrap();
        bytes.resize(1 << 16, 0);
        bytes
    }

    fn named(bytes: &[u8]) -> Option<Backing> {
        Header::parse(bytes, 1 << 20).unwrap().backing
    }

    #[test]
    fn either_half_of_the_change_leaves_one_of_both_names() {
        let first = backing("/images/a name that is rather long.qcow2", Some("qcow2"));
        for second in [
            Some(backing("b", Some("raw"))),
            Some(backing(&"c".repeat(600), Some("qcow2"))),
            None,
        ] {
            let old = cluster(Some(first.clone()));
            let new = Header::with_backing(&old, 1 << 20, second.as_ref()).unwrap();
            assert_eq!(named(&new), second);
            // What is past the first sector is written first.
            let half = [&old[..512], &new[512..]].concat();
            assert_eq!(named(&half), Some(first.clone()));
            let back = Header::with_backing(&new, 1 << 20, Some(&first)).unwrap();
            assert_eq!(named(&back), Some(first.clone()));
        }
    }

    #[test]
    fn a_format_that_was_not_said_gets_its_place() {
        let old = cluster(None);
        let wanted = backing("base.raw", Some("raw"));
        let new = Header::with_backing(&old, 1 << 20, Some(&wanted)).unwrap();
        assert_eq!((named(&new), new.len()), (Some(wanted), old.len()));
    }

    #[test]
    fn a_name_that_is_too_long_is_refused() {
        let old = cluster(Some(backing("a", Some("raw"))));
        let wanted = backing(&"x".repeat(1024), Some("raw"));
        let error = Header::with_backing(&old, 1 << 20, Some(&wanted)).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
    }
}
