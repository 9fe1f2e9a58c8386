//! What a disk may hold: for each sector the values that it may have, as tags. Requests that ran at the same time and
//! overlap leave several; a later one that covers the sector whole leaves its own.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::image::SECTOR;

/// What a sector holds: [`ZERO`], [`INITIAL`], or what the write with this number wrote there.
pub type Tag = u32;
pub const ZERO: Tag = 0;
/// What it held when the model was made.
pub const INITIAL: Tag = 1;
/// The numbers of writes begin here; they have 24 bits.
pub const FIRST: Tag = 2;

/// The bytes that the write `tag` puts into `sector`. They tell where they belong.
pub fn sector_bytes(tag: Tag, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    if tag != ZERO {
        let head = 0xD1 << 56 | u64::from(tag) << 32 | sector & 0xFFFF_FFFF;
        for (n, word) in bytes.chunks_mut(8).enumerate() {
            let value = head.wrapping_mul(1 + n as u64);
            word.copy_from_slice(&value.to_be_bytes());
        }
    }
    bytes
}

/// The bytes of a whole write.
pub fn write_bytes(tag: Tag, offset: u64, len: u64) -> Vec<u8> {
    let sectors = offset / SECTOR..(offset + len) / SECTOR;
    sectors.flat_map(|s| sector_bytes(tag, s)).collect()
}

/// The write and the sector that these bytes were written for, if they are those of a write, whole.
pub fn whose(bytes: &[u8]) -> Option<(Tag, u64)> {
    let head = u64::from_be_bytes(bytes.get(..8)?.try_into().ok()?);
    let (tag, sector) = ((head >> 32) as u32 & 0xFF_FFFF, head & 0xFFFF_FFFF);
    (head >> 56 == 0xD1 && bytes == sector_bytes(tag, sector)).then_some((tag, sector))
}

/// What found bytes look like, for people.
fn describe(bytes: &[u8]) -> String {
    match whose(bytes) {
        Some((tag, sector)) => format!("write {tag} at sector {sector}"),
        None if bytes.iter().all(|&b| b == 0) => "zeroes".to_owned(),
        None => format!("{:02x?}…{:02x?}", &bytes[..12], &bytes[500..]),
    }
}

/// One request, as far as it matters to the contents.
#[derive(Clone, Debug)]
pub enum Change {
    Write { offset: u64, len: u64, tag: Tag },
    Zero { offset: u64, len: u64 },
    Discard { offset: u64, len: u64 },
}

impl Change {
    pub fn range(&self) -> (u64, u64) {
        let (Self::Write { offset, len, .. }
        | Self::Zero { offset, len }
        | Self::Discard { offset, len }) = *self;
        (offset, len)
    }

    fn sectors(&self) -> std::ops::Range<u64> {
        let (offset, len) = self.range();
        offset / SECTOR..(offset + len) / SECTOR
    }
}

pub struct Model {
    pub size: u64,
    /// Sectors that are not here are zeroes.
    sectors: HashMap<u64, Vec<Tag>>,
    initial: File,
}

impl Model {
    /// Of a disk that holds what `raw` holds, which must not change.
    pub fn of(raw: &Path) -> Self {
        let initial = File::open(raw).unwrap();
        let size = initial.metadata().unwrap().len();
        let mut sectors = HashMap::new();
        for (start, len) in data_extents(&initial, size) {
            let bytes = read_at(&initial, start, len);
            for (n, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
                if bytes.iter().any(|&b| b != 0) {
                    sectors.insert(start / SECTOR + n as u64, vec![INITIAL]);
                }
            }
        }
        Self {
            size,
            sectors,
            initial,
        }
    }

    pub fn allowed(&self, sector: u64) -> &[Tag] {
        self.sectors.get(&sector).map_or(&[ZERO], Vec::as_slice)
    }

    /// Requests that ran at the same time are over.
    pub fn apply(&mut self, changes: &[Change]) {
        let mut after: HashMap<u64, (bool, Vec<Tag>)> = HashMap::new();
        for change in changes {
            let (whole, tag) = match *change {
                Change::Write { tag, .. } => (true, tag),
                Change::Zero { .. } => (true, ZERO),
                Change::Discard { .. } => (false, ZERO),
            };
            for sector in change.sectors() {
                let (covered, tags) = after.entry(sector).or_default();
                *covered |= whole;
                add(tags, tag);
            }
        }
        for (sector, (covered, mut tags)) in after {
            if !covered {
                self.allowed(sector).iter().for_each(|&t| add(&mut tags, t));
            }
            self.sectors.insert(sector, tags);
        }
    }

    /// The disk has a new size: what was cut off is gone, what is new is zeroes.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
        self.sectors.retain(|&sector, _| sector < size / SECTOR);
    }

    /// Bytes that were read at `offset` while `beside` ran: each sector must be one of those allowed, or, if something ran
    /// beside that changes it, a mixture of them: the host's page cache lets a read see part of a write. If nothing ran
    /// beside, what was seen is what must be seen from now on.
    pub fn check(&mut self, offset: u64, bytes: &[u8], beside: &[Change]) -> Result<(), String> {
        let first = offset / SECTOR;
        let beside_here = |sector: u64| {
            let here = move |c: &&Change| c.sectors().contains(&sector);
            beside.iter().filter(here).map(|c| match *c {
                Change::Write { tag, .. } => tag,
                Change::Zero { .. } | Change::Discard { .. } => ZERO,
            })
        };
        for (n, found) in bytes.chunks(SECTOR as usize).enumerate() {
            let sector = first + n as u64;
            let mut allowed = self.allowed(sector).to_vec();
            beside_here(sector).for_each(|tag| add(&mut allowed, tag));
            let matching = allowed.iter().find(|&&tag| self.is(tag, sector, found));
            let Some(&tag) = matching else {
                if beside_here(sector).next().is_some() && self.is_mixture(&allowed, sector, found)
                {
                    continue;
                }
                return Err(format!(
                    "sector {sector} (byte {}) is {}, but must be one of {allowed:?}",
                    sector * SECTOR,
                    describe(found)
                ));
            };
            if allowed.len() > 1 && beside.is_empty() {
                self.sectors.insert(sector, vec![tag]);
            }
        }
        Ok(())
    }

    fn is(&self, tag: Tag, sector: u64, found: &[u8]) -> bool {
        self.bytes_of(tag, sector, found.len()) == found
    }

    /// Whether each byte is that of one of the tags.
    fn is_mixture(&self, tags: &[Tag], sector: u64, found: &[u8]) -> bool {
        let of = |&tag: &Tag| self.bytes_of(tag, sector, found.len());
        let all: Vec<Vec<u8>> = tags.iter().map(of).collect();
        let mut places = found.iter().enumerate();
        places.all(|(n, byte)| all.iter().any(|bytes| bytes[n] == *byte))
    }

    fn bytes_of(&self, tag: Tag, sector: u64, len: usize) -> Vec<u8> {
        match tag {
            ZERO => vec![0; len],
            INITIAL => read_at(&self.initial, sector * SECTOR, len as u64),
            tag => sector_bytes(tag, sector)[..len].to_vec(),
        }
    }

    /// A raw file of the whole disk must be what the model says; holes are only looked at where there must be data.
    pub fn check_raw(&mut self, raw: &Path) -> Result<(), String> {
        let file = File::open(raw).unwrap();
        let size = file.metadata().unwrap().len();
        if size != self.size {
            return Err(format!("{size} bytes instead of {}", self.size));
        }
        self.check_file(&file, size)
    }

    /// The same of a file that may be longer or shorter; what both have must agree.
    pub fn check_shown(&mut self, raw: &Path) -> Result<(), String> {
        let file = File::open(raw).unwrap();
        let size = file.metadata().unwrap().len().min(self.size);
        self.check_file(&file, size)
    }

    fn check_file(&mut self, file: &File, size: u64) -> Result<(), String> {
        for (start, len) in data_extents(file, size) {
            self.check(start, &read_at(file, start, len), &[])?;
        }
        let shown = |sector: &u64| sector * SECTOR < size;
        for sector in self.interesting().into_iter().filter(shown) {
            let len = SECTOR.min(size - sector * SECTOR);
            self.check(sector * SECTOR, &read_at(file, sector * SECTOR, len), &[])?;
        }
        Ok(())
    }

    /// The sectors that may be other than zeroes, in order.
    pub fn interesting(&self) -> Vec<u64> {
        let mut sectors: Vec<u64> = self.sectors.keys().copied().collect();
        sectors.sort_unstable();
        sectors
    }
}

fn add(tags: &mut Vec<Tag>, tag: Tag) {
    if !tags.contains(&tag) {
        tags.push(tag);
    }
}

pub fn read_at(file: &File, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Where a file is not a hole, in pieces of a MiB at most that begin at whole sectors.
pub fn data_extents(file: &File, size: u64) -> Vec<(u64, u64)> {
    use rustix::fs::{SeekFrom, seek};
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let Ok(start) = seek(file, SeekFrom::Data(at)) else {
            break;
        };
        let start = start / SECTOR * SECTOR;
        if start >= size {
            // The file is longer than what is looked at.
            break;
        }
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(size);
        at = (start + (1 << 20))
            .min(end.next_multiple_of(SECTOR))
            .min(size);
        extents.push((start, at - start));
    }
    extents
}
