//! Feature bits of the header: which there are, and refusing those that nobody here knows. (Specification, "Header".)

use diskfuse_block::{Error, Kind, Result};

use super::extensions::FeatureName;

/// Incompatible: refcounts may be behind.
pub const DIRTY: u64 = 1;
/// Incompatible: the image contradicts itself.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible: guest data is in a file of its own.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible: clusters are compressed in another way than by deflate.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible: L2 entries have bitmaps of subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Compatible: refcounts may be updated lazily.
pub const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear: the bitmaps are consistent.
pub const BITMAPS: u64 = 1;
/// Autoclear: the data file is a raw image by itself.
pub const RAW_DATA: u64 = 1 << 1;

const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

/// Kinds of features in the table of names.
const INCOMPATIBLE: u8 = 0;
const COMPATIBLE: u8 = 1;
const AUTOCLEAR: u8 = 2;

/// [`Kind::Unsupported`] for an incompatible feature that is not known here: by the name that the image gives it.
pub(super) fn refuse_unknown(incompatible: u64, names: &[FeatureName]) -> Result<()> {
    let unknown = incompatible & !KNOWN_INCOMPATIBLE;
    if unknown == 0 {
        return Ok(());
    }
    let bits = (0..64u8).filter(|bit| unknown & (1 << bit) != 0);
    let name = |bit: u8| {
        let given = names
            .iter()
            .find(|n| n.kind == INCOMPATIBLE && n.bit == bit);
        given.map_or_else(
            || format!("unknown incompatible feature, bit {bit}"),
            |n| n.name.clone(),
        )
    };
    let list: Vec<String> = bits.map(name).collect();
    Err(Error::new(
        Kind::Unsupported,
        format!(
            "the image uses what this version does not know: {}",
            list.join(", ")
        ),
    ))
}

/// The names of all features that are known here, for new images.
pub(crate) fn names() -> Vec<FeatureName> {
    let known = [
        (INCOMPATIBLE, 0, "dirty bit"),
        (INCOMPATIBLE, 1, "corrupt bit"),
        (INCOMPATIBLE, 2, "external data file"),
        (INCOMPATIBLE, 3, "compression type"),
        (INCOMPATIBLE, 4, "extended L2 entries"),
        (COMPATIBLE, 0, "lazy refcounts"),
        (AUTOCLEAR, 0, "bitmaps"),
        (AUTOCLEAR, 1, "raw external data"),
    ];
    let name = |(kind, bit, name): (u8, u8, &str)| FeatureName {
        kind,
        bit,
        name: name.to_owned(),
    };
    known.into_iter().map(name).collect()
}
