//! A closed image as bytes and header: what check, repair and snapshots work on. It must never change more than it is
//! told to, and keeps nothing in memory but the header.

use diskfuse_block::{Error, Kind, Node, Resize, Result, io};
use diskfuse_ring::Buf;

use crate::format::{Encryption, Geometry, Header, features};

use super::ahead;

/// Where fields of the header are, in bytes (specification, "Header").
mod field {
    pub(super) const SIZE: u64 = 24;
    pub(super) const ENCRYPTION: u64 = 32;
    pub(super) const REFCOUNT_TABLE: u64 = 48;
    pub(super) const SNAPSHOTS: u64 = 60;
    pub(super) const INCOMPATIBLE: u64 = 72;
    pub(super) const AUTOCLEAR: u64 = 88;
}

/// The autoclear features that we know how to keep true.
const KNOWN_AUTOCLEAR: u64 = features::BITMAPS | features::RAW_DATA;

/// An image that nobody has open.
pub(crate) struct Image<'a> {
    /// Where its bytes are.
    pub(crate) file: &'a dyn Node,
    /// As on disk.
    pub(crate) header: Header,
    /// The header's.
    pub(crate) geometry: Geometry,
}

impl<'a> Image<'a> {
    /// Reads the header. [`Kind::Unsupported`] if LUKS keeps keys in clusters that are not ours to know.
    pub(crate) async fn open(file: &'a dyn Node) -> Result<Self> {
        Self::with_header(file, Header::read(file).await?)
    }

    /// The same with a header that was read already.
    pub(crate) fn with_header(file: &'a dyn Node, header: Header) -> Result<Self> {
        let geometry = header.geometry;
        let image = Self {
            file,
            header,
            geometry,
        };
        if image.header.encryption == Encryption::Luks {
            return Err(Error::new(
                Kind::Unsupported,
                format!("'{}' is encrypted with LUKS: use qemu-img", image.name()),
            ));
        }
        Ok(image)
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        self.file.filename().unwrap_or_else(|| "the image".into())
    }

    /// Clusters that the file has, the last perhaps not whole.
    pub(crate) fn clusters(&self) -> u64 {
        self.file.size().div_ceil(self.geometry.cluster_size())
    }

    /// What is past the end of the file reads as zeroes.
    pub(crate) async fn read(&self, offset: u64, len: u64) -> Result<Buf> {
        ahead::read(self.file, offset, len).await
    }

    /// Writes bytes, growing the file if need be.
    pub(crate) async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut buf = Buf::new(bytes.len())
            .map_err(|e| Error::os(format!("{} bytes of memory", bytes.len()), e))?;
        buf.as_mut_slice().copy_from_slice(bytes);
        self.write_buf(offset, buf).await
    }

    /// The same of a buffer.
    pub(crate) async fn write_buf(&self, offset: u64, buf: Buf) -> Result<()> {
        let end = offset
            .checked_add(buf.len() as u64)
            .ok_or_else(|| Error::new(Kind::Invalid, format!("{offset} is no place in a file")))?;
        if end > self.file.size() {
            self.file.resize(end, Resize::AtLeast, false).await?;
        }
        io::write(self.file, offset, buf).await.0
    }

    /// Puts everything written so far on stable storage.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.file.flush().await
    }

    /// Must precede the first change: refuses a file that is read only, and withdraws what unknown features promise.
    pub(crate) async fn prepare_to_write(&mut self) -> Result<()> {
        if self.file.read_only() {
            return Err(Error::new(
                Kind::ReadOnly,
                format!("'{}' is open for reading only", self.name()),
            ));
        }
        let known = self.header.autoclear & KNOWN_AUTOCLEAR;
        if known != self.header.autoclear {
            self.set_autoclear(known).await?;
        }
        Ok(())
    }

    /// Sets and clears incompatible features, on disk and here; on stable storage when it returns. Nothing in
    /// version 2, which has none.
    pub(crate) async fn set_incompatible(&mut self, set: u64, clear: u64) -> Result<()> {
        let features = (self.header.incompatible | set) & !clear;
        if self.header.version < 3 || features == self.header.incompatible {
            return Ok(());
        }
        self.write(field::INCOMPATIBLE, &features.to_be_bytes())
            .await?;
        self.header.incompatible = features;
        self.flush().await
    }

    /// Changes the autoclear features, on disk and here; on stable storage when it returns.
    pub(crate) async fn set_autoclear(&mut self, features: u64) -> Result<()> {
        self.write(field::AUTOCLEAR, &features.to_be_bytes())
            .await?;
        self.header.autoclear = features;
        self.flush().await
    }

    /// Points the header to another refcount table, in one write. What it points to is on stable storage already.
    pub(crate) async fn set_refcount_table(&mut self, offset: u64, clusters: u32) -> Result<()> {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes[8..].copy_from_slice(&clusters.to_be_bytes());
        self.write(field::REFCOUNT_TABLE, &bytes).await?;
        self.header.refcount_table_offset = offset;
        self.header.refcount_table_clusters = clusters;
        self.flush().await
    }

    /// Points the header to another snapshot table, in one write.
    pub(crate) async fn set_snapshots(&mut self, offset: u64, count: u32) -> Result<()> {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&count.to_be_bytes());
        bytes[4..].copy_from_slice(&offset.to_be_bytes());
        self.write(field::SNAPSHOTS, &bytes).await?;
        self.header.snapshots_offset = offset;
        self.header.snapshot_count = count;
        self.flush().await
    }

    /// Points the header to another active L1 table and sets the disk's size, in one write.
    pub(crate) async fn set_l1(&mut self, offset: u64, entries: u32, size: u64) -> Result<()> {
        // Bytes 24..48: size, encryption method, L1 entries, L1 offset.
        let old = self.read(field::ENCRYPTION, 4).await?;
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&size.to_be_bytes());
        bytes[8..12].copy_from_slice(old.as_slice());
        bytes[12..16].copy_from_slice(&entries.to_be_bytes());
        bytes[16..].copy_from_slice(&offset.to_be_bytes());
        self.write(field::SIZE, &bytes).await?;
        self.header.size = size;
        self.header.l1_size = entries;
        self.header.l1_offset = offset;
        self.flush().await
    }
}

/// Big-endian words of a table.
pub(crate) fn words(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> {
    bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|w| u64::from_be_bytes(*w))
}
