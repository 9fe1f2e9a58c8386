//! Options of a new image, with the names and values of `qemu-img create -o`. Everything is checked here but what only
//! the format can know.

use diskfuse_block::{Error, Kind, Result};
use diskfuse_qcow2::format::Compression;

use crate::format::Format;
use crate::preallocation::Preallocation;

/// What a new image is to be like.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NewImageOptions {
    /// `size`: bytes of the disk.
    pub size: Option<u64>,
    /// `backing_file`: the image below, as it is to stand in the header.
    pub backing_file: Option<String>,
    /// `backing_fmt`: its format.
    pub backing_fmt: Option<Format>,
    /// `preallocation`.
    pub preallocation: Preallocation,
    /// `compat`: 2 (`0.10`, `v2`) or 3 (`1.1`, `v3`).
    pub version: Option<u32>,
    /// `cluster_size`, in bytes.
    pub cluster_size: Option<u64>,
    /// `refcount_bits`.
    pub refcount_bits: Option<u32>,
    /// `extended_l2`.
    pub extended_l2: bool,
    /// `lazy_refcounts`.
    pub lazy_refcounts: bool,
    /// `compression_type`.
    pub compression: Compression,
    /// `data_file`: the file for the data, relative to the image's folder, as it is to stand in the header.
    pub data_file: Option<String>,
    /// `data_file_raw`: that file is to stay a raw image of the disk.
    pub data_file_raw: bool,
}

/// What only qcow2 images have.
const QCOW2_ONLY: &[&str] = &[
    "backing_file",
    "backing_fmt",
    "compat",
    "cluster_size",
    "refcount_bits",
    "extended_l2",
    "lazy_refcounts",
    "compression_type",
    "data_file",
    "data_file_raw",
];

impl NewImageOptions {
    /// Takes `key=value,key=value…`; a comma in a value is written twice. Later ones count.
    ///
    /// # Errors
    /// [`Kind::Invalid`] with the option and what it takes; [`Kind::Unsupported`] for encryption.
    pub fn parse(&mut self, text: &str, format: Format) -> Result<()> {
        for (key, value) in split(text)? {
            if format == Format::Raw && QCOW2_ONLY.contains(&key.as_str()) {
                return Err(invalid(format!("a raw image has no option '{key}'")));
            }
            self.set(&key, &value)
                .map_err(|error| Error::new(error.kind(), format!("option '{key}': {error}")))?;
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: &str) -> Result<()> {
        match key {
            "size" => self.size = Some(parse_size(value)?),
            "backing_file" => self.backing_file = Some(value.to_owned()).filter(|v| !v.is_empty()),
            "backing_fmt" => self.backing_fmt = Some(Format::parse(value)?),
            "preallocation" => self.preallocation = Preallocation::parse(value)?,
            "compat" => {
                self.version = Some(match value {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    _ => return Err(invalid(format!("'{value}' is not 0.10 (v2) or 1.1 (v3)"))),
                });
            }
            "cluster_size" => self.cluster_size = Some(parse_size(value)?),
            "refcount_bits" => {
                let bits = value.parse().ok();
                let bits = bits.ok_or_else(|| invalid(format!("'{value}' is not a number")))?;
                self.refcount_bits = Some(bits);
            }
            "extended_l2" => self.extended_l2 = parse_switch(value)?,
            "lazy_refcounts" => self.lazy_refcounts = parse_switch(value)?,
            "compression_type" => {
                self.compression = match value {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    _ => return Err(invalid(format!("'{value}' is not zlib or zstd"))),
                };
            }
            "data_file" => self.data_file = Some(value.to_owned()).filter(|v| !v.is_empty()),
            "data_file_raw" => self.data_file_raw = parse_switch(value)?,
            // The file system decides about it.
            "nocow" | "extent_size_hint" => {
                let message = "is not built into this version yet; leave it out";
                return Err(Error::new(Kind::Unsupported, message));
            }
            _ if key.starts_with("encrypt") => {
                let message = "encryption is not built into this version yet";
                return Err(Error::new(Kind::Unsupported, message));
            }
            _ => {
                return Err(invalid(
                    "there is no such option; there are: backing_file, backing_fmt, cluster_size, compat, \
                     compression_type, data_file, data_file_raw, extended_l2, lazy_refcounts, preallocation, \
                     refcount_bits, size",
                ));
            }
        }
        Ok(())
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(Kind::Invalid, message)
}

fn parse_switch(value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(invalid(format!("'{value}' is not on or off"))),
    }
}

/// `key=value` pairs; a key alone is switched on, as in QEMU.
fn split(text: &str) -> Result<Vec<(String, String)>> {
    // A comma that is written twice is part of a value.
    const COMMA: char = '\u{0}';
    let text = text.replace(",,", &COMMA.to_string());
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "on"));
            if key.is_empty() {
                return Err(invalid(format!("'{pair}' has no name in front of its '='")));
            }
            Ok((key.to_owned(), value.replace(COMMA, ",")))
        })
        .collect()
}

/// A number of bytes with a suffix, a power of 1024: `512`, `64k`, `1.5G`.
///
/// # Errors
/// [`Kind::Invalid`] if it is not one, or larger than any disk.
pub fn parse_size(text: &str) -> Result<u64> {
    let wrong = || invalid("not a number of bytes; examples: 1048576, 64k, 1.5G");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let suffix = text.get(digits.len()..).unwrap_or_default();
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        "e" | "eib" => 60,
        _ => {
            let message = format!("'{suffix}' is not a unit; use k, M, G, T, P or E");
            return Err(invalid(message));
        }
    };
    let (whole, part) = digits.split_once('.').unwrap_or((digits, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !is_number(whole) || !is_number(part) || part.len() > 9 {
        return Err(wrong());
    }
    let scale = 10u128.pow(u32::try_from(part.len()).unwrap_or(0));
    let digits = |text: &str| text.parse::<u128>().ok();
    let units = digits(whole)
        .and_then(|whole| whole.checked_mul(scale))
        .zip(digits(part))
        .and_then(|(whole, part)| whole.checked_add(part))
        .and_then(|units| units.checked_mul(1 << shift));
    let bytes = units.map(|units| units / scale);
    bytes
        .and_then(|bytes| i64::try_from(bytes).ok())
        .map(i64::cast_unsigned)
        .ok_or_else(|| invalid("larger than any disk"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_those_of_qemu_img() {
        let mut options = NewImageOptions::default();
        let text = "size=1.5G,cluster_size=64k,compat=1.1,refcount_bits=8,lazy_refcounts=on,extended_l2,\
                    compression_type=zstd,preallocation=falloc,backing_file=a,,b=c,backing_fmt=raw";
        options.parse(text, Format::Qcow2).unwrap();
        assert_eq!(options.size, Some(3 << 29));
        assert_eq!(options.cluster_size, Some(65536));
        assert_eq!(options.version, Some(3));
        assert_eq!(options.refcount_bits, Some(8));
        assert!(options.lazy_refcounts && options.extended_l2);
        assert_eq!(options.compression, Compression::Zstd);
        assert_eq!(options.preallocation, Preallocation::Falloc);
        assert_eq!(options.backing_file.as_deref(), Some("a,b=c"));
        assert_eq!(options.backing_fmt, Some(Format::Raw));
    }

    #[test]
    fn a_wrong_option_is_named_with_what_it_takes() {
        let cases = [
            ("clutser_size=64k", "cluster_size,"),
            ("cluster_size=huge", "'cluster_size': 'huge' is not a unit"),
            ("compat=2.0", "0.10 (v2) or 1.1 (v3)"),
            ("encrypt.format=luks", "encryption is not built"),
            ("preallocation=some", "off, metadata, falloc or full"),
            ("=1", "no name"),
        ];
        for (text, words) in cases {
            let error = NewImageOptions::default()
                .parse(text, Format::Qcow2)
                .unwrap_err()
                .to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let raw = NewImageOptions::default().parse("cluster_size=1k", Format::Raw);
        assert!(raw.unwrap_err().to_string().contains("raw image"));
    }

    #[test]
    fn sizes_may_have_a_fraction() {
        let cases = [
            ("0", 0),
            ("512", 512),
            ("64k", 65536),
            ("0.5M", 1 << 19),
            ("1.5G", 3 << 29),
            ("7E", 7 << 60),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
        for text in [
            "", "k", "-1", "+1", "1x", "8E", "1.k", ".5k", "9e9", "1 k", "٣",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
