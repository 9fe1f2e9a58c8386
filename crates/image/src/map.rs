//! Where each byte of a disk is: in which image of the chain, whether it is data or known zeroes, and at which place of
//! the file. It reads tables only. The fields are those of `qemu-img map --output=json`.

use std::sync::Arc;

use diskfuse_block::{Error, Kind, Node, Result};
use diskfuse_qcow2::node::{Layered, Qcow2Node};
use serde::Serialize;

use crate::session::Session;

/// A part of the disk that is alike throughout.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MapEntry {
    /// Where it begins on the disk, in bytes.
    pub start: u64,
    /// Its bytes.
    pub length: u64,
    /// How many images below the top one it is in, or the search for it ended.
    pub depth: usize,
    /// Some image of the chain has it.
    pub present: bool,
    /// It is known to read as zeroes.
    pub zero: bool,
    /// There is data.
    pub data: bool,
    /// The data is compressed.
    pub compressed: bool,
    /// Where it is in the file, in bytes, if it is there as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// That file.
    #[serde(skip)]
    pub filename: Option<String>,
}

impl MapEntry {
    /// Whether `next` is more of the same, right behind it.
    fn continues(&self, next: &Self) -> bool {
        let alike = |entry: &Self| {
            (
                entry.depth,
                entry.present,
                entry.zero,
                entry.data,
                entry.compressed,
            )
        };
        let offsets = match (self.offset, next.offset) {
            (Some(offset), Some(next)) => offset.checked_add(self.length) == Some(next),
            (None, None) => true,
            _ => false,
        };
        self.start + self.length == next.start
            && alike(self) == alike(next)
            && offsets
            && self.filename == next.filename
    }
}

/// One image of the chain.
struct Level {
    node: Arc<dyn Node>,
    qcow2: Option<Arc<Qcow2Node>>,
    /// The tables may name places where nothing was ever written: the file below is asked as well.
    preallocated: bool,
}

/// The map of a range of an open image, `start..end` in bytes, handed to `tell` part by part.
pub async fn map(
    image: &Session,
    start: u64,
    end: u64,
    mut tell: impl FnMut(MapEntry) -> Result<()>,
) -> Result<()> {
    let levels = levels(image).await?;
    let end = end.min(image.node().size());
    let mut at = start;
    let mut pending: Option<MapEntry> = None;
    while at < end {
        let entry = look(&levels, at, end - at).await?;
        at += entry.length;
        match &mut pending {
            Some(last) if last.continues(&entry) => last.length += entry.length,
            _ => {
                if let Some(done) = pending.replace(entry) {
                    tell(done)?;
                }
            }
        }
    }
    pending.map_or(Ok(()), tell)
}

async fn levels(image: &Session) -> Result<Vec<Level>> {
    let top = (&image.opened.node, &image.opened.qcow2);
    let below = image.opened.below.iter();
    let all = std::iter::once(top).chain(below.map(|layer| (&layer.node, &layer.qcow2)));
    let mut levels = Vec::new();
    for (node, qcow2) in all {
        let preallocated = match qcow2 {
            Some(qcow2) => looks_preallocated(qcow2).await?,
            None => false,
        };
        levels.push(Level {
            node: Arc::clone(node),
            qcow2: qcow2.clone(),
            preallocated,
        });
    }
    Ok(levels)
}

/// Whether an image has many clusters that take no space on the host. (QEMU's rule,
/// `qcow2_detect_metadata_preallocation`: more than 10/9 of those that do, and more than two.)
async fn looks_preallocated(qcow2: &Qcow2Node) -> Result<bool> {
    let cluster = qcow2.header().geometry.cluster_size();
    let real = qcow2.allocated().div_ceil(cluster);
    let threshold = (real.saturating_mul(10) / 9).max(real + 2);
    // The tables need not be read if the disk itself has not so many.
    let size = qcow2.size();
    let mut found = 0;
    let mut at = 0;
    while at < size && found < threshold {
        let status = qcow2.layer_status(at, size - at).await?;
        if status.host_offset.is_some() {
            found += status.len.div_ceil(cluster);
        }
        at += step(status.len, size - at)?;
    }
    Ok(found >= threshold)
}

/// A length that a node answered, checked.
fn step(len: u64, most: u64) -> Result<u64> {
    if len == 0 || len > most {
        return Err(Error::new(
            Kind::Corrupt,
            "an image says nothing of its contents",
        ));
    }
    Ok(len)
}

/// What is at `start`, `len` bytes at most.
async fn look(levels: &[Level], start: u64, mut len: u64) -> Result<MapEntry> {
    for (depth, level) in levels.iter().enumerate() {
        let nothing = |length| MapEntry {
            start,
            length,
            depth,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            offset: None,
            filename: None,
        };
        let size = level.node.size();
        let Some(here) = size.checked_sub(start).filter(|&here| here > 0) else {
            // QEMU stops above a backing file that is too short.
            return Ok(MapEntry {
                depth: depth.saturating_sub(1),
                ..nothing(len)
            });
        };
        len = len.min(here);
        let Some(qcow2) = &level.qcow2 else {
            let status = level.node.block_status(start, len).await?;
            return Ok(MapEntry {
                present: true,
                zero: status.zero,
                data: !status.zero,
                offset: status.host_offset.or(Some(start)),
                filename: level.node.filename(),
                ..nothing(step(status.len, len)?)
            });
        };
        let status = qcow2.map_status(start, len).await?;
        len = step(status.len, len)?;
        let found = MapEntry {
            present: true,
            zero: status.layered == Layered::Zero,
            data: status.layered != Layered::Zero,
            compressed: status.layered == Layered::Compressed,
            offset: status.host_offset,
            filename: status
                .host_offset
                .and_then(|_| qcow2.data_node().filename()),
            ..nothing(len)
        };
        match status.layered {
            Layered::Unallocated if depth + 1 == levels.len() => {
                return Ok(MapEntry {
                    offset: status.host_offset,
                    ..nothing(len)
                });
            }
            Layered::Unallocated => {}
            Layered::Data if level.preallocated => {
                return through_file(qcow2, found).await;
            }
            _ => return Ok(found),
        }
    }
    Err(Error::new(Kind::Corrupt, "there is no image to map"))
}

/// Data of an image that may never have been written: what the file below says of its place.
async fn through_file(qcow2: &Qcow2Node, found: MapEntry) -> Result<MapEntry> {
    let Some(offset) = found.offset else {
        return Ok(found);
    };
    let file = qcow2.data_node();
    let there = file.size().saturating_sub(offset).min(found.length);
    if there == 0 {
        return Ok(MapEntry {
            zero: true,
            ..found
        });
    }
    let status = file.block_status(offset, there).await?;
    Ok(MapEntry {
        length: step(status.len, there)?,
        zero: status.zero,
        ..found
    })
}
