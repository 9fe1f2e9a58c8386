//! Header extensions: those we know, parsed; all of them kept as they were. (Specification, "Header extensions".)

use diskfuse_block::{Error, Kind, Result};

use super::bitmap::{MOST_BITMAPS, MOST_DIRECTORY};

pub(super) const END: u32 = 0;
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
pub(super) const BITMAPS: u32 = 0x2385_2875;
const DATA_FILE: u32 = 0x4441_5441;
/// Bytes of an entry in the table of feature names.
const NAME_ENTRY: usize = 48;

/// One extension: its type and its bytes without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

/// The name that an image gives to a feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// The bit's number.
    pub bit: u8,
    /// The name, 46 bytes at most.
    pub name: String,
}

/// Where the persistent bitmaps are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// How many there are.
    pub count: u32,
    /// Bytes of their directory.
    pub directory_size: u64,
    /// Byte offset of the directory.
    pub directory_offset: u64,
}

/// What the extensions of a header say.
#[derive(Default)]
pub(super) struct Parsed {
    pub(super) all: Vec<Extension>,
    pub(super) backing_format: Option<String>,
    pub(super) data_file: Option<String>,
    pub(super) feature_names: Vec<FeatureName>,
    pub(super) bitmaps: Option<BitmapsExtension>,
}

/// The two halves of a word, the first one first.
fn split_word(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, message)
}

fn text(data: &[u8], what: &str) -> Result<String> {
    let text = std::str::from_utf8(data).map_err(|_| corrupt(format!("{what} is not UTF-8")))?;
    Ok(text.to_owned())
}

impl Extension {
    pub(super) const END: Self = Self {
        kind: END,
        data: Vec::new(),
    };

    /// Appends the extension, padded to a multiple of 8 bytes.
    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(&self.kind.to_be_bytes());
        bytes.extend_from_slice(&(self.data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&self.data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
}

impl Parsed {
    /// Parses what follows the header, up to the end mark or the end of `bytes`.
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self> {
        let mut parsed = Self::default();
        while let Some((head, rest)) = bytes.split_first_chunk::<8>() {
            let (kind, len) = split_word(u64::from_be_bytes(*head));
            let len = len as usize;
            if kind == END {
                break;
            }
            let data = rest.get(..len).ok_or_else(|| {
                corrupt(format!(
                    "header extension {kind:#010x} is longer than the header"
                ))
            })?;
            parsed.take(kind, data)?;
            bytes = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(parsed)
    }

    fn take(&mut self, kind: u32, data: &[u8]) -> Result<()> {
        match kind {
            BACKING_FORMAT => self.backing_format = Some(text(data, "the backing file's format")?),
            DATA_FILE => self.data_file = Some(text(data, "the data file's name")?),
            FEATURE_NAMES => self.feature_names = feature_names(data),
            BITMAPS => self.bitmaps = Some(bitmaps(data)?),
            _ => {}
        }
        self.all.push(Extension {
            kind,
            data: data.to_vec(),
        });
        Ok(())
    }
}

fn feature_names(data: &[u8]) -> Vec<FeatureName> {
    let (entries, _) = data.as_chunks::<NAME_ENTRY>();
    let name = |entry: &[u8; NAME_ENTRY]| {
        let end = entry[2..]
            .iter()
            .position(|&b| b == 0)
            .map_or(NAME_ENTRY, |n| n + 2);
        FeatureName {
            kind: entry[0],
            bit: entry[1],
            name: String::from_utf8_lossy(&entry[2..end]).into_owned(),
        }
    };
    entries.iter().map(name).collect()
}

fn encode_names(names: &[FeatureName]) -> Vec<u8> {
    let mut data = Vec::new();
    for name in names {
        let mut entry = [0; NAME_ENTRY];
        entry[0] = name.kind;
        entry[1] = name.bit;
        let bytes = name.name.as_bytes();
        let len = bytes.len().min(NAME_ENTRY - 2);
        entry[2..2 + len].copy_from_slice(&bytes[..len]);
        data.extend_from_slice(&entry);
    }
    data
}

fn bitmaps(data: &[u8]) -> Result<BitmapsExtension> {
    let data: &[u8; 24] = data
        .try_into()
        .map_err(|_| corrupt("the bitmaps extension does not have 24 bytes"))?;
    let word = |at: usize| {
        data[at..at + 8]
            .iter()
            .fold(0, |all, &b| all << 8 | u64::from(b))
    };
    let this = BitmapsExtension {
        count: (word(0) >> 32) as u32,
        directory_size: word(8),
        directory_offset: word(16),
    };
    if this.count > MOST_BITMAPS || this.directory_size > MOST_DIRECTORY {
        return Err(corrupt(format!(
            "{} bitmaps with a directory of {} bytes are too many",
            this.count, this.directory_size
        )));
    }
    Ok(this)
}

impl super::Header {
    /// The extensions as the fields say now: those that a field speaks of are made anew, in their old place, or behind
    /// the others.
    pub(super) fn current_extensions(&self) -> Vec<Extension> {
        let format = self.backing.as_ref().and_then(|b| b.format.as_ref());
        let bitmaps = self.bitmaps.as_ref().map(|b| {
            let mut data = u64::from(b.count).rotate_left(32).to_be_bytes().to_vec();
            data.extend_from_slice(&b.directory_size.to_be_bytes());
            data.extend_from_slice(&b.directory_offset.to_be_bytes());
            data
        });
        let names = Some(encode_names(&self.feature_names)).filter(|names| !names.is_empty());
        let mut fields = vec![
            (BACKING_FORMAT, format.map(|f| f.as_bytes().to_vec())),
            (
                DATA_FILE,
                self.data_file.as_ref().map(|f| f.as_bytes().to_vec()),
            ),
            (FEATURE_NAMES, names),
            (BITMAPS, bitmaps),
        ];
        let mut all = Vec::new();
        for extension in &self.extensions {
            let field = fields.iter().position(|(kind, _)| *kind == extension.kind);
            match field.map(|n| fields.remove(n).1) {
                None => all.push(extension.clone()),
                Some(Some(data)) => all.push(Extension {
                    kind: extension.kind,
                    data,
                }),
                Some(None) => {}
            }
        }
        let new = fields.into_iter();
        all.extend(new.filter_map(|(kind, data)| data.map(|data| Extension { kind, data })));
        all
    }
}
