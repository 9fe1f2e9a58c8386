//! Which parts of a disk were changed: a bit for each piece of it. Marking takes no lock and, but for the first mark in a
//! stretch, allocates nothing, so it may be done on the way of every write. A bit must never be lost: whoever takes bits away
//! sees to it that nothing is being written meanwhile, or reads what they stood for only afterwards.

mod pages;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Kind, Result};
use crate::node::{LocalFuture, Node, Wrap};
use crate::watch::{Edit, Edited, Watch, Watched};
use pages::Pages;

/// The bounds of a granularity, in bytes.
pub const GRANULARITIES: Range<u64> = 512..(2 << 30) + 1;
/// The most that the default granularity is, in bytes.
pub const DEFAULT_GRANULARITY: u64 = 64 << 10;
/// Bits of one bitmap: more would take more than 4 GiB of memory.
const MOST_BITS: u64 = 1 << 35;

/// A bitmap over a disk. May be used from any thread.
pub struct DirtyBitmap {
    /// log2 of the bytes that one bit stands for.
    shift: u32,
    size: AtomicU64,
    /// Held while a size is read and followed: of two who change it at the same time, the later one reads the newer size.
    following: Mutex<()>,
    pages: Pages,
    recording: AtomicBool,
    busy: AtomicBool,
    /// Bits that users are told of while a job has taken them away.
    kept_count: Mutex<Option<u64>>,
    inconsistent: AtomicBool,
}

/// What `query-named-block-nodes` says of a bitmap, but for its name and whether it is stored in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Dirty bytes, in whole units of the granularity.
    pub count: u64,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Writes are recorded.
    pub recording: bool,
    /// A job uses it, so it cannot be changed.
    pub busy: bool,
    /// It does not tell the truth, as it was not stored when it should have been; it can only be removed.
    pub inconsistent: bool,
}

impl DirtyBitmap {
    /// A clean bitmap that records, for a disk of `size` bytes; one bit for each `granularity` bytes.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the granularity is not a power of two within [`GRANULARITIES`], or so small that the bitmap
    /// of this disk would be too large.
    pub fn new(size: u64, granularity: u64) -> Result<Self> {
        if !granularity.is_power_of_two() {
            let message = "Granularity must be a power of 2";
            return Err(Error::new(Kind::Invalid, message));
        }
        if !GRANULARITIES.contains(&granularity) {
            let (least, most) = (GRANULARITIES.start, GRANULARITIES.end - 1);
            let message = format!("Granularity must be between {least} and {most} bytes");
            return Err(Error::new(Kind::Invalid, message));
        }
        let this = Self {
            shift: granularity.trailing_zeros(),
            size: AtomicU64::new(size),
            following: Mutex::new(()),
            pages: Pages::default(),
            recording: AtomicBool::new(true),
            busy: AtomicBool::new(false),
            kept_count: Mutex::default(),
            inconsistent: AtomicBool::new(false),
        };
        this.check_size(size)?;
        Ok(this)
    }

    /// The granularity that a bitmap of `node` has if nobody says another: that of its clusters, or 64 KiB.
    pub fn default_granularity(node: &dyn Node) -> u64 {
        let cluster = node.cluster_size().unwrap_or(DEFAULT_GRANULARITY);
        cluster.clamp(4096, DEFAULT_GRANULARITY)
    }

    fn check_size(&self, size: u64) -> Result<()> {
        if size.div_ceil(self.granularity()) <= MOST_BITS {
            return Ok(());
        }
        let granularity = self.granularity();
        let message = format!(
            "a bitmap with a granularity of {granularity} bytes is too large for a disk of {size} bytes: choose a larger one"
        );
        Err(Error::new(Kind::Invalid, message))
    }

    /// Bytes that one bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    /// Dirty bytes, in whole units of the granularity but for the end of the disk.
    pub fn dirty_bytes(&self) -> u64 {
        let bytes = self.pages.count() << self.shift;
        bytes.min(self.size())
    }

    /// What is said of it to users.
    pub fn info(&self) -> BitmapInfo {
        let count = self.kept_count.lock().unwrap_or(self.pages.count());
        BitmapInfo {
            count: count << self.shift,
            granularity: self.granularity(),
            recording: self.recording.load(Ordering::SeqCst),
            busy: self.is_busy(),
            inconsistent: self.inconsistent.load(Ordering::SeqCst),
        }
    }

    /// Whether changes of the disk are marked.
    pub fn is_recording(&self) -> bool {
        self.recording.load(Ordering::SeqCst)
    }

    /// Whether changes of the disk are marked from now on.
    pub fn set_recording(&self, recording: bool) {
        self.recording.store(recording, Ordering::SeqCst);
    }

    /// Takes the bitmap for a job, or gives it back. False if it was taken already.
    pub fn set_busy(&self, busy: bool) -> bool {
        if !busy {
            *self.kept_count.lock() = None;
        }
        self.busy.swap(busy, Ordering::SeqCst) != busy || !busy
    }

    /// For the job that uses the bitmap, before it takes the marks away: until it gives the bitmap back, users are told of as
    /// many dirty bytes as there are now.
    pub fn keep_count(&self) {
        *self.kept_count.lock() = Some(self.pages.count());
    }

    /// Whether a job uses it.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }

    /// From now on it is known not to tell the truth.
    pub fn set_inconsistent(&self) {
        self.recording.store(false, Ordering::SeqCst);
        self.inconsistent.store(true, Ordering::SeqCst);
    }

    /// The bits that a range touches.
    fn bits(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len);
        let last = (end >> self.shift) + u64::from(end & (self.granularity() - 1) != 0);
        let bits = (offset >> self.shift).min(MOST_BITS)..last.min(MOST_BITS);
        if len == 0 {
            bits.start..bits.start
        } else {
            bits
        }
    }

    /// Marks all that a range touches. Returns whether some of it was clean.
    pub fn mark(&self, offset: u64, len: u64) -> bool {
        self.pages.set(self.bits(offset, len))
    }

    /// Clears all that a range touches. Returns whether some of it was dirty.
    pub fn clear(&self, offset: u64, len: u64) -> bool {
        self.pages.clear(self.bits(offset, len))
    }

    /// Whether something that a range touches is dirty.
    pub fn is_dirty(&self, offset: u64, len: u64) -> bool {
        let bits = self.bits(offset, len);
        self.pages.next_set(bits.start, bits.end).is_some()
    }

    /// The first dirty area from `offset` on, in bytes, whole units but for the end of the disk: no longer than `most` bytes
    /// (at least one unit), and not past `end`.
    pub fn next_dirty(&self, offset: u64, end: u64, most: u64) -> Option<Range<u64>> {
        let end = end.min(self.size());
        if offset >= end {
            return None;
        }
        let bits = self.bits(offset, end - offset);
        let first = self.pages.next_set(bits.start, bits.end)?;
        let most = (most >> self.shift).max(1);
        let limit = bits.end.min(first.saturating_add(most));
        let last = self.pages.next_clear(first, limit);
        Some((first << self.shift).max(offset)..(last << self.shift).min(end))
    }

    /// Marks here what is dirty in `other`, which is not changed. The granularities may differ.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the disks are of different sizes.
    pub fn merge(&self, other: &Self) -> Result<()> {
        let (ours, theirs) = (self.size(), other.size());
        if ours != theirs {
            let message = format!(
                "Bitmaps are of different sizes (destination size is {ours}, source size is {theirs}) and can't be merged"
            );
            return Err(Error::new(Kind::Invalid, message));
        }
        self.absorb(other);
        Ok(())
    }

    /// Marks here what is dirty in `other`, as far as it is within this disk.
    pub fn absorb(&self, other: &Self) {
        let mut at = 0;
        while let Some(area) = other.next_dirty(at, self.size(), u64::MAX) {
            self.mark(area.start, area.end - area.start);
            at = area.end;
        }
    }

    /// How many bits there are: one for each unit of the disk, also for the last one if it is not whole.
    pub fn bits_of_disk(&self) -> u64 {
        self.size().div_ceil(self.granularity())
    }

    /// The bits as bytes, from byte `at` on, a multiple of 8, as far as `bytes` has room for whole words of 8 bytes: bit *i* is
    /// bit *i* % 8 of byte *i* / 8. There are none past the end of the disk.
    pub fn copy_to_bytes(&self, at: u64, bytes: &mut [u8]) {
        let end = self.bits_of_disk();
        for (word, to) in (at / 8..).zip(bytes.as_chunks_mut::<8>().0) {
            let bits = self.pages.get(word) & within(word, end);
            *to = bits.to_le_bytes();
        }
    }

    /// Marks what is set in bytes that are as [`DirtyBitmap::copy_to_bytes`] makes them, as far as that is within the disk.
    pub fn mark_from_bytes(&self, at: u64, bytes: &[u8]) {
        let end = self.bits_of_disk();
        for (word, from) in (at / 8..).zip(bytes.as_chunks::<8>().0) {
            let bits = u64::from_le_bytes(*from) & within(word, end);
            self.pages.put(word, bits);
        }
    }

    /// Moves all marks to a bitmap of its own. Only while nobody writes the disk: a mark that comes meanwhile may be in
    /// either.
    pub fn take(&self) -> Result<Self> {
        let taken = Self::new(self.size(), self.granularity())?;
        taken.absorb(self);
        self.clear(0, self.size());
        Ok(taken)
    }

    /// The disk may have another size, which `size` reads, in bytes: what is past its end is clean from now on; new parts are
    /// dirty, as they were not there. `size` is called in the course of this, so that nobody who follows a change of size
    /// that happens at the same time can do so with an older one later; it must not block.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the bitmap would be too large; it stays as it was then.
    pub fn follow(&self, size: impl FnOnce() -> u64) -> Result<()> {
        let _following = self.following.lock();
        let size = size();
        self.check_size(size)?;
        let before = self.size.swap(size, Ordering::SeqCst);
        if size < before {
            let gone = self.bits(0, size).end..self.bits(0, before).end;
            self.pages.clear(gone);
        } else if self.recording.load(Ordering::SeqCst) {
            self.mark(before, size - before);
        }
        Ok(())
    }
}

impl std::fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DirtyBitmap").field(&self.info()).finish()
    }
}

/// Those bits of a word that are before bit `end` of all.
fn within(word: u64, end: u64) -> u64 {
    match end.saturating_sub(word.saturating_mul(64)) {
        64.. => u64::MAX,
        left => (1 << left) - 1,
    }
}

/// Marks before the change, so that it is enough to stop all writers to see every change that was made.
impl Watch for DirtyBitmap {
    fn lets_through(&self, offset: u64, len: u64) -> bool {
        if self.recording.load(Ordering::SeqCst) {
            self.mark(offset, len);
        }
        true
    }

    fn edit<'a>(&'a self, node: &'a dyn Node, edit: Edit) -> LocalFuture<'a, Edited> {
        Box::pin(async move {
            let range = edit.range(node.size());
            self.lets_through(range.start, range.end - range.start);
            let resizes = matches!(edit, Edit::Resize { .. });
            let mut edited = edit.apply(node).await;
            if resizes {
                edited.result = edited.result.and(self.follow(|| node.size()));
            }
            edited
        })
    }
}

/// Between a node and its users: changes are marked in a bitmap.
#[derive(Debug)]
pub struct Recorder(pub Arc<DirtyBitmap>);

impl Wrap for Recorder {
    fn over(&self, node: Arc<dyn Node>) -> Arc<dyn Node> {
        let bitmap = Arc::clone(&self.0);
        Arc::new(Watched::new(node, bitmap))
    }
}

#[cfg(test)]
mod tests;
