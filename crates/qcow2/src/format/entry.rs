//! Entries of L1 and L2 tables: what a word says, and the word that says it. A word that cannot be right is an error,
//! never a guess. (Specification, "Cluster mapping", "L1 table entry", "L2 table entry".)

use diskfuse_block::{Error, Kind, Result};

use super::Geometry;

/// The refcount of what the entry names is exactly one.
pub const COPIED: u64 = 1 << 63;
/// The entry names compressed data.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes, whatever the entry names (version 3, without extended entries).
pub const ZERO: u64 = 1;
/// Bits of a host offset, in L1 and in standard L2 entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// What an L2 entry says about a guest cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Nothing: the backing file shows, or zeroes.
    Unallocated,
    /// It reads as zeroes.
    Zero {
        /// A cluster is kept for it at this byte offset all the same.
        host: Option<u64>,
        /// The refcount of that cluster is one.
        copied: bool,
    },
    /// It is at this byte offset of the file.
    Normal {
        /// Byte offset, a multiple of the cluster size.
        host: u64,
        /// Its refcount is one: it may be written in place.
        copied: bool,
    },
    /// It is compressed.
    Compressed(CompressedRange),
}

/// Where compressed data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressedRange {
    /// Byte offset in the file; need not be aligned.
    pub offset: u64,
    /// Bytes at most: to the end of the last 512-byte sector that has some of it.
    pub len: u64,
}

impl Mapping {
    /// Decodes a word in the host's byte order. With extended entries bit 0 is reserved; what reads as zeroes there is
    /// in the bitmap. A data file may be used from its byte 0 on: an entry of offset 0 with [`COPIED`] is allocated.
    ///
    /// [`Kind::Corrupt`] for a misaligned offset and for reserved bits.
    pub fn decode(word: u64, geometry: Geometry, version: u32) -> Result<Self> {
        if word & COMPRESSED != 0 {
            return Ok(Self::Compressed(CompressedRange::decode(word, geometry)));
        }
        let copied = word & COPIED != 0;
        let host = word & OFFSET_MASK;
        let has_zero_bit = version >= 3 && !geometry.extended_l2();
        let known = COPIED | OFFSET_MASK | if has_zero_bit { ZERO } else { 0 };
        if word & !known != 0 {
            return Err(corrupt(word, "has reserved bits set"));
        }
        if geometry.offset_in_cluster(host) != 0 {
            return Err(corrupt(
                word,
                "names an offset that does not begin a cluster",
            ));
        }
        let allocated = host != 0 || (copied && geometry.external_data());
        Ok(match (has_zero_bit && word & ZERO != 0, allocated) {
            (true, _) => Self::Zero {
                host: allocated.then_some(host),
                copied,
            },
            (false, true) => Self::Normal { host, copied },
            (false, false) => Self::Unallocated,
        })
    }

    /// The word that says this.
    pub fn encode(&self, geometry: Geometry) -> u64 {
        let flag = |copied| if copied { COPIED } else { 0 };
        match *self {
            Self::Unallocated => 0,
            Self::Zero { host, copied } => {
                let host = host.map_or(0, |host| host | flag(copied));
                host | if geometry.extended_l2() { 0 } else { ZERO }
            }
            Self::Normal { host, copied } => host | flag(copied),
            Self::Compressed(range) => range.encode(geometry),
        }
    }
}

impl CompressedRange {
    /// Bits of the offset: what 62 bits leave beside the count of sectors (specification, "Compressed Clusters
    /// Descriptor").
    fn offset_bits(geometry: Geometry) -> u32 {
        62 - (geometry.cluster_bits() - 8)
    }

    fn decode(word: u64, geometry: Geometry) -> Self {
        let bits = Self::offset_bits(geometry);
        let offset = word & ((1 << bits) - 1);
        let more_sectors = (word & (COMPRESSED - 1)) >> bits;
        Self {
            offset,
            len: (more_sectors + 1) * 512 - offset % 512,
        }
    }

    fn encode(self, geometry: Geometry) -> u64 {
        let last = self.offset.saturating_add(self.len.max(1) - 1);
        let more_sectors = last / 512 - self.offset / 512;
        COMPRESSED | more_sectors << Self::offset_bits(geometry) | self.offset
    }
}

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// Names a table at a byte offset.
    pub fn new(table: u64, copied: bool) -> Self {
        Self(table | if copied { COPIED } else { 0 })
    }

    /// Byte offset of the L2 table; 0 if there is none.
    pub fn table(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// The table's refcount is one: it may be changed in place.
    pub fn copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// [`Kind::Corrupt`] for a misaligned table and for reserved bits.
    pub fn check(self, geometry: Geometry) -> Result<()> {
        if self.0 & !(COPIED | OFFSET_MASK) != 0 {
            return Err(corrupt(self.0, "of the L1 table has reserved bits set"));
        }
        if geometry.offset_in_cluster(self.table()) != 0 {
            return Err(corrupt(
                self.0,
                "of the L1 table names an offset that does not begin a cluster",
            ));
        }
        Ok(())
    }
}

fn corrupt(word: u64, what: &str) -> Error {
    Error::new(Kind::Corrupt, format!("the entry {word:#018x} {what}"))
}
