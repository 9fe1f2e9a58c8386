//! The directory of persistent bitmaps: only what keeps it honest. (Specification, "Bitmap directory".)

use diskfuse_block::{Error, Kind, Result};

/// Flag: somebody may have changed the disk without the bitmap.
const IN_USE: u32 = 1;
/// Flag: the bitmap records what is written.
const AUTO: u32 = 1 << 1;
/// Bytes of an entry before its extra data and its name.
const ENTRY: usize = 24;

/// Marks every bitmap that records what is written as in use, in the bytes of a directory of `count` entries. Whether
/// that changed anything. [`Kind::Corrupt`] if the directory does not have so many.
pub fn mark_recording_in_use(directory: &mut [u8], count: u32) -> Result<bool> {
    let corrupt = || Error::new(Kind::Corrupt, "the bitmap directory is truncated");
    let mut changed = false;
    let mut at = 0usize;
    for _ in 0..count {
        let entry = directory
            .get_mut(at..)
            .and_then(|rest| rest.get_mut(..ENTRY));
        let entry = entry.ok_or_else(corrupt)?;
        let field = |at: usize| {
            u32::from_be_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
        };
        let flags = field(12);
        // type (1), granularity (1), name size (2), extra data size (4)
        let name = usize::from(u16::from_be_bytes([entry[18], entry[19]]));
        let extra = field(20) as usize;
        if flags & AUTO != 0 && flags & IN_USE == 0 {
            entry[12..16].copy_from_slice(&(flags | IN_USE).to_be_bytes());
            changed = true;
        }
        let len = ENTRY.checked_add(name).and_then(|n| n.checked_add(extra));
        let next = len.and_then(|n| at.checked_add(n.next_multiple_of(8)));
        at = next.ok_or_else(corrupt)?;
    }
    Ok(changed)
}
