//! Loading: what the directory names, checked. Nothing of it may be believed before.

use std::collections::HashSet;
use std::sync::Arc;

use diskfuse_block::{DirtyBitmap, Error, Kind, Node, Result, io};
use diskfuse_ring::Buf;

use super::{PersistentBitmap, bytes_of};
use crate::format::bitmap::{
    self, AUTO, DIRTY_TRACKING, DirectoryEntry, GRANULARITY_BITS, IN_USE, LONGEST_NAME, MOST_BYTES,
    TableEntry,
};
use crate::format::{BitmapsExtension, Geometry, Header};

/// Bytes that all bitmaps of an image may take in memory.
const MOST_IN_MEMORY: u64 = 2 << 30;

/// The directory of an image, if it has bitmaps that are said to be true.
///
/// # Errors
/// [`Kind::Corrupt`] if it cannot be, or one of its entries.
pub(crate) async fn read_directory(
    file: &dyn Node,
    header: &Header,
) -> Result<Vec<DirectoryEntry>> {
    let Some(place) = header.true_bitmaps() else {
        return Ok(Vec::new());
    };
    check_place(file, header.geometry, place).map_err(|what| corrupt(file, &what))?;
    let directory = read(file, place.directory_offset, place.directory_size).await?;
    let entries = bitmap::parse_directory(directory.as_slice(), place.count)
        .map_err(|error| corrupt(file, &error.to_string()))?;
    let mut names = HashSet::new();
    for entry in &entries {
        let name = String::from_utf8_lossy(&entry.name);
        check(entry, header.geometry).map_err(|what| {
            corrupt(
                file,
                &format!("Bitmap '{name}' doesn't satisfy the constraints: {what}"),
            )
        })?;
        if !names.insert(&entry.name) {
            return Err(corrupt(file, &format!("Bitmap already exists: {name}")));
        }
    }
    Ok(entries)
}

fn check_place(
    file: &dyn Node,
    geometry: Geometry,
    place: &BitmapsExtension,
) -> std::result::Result<(), String> {
    let (at, len) = (place.directory_offset, place.directory_size);
    let within = at.checked_add(len).is_some_and(|end| end <= file.size());
    if within && at > 0 && geometry.offset_in_cluster(at) == 0 {
        return Ok(());
    }
    Err(format!(
        "the bitmap directory, {len} bytes at offset {at:#x}, is not within the file"
    ))
}

fn check(entry: &DirectoryEntry, geometry: Geometry) -> std::result::Result<(), &'static str> {
    if entry.kind != DIRTY_TRACKING {
        return Err("its type is not known");
    }
    if entry.flags & !(IN_USE | AUTO) != 0 || !entry.extra.is_empty() {
        return Err("it has flags or data that are not known");
    }
    if !GRANULARITY_BITS.contains(&entry.granularity_bits) {
        return Err("its granularity is not one of those that can be");
    }
    let bytes = u64::from(entry.table_entries) * geometry.cluster_size();
    if bytes > MOST_BYTES {
        return Err("its table is larger than any can be");
    }
    if !(1..=LONGEST_NAME).contains(&entry.name.len()) || std::str::from_utf8(&entry.name).is_err()
    {
        return Err("its name is not text of 1 to 1023 bytes");
    }
    Ok(())
}

/// The bitmaps of a directory. Of those that are in use nothing but the name is of use.
///
/// # Errors
/// [`Kind::Corrupt`] if something of them cannot be; [`Kind::Unsupported`] if they would take too much memory.
pub(crate) async fn load(
    file: &dyn Node,
    header: &Header,
    entries: Vec<DirectoryEntry>,
) -> Result<Vec<PersistentBitmap>> {
    let mut budget = MOST_IN_MEMORY;
    let mut all = Vec::new();
    for entry in entries {
        let name = String::from_utf8_lossy(&entry.name).into_owned();
        let granularity = 1 << entry.granularity_bits;
        let bitmap = match entry.flags & IN_USE == 0 {
            false => {
                let lost = DirtyBitmap::new(0, granularity)?;
                lost.set_inconsistent();
                lost
            }
            true => {
                let bytes = bytes_of(header.size, granularity);
                budget = budget.checked_sub(bytes).ok_or_else(|| {
                    let message = "its bitmaps are too large together to be loaded; remove some (qemu-img bitmap --remove)";
                    Error::new(Kind::Unsupported, format!("{}: {message}", name_of(file)))
                })?;
                let loaded = load_one(file, header, &entry).await;
                loaded.map_err(|error| of_bitmap(file, &name, &error))?
            }
        };
        all.push(PersistentBitmap {
            name,
            bitmap: Arc::new(bitmap),
            stored: Some(entry),
        });
    }
    Ok(all)
}

async fn load_one(file: &dyn Node, header: &Header, entry: &DirectoryEntry) -> Result<DirtyBitmap> {
    let geometry = header.geometry;
    let cluster = geometry.cluster_size();
    let granularity = 1 << entry.granularity_bits;
    let bytes = bytes_of(header.size, granularity);
    let needed = bytes.div_ceil(cluster);
    if u64::from(entry.table_entries) != needed || bytes > MOST_BYTES {
        let message = format!(
            "its table has {} entries, and for a disk of {} bytes it needs {needed}",
            entry.table_entries, header.size
        );
        return Err(Error::new(Kind::Corrupt, message));
    }
    let table = read_table(file, geometry, entry).await?;
    let bitmap = DirtyBitmap::new(header.size, granularity)?;
    bitmap.set_recording(entry.flags & AUTO != 0);
    for (index, word) in (0..).zip(table) {
        let at = index * cluster;
        match TableEntry::decode(word, geometry) {
            Some(TableEntry::Zeroes) => {}
            Some(TableEntry::Ones) => {
                let covers = cluster * 8 * granularity;
                let from = at * 8 * granularity;
                bitmap.mark(from, covers.min(header.size - from));
            }
            Some(TableEntry::Data(host)) if is_within(file, host, cluster) => {
                let bits = read(file, host, cluster).await?;
                bitmap.mark_from_bytes(at, bits.as_slice());
            }
            _ => {
                let message = format!("entry {index} of its table, {word:#x}, cannot be right");
                return Err(Error::new(Kind::Corrupt, message));
            }
        }
    }
    Ok(bitmap)
}

/// The words of a bitmap's table.
async fn read_table(
    file: &dyn Node,
    geometry: Geometry,
    entry: &DirectoryEntry,
) -> Result<Vec<u64>> {
    let (at, len) = (entry.table_offset, u64::from(entry.table_entries) * 8);
    if len == 0 {
        return Ok(Vec::new());
    }
    if at == 0 || geometry.offset_in_cluster(at) != 0 || !is_within(file, at, len) {
        let message = format!("its table at offset {at:#x} is not within the file");
        return Err(Error::new(Kind::Corrupt, message));
    }
    let bytes = read(file, at, len).await?;
    let words = bytes.as_slice().as_chunks::<8>().0.iter();
    Ok(words.map(|word| u64::from_be_bytes(*word)).collect())
}

/// The clusters of a bitmap's bits and of its table, as far as they can be: byte offsets.
pub(super) async fn clusters_of(
    file: &dyn Node,
    geometry: Geometry,
    entry: &DirectoryEntry,
) -> Result<Vec<u64>> {
    let cluster = geometry.cluster_size();
    let table = read_table(file, geometry, entry).await?;
    let tables = (entry.table_offset..).step_by(usize::try_from(cluster).unwrap_or(usize::MAX));
    let tables = tables.take((table.len() as u64 * 8).div_ceil(cluster) as usize);
    let host = |word: u64| match TableEntry::decode(word, geometry) {
        Some(TableEntry::Data(host)) if is_within(file, host, cluster) => Some(host),
        _ => None,
    };
    Ok(tables.chain(table.into_iter().filter_map(host)).collect())
}

fn is_within(file: &dyn Node, offset: u64, len: u64) -> bool {
    offset
        .checked_add(len)
        .is_some_and(|end| end <= file.size())
}

async fn read(file: &dyn Node, offset: u64, len: u64) -> Result<Buf> {
    let room = usize::try_from(len).unwrap_or(usize::MAX);
    let buf = Buf::new(room).map_err(|error| Error::os(format!("{len} bytes of memory"), error))?;
    let (result, buf) = io::read(file, offset, buf).await;
    result.map(|()| buf)
}

fn name_of(file: &dyn Node) -> String {
    let name = file.filename().unwrap_or_else(|| "qcow2".to_owned());
    format!("'{name}'")
}

fn corrupt(file: &dyn Node, what: &str) -> Error {
    Error::new(Kind::Corrupt, format!("{}: {what}", name_of(file)))
}

fn of_bitmap(file: &dyn Node, name: &str, error: &Error) -> Error {
    let image = name_of(file);
    let message = format!("{image}: Could not read bitmap '{name}' from image: {error}");
    Error::new(error.kind(), message)
}
