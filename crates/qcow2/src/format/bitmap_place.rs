//! Where the bitmaps are, in the header of an image that is in use. Disks write a sector whole, so the change is made in steps,
//! each of which matters in one sector only: a crash leaves the old bitmaps or the new ones, and where that cannot be had (what is
//! said of them lies across two sectors), none.

use diskfuse_block::{Error, Kind, Result};

use super::extensions::{BITMAPS, BitmapsExtension, END};
use super::{Header, features};

const SECTOR: usize = 512;
/// Byte offsets of fields (specification, "Header").
const NAME_OFFSET: usize = 8;
const NAME_LEN: usize = 16;
const AUTOCLEAR: usize = 88;
/// Bytes of an extension's type and length.
const HEAD: usize = 8;
/// Bytes of what the extension says, and with its head and an end mark behind it.
const DATA: usize = 24;
const WITH_END: usize = HEAD + DATA + HEAD;

/// Where the extension is, or where one more may begin.
struct Places {
    ours: Option<usize>,
    /// The end mark.
    end: usize,
}

impl Header {
    /// The first cluster of an image, `old`, of version 3, with other bitmaps, or none: what is to be written one after the other,
    /// each on stable storage before the next.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if they do not fit; [`Kind::Corrupt`] if `old` is not the beginning of an image.
    pub(crate) fn with_bitmaps(
        old: &[u8],
        file_size: u64,
        bitmaps: Option<&BitmapsExtension>,
    ) -> Result<Vec<Vec<u8>>> {
        let length = Self::parse(old, file_size)?.length;
        let places = places(old, length).ok_or_else(no_room)?;
        let mut steps = Steps(vec![old.to_vec()]);
        let done = match (bitmaps, places.ours) {
            (None, ours) => steps.without(ours, places.end),
            (Some(bitmaps), Some(at)) => steps.replace(at, bitmaps),
            (Some(bitmaps), None) => steps.add(places.end, bitmaps),
        };
        done.ok_or_else(no_room)?;
        let Steps(mut steps) = steps;
        steps.remove(0);
        Ok(steps)
    }
}

fn no_room() -> Error {
    let message = "there is no room for what is said of bitmaps in the header of the image";
    Error::new(Kind::Invalid, message)
}

fn number(bytes: &[u8], range: std::ops::Range<usize>) -> Option<usize> {
    let bytes = bytes.get(range)?;
    let number = bytes.iter().fold(0, |all, &b| all << 8 | u64::from(b));
    usize::try_from(number).ok()
}

fn places(bytes: &[u8], length: usize) -> Option<Places> {
    let mut ours = None;
    let mut at = length;
    loop {
        let kind = number(bytes, at..at + 4)?;
        let len = number(bytes, at + 4..at + HEAD)?;
        if kind == END as usize {
            return Some(Places { ours, end: at });
        }
        if kind == BITMAPS as usize {
            ours = Some(at);
        }
        at = at
            .checked_add(HEAD)?
            .checked_add(len.checked_next_multiple_of(8)?)?;
    }
}

fn encode(bitmaps: &BitmapsExtension) -> [u8; DATA] {
    let mut data = [0; DATA];
    data[..4].copy_from_slice(&bitmaps.count.to_be_bytes());
    data[8..16].copy_from_slice(&bitmaps.directory_size.to_be_bytes());
    data[16..].copy_from_slice(&bitmaps.directory_offset.to_be_bytes());
    data
}

/// Whether what differs lies in one sector.
fn in_one_sector(a: &[u8], b: &[u8]) -> bool {
    let pairs = a.iter().zip(b).enumerate();
    let mut sectors = pairs
        .filter(|(_, (a, b))| a != b)
        .map(|(at, _)| at / SECTOR);
    let first = sectors.next();
    sectors.all(|sector| Some(sector) == first)
}

/// The header after each step, beginning with how it was.
struct Steps(Vec<Vec<u8>>);

impl Steps {
    fn now(&self) -> &[u8] {
        self.0.last().map_or(&[], Vec::as_slice)
    }

    /// One more step: other bytes in one place. None if there is no such place.
    fn put(&mut self, at: usize, bytes: &[u8]) -> Option<()> {
        let mut next = self.now().to_vec();
        next.get_mut(at..at.checked_add(bytes.len())?)?
            .copy_from_slice(bytes);
        if next != self.now() {
            self.0.push(next);
        }
        Some(())
    }

    /// Says whether the bitmaps are true.
    fn set_true(&mut self, are_true: bool) -> Option<()> {
        let now = number(self.now(), AUTOCLEAR..AUTOCLEAR + 8)? as u64;
        let next = match are_true {
            true => now | features::BITMAPS,
            false => now & !features::BITMAPS,
        };
        self.put(AUTOCLEAR, &next.to_be_bytes())
    }

    /// Nobody looks for what is not said to be true; and where nothing follows, it goes.
    fn without(&mut self, ours: Option<usize>, end: usize) -> Option<()> {
        self.set_true(false)?;
        match ours {
            Some(at) if at + HEAD + DATA == end => self.put(at, &[0; HEAD]),
            _ => Some(()),
        }
    }

    fn replace(&mut self, at: usize, bitmaps: &BitmapsExtension) -> Option<()> {
        let data = encode(bitmaps);
        let there = self.now().get(at + HEAD..at + HEAD + DATA)?;
        let mut next = self.now().to_vec();
        next.get_mut(at + HEAD..at + HEAD + DATA)?
            .copy_from_slice(&data);
        let at_once = in_one_sector(&next, self.now());
        if there != data && !at_once {
            self.set_true(false)?;
        }
        self.put(at + HEAD, &data)?;
        self.set_true(true)
    }

    /// Where the end mark is, of which the sector is written when all behind it is there.
    fn add(&mut self, end: usize, bitmaps: &BitmapsExtension) -> Option<()> {
        // Were they said to be true, nobody could tell which.
        self.set_true(false)?;
        self.move_name(end..end + WITH_END)?;
        let behind = [&encode(bitmaps)[..], &[0; HEAD]].concat();
        self.put(end + HEAD, &behind)?;
        let head = [BITMAPS.to_be_bytes(), (DATA as u32).to_be_bytes()].concat();
        self.put(end, &head)?;
        self.set_true(true)
    }

    /// Puts the name of the backing file behind a range, if it is within.
    fn move_name(&mut self, range: std::ops::Range<usize>) -> Option<()> {
        let now = self.now();
        let start = number(now, NAME_OFFSET..NAME_OFFSET + 8)?;
        let end = start.checked_add(number(now, NAME_LEN..NAME_LEN + 4)?)?;
        if start == 0 || end <= range.start || start >= range.end {
            return Some(());
        }
        let name = now.get(start..end)?.to_vec();
        let to = end.max(range.end).next_multiple_of(8);
        self.put(to, &name)?;
        self.put(NAME_OFFSET, &(to as u64).to_be_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Backing, Geometry};

    /// The first cluster of a new image of 64 KiB clusters.
    fn cluster(backing: Option<&str>, data_file: Option<&str>) -> Vec<u8> {
        let geometry = Geometry::new(16, 4, false).unwrap();
        let mut header = Header::new(3, geometry, 1 << 20);
        header.refcount_table_offset = 1 << 16;
        header.backing = backing.map(|name| Backing {
            name: name.to_owned(),
            format: Some("qcow2".to_owned()),
        });
        if let Some(name) = data_file {
            header.incompatible |= features::DATA_FILE;
            header.data_file = Some(name.to_owned());
        }
        let mut bytes = header.encode().unwrap();
        bytes.resize(1 << 16, 0);
        bytes
    }

    fn place(count: u32) -> BitmapsExtension {
        BitmapsExtension {
            count,
            directory_size: u64::from(count) * 32,
            directory_offset: u64::from(count) << 16,
        }
    }

    /// What the header says of the rest, and of bitmaps if they are true.
    fn said(bytes: &[u8]) -> (Option<Backing>, Option<String>, Option<BitmapsExtension>) {
        let header = Header::parse(bytes, 1 << 20).unwrap();
        let are_true = header.autoclear & features::BITMAPS != 0;
        (
            header.backing,
            header.data_file,
            header.bitmaps.filter(|_| are_true),
        )
    }

    /// Makes the change, with a crash at every moment: of a step any of its sectors may be there. Returns what came last, and
    /// whether there were no bitmaps in between.
    fn change(old: &[u8], to: Option<&BitmapsExtension>) -> (Vec<u8>, bool) {
        let (name, data, before) = said(old);
        let steps = Header::with_bitmaps(old, 1 << 20, to).unwrap();
        let mut now = old.to_vec();
        let mut gap = false;
        for step in steps {
            for sector in 0..now.len() / SECTOR {
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                if now[range.clone()] == step[range.clone()] {
                    continue;
                }
                // This one alone, and all up to this one.
                let mut torn = now.clone();
                torn[range.clone()].copy_from_slice(&step[range.clone()]);
                let mut upto = now.clone();
                upto[..range.end].copy_from_slice(&step[..range.end]);
                for state in [torn, upto, step.clone()] {
                    let (name_now, data_now, bitmaps) = said(&state);
                    assert_eq!((&name_now, &data_now), (&name, &data));
                    gap |= bitmaps.is_none() && before.is_some() && to.is_some();
                    let one_of_both = [before.as_ref(), to, None].contains(&bitmaps.as_ref());
                    assert!(one_of_both, "{bitmaps:?}");
                }
            }
            now = step;
        }
        assert_eq!(said(&now), (name, data, to.cloned()));
        (now, gap)
    }

    #[test]
    fn a_crash_leaves_the_old_bitmaps_or_the_new_ones() {
        let data_files = (0..80).map(|n| Some("d".repeat(1 + n * 8)));
        let mut gaps = 0;
        for data_file in data_files.chain([None]) {
            for backing in [None, Some("base"), Some("/a/longer/name/of/a/base.qcow2")] {
                let new = cluster(backing, data_file.as_deref());
                let (first, _) = change(&new, Some(&place(1)));
                let (second, gap) = change(&first, Some(&place(7)));
                gaps += usize::from(gap);
                let (none, _) = change(&second, None);
                assert!(Header::parse(&none, 1 << 20).unwrap().bitmaps.is_none());
                change(&none, Some(&place(3)));
            }
        }
        // Only where it lies across sectors.
        assert!((1..12).contains(&gaps), "{gaps}");
    }

    #[test]
    fn what_others_have_put_behind_stays() {
        let old = cluster(None, None);
        let places = places(&old, Header::parse(&old, 1 << 20).unwrap().length).unwrap();
        let with = change(&old, Some(&place(2))).0;
        let mut more = with.clone();
        let at = places.end + HEAD + DATA;
        more[at..at + 16]
            .copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
        let without = change(&more, None).0;
        assert_eq!(without[at..at + 16], more[at..at + 16]);
        change(&without, Some(&place(4)));
    }

    #[test]
    fn a_header_without_room_is_refused() {
        let geometry = Geometry::new(9, 4, false).unwrap();
        let mut header = Header::new(3, geometry, 1 << 20);
        header.refcount_table_offset = 512;
        header.backing = Some(Backing {
            name: "n".repeat(350),
            format: None,
        });
        let mut bytes = header.encode().unwrap();
        bytes.resize(512, 0);
        let error = Header::with_bitmaps(&bytes, 1 << 20, Some(&place(1))).unwrap_err();
        assert_eq!(error.kind(), Kind::Invalid);
    }
}
