//! What a guest may find. Every sector that a guest writes is stamped with its number and the version of the write, so
//! that a sector tells where it comes from; the model knows which versions it may hold after a crash at a moment.

use std::collections::BTreeSet;

use super::SECTOR;
use super::log::Time;

/// Zero means zeroes; every write has one of its own.
pub type Version = u64;

/// What a guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Write sectors of a version; 0 writes zeroes.
    Write(Version),
    /// The sectors are not needed any more: what they hold, or zeroes.
    Discard,
}

/// One request of a guest.
#[derive(Clone, Debug)]
pub struct Request {
    ask: Ask,
    began: Time,
    ended: Option<Time>,
    ok: bool,
}

/// A change of the disk's size.
#[derive(Clone, Debug)]
struct Sizing {
    size: u64,
    began: Time,
    ended: Option<Time>,
    ok: bool,
}

/// A guest's flush that ended well.
#[derive(Clone, Copy, Debug)]
struct Flush {
    began: Time,
    ended: Time,
}

/// All that guests asked for.
#[derive(Default)]
pub struct Model {
    /// Versions at the beginning, one for each sector.
    initial: Vec<Version>,
    initial_size: u64,
    /// Requests of each sector, by their places in `requests`.
    sectors: Vec<Vec<u32>>,
    requests: Vec<Request>,
    sizes: Vec<Sizing>,
    flushes: Vec<Flush>,
}

/// What may be there: see [`Model::allowed`].
#[derive(Debug)]
pub struct Allowed(pub BTreeSet<Version>);

impl Model {
    /// A disk that holds these versions.
    pub fn new(initial: Vec<Version>) -> Self {
        Self {
            sectors: vec![Vec::new(); initial.len()],
            initial_size: initial.len() as u64 * SECTOR,
            initial,
            ..Self::default()
        }
    }

    fn reach(&mut self, sectors: u64) {
        let sectors = sectors as usize;
        if self.sectors.len() < sectors {
            self.sectors.resize(sectors, Vec::new());
            self.initial.resize(sectors, 0);
        }
    }

    /// A request begins. Its version need not be known to the model before.
    pub fn begin(&mut self, now: Time, ask: Ask, sector: u64, count: u64) -> usize {
        let id = self.requests.len();
        self.requests.push(Request {
            ask,
            began: now,
            ended: None,
            ok: false,
        });
        self.reach(sector + count);
        for s in sector..sector + count {
            self.sectors[s as usize].push(id as u32);
        }
        id
    }

    /// It ends.
    pub fn end(&mut self, now: Time, request: usize, ok: bool) {
        self.requests[request].ended = Some(now);
        self.requests[request].ok = ok;
    }

    /// A flush that began at `began` has ended well.
    pub fn flushed(&mut self, now: Time, began: Time) {
        self.flushes.push(Flush { began, ended: now });
    }

    /// A change of the size begins: what is past a smaller size is zero if it ever comes back.
    pub fn begin_resize(&mut self, now: Time, from: u64, to: u64) -> (usize, Option<usize>) {
        self.sizes.push(Sizing {
            size: to,
            began: now,
            ended: None,
            ok: false,
        });
        let cut = (to < from).then(|| {
            let (first, end) = (to / SECTOR, from / SECTOR);
            self.begin(now, Ask::Write(0), first, end - first)
        });
        (self.sizes.len() - 1, cut)
    }

    /// It ends.
    pub fn end_resize(&mut self, now: Time, (resize, cut): (usize, Option<usize>), ok: bool) {
        self.sizes[resize].ended = Some(now);
        self.sizes[resize].ok = ok;
        if let Some(cut) = cut {
            self.end(now, cut, ok);
        }
    }

    /// The moment before which everything that had ended is promised to survive a crash at `crash`.
    pub fn promised(&self, crash: Time) -> Time {
        let over = self.flushes.iter().filter(|f| f.ended <= crash);
        over.map(|f| f.began).max().unwrap_or(0)
    }

    /// Sectors that the disk ever had.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// The versions that a sector may hold, if all that had ended before `promised` must be there and nothing that
    /// began after `until` can be.
    pub fn allowed(&self, sector: u64, promised: Time, until: Time) -> Allowed {
        let all = self
            .sectors
            .get(sector as usize)
            .map_or(&[][..], Vec::as_slice);
        let of = |&id: &u32| &self.requests[id as usize];
        // What is certain to have replaced what had ended before it began.
        let newest = all.iter().map(of).filter(|r| {
            r.ok && r.ask != Ask::Discard && r.ended.is_some_and(|ended| ended < promised)
        });
        let replaced_before = newest.map(|r| r.began).max().unwrap_or(0);
        let alive = all
            .iter()
            .map(of)
            .filter(|r| r.began <= until && r.ended.is_none_or(|ended| ended >= replaced_before));
        let mut versions: BTreeSet<Version> = alive
            .map(|r| match r.ask {
                Ask::Write(version) => version,
                Ask::Discard => 0,
            })
            .collect();
        if replaced_before == 0 {
            let initial = self.initial.get(sector as usize).copied().unwrap_or(0);
            versions.insert(initial);
        }
        Allowed(versions)
    }

    /// The sizes in bytes that the disk may have; arguments as of [`Model::allowed`].
    pub fn sizes(&self, promised: Time, until: Time) -> BTreeSet<u64> {
        let certain = self
            .sizes
            .iter()
            .filter(|s| s.ok && s.ended.is_some_and(|ended| ended < promised));
        let replaced_before = certain.map(|s| s.began).max().unwrap_or(0);
        let alive = self
            .sizes
            .iter()
            .filter(|s| s.began <= until && s.ended.is_none_or(|ended| ended >= replaced_before));
        let mut sizes: BTreeSet<u64> = alive.map(|s| s.size).collect();
        if replaced_before == 0 {
            sizes.insert(self.initial_size);
        }
        sizes
    }

    /// Compares what was read from `sector` on: what the first wrong sector holds, and what it may hold.
    pub fn compare(
        &self,
        sector: u64,
        bytes: &[u8],
        promised: Time,
        until: Time,
    ) -> Result<(), String> {
        for (number, there) in (sector..).zip(bytes.chunks(SECTOR as usize)) {
            let found = version_of(number, there);
            let touched = !self.sectors.get(number as usize).is_none_or(Vec::is_empty);
            let initial = self.initial.get(number as usize).copied().unwrap_or(0);
            if found == Ok(initial) && !touched {
                continue;
            }
            let Allowed(allowed) = self.allowed(number, promised, until);
            if !found
                .as_ref()
                .is_ok_and(|version| allowed.contains(version))
            {
                let history = self.history(number);
                return Err(format!(
                    "sector {number} (byte {:#x}) holds {}, but may hold versions {allowed:?}; promised is what had \
                     ended by {promised}; its history:\n{history}",
                    number * SECTOR,
                    match found {
                        Ok(version) => format!("version {version}"),
                        Err(what) => what,
                    },
                ));
            }
        }
        Ok(())
    }

    fn history(&self, sector: u64) -> String {
        let initial = self.initial.get(sector as usize).copied().unwrap_or(0);
        let mut lines = vec![format!("  initially version {initial}")];
        let all = self
            .sectors
            .get(sector as usize)
            .map_or(&[][..], Vec::as_slice);
        for &id in all {
            lines.push(format!("  {:?}", self.requests[id as usize]));
        }
        let flushes = self
            .flushes
            .iter()
            .map(|f| format!("{}–{}", f.began, f.ended));
        lines.push(format!(
            "  flushes {}",
            flushes.collect::<Vec<_>>().join(", ")
        ));
        lines.join("\n")
    }
}

/// Stamps sectors from `sector` on with a version. Compressible, and different in every sector.
pub fn stamp(sector: u64, version: Version, bytes: &mut [u8]) {
    for (number, sector) in (sector..).zip(bytes.chunks_mut(SECTOR as usize)) {
        if version == 0 {
            sector.fill(0);
            continue;
        }
        for (place, word) in (0..).zip(sector.chunks_mut(8)) {
            word.copy_from_slice(&word_of(number, version, place).to_le_bytes());
        }
    }
}

fn word_of(sector: u64, version: Version, place: usize) -> u64 {
    match place {
        0 => sector,
        1 => version,
        _ => (sector << 32 | version).wrapping_mul(0x9E37_79B9_7F4A_7C15),
    }
}

/// The version that a sector holds, or what it holds else.
pub fn version_of(sector: u64, bytes: &[u8]) -> Result<Version, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(0);
    }
    let (words, _) = bytes.as_chunks::<8>();
    let word = |place: usize| u64::from_le_bytes(words[place]);
    let (number, version) = (word(0), word(1));
    let whole = (0..words.len()).all(|place| word(place) == word_of(number, version, place));
    match whole {
        true if number == sector => Ok(version),
        true => Err(format!("version {version} of sector {number}")),
        false => Err(format!("garbage ({:02x?}…)", &bytes[..16.min(bytes.len())])),
    }
}
