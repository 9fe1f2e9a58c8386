//! A large array of atomic words, all zero, of which only what is touched is resident: for tables that are sized for
//! the worst case and mostly empty. It must never move, and never be freed while it can be reached.

#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::buf::PAGE;

/// Words in a page.
const WORDS: usize = PAGE / size_of::<u64>();

/// Zero-filled atomic words in memory of their own. May be used from any thread.
pub struct Words {
    base: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: it is an array of atomics, which any thread may use through a shared reference.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// Maps `len` words, all zero, none resident. ENOMEM when the kernel has no address space left, or they are more
    /// than can be counted.
    pub fn new(len: usize) -> io::Result<Self> {
        let none = || io::Error::from_raw_os_error(libc::ENOMEM);
        let len = len
            .max(1)
            .checked_next_multiple_of(WORDS)
            .ok_or_else(none)?;
        let bytes = len.checked_mul(size_of::<u64>()).ok_or_else(none)?;
        if isize::try_from(bytes).is_err() {
            return Err(none());
        }
        // SAFETY: a fresh private anonymous mapping aliases nothing.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        // A huge page would make half a million words resident for one. A kernel without them refuses the advice,
        // which is as good.
        // SAFETY: the range is the mapping made above; this advice changes no contents.
        let _ = unsafe { madvise(base, bytes, Advice::LinuxNoHugepage) };
        let base = NonNull::new(base.cast()).ok_or_else(none)?;
        Ok(Self { base, len })
    }

    /// Gives whole pages inside of `range` (in words) back to the kernel: their words are zero again and not
    /// resident. Words of pages that are partly outside of the range keep their values. Nothing happens if the kernel
    /// refuses (locked memory).
    pub fn release(&self, range: Range<usize>) {
        let start = range.start.next_multiple_of(WORDS);
        let end = range.end.min(self.len) / WORDS * WORDS;
        if start >= end {
            return;
        }
        let bytes = (end - start) * size_of::<u64>();
        // SAFETY: the range lies in the mapping. Private anonymous pages come back zero-filled; for whoever looks at
        // the same time this is a store of zero to each word, which atomics allow.
        let _ = unsafe {
            madvise(
                self.base.as_ptr().add(start).cast(),
                bytes,
                Advice::LinuxDontNeed,
            )
        };
    }
}

impl Deref for Words {
    type Target = [AtomicU64];
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `len` words, is page-aligned, zero-initialised (a valid AtomicU64), and lives as
        // long as `self`; it is reached through shared references to atomics only.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length, and nobody borrows from it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len * size_of::<u64>()) };
    }
}

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Words")
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use super::*;

    #[test]
    fn words_are_zero_keep_what_is_stored_and_are_zero_when_released() {
        let words = Words::new(3 * WORDS - 1).unwrap();
        assert_eq!(words.len(), 3 * WORDS);
        for word in words.iter() {
            assert_eq!(word.swap(7, Relaxed), 0);
        }
        words.release(1..2 * WORDS + 1);
        let values = |range: Range<usize>| words[range].iter().map(|w| w.load(Relaxed)).max();
        assert_eq!(values(0..WORDS), Some(7), "its first word was kept out");
        assert_eq!(values(WORDS..2 * WORDS), Some(0));
        assert_eq!(values(2 * WORDS..3 * WORDS), Some(7));
    }

    #[test]
    fn a_size_that_cannot_be_is_an_error() {
        assert!(Words::new(usize::MAX).is_err());
        assert!(Words::new(usize::MAX / 16).is_err());
    }

    #[test]
    fn untouched_words_cost_no_memory() {
        let words = Words::new(1 << 30).unwrap();
        words[(1 << 30) - 1].store(1, Relaxed);
        assert_eq!(words[0].load(Relaxed), 0);
    }
}
