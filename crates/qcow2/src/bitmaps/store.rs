//! Storing: all of it to new clusters, then the header. What cannot be stored leaves the bitmaps that are there, marked as in use.

use std::collections::BTreeSet;

use diskfuse_block::{DirtyBitmap, Error, Kind, Node, Result};

use super::load::clusters_of;
use super::{PersistentBitmap, is_lost};
use crate::format::BitmapsExtension;
use crate::format::bitmap::{
    AUTO, DIRTY_TRACKING, DirectoryEntry, IN_USE, TableEntry, encode_directory,
};
use crate::meta::Meta;

/// Stores bitmaps, in this order, in the place of those that the file has. Returns what it has of each of them then. The image is
/// prepared for changes, and nobody changes anything else.
///
/// # Errors
/// Those of a full or failing disk; then the file has what it had, or already the new ones.
pub(crate) async fn store(meta: &Meta, all: &[PersistentBitmap]) -> Result<Vec<DirectoryEntry>> {
    let mut new = Clusters::new(meta);
    let mut entries = Vec::new();
    for one in all {
        match &one.stored {
            // What there is of it is as useless as it was.
            Some(stored) if is_lost(one) => entries.push(stored.clone()),
            _ => entries.push(new.write(&one.name, &one.bitmap).await?),
        }
    }
    new.name(&entries).await?;
    Ok(entries)
}

/// Has the directory name these bitmaps of the file, and no others.
pub(crate) async fn write_directory(meta: &Meta, entries: &[DirectoryEntry]) -> Result<()> {
    Clusters::new(meta).name(entries).await
}

/// The clusters of bitmaps that no directory names any more are free; what it costs to find them is paid now.
pub(crate) async fn drop_stored(meta: &Meta, file: &dyn Node, gone: &[DirectoryEntry]) {
    let geometry = meta.geometry();
    let mut clusters = BTreeSet::new();
    for entry in gone {
        match clusters_of(file, geometry, entry).await {
            Ok(of_entry) => clusters.extend(of_entry),
            Err(error) => {
                let name = String::from_utf8_lossy(&entry.name).into_owned();
                tracing::warn!(image = meta.name(), name, %error, "the clusters of a bitmap are leaked");
            }
        }
    }
    for cluster in clusters {
        meta.drop_row_of_bitmaps(cluster, geometry.cluster_size());
    }
}

/// New clusters, which are given back unless the header names them, or may name them.
struct Clusters<'m> {
    meta: &'m Meta,
    /// Byte offsets, and bytes.
    rows: Vec<(u64, u64)>,
}

impl<'m> Clusters<'m> {
    fn new(meta: &'m Meta) -> Self {
        let rows = Vec::new();
        Self { meta, rows }
    }

    /// Writes bytes to clusters in a row; their byte offset.
    async fn put(&mut self, mut bytes: Vec<u8>) -> Result<u64> {
        let cluster = self.meta.geometry().cluster_size();
        bytes.resize(bytes.len().next_multiple_of(cluster as usize), 0);
        let len = bytes.len() as u64;
        let offset = self.meta.allocate_for_bitmaps(len).await?;
        self.rows.push((offset, len));
        self.meta.write_of_bitmaps(offset, &bytes).await?;
        Ok(offset)
    }

    async fn write(&mut self, name: &str, bitmap: &DirtyBitmap) -> Result<DirectoryEntry> {
        // Before the bits are read: of one that a job has taken the marks of nothing can be believed.
        let (info, mut bits) = (bitmap.info(), bitmap.bits_of_disk());
        if info.inconsistent {
            // Its bits are of no use to anybody; the format asks for a table all the same.
            bits = self.meta.size().div_ceil(info.granularity);
        }
        let cluster = self.meta.geometry().cluster_size();
        let covers = cluster * 8;
        let mut table = Vec::new();
        let mut at = 0;
        while at * 8 < bits {
            let mut bytes = vec![0; cluster as usize];
            if !info.inconsistent {
                bitmap.copy_to_bytes(at, &mut bytes);
            }
            let whole = bits - at * 8 >= covers;
            let entry = match (whole, bytes.iter().all(|&byte| byte == 0)) {
                (_, true) => TableEntry::Zeroes,
                (true, _) if bytes.iter().all(|&byte| byte == 0xff) => TableEntry::Ones,
                _ => TableEntry::Data(self.put(bytes).await?),
            };
            table.extend(entry.encode().to_be_bytes());
            at += cluster;
        }
        let table_entries = u32::try_from(table.len() / 8).map_err(|_| too_large(name))?;
        let table_offset = match table_entries {
            0 => 0,
            _ => self.put(table).await?,
        };
        let auto = if info.recording { AUTO } else { 0 };
        let in_use = if info.busy || info.inconsistent {
            IN_USE
        } else {
            0
        };
        Ok(DirectoryEntry {
            table_offset,
            table_entries,
            flags: auto | in_use,
            kind: DIRTY_TRACKING,
            granularity_bits: info.granularity.trailing_zeros() as u8,
            extra: Vec::new(),
            name: name.as_bytes().to_vec(),
        })
    }

    /// Writes a directory of these bitmaps, and has the header name it; with none it names nothing.
    async fn name(mut self, entries: &[DirectoryEntry]) -> Result<()> {
        let mut place = None;
        if !entries.is_empty() {
            let directory = encode_directory(entries);
            place = Some(BitmapsExtension {
                count: u32::try_from(entries.len()).map_err(|_| too_large("all of them"))?,
                directory_size: directory.len() as u64,
                directory_offset: self.put(directory).await?,
            });
        }
        let named = self.meta.name_bitmaps(place.clone()).await;
        if named.is_ok() || place.is_some_and(|place| self.meta.may_name_bitmaps(&place)) {
            self.rows.clear();
        }
        named
    }
}

impl Drop for Clusters<'_> {
    fn drop(&mut self) {
        for (offset, len) in self.rows.drain(..) {
            self.meta.drop_row_of_bitmaps(offset, len);
        }
    }
}

fn too_large(name: &str) -> Error {
    Error::new(
        Kind::Invalid,
        format!("bitmap {name}: too large to be stored"),
    )
}
