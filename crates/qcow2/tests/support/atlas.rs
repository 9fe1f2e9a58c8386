//! Where an image keeps its metadata, as its bytes say: read here anew, from the specification and not with the engine's
//! code, so that the two can disagree. Whatever the bytes are, it never panics and never goes beyond them.

use std::ops::Range;

pub fn be32(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    let field = bytes.get(at..at.saturating_add(4));
    field.map_or(0, |b| u64::from(u32::from_be_bytes(b.try_into().unwrap())))
}

pub fn be64(bytes: &[u8], at: u64) -> u64 {
    be32(bytes, at) << 32 | be32(bytes, at.saturating_add(4))
}

pub fn put(bytes: &mut [u8], at: u64, width: usize, value: u64) {
    let at = at as usize;
    if let Some(field) = bytes.get_mut(at..at.saturating_add(width)) {
        field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

/// The bits of an entry that are an offset.
pub const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;

/// Entries of an L1 table at most.
const MOST_L1: u64 = (32 << 20) / 8;

/// What kind of metadata a range is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    Snapshots,
    InactiveL1,
}

/// One structure, or one table of a kind.
pub type Region = (Kind, Range<u64>);

/// The fields of an image that metadata hangs on.
pub struct Atlas {
    pub cluster: u64,
    pub extended: bool,
    pub refcount_bits: u64,
    pub regions: Vec<Region>,
}

impl Atlas {
    pub fn of(bytes: &[u8]) -> Self {
        let bits = be32(bytes, 20).clamp(9, 21);
        let cluster = 1 << bits;
        let v3 = be32(bytes, 4) >= 3;
        let mut atlas = Self {
            cluster,
            extended: v3 && be64(bytes, 72) & 16 != 0,
            refcount_bits: if v3 { 1 << be32(bytes, 96).min(6) } else { 16 },
            regions: vec![(Kind::Header, 0..cluster)],
        };
        let end = (bytes.len() as u64).next_multiple_of(cluster);
        atlas.table(
            bytes,
            end,
            (Kind::L1, be64(bytes, 40), be32(bytes, 36)),
            Some(Kind::L2),
        );
        let refcounts = be32(bytes, 56).saturating_mul(cluster / 8);
        let table = (Kind::RefcountTable, be64(bytes, 48), refcounts);
        atlas.table(bytes, end, table, Some(Kind::RefcountBlock));
        atlas.snapshots(bytes, end);
        atlas
    }

    /// A table of offsets, and the clusters that it names.
    fn table(
        &mut self,
        bytes: &[u8],
        end: u64,
        (kind, at, count): (Kind, u64, u64),
        names: Option<Kind>,
    ) {
        let len = (count * 8).min(end.saturating_sub(at));
        if at == 0 || len == 0 {
            return;
        }
        self.regions.push((kind, at..at + len));
        let Some(names) = names else { return };
        for n in 0..len / 8 {
            let mask = match names {
                Kind::RefcountBlock => !0x1ff,
                _ => OFFSET,
            };
            let offset = be64(bytes, at + n * 8) & mask;
            if offset != 0 && offset.is_multiple_of(self.cluster) && offset < end {
                self.regions.push((names, offset..offset + self.cluster));
            }
        }
    }

    fn snapshots(&mut self, bytes: &[u8], end: u64) {
        let start = be64(bytes, 64);
        let mut at = start;
        for _ in 0..be32(bytes, 60).min(16) {
            if at >= end {
                break;
            }
            let entries = be32(bytes, at + 8);
            // More than the format allows is no table.
            if entries <= MOST_L1 {
                let l1 = (Kind::InactiveL1, be64(bytes, at), entries);
                self.table(bytes, end, l1, None);
            }
            let sizes = be32(bytes, at + 12) & 0xFFFF_0000;
            let (id, name) = (sizes >> 16, be32(bytes, at + 12) & 0xFFFF);
            let len = 40 + be32(bytes, at + 36) + id + name;
            at += len.next_multiple_of(8);
        }
        if start != 0 && at > start {
            self.regions.push((Kind::Snapshots, start..at.min(end)));
        }
    }

    pub fn all(&self, kind: Kind) -> impl Iterator<Item = &Range<u64>> {
        self.regions
            .iter()
            .filter(move |r| r.0 == kind)
            .map(|r| &r.1)
    }

    /// The first one, where there must be one.
    pub fn first(&self, kind: Kind) -> Range<u64> {
        self.all(kind)
            .next()
            .unwrap_or_else(|| panic!("no {kind:?}"))
            .clone()
    }
}
