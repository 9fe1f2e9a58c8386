//! The numbers of an image that everything else is computed from: sizes of clusters, tables and refcounts. Made only
//! from values that were checked, so that nothing derived from them can overflow.

use diskfuse_block::{Error, Kind, Result};

/// log2 of the cluster sizes that QEMU takes: 512 bytes to 2 MiB (specification, "Header", cluster_bits).
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Subclusters in a cluster (specification, "Extended L2 Entries").
pub const SUBCLUSTERS: u32 = 32;

/// Sizes of clusters, tables and refcounts of one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    cluster_bits: u32,
    refcount_order: u32,
    extended_l2: bool,
    external_data: bool,
}

impl Geometry {
    /// [`Kind::Unsupported`] for clusters that are no power of two from 512 bytes to 2 MiB, [`Kind::Corrupt`] for
    /// refcounts wider than 64 bits and for extended L2 entries with clusters below 16 KiB.
    pub fn new(cluster_bits: u32, refcount_order: u32, extended_l2: bool) -> Result<Self> {
        if !CLUSTER_BITS.contains(&cluster_bits) {
            let message =
                format!("clusters of 2^{cluster_bits} bytes are not supported (2^9 to 2^21 are)");
            return Err(Error::new(Kind::Unsupported, message));
        }
        if refcount_order > 6 {
            let message =
                format!("refcounts of 2^{refcount_order} bits cannot be (64 bits at most)");
            return Err(Error::new(Kind::Corrupt, message));
        }
        if extended_l2 && cluster_bits < 14 {
            let message = "extended L2 entries need clusters of 16 KiB at least";
            return Err(Error::new(Kind::Corrupt, message));
        }
        Ok(Self {
            cluster_bits,
            refcount_order,
            extended_l2,
            external_data: false,
        })
    }

    /// The same with guest data in a file of its own, where byte 0 is a place for data as any other.
    #[must_use]
    pub fn with_external_data(self, external_data: bool) -> Self {
        Self {
            external_data,
            ..self
        }
    }

    /// Whether guest data is in a file of its own.
    pub fn external_data(self) -> bool {
        self.external_data
    }

    /// log2 of the cluster size.
    pub fn cluster_bits(self) -> u32 {
        self.cluster_bits
    }

    /// Bytes of a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// The offset within its cluster.
    pub fn offset_in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// The number of the cluster of a byte.
    pub fn cluster_of(self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// The first byte of a byte's cluster.
    pub fn round_down(self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// The offset, or the next one that begins a cluster; none past 2^64.
    pub fn round_up(self, offset: u64) -> Option<u64> {
        offset.checked_next_multiple_of(self.cluster_size())
    }

    /// Whether entries of L2 tables have a bitmap of subclusters.
    pub fn extended_l2(self) -> bool {
        self.extended_l2
    }

    /// 64-bit words of an L2 entry.
    pub fn words_per_entry(self) -> usize {
        1 + usize::from(self.extended_l2)
    }

    /// Bytes of an L2 entry.
    pub fn l2_entry_size(self) -> u64 {
        8 * self.words_per_entry() as u64
    }

    /// Entries of an L2 table.
    pub fn l2_entries(self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_coverage(self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries_for(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// The L1 entry of a guest offset.
    pub fn l1_index(self, guest: u64) -> u64 {
        guest / self.l2_coverage()
    }

    /// The entry of a guest offset within its L2 table.
    pub fn l2_index(self, guest: u64) -> u64 {
        self.cluster_of(guest) % self.l2_entries()
    }

    /// Bytes of a subcluster; of a cluster where there are none.
    pub fn subcluster_size(self) -> u64 {
        match self.extended_l2 {
            true => self.cluster_size() / u64::from(SUBCLUSTERS),
            false => self.cluster_size(),
        }
    }

    /// log2 of the bits of a refcount.
    pub fn refcount_order(self) -> u32 {
        self.refcount_order
    }

    /// Bits of a refcount.
    pub fn refcount_bits(self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount that fits.
    pub fn max_refcount(self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Refcounts of a refcount block.
    pub fn refcounts_per_block(self) -> u64 {
        self.cluster_size() * 8 / u64::from(self.refcount_bits())
    }
}
