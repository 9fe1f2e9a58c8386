//! The header: parsed with every number checked, and written again with everything in it that we do not know. It must
//! never accept a feature that it does not understand. (Specification, "Header", "Header extensions".)

use diskfuse_block::{Error, Kind, Node, Result, io};
use diskfuse_ring::Buf;

use super::extensions::{BitmapsExtension, Extension, FeatureName, Parsed};
use super::{Geometry, OFFSET_MASK, features};

/// Bytes of the header in version 2, and the least in version 3.
const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// Bytes of the header with the compression type.
const FULL_LENGTH: usize = 112;
/// Longest name of a backing file, in bytes.
pub(super) const MAX_BACKING_NAME: usize = 1023;
/// Largest L1 and refcount tables, in bytes; most snapshots (as QEMU bounds them).
const MAX_L1: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;

/// The image whose content shows where this one has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name as it is written in the image: relative to the image's folder, or absolute, or `json:…`.
    pub name: String,
    /// Its format, if the image says so.
    pub format: Option<String>,
}

/// How the guest's data is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Not at all.
    None,
    /// By AES in the old way.
    Aes,
    /// By LUKS.
    Luks,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// A header that was checked, as far as that needs nothing but the header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// What is below.
    pub backing: Option<Backing>,
    /// Sizes of clusters, tables and refcounts.
    pub geometry: Geometry,
    /// Bytes of the disk.
    pub size: u64,
    /// How data is encrypted.
    pub encryption: Encryption,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Byte offset of the active L1 table.
    pub l1_offset: u64,
    /// Byte offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshot_count: u32,
    /// Byte offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Features without which the image must not be opened.
    pub incompatible: u64,
    /// Features that may be ignored.
    pub compatible: u64,
    /// Features that are to be cleared when the image is changed by somebody who does not know them.
    pub autoclear: u64,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Names of features, for messages.
    pub feature_names: Vec<FeatureName>,
    /// The external data file, as it is written in the image.
    pub data_file: Option<String>,
    /// Where the persistent bitmaps are.
    pub bitmaps: Option<BitmapsExtension>,
    /// All extensions in their order, also those that are known to the fields above.
    pub(super) extensions: Vec<Extension>,
    /// Header bytes past those that are known.
    pub(super) unknown_fields: Vec<u8>,
    /// Bytes of the header in the file: 72 in version 2.
    pub(super) length: usize,
}

fn corrupt(message: impl Into<String>) -> Error {
    Error::new(Kind::Corrupt, message)
}

fn be32(bytes: &[u8], at: usize) -> Result<u32> {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    field.map(u32::from_be_bytes).ok_or_else(truncated)
}

fn be64(bytes: &[u8], at: usize) -> Result<u64> {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    field.map(u64::from_be_bytes).ok_or_else(truncated)
}

fn truncated() -> Error {
    corrupt("the header of the qcow2 image is truncated")
}

impl Header {
    /// "QFI\xfb".
    pub const MAGIC: u32 = 0x5146_49fb;

    /// Whether a file that begins with these bytes says that it is qcow2 of version 2 or later.
    pub fn looks_like(first_bytes: &[u8]) -> bool {
        be32(first_bytes, 0).is_ok_and(|magic| magic == Self::MAGIC)
            && be32(first_bytes, 4).is_ok_and(|version| version >= 2)
    }

    /// Parses the first cluster, or as much of it as the file has. `file_size` is in bytes.
    ///
    /// [`Kind::Unsupported`] for other versions and unknown incompatible features (by name), [`Kind::Corrupt`] for
    /// everything that cannot be.
    pub fn parse(bytes: &[u8], file_size: u64) -> Result<Self> {
        if be32(bytes, 0)? != Self::MAGIC {
            return Err(corrupt(
                "not a qcow2 image: its first bytes are not those of one",
            ));
        }
        let version = be32(bytes, 4)?;
        if !(2..=3).contains(&version) {
            let message = format!("version {version} of qcow2 is not supported (2 and 3 are)");
            return Err(Error::new(Kind::Unsupported, message));
        }
        let length = match version {
            2 => V2_LENGTH,
            _ => be32(bytes, 100)? as usize,
        };
        let least = if version == 2 { V2_LENGTH } else { V3_LENGTH };
        let cluster_bits = be32(bytes, 20)?;
        // Checks the cluster size before anything is computed from it.
        let plain = Geometry::new(cluster_bits, 4, false)?;
        let cluster = plain.cluster_size();
        if length < least || length as u64 > cluster || !length.is_multiple_of(8) {
            return Err(corrupt(format!("a header of {length} bytes cannot be")));
        }
        let first = usize::try_from(cluster)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let bytes = &bytes[..first];
        let header = bytes.get(..length).ok_or_else(truncated)?;
        let (incompatible, compatible, autoclear, refcount_order) = match version {
            2 => (0, 0, 0, 4),
            _ => (
                be64(header, 72)?,
                be64(header, 80)?,
                be64(header, 88)?,
                be32(header, 96)?,
            ),
        };
        let backing_offset = be64(header, 8)?;
        let backing_len = be32(header, 16)? as usize;
        let extensions_end = match backing_offset {
            0 => bytes.len(),
            offset => usize::try_from(offset).map_or(bytes.len(), |o| o.min(bytes.len())),
        };
        let parsed = Parsed::parse(bytes.get(length..extensions_end).unwrap_or_default())?;
        features::refuse_unknown(incompatible, &parsed.feature_names)?;
        let has = |feature| incompatible & feature != 0;
        let geometry = Geometry::new(cluster_bits, refcount_order, has(features::EXTENDED_L2))?
            .with_external_data(has(features::DATA_FILE));
        let name = backing_name(bytes, backing_offset, backing_len)?;
        let this = Self {
            version,
            backing: name.map(|name| Backing {
                name,
                format: parsed.backing_format.clone(),
            }),
            geometry,
            size: be64(header, 24)?,
            encryption: match be32(header, 32)? {
                0 => Encryption::None,
                1 => Encryption::Aes,
                2 => Encryption::Luks,
                other => return Err(corrupt(format!("encryption method {other} is unknown"))),
            },
            l1_size: be32(header, 36)?,
            l1_offset: be64(header, 40)?,
            refcount_table_offset: be64(header, 48)?,
            refcount_table_clusters: be32(header, 56)?,
            snapshot_count: be32(header, 60)?,
            snapshots_offset: be64(header, 64)?,
            incompatible,
            compatible,
            autoclear,
            compression: compression(header, has(features::COMPRESSION))?,
            feature_names: parsed.feature_names,
            data_file: parsed.data_file,
            bitmaps: parsed.bitmaps,
            extensions: parsed.all,
            unknown_fields: header.get(FULL_LENGTH..).unwrap_or_default().to_vec(),
            length,
        };
        this.check(file_size)?;
        Ok(this)
    }

    /// A header for a new image: no tables, no features.
    pub(crate) fn new(version: u32, geometry: Geometry, size: u64) -> Self {
        // As `qemu-img` does: there the names would take too much of small clusters.
        let has_names = version >= 3 && geometry.cluster_size() >= 4096;
        Self {
            version,
            backing: None,
            geometry,
            size,
            encryption: Encryption::None,
            l1_size: 0,
            l1_offset: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            compression: Compression::Zlib,
            feature_names: match has_names {
                true => features::names(),
                false => Vec::new(),
            },
            data_file: None,
            bitmaps: None,
            extensions: Vec::new(),
            unknown_fields: Vec::new(),
            length: if version == 2 { V2_LENGTH } else { FULL_LENGTH },
        }
    }

    fn check(&self, file_size: u64) -> Result<()> {
        let geometry = self.geometry;
        if i64::try_from(self.size).is_err() {
            return Err(corrupt(format!("a disk of {} bytes cannot be", self.size)));
        }
        if u64::from(self.l1_size) * 8 > MAX_L1 {
            return Err(corrupt(format!(
                "the L1 table has {} entries; {} are the most that can be",
                self.l1_size,
                MAX_L1 / 8
            )));
        }
        let table = u64::from(self.refcount_table_clusters) * geometry.cluster_size();
        if table > MAX_REFCOUNT_TABLE {
            return Err(corrupt(format!(
                "the refcount table has {table} bytes; 8 MiB are the most"
            )));
        }
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(corrupt(format!(
                "{} snapshots are too many",
                self.snapshot_count
            )));
        }
        let places = [
            ("L1 table", self.l1_offset, self.l1_size > 0),
            ("refcount table", self.refcount_table_offset, true),
            (
                "snapshot table",
                self.snapshots_offset,
                self.snapshot_count > 0,
            ),
        ];
        for (what, offset, is_used) in places {
            if is_used && (geometry.offset_in_cluster(offset) != 0 || offset > OFFSET_MASK) {
                return Err(corrupt(format!(
                    "the {what} is said to be at offset {offset:#x}, where no cluster of a file begins"
                )));
            }
        }
        if self.l1_size > 0 && self.l1_offset >= file_size {
            return Err(corrupt(format!(
                "the L1 table is said to be at offset {:#x}, past the end of the file",
                self.l1_offset
            )));
        }
        if self.data_file.is_some() && !self.has_data_file() {
            return Err(corrupt("the image names a data file and does not use one"));
        }
        Ok(())
    }

    /// The bitmaps, if the header says that they are true: others are of no use to anybody, and what they had may be somebody
    /// else's.
    pub fn true_bitmaps(&self) -> Option<&BitmapsExtension> {
        let are_true = self.autoclear & features::BITMAPS != 0;
        self.bitmaps.as_ref().filter(|_| are_true)
    }

    /// Reads and parses the header of an image.
    pub async fn read(node: &dyn Node) -> Result<Self> {
        const MOST: u64 = 2 << 20;
        let size = node.size();
        // The first sector tells how large a cluster is.
        let first = read(node, size.min(512)).await?;
        let bits = be32(&first, 20).unwrap_or(0).clamp(9, 21);
        let whole = match size.min(1 << bits).min(MOST) {
            len if len as usize <= first.len() => first,
            len => read(node, len).await?,
        };
        Self::parse(&whole, size).map_err(|error| match node.filename() {
            Some(name) => Error::new(error.kind(), format!("'{name}': {error}")),
            None => error,
        })
    }

    /// The header's bytes, extensions and backing name and all. [`Kind::Invalid`] if they do not fit into a cluster.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.length];
        let mut put = |at: usize, field: &[u8]| {
            if let Some(room) = bytes.get_mut(at..at + field.len()) {
                room.copy_from_slice(field);
            }
        };
        put(0, &Self::MAGIC.to_be_bytes());
        put(4, &self.version.to_be_bytes());
        put(20, &self.geometry.cluster_bits().to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(32, &(self.encryption as u32).to_be_bytes());
        put(36, &self.l1_size.to_be_bytes());
        put(40, &self.l1_offset.to_be_bytes());
        put(48, &self.refcount_table_offset.to_be_bytes());
        put(56, &self.refcount_table_clusters.to_be_bytes());
        put(60, &self.snapshot_count.to_be_bytes());
        put(64, &self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            put(72, &self.incompatible.to_be_bytes());
            put(80, &self.compatible.to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &self.geometry.refcount_order().to_be_bytes());
            put(100, &(self.length as u32).to_be_bytes());
            if self.length > V3_LENGTH {
                put(V3_LENGTH, &[self.compression as u8]);
            }
            put(FULL_LENGTH, &self.unknown_fields);
        }
        for extension in self.current_extensions() {
            extension.encode(&mut bytes);
        }
        Extension::END.encode(&mut bytes);
        if let Some(backing) = &self.backing {
            let (offset, len) = (bytes.len() as u64, backing.name.len() as u32);
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            bytes[16..20].copy_from_slice(&len.to_be_bytes());
            bytes.extend_from_slice(backing.name.as_bytes());
        }
        let too_long = self
            .backing
            .as_ref()
            .is_some_and(|b| b.name.len() > MAX_BACKING_NAME);
        if bytes.len() as u64 > self.geometry.cluster_size() || too_long {
            let message = "the header does not fit into one cluster: use a shorter backing file name or larger clusters";
            return Err(Error::new(Kind::Invalid, message));
        }
        Ok(bytes)
    }

    /// Refcounts may be behind.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & features::DIRTY != 0
    }

    /// Somebody found that the image contradicts itself.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & features::CORRUPT != 0
    }

    /// Guest data is in a file of its own.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & features::DATA_FILE != 0
    }

    /// The data file is a raw image of the disk by itself.
    pub fn data_file_raw(&self) -> bool {
        self.autoclear & features::RAW_DATA != 0
    }

    /// Refcounts may be updated lazily.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & features::LAZY_REFCOUNTS != 0
    }
}

fn compression(header: &[u8], is_set: bool) -> Result<Compression> {
    let kind = match header.get(V3_LENGTH) {
        None => 0,
        Some(&kind) => kind,
    };
    match (kind, is_set) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0, true) => Err(corrupt(
            "the compression type is zlib, but the feature bit says another",
        )),
        (other, _) => {
            let message = format!("compression type {other} is unknown");
            Err(Error::new(Kind::Unsupported, message))
        }
    }
}

fn backing_name(bytes: &[u8], offset: u64, len: usize) -> Result<Option<String>> {
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    if len > MAX_BACKING_NAME {
        return Err(corrupt(format!(
            "the header says that the backing file's name has {len} bytes; 1023 are the most"
        )));
    }
    let start = usize::try_from(offset).map_err(|_| truncated())?;
    let end = start.checked_add(len).ok_or_else(truncated)?;
    let name = bytes.get(start..end).ok_or_else(|| {
        corrupt("the backing file's name is not within the cluster of the header")
    })?;
    let name = std::str::from_utf8(name);
    let name = name.map_err(|_| corrupt("the backing file's name is not UTF-8"))?;
    Ok(Some(name.to_owned()))
}

async fn read(node: &dyn Node, len: u64) -> Result<Vec<u8>> {
    let buf = Buf::new(len as usize).map_err(|e| Error::os(format!("allocate {len} bytes"), e))?;
    let (result, buf) = io::read(node, 0, buf).await;
    result.map(|()| buf.as_slice().to_vec())
}
