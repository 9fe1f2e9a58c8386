//! Partition tables as values: which partitions there are, and what is wrong with them. It decides which of two tables of a
//! disk counts, and never shows a partition that is not wholly on the disk.

use std::collections::BTreeMap;
use std::ops::Range;

use gpt::GptConfig;
use gpt::disk::LogicalBlockSize;
use serde::Serialize;

use crate::blocks::{Blocks, View};
use crate::filesystem::FileSystem;
use crate::mbr;

/// Partitions that are shown of a table; more are said to be there.
pub const MOST_PARTITIONS: usize = 1024;

/// Entries of a GPT at most: 512 KiB of them. Usual are 128.
const MOST_ENTRIES: u32 = 4096;

/// Bytes of an entry; nobody has made a table with others, and the crate that reads them knows no others.
const ENTRY: u32 = 128;

/// What the table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// GUID partition table.
    Gpt,
    /// Master boot record.
    Mbr,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Partition {
    /// As the kernel numbers it: from 1; logical ones of an MBR from 5.
    pub number: u32,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its bytes.
    pub size: u64,
    /// A GUID (GPT), or a byte in hexadecimal (MBR).
    #[serde(rename = "type")]
    pub kind: String,
    /// What a GPT calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The partition's own UUID, or what stands for it in an MBR.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// What is on it, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<FileSystem>,
}

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Table {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Bytes of the sectors that it counts in.
    pub sector_size: u32,
    /// The disk's own UUID, or what stands for it in an MBR.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// In the order of their numbers.
    pub partitions: Vec<Partition>,
    /// Where the table is, apart from the beginning and the end of the disk, in bytes.
    #[serde(skip)]
    pub areas: Vec<Range<u64>>,
}

/// The table, if there is one, with what is wrong with it in `problems`. Looks at what is in memory only: see [`Blocks`].
pub(crate) fn read(blocks: &Blocks, problems: &mut Vec<String>) -> Option<Table> {
    let boot = mbr::boot(blocks);
    let boot_is_lost = blocks
        .get::<512>(0)
        .is_ok_and(|b| b.iter().all(|&b| b == 0));
    let table = match boot {
        Some(boot) if !boot.protects => Some(mbr::read(blocks, &boot, problems)),
        None if !boot_is_lost => None,
        _ => {
            let table = read_gpt(blocks, problems);
            match (&table, boot.is_some()) {
                (Some(_), true) => {}
                (Some(_), false) => {
                    problems.push("the protective MBR is missing; the GPT is used".to_owned());
                }
                (None, true) => problems
                    .push("the MBR says that there is a GPT, but none can be used".to_owned()),
                // Nothing there.
                (None, false) => problems.clear(),
            }
            table
        }
    };
    table.map(|mut table| {
        check(&mut table, blocks.size(), problems);
        table
    })
}

/// A header of a GPT.
struct Header {
    /// Where it is, in bytes.
    at: u64,
    /// `first` or `backup`.
    what: &'static str,
}

/// Whether there is a header with sizes that are borne.
fn is_sane(blocks: &Blocks, header: &Header, problems: &mut Vec<String>) -> bool {
    let Ok(bytes) = blocks.get::<92>(header.at) else {
        return false;
    };
    if !bytes.starts_with(b"EFI PART") {
        return false;
    }
    let word = |at: usize| mbr::le32(&bytes, at);
    let (entries, size) = (word(80), word(84));
    if entries > MOST_ENTRIES || size != ENTRY {
        problems.push(format!(
            "the {} header of the GPT speaks of {entries} entries of {size} bytes, which is not believed",
            header.what
        ));
        return false;
    }
    true
}

fn read_gpt(blocks: &Blocks, problems: &mut Vec<String>) -> Option<Table> {
    let mut found = Vec::new();
    for (sector, how) in [
        (512, LogicalBlockSize::Lb512),
        (4096, LogicalBlockSize::Lb4096),
    ] {
        let last = (blocks.size() / sector).checked_sub(1)? * sector;
        let headers = [("first", sector), ("backup", last)].map(|(what, at)| Header { at, what });
        let [primary, backup] = &headers;
        let sane: Vec<bool> = headers
            .iter()
            .map(|header| is_sane(blocks, header, &mut found))
            .collect();
        for (header, other) in [(primary, backup), (backup, primary)] {
            let is_there = sane.get(usize::from(header.what != "first"));
            if is_there != Some(&true) {
                continue;
            }
            // The crate takes the first header that is right, so the other one is hidden.
            let other = other.at..other.at + sector;
            match open(blocks, how, vec![other]) {
                Ok(table) => {
                    if header.what == "backup" {
                        let message = "the first header of the GPT, or its table, is damaged or missing; the backup at the end \
                                       of the disk is used";
                        problems.push(message.to_owned());
                    }
                    problems.append(&mut found);
                    return Some(table);
                }
                Err(why) => found.push(format!("the {} table of the GPT: {why}", header.what)),
            }
        }
    }
    problems.append(&mut found);
    None
}

fn open(blocks: &Blocks, how: LogicalBlockSize, hidden: Vec<Range<u64>>) -> Result<Table, String> {
    let view = View::new(blocks, hidden);
    let config = GptConfig::new().writable(false).logical_block_size(how);
    let disk = config
        .open_from_device(view)
        .map_err(|error| error.to_string())?;
    let header = disk.header();
    let sector = how.as_u64();
    let area = |lba: u64, len: u64| {
        let start = lba.saturating_mul(sector);
        start..start.saturating_add(len)
    };
    let entries = u64::from(header.num_parts) * u64::from(header.part_size);
    let areas = vec![
        area(header.current_lba, sector),
        area(header.part_start, entries),
    ];
    let used = disk.partitions().iter();
    let used = used.filter(|(_, partition)| partition.is_used());
    let partitions = used.map(|(&number, partition)| {
        let sectors = partition
            .last_lba
            .checked_add(1)
            .and_then(|end| end.checked_sub(partition.first_lba));
        Partition {
            number,
            offset: partition.first_lba.saturating_mul(sector),
            // Nothing, which is found to be wrong, for one that ends before it begins.
            size: sectors.unwrap_or(0).saturating_mul(sector),
            kind: partition.part_type_guid.guid.to_string(),
            name: Some(partition.name.clone()).filter(|name| !name.is_empty()),
            uuid: Some(partition.part_guid.to_string()),
            filesystem: None,
        }
    });
    Ok(Table {
        kind: Kind::Gpt,
        sector_size: sector as u32,
        uuid: Some(disk.guid().to_string()),
        partitions: partitions.collect(),
        areas,
    })
}

/// Takes out what cannot be shown, and says what is odd.
fn check(table: &mut Table, disk: u64, problems: &mut Vec<String>) {
    let partitions = std::mem::take(&mut table.partitions);
    let mut by_number: BTreeMap<u32, Partition> = BTreeMap::new();
    let mut left_out = 0_usize;
    for partition in partitions {
        let number = partition.number;
        let end = partition.offset.checked_add(partition.size);
        if partition.size == 0 {
            problems.push(format!("p{number} is empty, or ends before it begins"));
        } else if end.is_none_or(|end| end > disk) {
            problems.push(format!(
                "p{number} reaches past the end of the disk ({} bytes at {}, and the disk has {disk}); it is not shown",
                partition.size, partition.offset
            ));
        } else if by_number.len() >= MOST_PARTITIONS {
            left_out += 1;
        } else {
            by_number.insert(number, partition);
        }
    }
    if left_out > 0 {
        problems.push(format!(
            "{left_out} partitions beyond the first {MOST_PARTITIONS} are not shown"
        ));
    }
    table.partitions = by_number.into_values().collect();
    overlaps(&table.partitions, problems);
}

/// Says which partitions overlap; they are shown all the same.
fn overlaps(partitions: &[Partition], problems: &mut Vec<String>) {
    /// Enough for people to see.
    const MOST: usize = 10;
    let mut by_offset: Vec<&Partition> = partitions.iter().collect();
    by_offset.sort_by_key(|partition| partition.offset);
    let mut furthest: Option<&Partition> = None;
    let mut said = 0;
    for partition in by_offset {
        let end = |p: &Partition| p.offset.saturating_add(p.size);
        if let Some(before) = furthest
            && end(before) > partition.offset
            && said < MOST
        {
            said += 1;
            problems.push(format!(
                "p{} and p{} overlap",
                before.number, partition.number
            ));
        }
        if furthest.is_none_or(|before| end(before) < end(partition)) {
            furthest = Some(partition);
        }
    }
}
