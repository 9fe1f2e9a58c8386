//! INIT: what we ask the kernel for, and what it lets us have. Only flags that the kernel offered are ever asked for.
//!
//! Source: `process_init_reply()` in `fs/fuse/inode.c` of Linux and `include/uapi/linux/fuse.h`.

use crate::abi::{self, InitOut, init};

/// The most pages of one request; the kernel's own limit is /proc/sys/fs/fuse/max_pages_limit, 256 by default.
pub(crate) const MAX_PAGES: u16 = 256;
/// The largest READ and WRITE, in bytes.
pub(crate) const MAX_REQUEST: usize = MAX_PAGES as usize * 4096;

/// What we would like, each with what it is good for:
/// parallel reads (`ASYNC_READ`), libaio that is not served one by one (`ASYNC_DIO`), 1 MiB requests (`MAX_PAGES`,
/// `BIG_WRITES`), O_TRUNC in OPEN where a fixed size can ignore it (`ATOMIC_O_TRUNC`), shared mappings of a file
/// opened for direct I/O (`DIRECT_IO_ALLOW_MMAP`).
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::ASYNC_DIO
    | init::MAX_PAGES
    | init::INIT_EXT
    | init::DIRECT_IO_ALLOW_MMAP;

/// Answers an INIT, or says why this kernel is of no use.
pub(crate) fn answer(
    major: u32,
    minor: u32,
    max_readahead: u32,
    offered: u64,
    max_background: u16,
) -> Result<InitOut, String> {
    if major != abi::MAJOR || minor < abi::OLDEST_MINOR {
        return Err(format!(
            "speaks protocol {major}.{minor}; {}.{} or later is needed (Linux 5.4)",
            abi::MAJOR,
            abi::OLDEST_MINOR
        ));
    }
    let flags = WANTED & offered;
    if flags & init::MAX_PAGES == 0 {
        return Err("offers no requests larger than 128 KiB".into());
    }
    Ok(InitOut {
        major: abi::MAJOR,
        minor: minor.min(abi::MINOR),
        max_readahead,
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        max_background,
        // Background requests in flight from which on the kernel calls the mount congested.
        congestion_threshold: (u32::from(max_background) * 3 / 4).max(1) as u16,
        max_write: MAX_REQUEST as u32,
        time_gran: 1,
        max_pages: MAX_PAGES,
        ..InitOut::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_offered_is_asked_for() {
        let out = answer(7, 45, 4096, init::MAX_PAGES | init::ASYNC_DIO, 64).unwrap();
        assert_eq!(u64::from(out.flags), init::MAX_PAGES | init::ASYNC_DIO);
        assert_eq!(out.flags2, 0);
        assert_eq!((out.max_background, out.congestion_threshold), (64, 48));
        assert_eq!(out.max_write, 1 << 20);
    }

    #[test]
    fn a_newer_kernel_is_answered_with_our_version_and_an_old_one_refused() {
        assert_eq!(answer(7, 99, 0, u64::MAX, 1).unwrap().minor, abi::MINOR);
        assert_eq!(answer(7, 40, 0, u64::MAX, 1).unwrap().minor, 40);
        assert!(answer(7, 30, 0, u64::MAX, 1).is_err());
        assert!(answer(8, 0, 0, u64::MAX, 1).is_err());
    }
}
