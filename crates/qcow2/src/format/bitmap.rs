//! Persistent bitmaps as bytes: the directory, and the entries of a bitmap's table. (Specification, "Bitmaps extension",
//! "Bitmap directory", "Bitmap table".)

use diskfuse_block::{Error, Kind, Result};

use super::Geometry;

/// Flag: somebody may have changed the disk without the bitmap.
pub const IN_USE: u32 = 1;
/// Flag: the bitmap records what is written.
pub const AUTO: u32 = 1 << 1;
/// The type of a dirty bitmap, which is the only one there is.
pub const DIRTY_TRACKING: u8 = 1;
/// The longest name, in bytes.
pub const LONGEST_NAME: usize = 1023;
/// Most bitmaps of an image (as QEMU bounds them).
pub const MOST_BITMAPS: u32 = 65535;
/// Most bytes of their directory (as QEMU bounds it).
pub const MOST_DIRECTORY: u64 = 64 << 20;
/// Most bytes of the bits of one bitmap (as QEMU bounds them).
pub const MOST_BYTES: u64 = 512 << 20;
/// log2 of the least and the most bytes that a bit stands for.
pub const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// Bytes of an entry before its extra data and its name.
const ENTRY: usize = 24;
/// Where the flags are in it.
const FLAGS: std::ops::Range<usize> = 12..16;
/// Bits of a table's entry: where the data are; if nowhere, that all bits are ones.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ALL_ONES: u64 = 1;

/// One bitmap of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryEntry {
    /// Byte offset of its table.
    pub table_offset: u64,
    /// Entries of the table.
    pub table_entries: u32,
    /// [`IN_USE`], [`AUTO`], and what is not known.
    pub flags: u32,
    /// Its type, which should be [`DIRTY_TRACKING`].
    pub kind: u8,
    /// log2 of the bytes that a bit stands for.
    pub granularity_bits: u8,
    /// What there is of data beyond the specification.
    pub extra: Vec<u8>,
    /// The name, which should be text.
    pub name: Vec<u8>,
}

impl DirectoryEntry {
    /// Bytes that it takes in the directory.
    pub fn encoded_len(&self) -> usize {
        (ENTRY + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// Parses the entry at the beginning of `bytes`; `None` if it is not whole.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let name_len = usize::from(u16::from_be_bytes(bytes.get(18..20)?.try_into().ok()?));
        let extra_end = ENTRY.checked_add(usize::try_from(word(20)?).ok()?)?;
        Some(Self {
            table_offset: u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?),
            table_entries: word(8)?,
            flags: word(FLAGS.start)?,
            kind: *bytes.get(16)?,
            granularity_bits: *bytes.get(17)?,
            extra: bytes.get(ENTRY..extra_end)?.to_vec(),
            name: bytes
                .get(extra_end..extra_end.checked_add(name_len)?)?
                .to_vec(),
        })
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend(self.table_offset.to_be_bytes());
        bytes.extend(self.table_entries.to_be_bytes());
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend([self.kind, self.granularity_bits]);
        bytes.extend((self.name.len() as u16).to_be_bytes());
        bytes.extend((self.extra.len() as u32).to_be_bytes());
        bytes.extend(&self.extra);
        bytes.extend(&self.name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
}

/// The entries of a directory, in their order.
///
/// # Errors
/// [`Kind::Corrupt`] if there are not `count` of them.
pub fn parse_directory(directory: &[u8], count: u32) -> Result<Vec<DirectoryEntry>> {
    let mut all = Vec::new();
    let mut rest = directory;
    for _ in 0..count {
        let entry = DirectoryEntry::parse(rest).ok_or_else(truncated)?;
        rest = rest.get(entry.encoded_len()..).unwrap_or_default();
        all.push(entry);
    }
    Ok(all)
}

fn truncated() -> Error {
    Error::new(Kind::Corrupt, "the bitmap directory is truncated")
}

/// A directory of these entries.
pub fn encode_directory(entries: &[DirectoryEntry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        entry.encode(&mut bytes);
    }
    bytes
}

/// Marks those of the `count` bitmaps of a directory as in use that have one of these flags, or every one if there are none.
/// Whether that changed anything.
///
/// # Errors
/// [`Kind::Corrupt`] if the directory does not have so many.
pub fn mark_in_use(directory: &mut [u8], count: u32, flags: u32) -> Result<bool> {
    let mut changed = false;
    let mut at = 0;
    for entry in parse_directory(directory, count)? {
        let is_meant = flags == 0 || entry.flags & flags != 0;
        if is_meant && entry.flags & IN_USE == 0 {
            let field = directory.get_mut(at + FLAGS.start..at + FLAGS.end);
            let marked = (entry.flags | IN_USE).to_be_bytes();
            field.ok_or_else(truncated)?.copy_from_slice(&marked);
            changed = true;
        }
        at += entry.encoded_len();
    }
    Ok(changed)
}

/// What an entry of a bitmap's table says of one cluster of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableEntry {
    /// None is set.
    Zeroes,
    /// All are set.
    Ones,
    /// They are in the cluster at this byte offset.
    Data(u64),
}

impl TableEntry {
    /// `None` if the entry cannot be.
    pub fn decode(word: u64, geometry: Geometry) -> Option<Self> {
        let offset = word & OFFSET;
        match word {
            0 => Some(Self::Zeroes),
            ALL_ONES => Some(Self::Ones),
            _ => (word == offset && geometry.offset_in_cluster(offset) == 0)
                .then_some(Self::Data(offset)),
        }
    }

    /// The word in the table.
    pub fn encode(self) -> u64 {
        match self {
            Self::Zeroes => 0,
            Self::Ones => ALL_ONES,
            Self::Data(offset) => offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(flags: u32, name: &str, extra: usize) -> DirectoryEntry {
        DirectoryEntry {
            table_offset: 0x7_0000,
            table_entries: 3,
            flags,
            kind: DIRTY_TRACKING,
            granularity_bits: 16,
            extra: vec![0xee; extra],
            name: name.as_bytes().to_vec(),
        }
    }

    #[test]
    fn a_directory_is_read_to_its_last_entry() {
        let entries = [
            entry(AUTO, "one", 0),
            entry(IN_USE | AUTO, "the second", 8),
            entry(0, "d", 0),
        ];
        let directory = encode_directory(&entries);
        assert_eq!(parse_directory(&directory, 3).unwrap(), entries);
        assert_eq!(parse_directory(&directory, 2).unwrap(), entries[..2]);
        for (bytes, count) in [(&directory[..], 4), (&directory[..directory.len() - 8], 3)] {
            let error = parse_directory(bytes, count).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{error}");
        }
    }

    #[test]
    fn only_flags_are_changed_by_a_mark() {
        let entries = [entry(AUTO, "one", 8), entry(0, "still", 0)];
        let mut directory = encode_directory(&entries);
        directory.extend([7; 8]);
        assert!(mark_in_use(&mut directory, 2, AUTO).unwrap());
        let mut expected = entries.clone();
        expected[0].flags |= IN_USE;
        assert_eq!(parse_directory(&directory, 2).unwrap(), expected);
        assert!(!mark_in_use(&mut directory, 2, AUTO).unwrap());
        assert!(mark_in_use(&mut directory, 2, 0).unwrap());
        expected[1].flags |= IN_USE;
        let whole = [encode_directory(&expected), vec![7; 8]].concat();
        assert_eq!(directory, whole);
        assert!(mark_in_use(&mut directory, 5, 0).is_err());
    }

    #[test]
    fn entries_of_tables_that_cannot_be_are_found() {
        let geometry = Geometry::new(16, 4, false).unwrap();
        for good in [
            TableEntry::Zeroes,
            TableEntry::Ones,
            TableEntry::Data(3 << 16),
        ] {
            assert_eq!(TableEntry::decode(good.encode(), geometry), Some(good));
        }
        for bad in [2, 3 << 16 | 1, 3 << 15, 1 << 63, 1 << 56 | 3 << 16] {
            assert_eq!(TableEntry::decode(bad, geometry), None, "{bad:#x}");
        }
    }
}
