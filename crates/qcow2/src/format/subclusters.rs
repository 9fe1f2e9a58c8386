//! The bitmap of an extended L2 entry: which of the 32 subclusters are allocated, and which read as zeroes
//! (specification, "Extended L2 Entries").

use std::ops::Range;

use diskfuse_block::{Error, Kind, Result};

use super::geometry::SUBCLUSTERS;

/// The second word of an extended entry: bit *i* says that subcluster *i* is allocated, bit 32 + *i* that it reads as
/// zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Subclusters(pub u64);

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubclusterKind {
    /// The backing file shows.
    Unallocated,
    /// It reads as zeroes.
    Zero,
    /// It is in the cluster that the entry names.
    Allocated,
}

/// The bits of subclusters `range`, as allocation bits.
fn bits(range: &Range<u32>) -> u64 {
    let below = |n: u32| (1u64 << n.min(SUBCLUSTERS)) - 1;
    below(range.end) & !below(range.start)
}

impl Subclusters {
    /// All of them allocated.
    pub const ALL_ALLOCATED: Self = Self(u32::MAX as u64);
    /// All of them zero.
    pub const ALL_ZERO: Self = Self((u32::MAX as u64) << 32);

    /// Whether subcluster `index` is allocated.
    pub fn allocated(self, index: u32) -> bool {
        self.0 & bits(&(index..index + 1)) != 0
    }

    /// Whether subcluster `index` reads as zeroes.
    pub fn zero(self, index: u32) -> bool {
        self.0 >> 32 & bits(&(index..index + 1)) != 0
    }

    /// With these allocated, and so not zero.
    #[must_use]
    pub fn set_allocated(self, range: Range<u32>) -> Self {
        let bits = bits(&range);
        Self((self.0 | bits) & !(bits << 32))
    }

    /// With these zero, and so not allocated.
    #[must_use]
    pub fn set_zero(self, range: Range<u32>) -> Self {
        let bits = bits(&range);
        Self((self.0 | bits << 32) & !bits)
    }

    /// With these neither.
    #[must_use]
    pub fn unallocate(self, range: Range<u32>) -> Self {
        let bits = bits(&range);
        Self(self.0 & !(bits << 32 | bits))
    }

    /// What subcluster `index` (below 32) is.
    pub fn kind(self, index: u32) -> SubclusterKind {
        match (self.zero(index), self.allocated(index)) {
            (true, _) => SubclusterKind::Zero,
            (false, true) => SubclusterKind::Allocated,
            (false, false) => SubclusterKind::Unallocated,
        }
    }

    /// What subcluster `index` is, and how many from it on are alike.
    pub fn run(self, index: u32) -> (SubclusterKind, u32) {
        let kind = self.kind(index);
        let alike = (index..SUBCLUSTERS).take_while(|&n| self.kind(n) == kind);
        (kind, alike.count() as u32)
    }

    /// [`Kind::Corrupt`] if one is allocated and zero at once.
    pub fn check(self) -> Result<()> {
        let both = self.0 & self.0 >> 32 & u64::from(u32::MAX);
        if both != 0 {
            let index = both.trailing_zeros();
            let message = format!("subcluster {index} is both allocated and zero");
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_the_kind_changes() {
        let map = Subclusters::default().set_allocated(0..4).set_zero(2..32);
        assert_eq!(map.run(0), (SubclusterKind::Allocated, 2));
        assert_eq!(map.run(1), (SubclusterKind::Allocated, 1));
        assert_eq!(map.run(2), (SubclusterKind::Zero, 30));
        let map = map.unallocate(31..32);
        assert_eq!(map.run(31), (SubclusterKind::Unallocated, 1));
        assert!(map.check().is_ok());
        assert!(Subclusters(1 | 1 << 32).check().is_err());
        assert_eq!(
            Subclusters::default().set_zero(0..32),
            Subclusters::ALL_ZERO
        );
        let all = Subclusters::ALL_ZERO.set_allocated(0..32);
        assert_eq!(all, Subclusters::ALL_ALLOCATED);
    }
}
