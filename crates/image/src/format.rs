//! Which format an image has, by its first bytes. It never answers "raw" for a file that any known format claims.

use std::path::Path;

use diskfuse_block::{Error, Kind, Node, Result, io};
use diskfuse_ring::Buf;

/// Bytes at the beginning of a file that every test here looks at: one sector, as in QEMU (`BLOCK_PROBE_BUF_SIZE`).
pub const PROBED_BYTES: usize = 512;

/// The formats that can be read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk, byte for byte.
    Raw,
    /// QEMU's format with clusters.
    Qcow2,
}

impl Format {
    /// As it is written in options and in image headers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format of this name. Drivers of files count as raw: that is what QEMU wrote into headers in former times.
    /// [`Kind::Unsupported`] for a format that people have and this version cannot read, [`Kind::Invalid`] for anything
    /// else.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ if OTHERS.contains(&name) => Err(Error::new(
                Kind::Unsupported,
                format!("format '{name}' is not built into this version yet; it reads: qcow2, raw"),
            )),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("'{name}' is not a format; this version reads: qcow2, raw"),
            )),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Names of formats that are known and cannot be read.
const OTHERS: &[&str] = &[
    "bochs",
    "cloop",
    "dmg",
    "luks",
    "parallels",
    "qcow",
    "qed",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
];

/// What a file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// Nothing claims it.
    Raw,
    /// It begins as a qcow2 image, of version 2 or later.
    Qcow2,
    /// It begins as an image of this format, which cannot be read.
    Other(&'static str),
}

/// Where a format's mark is, and the format.
const MARKS: &[(usize, &[u8], &str)] = &[
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"vhdxfile", "VHDX"),
    (0, b"conectix", "VPC"),
    (0, b"cxsparse", "VPC"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "VDI"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
    (0, b"Bochs Virtual HD Image", "Bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop", "cloop"),
];

/// What a file that begins with these bytes looks like; [`PROBED_BYTES`] of them, or all that there are.
pub fn probe_bytes(head: &[u8]) -> Probed {
    if let Some(rest) = head.strip_prefix(b"QFI\xfb") {
        // Version 1 is the older format, qcow.
        return match rest.get(..4) {
            Some([0, 0, 0, 1]) => Probed::Other("qcow"),
            _ => Probed::Qcow2,
        };
    }
    let claims = |(at, mark, _): &&(usize, &[u8], &str)| {
        head.get(*at..).is_some_and(|rest| rest.starts_with(mark))
    };
    match MARKS.iter().find(claims) {
        Some((_, _, format)) => Probed::Other(format),
        None => Probed::Raw,
    }
}

/// The error for an image that looks like one of a format that cannot be read.
pub fn cannot_be_read(image: &Path, format: &str) -> Error {
    Error::new(
        Kind::Unsupported,
        format!(
            "'{}' looks like a {format} image, and that format is not built into this version yet (--format raw \
             takes its bytes as they are)",
            image.display()
        ),
    )
}

/// What a file looks like. Reads its first bytes; runs on a ring.
pub async fn probe(file: &dyn Node) -> Result<Probed> {
    let len = usize::try_from(file.size())
        .unwrap_or(usize::MAX)
        .min(PROBED_BYTES);
    if len == 0 {
        return Ok(Probed::Raw);
    }
    let buf = Buf::new(len).map_err(|error| Error::os("get memory", error))?;
    let (result, buf) = io::read(file, 0, buf).await;
    result?;
    Ok(probe_bytes(buf.as_slice()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_beginning_is_told_from_raw() {
        for (at, mark, format) in MARKS {
            let mut head = vec![0; PROBED_BYTES];
            head[*at..at + mark.len()].copy_from_slice(mark);
            assert_eq!(probe_bytes(&head), Probed::Other(format));
        }
        assert_eq!(probe_bytes(b"QFI\xfb\0\0\0\x03"), Probed::Qcow2);
        assert_eq!(probe_bytes(b"QFI\xfb\0\0\0\x02"), Probed::Qcow2);
        assert_eq!(probe_bytes(b"QFI\xfb\0\0\0\x01"), Probed::Other("qcow"));
    }

    #[test]
    fn what_nothing_claims_is_raw_however_short() {
        assert_eq!(probe_bytes(b""), Probed::Raw);
        assert_eq!(probe_bytes(b"QFI"), Probed::Raw);
        assert_eq!(probe_bytes(&[0; PROBED_BYTES]), Probed::Raw);
    }

    #[test]
    fn a_known_format_that_cannot_be_read_is_told_from_nonsense() {
        assert_eq!(Format::parse("raw").unwrap(), Format::Raw);
        assert_eq!(Format::parse("host_device").unwrap(), Format::Raw);
        assert_eq!(Format::parse("qcow2").unwrap(), Format::Qcow2);
        let vmdk = Format::parse("vmdk").unwrap_err();
        assert_eq!(vmdk.kind(), Kind::Unsupported);
        assert!(vmdk.to_string().contains("not built"), "{vmdk}");
        let nonsense = Format::parse("nonsense").unwrap_err();
        assert!(nonsense.to_string().contains("not a format"), "{nonsense}");
    }
}
