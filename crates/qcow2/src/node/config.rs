//! How to open an image: the children it stands on and its options, as plain values. Option syntax is not its business.

use std::ops::BitOr;
use std::sync::Arc;
use std::time::Duration;

use diskfuse_block::Node;
use diskfuse_block::drivers::DetectZeroes;

/// The nodes below an image. Whoever opens it knows their names; this crate does not.
#[derive(Clone)]
pub struct Children {
    /// The image file itself: metadata and, without a data file of its own, the data.
    pub file: Arc<dyn Node>,
    /// The external data file, if the header asks for one.
    pub data_file: Option<Arc<dyn Node>>,
    /// What unallocated clusters show; `None` shows zeroes, also where the header names a backing file.
    pub backing: Option<Arc<dyn Node>>,
}

/// Who is told, once, that an open image contradicts itself: why, and whether nothing is written to it any more. Called by
/// whoever finds it, on any thread; must not block.
#[derive(Clone)]
pub struct OnCorrupt(Arc<Tell>);

type Tell = dyn Fn(&str, bool) + Send + Sync;

impl OnCorrupt {
    /// Calls this.
    pub fn new(tell: impl Fn(&str, bool) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    pub(crate) fn tell(&self, why: &str, fatal: bool) {
        (self.0)(why, fatal);
    }
}

impl std::fmt::Debug for OnCorrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnCorrupt")
    }
}

/// Options of an open image; the defaults are those of QEMU.
#[derive(Clone, Debug)]
pub struct Qcow2Config {
    /// Refuse every change, of data and of metadata.
    pub read_only: bool,
    /// Write whole clusters compressed. Parts of clusters are written as they are.
    pub compress: bool,
    /// `discard=unmap`: discards, and zeroes that may be unmapped, give clusters back.
    pub discard: bool,
    /// What to do with a write of nothing but zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Keep refcounts up to date only when the image is closed, and repair them after a crash; `None` does what the
    /// header says.
    pub lazy_refcounts: Option<bool>,
    /// Bytes of cached L2 tables at most.
    pub l2_cache_size: Option<u64>,
    /// Bytes of cached refcount blocks at most.
    pub refcount_cache_size: Option<u64>,
    /// Bytes of both caches together.
    pub cache_size: Option<u64>,
    /// How long cached metadata may lie unused before its memory is given back; zero keeps it.
    pub cache_clean_interval: Duration,
    /// What a write is checked not to run into.
    pub overlap_check: OverlapCheck,
    /// Discarded clusters keep their place in the file (less fragmentation), and read as zeroes.
    pub discard_no_unref: bool,
    /// Whether guest discards reach the file below; `None` does as [`Qcow2Config::discard`].
    pub pass_discard_request: Option<bool>,
    /// Whether deleting a snapshot discards in the file below.
    pub pass_discard_snapshot: bool,
    /// Whether other frees discard in the file below.
    pub pass_discard_other: bool,
    /// The id or name of an internal snapshot to show, read-only, instead of the disk.
    pub snapshot: Option<String>,
    /// Whether the persistent bitmaps of an image are loaded that is only read; of one that is written they always are.
    pub read_bitmaps: bool,
    /// Who is told that the image is corrupt, beside the log.
    pub on_corrupt: Option<OnCorrupt>,
}

impl Default for Qcow2Config {
    fn default() -> Self {
        Self {
            read_only: false,
            compress: false,
            discard: false,
            detect_zeroes: DetectZeroes::Off,
            lazy_refcounts: None,
            l2_cache_size: None,
            refcount_cache_size: None,
            cache_size: None,
            cache_clean_interval: Duration::from_secs(600),
            overlap_check: OverlapCheck::CACHED,
            discard_no_unref: false,
            pass_discard_request: None,
            pass_discard_snapshot: true,
            pass_discard_other: false,
            snapshot: None,
            read_bitmaps: false,
            on_corrupt: None,
        }
    }
}

impl Qcow2Config {
    /// Whether the persistent bitmaps are loaded of an image that may be written, or not.
    pub(crate) fn loads_bitmaps(&self, read_only: bool) -> bool {
        !read_only || (self.read_bitmaps && self.snapshot.is_none())
    }

    /// Whether guest discards reach the file below.
    pub fn passes_discard_requests(&self) -> bool {
        self.pass_discard_request.unwrap_or(self.discard)
    }
}

/// A set of metadata structures that no write of something else may touch. The names and the grouping are those of
/// QEMU's `overlap-check` option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlapCheck(u16);

impl OverlapCheck {
    /// Nothing is checked.
    pub const NONE: Self = Self(0);
    /// The image header.
    pub const MAIN_HEADER: Self = Self(1);
    /// The active L1 table.
    pub const ACTIVE_L1: Self = Self(1 << 1);
    /// The active L2 tables.
    pub const ACTIVE_L2: Self = Self(1 << 2);
    /// The refcount table.
    pub const REFCOUNT_TABLE: Self = Self(1 << 3);
    /// The refcount blocks.
    pub const REFCOUNT_BLOCK: Self = Self(1 << 4);
    /// The snapshot table.
    pub const SNAPSHOT_TABLE: Self = Self(1 << 5);
    /// The L1 tables of snapshots.
    pub const INACTIVE_L1: Self = Self(1 << 6);
    /// The L2 tables of snapshots: these have to be read from the disk for every check.
    pub const INACTIVE_L2: Self = Self(1 << 7);
    /// The directory of bitmaps.
    pub const BITMAP_DIRECTORY: Self = Self(1 << 8);
    /// What needs one comparison each: header, refcount table, snapshot table, bitmap directory, active L1.
    pub const CONSTANT: Self = Self(0b1_0010_1011);
    /// And what is known without reading the disk.
    pub const CACHED: Self = Self(0b1_0111_1111);
    /// Everything.
    pub const ALL: Self = Self(0b1_1111_1111);

    /// Whether all of `other` are in it.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The set without `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl BitOr for OverlapCheck {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}
