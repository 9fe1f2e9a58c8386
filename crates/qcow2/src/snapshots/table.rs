//! The snapshot table: parsed with every length checked, and written again with everything in it that we do not know.
//! (Specification, "Snapshots".) It must never need more memory than the bounds below, whatever the header claims.

use diskfuse_block::{Error, Kind, Result};

use crate::check::ahead::{Ahead, cut};
use crate::check::image::Image;

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Bytes of extra data that we know: size of the VM's state, size of the disk, instruction count.
const EXTRA: usize = 24;
/// Bytes of extra data that version 3 asks for.
const LEAST_EXTRA: usize = 16;
/// As QEMU bounds them: extra data of an entry, entries, and the whole table in bytes.
const MOST_EXTRA: usize = 1024;
const MOST_SNAPSHOTS: usize = 65536;
const MOST_TABLE: u64 = 64 << 20;

/// A snapshot of the disk, inside the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Unique among the snapshots of the image.
    pub id: String,
    /// What people call it; need not be unique.
    pub name: String,
    /// When it was taken, in seconds since 1970.
    pub date_seconds: u32,
    /// The part of that below a second, in nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of the machine's state that is kept with it; 0 if none is.
    pub vm_state_size: u64,
    /// Bytes of the disk then; `None` (version 2): as now.
    pub disk_size: Option<u64>,
    /// Instructions that the guest had executed, if that was counted.
    pub icount: Option<u64>,
    /// Byte offset of its L1 table.
    pub l1_offset: u64,
    /// Entries in that.
    pub l1_entries: u32,
    /// The entry as it is in the table, if it came from one.
    pub(super) raw: Vec<u8>,
}

impl SnapshotInfo {
    /// Whether version 3 would miss something in the entry.
    pub(crate) fn is_incomplete(&self) -> bool {
        self.disk_size.is_none()
    }

    /// The name for messages: a hostile one is as long as a message may be.
    pub(crate) fn label(&self) -> String {
        const LONGEST: usize = 100;
        match self.name.char_indices().nth(LONGEST) {
            None => self.name.clone(),
            Some((end, _)) => format!("{}…", &self.name[..end]),
        }
    }

    /// The entry's bytes, padded to a multiple of 8.
    fn encode(&self) -> Result<Vec<u8>> {
        if !self.raw.is_empty() {
            return Ok(self.raw.clone());
        }
        let too_long = || Error::new(Kind::Invalid, "The snapshot's name or id is too long");
        let id = u16::try_from(self.id.len()).map_err(|_| too_long())?;
        let name = u16::try_from(self.name.len()).map_err(|_| too_long())?;
        let small_state = u32::try_from(self.vm_state_size).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(FIXED + EXTRA + self.id.len() + self.name.len() + 8);
        bytes.extend(self.l1_offset.to_be_bytes());
        bytes.extend(self.l1_entries.to_be_bytes());
        bytes.extend(id.to_be_bytes());
        bytes.extend(name.to_be_bytes());
        bytes.extend(self.date_seconds.to_be_bytes());
        bytes.extend(self.date_nanoseconds.to_be_bytes());
        bytes.extend(self.vm_clock_nanoseconds.to_be_bytes());
        bytes.extend(small_state.to_be_bytes());
        bytes.extend((EXTRA as u32).to_be_bytes());
        bytes.extend(self.vm_state_size.to_be_bytes());
        bytes.extend(self.disk_size.unwrap_or(0).to_be_bytes());
        bytes.extend(self.icount.unwrap_or(u64::MAX).to_be_bytes());
        bytes.extend(self.id.as_bytes());
        bytes.extend(self.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        Ok(bytes)
    }

    /// The first entry of `bytes` and its length; `None` if it does not end in them.
    fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>> {
        let Some(fixed) = bytes.get(..FIXED) else {
            return Ok(None);
        };
        let id_len = number(fixed, 12, 2) as usize;
        let name_len = number(fixed, 14, 2) as usize;
        let extra_len = number(fixed, 36, 4) as usize;
        if extra_len > MOST_EXTRA {
            return Err(Error::new(
                Kind::Corrupt,
                format!("a snapshot cannot have {extra_len} bytes of extra data"),
            ));
        }
        let id_at = FIXED + extra_len;
        let len = (id_at + id_len + name_len).next_multiple_of(8);
        // The last entry's padding may be missing.
        let Some(text) = bytes.get(id_at..id_at + id_len + name_len) else {
            return Ok(None);
        };
        let (id, name) = text.split_at(id_len);
        let mut raw = bytes[..id_at + id_len + name_len].to_vec();
        raw.resize(len, 0);
        let extra = |at: usize| (extra_len >= at + 8).then(|| number(bytes, FIXED + at, 8));
        let info = Self {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            date_seconds: number(fixed, 16, 4) as u32,
            date_nanoseconds: number(fixed, 20, 4) as u32,
            vm_clock_nanoseconds: number(fixed, 24, 8),
            vm_state_size: extra(0).unwrap_or_else(|| number(fixed, 32, 4)),
            disk_size: extra(8),
            icount: extra(LEAST_EXTRA).filter(|&count| count != u64::MAX),
            l1_offset: number(fixed, 0, 8),
            l1_entries: number(fixed, 8, 4) as u32,
            raw,
        };
        Ok(Some((info, len)))
    }

    /// Points it to another L1 table.
    pub(super) fn set_l1(&mut self, offset: u64) {
        self.l1_offset = offset;
        if let Some(bytes) = self.raw.get_mut(..8) {
            bytes.copy_from_slice(&offset.to_be_bytes());
        }
    }

    /// Fills in what version 3 asks for.
    pub(super) fn complete(&mut self, disk_size: u64) {
        self.disk_size.get_or_insert(disk_size);
        self.raw.clear();
    }
}

/// A big-endian number of `len` bytes; 0 past the end.
fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    let field = bytes.get(at..at + len).unwrap_or_default();
    field.iter().fold(0, |all, &b| all << 8 | u64::from(b))
}

/// The snapshot table of an image, and how many bytes it has.
pub(crate) async fn read(image: &Image<'_>) -> Result<(Vec<SnapshotInfo>, u64)> {
    let header = &image.header;
    let count = header.snapshot_count as usize;
    let offset = header.snapshots_offset;
    let within = image.file.size().saturating_sub(offset);
    let mut ahead = Ahead::new(image.file, cut(offset, within.min(MOST_TABLE)));
    let mut snapshots = Vec::new();
    let mut bytes = Vec::new();
    let mut len = 0;
    while snapshots.len() < count {
        let here = bytes.get(len..).unwrap_or_default();
        let parsed =
            SnapshotInfo::parse(here).map_err(|error| broken(image, &error.to_string()))?;
        if let Some((snapshot, entry)) = parsed {
            snapshots.push(snapshot);
            len += entry;
            continue;
        }
        match ahead.next().await {
            Some(piece) => bytes.extend_from_slice(piece?.1.as_slice()),
            None => return Err(broken(image, "it ends too early")),
        }
    }
    Ok((snapshots, len as u64))
}

/// Bytes of the table that these were read from.
pub(crate) fn len(snapshots: &[SnapshotInfo]) -> u64 {
    snapshots.iter().map(|one| one.raw.len() as u64).sum()
}

fn broken(image: &Image<'_>, why: &str) -> Error {
    Error::new(
        Kind::Corrupt,
        format!(
            "'{}': the table of {} snapshots at {} cannot be read: {why}",
            image.name(),
            image.header.snapshot_count,
            image.header.snapshots_offset
        ),
    )
}

/// A table with these snapshots. [`Kind::Invalid`] if they are too many.
pub(super) fn encode(snapshots: &[SnapshotInfo]) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        bytes.extend(snapshot.encode()?);
    }
    if snapshots.len() > MOST_SNAPSHOTS || bytes.len() as u64 > MOST_TABLE {
        return Err(Error::new(
            Kind::Invalid,
            "There is no room for another snapshot: delete some",
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_entry_comes_back_as_it_was_written() {
        let info = SnapshotInfo {
            id: "12".into(),
            name: "before the update".into(),
            date_seconds: 1_700_000_000,
            date_nanoseconds: 5,
            vm_clock_nanoseconds: 7,
            vm_state_size: 1 << 40,
            disk_size: Some(1 << 30),
            icount: Some(9),
            l1_offset: 0x30000,
            l1_entries: 16,
            raw: Vec::new(),
        };
        let bytes = encode(&[info.clone(), info.clone()]).unwrap();
        let (mut parsed, len) = SnapshotInfo::parse(&bytes).unwrap().unwrap();
        assert_eq!(2 * len, bytes.len());
        assert_eq!(encode(&[parsed.clone(), parsed.clone()]).unwrap(), bytes);
        parsed.raw.clear();
        assert_eq!(parsed, info);
    }

    #[test]
    fn an_entry_that_does_not_end_is_not_parsed() {
        let bytes = [0xff; 2000];
        assert!(SnapshotInfo::parse(&bytes).is_err());
        let mut bytes = [0; 100];
        bytes[12] = 1;
        assert!(SnapshotInfo::parse(&bytes).unwrap().is_none());
        assert!(SnapshotInfo::parse(&bytes[..39]).unwrap().is_none());
    }
}
