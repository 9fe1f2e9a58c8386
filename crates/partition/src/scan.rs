//! Looking at a disk: reads what the tables' parsers want to see, then the first blocks of each partition.

use std::ops::Range;

use diskfuse_block::{Node, Result, io};
use diskfuse_ring::Buf;
use serde::Serialize;

use crate::blocks::Blocks;
use crate::filesystem::{self, FileSystem, Front};
use crate::table::{self, Table};

/// What is read of both ends of a disk at once: tables of the usual size are there.
const ENDS: u64 = 20 << 10;

/// Bytes of what is looked at of a file system at one place.
const PIECE: u64 = 4096;

/// What is on a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Contents {
    /// Its partition table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub table: Option<Table>,
    /// The file system that fills it, if there is no table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<FileSystem>,
    /// What is wrong, for people.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<String>,
}

/// Looks at `node`. Runs on a ring. What is wrong on the disk is in the answer; an error is one of reading.
pub async fn scan(node: &dyn Node) -> Result<Contents> {
    let size = node.size();
    let mut blocks = Blocks::new(size);
    blocks.load(node, 0..ENDS).await?;
    blocks.load(node, size.saturating_sub(ENDS)..size).await?;
    let mut contents = Contents::default();
    loop {
        contents.problems.clear();
        contents.table = table::read(&blocks, &mut contents.problems);
        match blocks.load_missed(node).await {
            Ok(true) => {}
            Ok(false) => break,
            Err(error) if contents.table.is_some() => {
                contents.problems.push(error.to_string());
                break;
            }
            Err(error) => return Err(error),
        }
    }
    match &mut contents.table {
        None => contents.filesystem = probe(node, 0..size).await?,
        Some(table) => {
            for partition in &mut table.partitions {
                let range = partition.offset..partition.offset.saturating_add(partition.size);
                match probe(node, range).await {
                    Ok(found) => partition.filesystem = found,
                    Err(error) => {
                        let number = partition.number;
                        contents.problems.push(format!("p{number}: {error}"));
                    }
                }
            }
        }
    }
    Ok(contents)
}

/// What is in a range of the disk.
async fn probe(node: &dyn Node, range: Range<u64>) -> Result<Option<FileSystem>> {
    let front = Front {
        first: piece(node, &range, 0).await?,
        at_32k: piece(node, &range, 32 << 10).await?,
        at_64k: piece(node, &range, 64 << 10).await?,
    };
    Ok(filesystem::probe(&front))
}

/// The bytes from `at` on in a range of the disk, as far as the range goes.
async fn piece(node: &dyn Node, range: &Range<u64>, at: u64) -> Result<Vec<u8>> {
    let len = (range.end - range.start).saturating_sub(at).min(PIECE);
    if len == 0 {
        return Ok(Vec::new());
    }
    let buf =
        Buf::new(PIECE as usize).map_err(|error| diskfuse_block::Error::os("get memory", error))?;
    let (read, buf) = io::read(node, range.start + at, buf.with_window(0..len as usize)).await;
    read?;
    Ok(buf.as_slice().to_vec())
}
