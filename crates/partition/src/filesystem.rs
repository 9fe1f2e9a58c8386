//! What a file system says of itself in its first blocks: kind, label, UUID. Only that: nothing here says that it is whole.
//!
//! The wrappers of `libblkid` open files by themselves, and so cannot look at a disk of ours; what is needed of it is where
//! a dozen fields are. Sources: the on-disk structures in Linux' `fs/ext4/ext4.h`, `fs/xfs/libxfs/xfs_format.h`,
//! `include/uapi/linux/btrfs_tree.h`, `include/linux/swap.h`, `include/uapi/linux/msdos_fs.h`, the LUKS1 and LUKS2 formats, and
//! ECMA-119.

use serde::{Serialize, Serializer};

/// A file system, or something else that a partition can hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FileSystem {
    /// As mount(8) calls it.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Its label, as it is on the disk: any bytes but zero.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text")]
    pub label: Option<Vec<u8>>,
    /// Its UUID, as blkid(8) writes it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

#[allow(clippy::ref_option, reason = "serde calls it so")]
fn as_text<S: Serializer>(label: &Option<Vec<u8>>, to: S) -> Result<S::Ok, S::Error> {
    let text = label.as_deref().map(String::from_utf8_lossy);
    text.serialize(to)
}

/// The beginning of a partition: three pieces of 4096 bytes, as far as it goes.
#[derive(Debug, Default)]
pub(crate) struct Front {
    /// From byte 0 on.
    pub(crate) first: Vec<u8>,
    /// From byte 32768 on.
    pub(crate) at_32k: Vec<u8>,
    /// From byte 65536 on.
    pub(crate) at_64k: Vec<u8>,
}

fn bytes(from: &[u8], at: usize, len: usize) -> &[u8] {
    from.get(at..at + len).unwrap_or_default()
}

fn has(from: &[u8], at: usize, magic: &[u8]) -> bool {
    bytes(from, at, magic.len()) == magic
}

/// A label that ends at the first zero; `None` if there is nothing in it.
fn label(from: &[u8], at: usize, len: usize) -> Option<Vec<u8>> {
    let raw = bytes(from, at, len);
    let text = raw.split(|&b| b == 0).next().unwrap_or_default();
    Some(text.to_vec()).filter(|text| !text.is_empty())
}

/// The same for one that is filled up with spaces.
fn padded(from: &[u8], at: usize, len: usize) -> Option<Vec<u8>> {
    let text = label(from, at, len)?.trim_ascii_end().to_vec();
    Some(text).filter(|text| !text.is_empty())
}

/// Sixteen bytes in the usual five groups; `None` if they are all zero.
fn uuid(from: &[u8], at: usize) -> Option<String> {
    let raw = bytes(from, at, 16);
    if raw.len() < 16 || raw.iter().all(|&b| b == 0) {
        return None;
    }
    let groups = [0..4, 4..6, 6..8, 8..10, 10..16];
    let hex = |group: std::ops::Range<usize>| -> String {
        let bytes = raw.get(group).unwrap_or_default();
        bytes
            .iter()
            .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
    };
    Some(groups.map(hex).join("-"))
}

/// The volume number of a FAT file system.
fn serial(from: &[u8], at: usize) -> Option<String> {
    let [a, b, c, d] = *bytes(from, at, 4).first_chunk::<4>()?;
    Some(format!("{d:02X}{c:02X}-{b:02X}{a:02X}"))
}

/// What is there, if it is something known.
pub(crate) fn probe(front: &Front) -> Option<FileSystem> {
    let first = &front.first;
    let found = |kind, label, uuid| Some(FileSystem { kind, label, uuid });
    if has(first, 0, b"LUKS\xba\xbe") {
        let is_second = has(first, 6, &[0, 2]);
        let label = is_second.then(|| label(first, 24, 48)).flatten();
        let text = padded(first, 168, 40);
        let uuid = text.and_then(|text| String::from_utf8(text).ok());
        return found("crypto_LUKS", label, uuid);
    }
    if has(first, 0, b"XFSB") {
        return found("xfs", padded(first, 108, 12), uuid(first, 32));
    }
    if has(&front.at_64k, 64, b"_BHRfS_M") {
        let btrfs = &front.at_64k;
        return found("btrfs", label(btrfs, 299, 256), uuid(btrfs, 32));
    }
    if has(first, 1024 + 56, &[0x53, 0xef]) {
        return found(
            ext(first),
            label(first, 1024 + 120, 16),
            uuid(first, 1024 + 104),
        );
    }
    if has(first, 4086, b"SWAPSPACE2") {
        return found("swap", label(first, 1024 + 28, 16), uuid(first, 1024 + 12));
    }
    if has(first, 3, b"NTFS    ") {
        let raw = bytes(first, 72, 8).first_chunk::<8>();
        let number = raw.map(|raw| format!("{:016X}", u64::from_le_bytes(*raw)));
        return found("ntfs", None, number);
    }
    if has(first, 510, &[0x55, 0xaa]) {
        let no_name = |label: &Vec<u8>| label != b"NO NAME";
        if has(first, 82, b"FAT32   ") {
            return found(
                "vfat",
                padded(first, 71, 11).filter(no_name),
                serial(first, 67),
            );
        }
        if has(first, 54, b"FAT12   ") || has(first, 54, b"FAT16   ") {
            return found(
                "vfat",
                padded(first, 43, 11).filter(no_name),
                serial(first, 39),
            );
        }
    }
    if has(&front.at_32k, 1, b"CD001") {
        return found("iso9660", padded(&front.at_32k, 40, 32), None);
    }
    None
}

/// Which of the three it is, by what it needs.
fn ext(first: &[u8]) -> &'static str {
    let compatible = crate::mbr::le32(first, 1024 + 92);
    let incompatible = crate::mbr::le32(first, 1024 + 96);
    // Extents, 64 bits, flexible groups.
    match (
        incompatible & (0x40 | 0x80 | 0x200) != 0,
        compatible & 4 != 0,
    ) {
        (true, _) => "ext4",
        (false, true) => "ext3",
        (false, false) => "ext2",
    }
}
