//! Memory that the kernel writes and reads behind the compiler's back: no reference into it is ever made, bytes are copied
//! in and out of it. It is empty (all zeroes, no pages behind it) until it is written.

// The mapping and copies through its pointer are unsafe calls.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// An anonymous mapping. It stays where it is until it is dropped. Not shared between threads.
pub struct Memory {
    start: *mut u8,
    length: usize,
}

impl Memory {
    /// Maps `length` bytes; address space is not reserved in swap, most of it is never touched.
    pub fn new(length: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of anybody.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), length, protection, flags)? };
        let start = start.cast();
        Ok(Self { start, length })
    }

    /// The address of byte `offset`, for the kernel; panics where `length` bytes from there are not in the mapping.
    pub fn address(&self, offset: usize, length: usize) -> usize {
        self.check(offset, length);
        self.start as usize + offset
    }

    /// Copies `N` bytes out.
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.check(offset, N);
        let mut bytes = [0; N];
        // SAFETY: the range was checked, the mapping lives as long as `self`, and a new array does not overlap it.
        unsafe { ptr::copy_nonoverlapping(self.start.add(offset), bytes.as_mut_ptr(), N) };
        bytes
    }

    /// Copies `bytes` in.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        // SAFETY: the range was checked, the mapping lives as long as `self`, and as there are no references into it
        // `bytes` cannot overlap it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(offset), bytes.len()) };
    }

    /// Offsets are computed from constants and numbers of our own; a wrong one is a bug and must not become a wild write.
    fn check(&self, offset: usize, length: usize) {
        assert!(
            offset
                .checked_add(length)
                .is_some_and(|end| end <= self.length)
        );
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this mapping is ours and nobody has a reference into it. The ring whose requests name it is dropped
        // before it.
        let _ = unsafe { munmap(self.start.cast::<c_void>(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_comes_out_and_the_rest_is_zero() {
        let mut memory = Memory::new(8192).unwrap();
        memory.put(4095, &[1, 2, 3]);
        assert_eq!(memory.get::<5>(4094), [0, 1, 2, 3, 0]);
        assert_eq!(memory.address(8192, 0) - memory.address(0, 1), 8192);
    }

    #[test]
    #[should_panic(expected = "offset")]
    fn nothing_is_written_past_the_end() {
        Memory::new(4096).unwrap().put(4094, &[1, 2, 3]);
    }
}
