//! The master boot record, with logical partitions in an extended one. A chain of those is followed for a bounded number of
//! steps, never twice to the same place, and never out of the extended partition.
//!
//! Source: the layout that `Documentation/admin-guide/devices.txt` and `block/partitions/msdos.c` of Linux go by: signature
//! 0x55AA at 510, four entries of 16 bytes at 446 (boot flag, type at 4, first sector at 8, sectors at 12, little-endian).

use std::collections::BTreeSet;

use crate::blocks::Blocks;
use crate::table::{Kind, MOST_PARTITIONS, Partition, Table};

/// An MBR counts in these; disks of 4096-byte sectors come with a GPT.
const SECTOR: u64 = 512;

/// The type of the entry that says that there is a GPT.
const PROTECTIVE: u8 = 0xee;

/// The types of an extended partition.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// Extended boot records that are watched for writes one by one.
const MOST_WATCHED: usize = 64;

/// An entry of a boot record, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    kind: u8,
    /// In sectors.
    first: u32,
    sectors: u32,
}

impl Entry {
    fn is_used(self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn is_extended(self) -> bool {
        EXTENDED.contains(&self.kind) && self.sectors != 0
    }
}

/// A boot record with a table in it.
#[derive(Debug)]
pub(crate) struct Boot {
    entries: [Entry; 4],
    signature: u32,
    /// It is there for programs that do not know GPT.
    pub(crate) protects: bool,
}

/// Four bytes, little-endian; zero if they are not there.
pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    four.map_or(0, |four| u32::from_le_bytes(*four))
}

fn entries(sector: &[u8; 512]) -> [Entry; 4] {
    [446, 462, 478, 494].map(|at| Entry {
        kind: sector.get(at + 4).copied().unwrap_or(0),
        first: le32(sector, at + 8),
        sectors: le32(sector, at + 12),
    })
}

fn has_signature(sector: &[u8; 512]) -> bool {
    sector.ends_with(&[0x55, 0xaa])
}

/// The boot record, if what is in the first sector can be one: file systems put other things there.
pub(crate) fn boot(blocks: &Blocks) -> Option<Boot> {
    let sector = blocks.get::<512>(0).ok()?;
    let flags_are_right = [446, 462, 478, 494]
        .iter()
        .all(|&at| sector.get(at).is_some_and(|flag| [0, 0x80].contains(flag)));
    let entries = entries(&sector);
    let is_table =
        has_signature(&sector) && flags_are_right && entries.iter().any(|entry| entry.is_used());
    is_table.then(|| Boot {
        entries,
        signature: le32(&sector, 440),
        protects: entries.iter().any(|entry| entry.kind == PROTECTIVE),
    })
}

/// The table that the record begins.
pub(crate) fn read(blocks: &Blocks, boot: &Boot, problems: &mut Vec<String>) -> Table {
    let mut table = Table {
        kind: Kind::Mbr,
        sector_size: SECTOR as u32,
        uuid: Some(format!("{:08x}", boot.signature)).filter(|_| boot.signature != 0),
        partitions: Vec::new(),
        areas: Vec::new(),
    };
    for (number, entry) in (1..).zip(boot.entries) {
        if entry.is_used() && !entry.is_extended() {
            let at = u64::from(entry.first);
            table.partitions.push(partition(boot, number, at, entry));
        }
    }
    if let Some(extended) = boot.entries.iter().find(|entry| entry.is_extended()) {
        logical(blocks, boot, *extended, &mut table, problems);
    }
    table
}

/// Entry number `number`, which begins at sector `at`.
fn partition(boot: &Boot, number: u32, at: u64, entry: Entry) -> Partition {
    Partition {
        number,
        offset: at * SECTOR,
        size: u64::from(entry.sectors) * SECTOR,
        kind: format!("{:02x}", entry.kind),
        name: None,
        uuid: (boot.signature != 0).then(|| format!("{:08x}-{number:02x}", boot.signature)),
        filesystem: None,
    }
}

/// The logical partitions: each has a boot record of its own, which names the next one.
fn logical(
    blocks: &Blocks,
    boot: &Boot,
    extended: Entry,
    table: &mut Table,
    problems: &mut Vec<String>,
) {
    let start = u64::from(extended.first);
    let end = start + u64::from(extended.sectors);
    let mut at = start;
    let mut seen = BTreeSet::new();
    let mut number = 5;
    loop {
        if at < start || at >= end {
            problems.push("the chain of logical partitions leaves the extended one".to_owned());
            break;
        }
        if !seen.insert(at) {
            problems.push("the chain of logical partitions is a loop".to_owned());
            break;
        }
        if seen.len() > MOST_PARTITIONS {
            problems.push("the chain of logical partitions is too long".to_owned());
            break;
        }
        // What was not read yet is read, and the walk begins again.
        let Ok(sector) = blocks.get::<512>(at * SECTOR) else {
            problems.push("a boot record of a logical partition cannot be read".to_owned());
            break;
        };
        if !has_signature(&sector) {
            // An extended partition without any has no record.
            if at != start {
                problems.push("a boot record of a logical partition is damaged".to_owned());
            }
            break;
        }
        let [here, next, ..] = entries(&sector);
        if here.is_used() && !here.is_extended() {
            let first = at + u64::from(here.first);
            table.partitions.push(partition(boot, number, first, here));
            number += 1;
        }
        if !next.is_extended() {
            break;
        }
        at = start + u64::from(next.first);
    }
    let records = seen.iter().map(|at| at * SECTOR..(at + 1) * SECTOR);
    table.areas = match seen.len() {
        0..=MOST_WATCHED => records.collect(),
        _ => std::iter::once(start * SECTOR..end * SECTOR).collect(),
    };
}
