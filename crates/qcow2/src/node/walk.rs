//! What the tables say about a range of the disk, as far as they are in memory: no I/O, no lock, no allocation. It must
//! never guess: what is not in memory is missing, and what makes no sense is corrupt.

use diskfuse_block::{Access, Error, Extent, Kind, Result};

use super::Qcow2Node;
use crate::format::{CompressedRange, Mapping, SubclusterKind, Subclusters};
use crate::meta::{Entry, Lookup};

/// Pieces that are joined to one run at most: what a caller who asks for a terabyte costs the others.
const PIECES: u32 = 4096;

/// Where a run of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Byte for byte at this offset of the data file. Only what is `copied` may be written there.
    Data { host: u64, copied: bool },
    /// It reads as zeroes.
    Zero,
    /// It shows the backing file.
    Unallocated,
    /// In a compressed cluster; the whole of it is one run.
    Compressed { word: u64, range: CompressedRange },
}

/// The first bytes of a range, all in the same kind of place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) place: Place,
    /// Bytes, at least one, no more than were asked for.
    pub(super) len: u64,
}

impl Run {
    /// Whether `next`, which follows on the disk, is more of the same.
    fn continues(&self, next: &Self) -> bool {
        match (self.place, next.place) {
            (Place::Zero, Place::Zero) | (Place::Unallocated, Place::Unallocated) => true,
            (
                Place::Data { host, copied },
                Place::Data {
                    host: next,
                    copied: next_copied,
                },
            ) => host.checked_add(self.len) == Some(next) && copied == next_copied,
            _ => false,
        }
    }
}

impl Qcow2Node {
    /// The longest run from `guest` on, `len` bytes (not 0) at most; `None` if its table is not in memory.
    pub(super) fn run(&self, guest: u64, len: u64) -> Result<Option<Run>> {
        let Some(mut run) = self.piece(guest, len)? else {
            return Ok(None);
        };
        for _ in 1..PIECES {
            if run.len >= len {
                break;
            }
            match self.piece(guest + run.len, len - run.len) {
                Ok(Some(next)) if run.continues(&next) => run.len += next.len,
                _ => break,
            }
        }
        Ok(Some(run))
    }

    /// What one entry says.
    fn piece(&self, guest: u64, len: u64) -> Result<Option<Run>> {
        match self.meta.lookup(guest) {
            Lookup::Missing => Ok(None),
            Lookup::Unallocated { len: absent } => Ok(Some(Run {
                place: Place::Unallocated,
                len: absent.clamp(1, len),
            })),
            Lookup::Entry(entry) => self.within(guest, len, entry).map(Some),
        }
    }

    fn within(&self, guest: u64, len: u64, entry: Entry) -> Result<Run> {
        let skip = self.geometry.offset_in_cluster(guest);
        let mapping = self.mapping(guest, entry)?;
        let (place, end) = match mapping {
            Mapping::Compressed(range) => {
                let word = entry.word;
                let place = Place::Compressed { word, range };
                (place, self.geometry.cluster_size())
            }
            _ if self.geometry.extended_l2() => self.subcluster(guest, &mapping, entry, skip)?,
            mapping => {
                let place = match mapping {
                    Mapping::Normal { host, copied } => data(host, skip, copied),
                    Mapping::Zero { .. } => Place::Zero,
                    _ => Place::Unallocated,
                };
                (place, self.geometry.cluster_size())
            }
        };
        let len = len.min(end - skip);
        Ok(Run { place, len })
    }

    /// The place of the subcluster that holds byte `skip` of a cluster, and where those like it end in the cluster.
    fn subcluster(
        &self,
        guest: u64,
        mapping: &Mapping,
        entry: Entry,
        skip: u64,
    ) -> Result<(Place, u64)> {
        let size = self.geometry.subcluster_size();
        let first = (skip / size) as u32;
        let (kind, count) = Subclusters(entry.subclusters).run(first);
        let end = u64::from(first + count) * size;
        let place = match (kind, mapping) {
            (SubclusterKind::Zero, _) => Place::Zero,
            (SubclusterKind::Unallocated, _) => Place::Unallocated,
            (SubclusterKind::Allocated, Mapping::Normal { host, copied }) => {
                data(*host, skip, *copied)
            }
            (SubclusterKind::Allocated, _) => {
                return Err(self.corrupt(guest, "has data in subclusters, but no place for them"));
            }
        };
        Ok((place, end))
    }

    /// What an entry says, checked.
    pub(super) fn mapping(&self, guest: u64, entry: Entry) -> Result<Mapping> {
        let mapping = Mapping::decode(entry.word, self.geometry, self.version)
            .map_err(|why| self.corrupt(guest, &why.to_string()))?;
        if self.geometry.extended_l2() && !matches!(mapping, Mapping::Compressed(_)) {
            Subclusters(entry.subclusters)
                .check()
                .map_err(|why| self.corrupt(guest, &why.to_string()))?;
        }
        Ok(mapping)
    }

    pub(super) fn corrupt(&self, guest: u64, why: &str) -> Error {
        let name = self.name();
        let message = format!(
            "'{name}': the table entry for byte {guest} of the disk makes no sense: {why}; `diskfuse check` tells more"
        );
        Error::new(Kind::Corrupt, message)
    }

    /// [`Self::reads_zero`] for what a guest can see: past the end of the disk nothing matters.
    pub(super) fn shows_zero(&self, guest: u64, end: u64) -> bool {
        self.reads_zero(guest, end.min(self.meta.size()))
    }

    /// Whether a range is known to read as zeroes without reading it.
    pub(super) fn reads_zero(&self, guest: u64, end: u64) -> bool {
        let mut at = guest;
        while at < end {
            let Ok(Some(run)) = self.run(at, end - at) else {
                return false;
            };
            let zero = match run.place {
                Place::Zero => true,
                Place::Unallocated => self.backing_reads_zero(at, at + run.len),
                Place::Data { .. } | Place::Compressed { .. } => false,
            };
            if !zero {
                return false;
            }
            at += run.len;
        }
        true
    }

    /// Whether the backing file is known to show zeroes in a range, without reading it.
    pub(super) fn backing_reads_zero(&self, guest: u64, end: u64) -> bool {
        let Some(backing) = &self.backing else {
            return true;
        };
        let end = end.min(backing.size());
        let mut at = guest;
        while at < end {
            match backing.resolve(Access::Read, at, end - at) {
                Extent::Void { len } if len > 0 => at += len,
                _ => return false,
            }
        }
        true
    }
}

fn data(host: u64, skip: u64, copied: bool) -> Place {
    Place::Data {
        // A host offset has 56 bits.
        host: host + skip,
        copied,
    }
}
