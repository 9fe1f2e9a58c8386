//! Memory that operations own while the kernel reads or writes it. It must never be freed, moved or aliased while an
//! operation is in flight; the type sees to that: a [`Buf`] is handed over whole and comes back with the result.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// The alignment of every buffer's first byte, in bytes: enough for O_DIRECT on any disk with sectors up to 4 KiB.
pub const PAGE: usize = 4096;

/// One mapping of anonymous memory: page-aligned, zero-filled, and not resident before it is touched.
struct Region {
    base: NonNull<u8>,
    len: usize,
}

impl Region {
    fn new(len: usize) -> io::Result<Self> {
        let len = len.max(1).next_multiple_of(PAGE);
        // SAFETY: a fresh private anonymous mapping aliases nothing.
        let base = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        // Huge pages would make a whole buffer resident at its first touched byte. A kernel without them refuses the
        // advice, which is as good.
        // SAFETY: the range is the mapping made above; this advice changes no contents.
        let _ = unsafe { madvise(base, len, Advice::LinuxNoHugepage) };
        match NonNull::new(base.cast()) {
            Some(base) => Ok(Self { base, len }),
            None => Err(io::Error::from_raw_os_error(libc::ENOMEM)),
        }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length, and no `Buf` into it is left.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// An owned piece of page-aligned memory with a window: operations and slices see the window only.
///
/// A buffer is *bounds* (what it owns, fixed but for [`Buf::split_off`]) and a *window* inside them (what the next
/// operation works on). It stays on its thread. No two buffers ever overlap.
pub struct Buf {
    region: Rc<Region>,
    lo: usize,
    hi: usize,
    start: usize,
    end: usize,
}

impl Buf {
    /// Maps `capacity` bytes (rounded up to whole pages), all zero, none of them resident yet. The window is
    /// `0..capacity`. Fails with ENOMEM when the kernel has no address space left.
    pub fn new(capacity: usize) -> io::Result<Self> {
        let region = Region::new(capacity)?;
        Ok(Self {
            lo: 0,
            hi: region.len,
            start: 0,
            end: capacity,
            region: Rc::new(region),
        })
    }

    /// Bytes within the bounds.
    pub fn capacity(&self) -> usize {
        self.hi - self.lo
    }

    /// Bytes in the window.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether the window is empty.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The window, in bytes from the beginning of the bounds.
    pub fn window(&self) -> Range<usize> {
        self.start - self.lo..self.end - self.lo
    }

    /// Moves the window to `range`, in bytes from the beginning of the bounds. Panics, as slicing does, if it does
    /// not lie within them.
    pub fn set_window(&mut self, range: Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= self.capacity(),
            "window {range:?} outside of a buffer of {} bytes",
            self.capacity()
        );
        self.start = self.lo + range.start;
        self.end = self.lo + range.end;
    }

    /// The same buffer with another window; see [`Buf::set_window`].
    #[must_use]
    pub fn with_window(mut self, range: Range<usize>) -> Self {
        self.set_window(range);
        self
    }

    /// Cuts the bounds at `at` bytes and gives the second half away. Both windows become the whole of their bounds.
    /// Panics if `at` is past the bounds.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(
            at <= self.capacity(),
            "split at {at} of {}",
            self.capacity()
        );
        let cut = self.lo + at;
        let tail = Self {
            region: Rc::clone(&self.region),
            lo: cut,
            hi: self.hi,
            start: cut,
            end: self.hi,
        };
        self.hi = cut;
        self.start = self.lo;
        self.end = cut;
        tail
    }

    /// Takes back what [`Buf::split_off`] gave away; the window becomes the whole of the joined bounds. A buffer that
    /// is not the direct continuation of this one is handed back unchanged.
    pub fn join(&mut self, tail: Self) -> Result<(), Self> {
        if !Rc::ptr_eq(&self.region, &tail.region) || tail.lo != self.hi {
            return Err(tail);
        }
        self.hi = tail.hi;
        self.start = self.lo;
        self.end = self.hi;
        Ok(())
    }

    /// The bytes of the window.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the window lies in the mapping, which lives as long as `self`; it is initialised (anonymous
        // memory is zero) and no other `Buf` covers it.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len()) }
    }

    /// The bytes of the window, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.ptr(), self.len()) }
    }

    /// Gives the window back to the kernel: it reads as zeroes again and is not resident. False, and nothing is known
    /// to have changed, if the kernel refuses (locked memory, larger pages) or the window is not whole pages.
    #[must_use]
    pub fn release(&mut self) -> bool {
        if !self.start.is_multiple_of(PAGE) || !self.end.is_multiple_of(PAGE) {
            return false;
        }
        // SAFETY: the range is page-aligned and inside the window, which only `self` covers; private anonymous pages
        // come back zero-filled.
        let released = unsafe { madvise(self.ptr().cast(), self.len(), Advice::LinuxDontNeed) };
        released.is_ok()
    }

    /// The first byte of the window, for the kernel. Whoever uses it must keep the `Buf`.
    pub(crate) fn ptr(&self) -> *mut u8 {
        // SAFETY: `start` is at most the mapping's length.
        unsafe { self.region.base.as_ptr().add(self.start) }
    }
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buf")
            .field("capacity", &self.capacity())
            .field("window", &self.window())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_halves_are_disjoint_and_join_again() {
        let mut a = Buf::new(3 * PAGE).unwrap();
        let mut b = a.split_off(PAGE);
        a.as_mut_slice().fill(1);
        b.as_mut_slice().fill(2);
        assert_eq!((a.len(), b.len()), (PAGE, 2 * PAGE));
        a.join(b).unwrap();
        assert_eq!(a.len(), 3 * PAGE);
        assert!(a.as_slice()[..PAGE].iter().all(|&x| x == 1));
        assert!(a.as_slice()[PAGE..].iter().all(|&x| x == 2));
    }

    #[test]
    fn a_stranger_is_not_joined() {
        let mut a = Buf::new(PAGE).unwrap();
        let b = Buf::new(PAGE).unwrap();
        assert!(a.join(b).is_err());
    }

    #[test]
    fn released_pages_read_as_zeroes() {
        let mut a = Buf::new(2 * PAGE).unwrap();
        a.as_mut_slice().fill(7);
        a.set_window(PAGE..2 * PAGE);
        assert!(a.release());
        assert!(a.as_slice().iter().all(|&x| x == 0));
        a.set_window(1..PAGE);
        assert!(!a.release(), "not whole pages");
        a.set_window(0..PAGE);
        assert!(a.as_slice().iter().all(|&x| x == 7));
    }

    #[test]
    #[should_panic(expected = "window")]
    fn a_window_outside_of_the_bounds_panics() {
        Buf::new(PAGE).unwrap().set_window(0..PAGE + 1);
    }
}
