//! What is wrong with one L2 entry, and what it should be instead. Pure: no I/O, no counts.

use crate::format::{COMPRESSED, COPIED, Geometry, Mapping, OFFSET_MASK, ZERO};

/// Bits 0 to 31 of an extended entry's second word: allocated.
const ALLOCATED: u64 = 0xffff_ffff;

/// An entry as it is in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) word: u64,
    /// The second word; 0 if entries have one only.
    pub(super) bitmap: u64,
}

/// What decides about an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Judge {
    pub(super) geometry: Geometry,
    pub(super) version: u32,
    /// Clusters are in a data file.
    pub(super) data_file: bool,
    /// Bytes of the image file.
    pub(super) end: u64,
}

/// What an entry refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nothing.
    None,
    /// A cluster at this offset, if it is in this file.
    Cluster(u64),
    /// Compressed bytes.
    Compressed {
        /// Where, in bytes.
        offset: u64,
        /// How many bytes at most.
        len: u64,
    },
}

impl Judge {
    /// An entry that shows zeroes, whatever a backing file holds; before version 3 there is none, and it is empty.
    pub(super) fn zeroes(self) -> Entry {
        match (self.geometry.extended_l2(), self.version) {
            (true, _) => Entry {
                word: 0,
                bitmap: !ALLOCATED,
            },
            (false, 0..=2) => Entry { word: 0, bitmap: 0 },
            (false, _) => Entry {
                word: ZERO,
                bitmap: 0,
            },
        }
    }

    /// Where it points to, whether or not that can be right.
    pub(super) fn target(self, entry: Entry) -> Target {
        let word = entry.word;
        if word & COMPRESSED != 0
            && let Ok(Mapping::Compressed(range)) =
                Mapping::decode(word, self.geometry, self.version)
        {
            return Target::Compressed {
                offset: range.offset,
                len: range.len,
            };
        }
        let host = word & OFFSET_MASK;
        let in_data_file = self.data_file && word & COPIED != 0;
        if host == 0 && !in_data_file {
            Target::None
        } else {
            Target::Cluster(host)
        }
    }

    /// Whether it is an ordinary entry with nothing to look at twice: a whole cluster of this file.
    #[inline]
    pub(super) fn is_plain(self, word: u64, bitmap: u64) -> bool {
        let allowed = if self.version >= 3 && !self.geometry.extended_l2() {
            COPIED | OFFSET_MASK | ZERO
        } else {
            COPIED | OFFSET_MASK
        };
        let host = word & OFFSET_MASK;
        word & !allowed == 0
            && host != 0
            && self.geometry.offset_in_cluster(host) == 0
            && host < self.end
            && (bitmap >> 32) & bitmap & ALLOCATED == 0
    }

    /// Tells `fault` everything that is wrong with an entry, and returns what it should be.
    pub(super) fn judge(self, entry: Entry, mut fault: impl FnMut(&'static str)) -> Entry {
        if entry.word & COMPRESSED != 0 {
            return self.judge_compressed(entry, fault);
        }
        let mut right = entry;
        let mut hopeless = false;
        let zero_bit = self.version < 3 || self.geometry.extended_l2();
        let reserved =
            if zero_bit { ZERO } else { 0 } | !(COPIED | COMPRESSED | OFFSET_MASK | ZERO);
        if entry.word & reserved != 0 {
            fault("reserved bits are set");
            right.word &= !reserved;
        }
        let both = (entry.bitmap >> 32) & entry.bitmap & ALLOCATED;
        if both != 0 {
            fault("subclusters are both allocated and zero");
            right.bitmap &= !both;
        }
        match self.target(entry) {
            Target::Cluster(host) => {
                if self.geometry.offset_in_cluster(host) != 0 {
                    fault("its cluster is not aligned");
                    hopeless = true;
                }
                if !self.data_file && self.is_beyond(host, self.geometry.cluster_size()) {
                    fault("its cluster lies beyond the end of the file");
                    hopeless = true;
                }
            }
            Target::None | Target::Compressed { .. } => {
                let nowhere = entry.bitmap & ALLOCATED;
                if nowhere != 0 {
                    fault("subclusters are allocated but no cluster is");
                    right.bitmap = (right.bitmap & !ALLOCATED) | (nowhere << 32);
                }
            }
        }
        if hopeless { self.zeroes() } else { right }
    }

    fn judge_compressed(self, entry: Entry, mut fault: impl FnMut(&'static str)) -> Entry {
        let mut right = entry;
        if entry.word & COPIED != 0 {
            fault("a compressed cluster says that it may be overwritten");
            right.word &= !COPIED;
        }
        if entry.bitmap != 0 {
            fault("a compressed cluster has subclusters");
            right.bitmap = 0;
        }
        if self.data_file {
            fault("a compressed cluster cannot be in a data file");
            return self.zeroes();
        }
        match self.target(entry) {
            Target::Compressed { offset, len } if self.is_beyond(offset, len) => {
                fault("its compressed bytes lie beyond the end of the file");
                self.zeroes()
            }
            Target::Compressed { offset, .. } if offset < self.geometry.cluster_size() => {
                fault("its compressed bytes lie in the header");
                self.zeroes()
            }
            _ => right,
        }
    }

    /// The last cluster of a file need not be whole; more than that must not be missing.
    pub(super) fn is_beyond(self, offset: u64, len: u64) -> bool {
        is_beyond(self.end, offset, len, self.geometry)
    }
}

/// Whether a cluster or more of a range is past the end of the file.
pub(super) fn is_beyond(end: u64, offset: u64, len: u64, geometry: Geometry) -> bool {
    match offset.checked_add(len) {
        Some(range_end) => range_end.saturating_sub(end) >= geometry.cluster_size(),
        None => true,
    }
}
