//! INIT: what we ask the kernel for, and what it lets us have. Only flags that the kernel offered are ever asked for.
//!
//! Source: `process_init_reply()` in `fs/fuse/inode.c` of Linux and `include/uapi/linux/fuse.h`.

use crate::abi::{self, InitOut, init};

/// What we would like, each with what it is good for:
/// parallel reads (`ASYNC_READ`), libaio that is not served one by one (`ASYNC_DIO`), large requests (`MAX_PAGES`,
/// `BIG_WRITES`), O_TRUNC in OPEN where a fixed size can ignore it (`ATOMIC_O_TRUNC`), shared mappings of a file
/// opened for direct I/O (`DIRECT_IO_ALLOW_MMAP`).
const WANTED: u64 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::ASYNC_DIO
    | init::MAX_PAGES
    | init::INIT_EXT
    | init::DIRECT_IO_ALLOW_MMAP;

/// What an export wants beyond that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish {
    /// Asynchronous requests in flight.
    pub(crate) max_background: u16,
    /// The largest request in bytes, a multiple of 4096.
    pub(crate) max_request: usize,
    /// FUSE over io_uring.
    pub(crate) ring: bool,
    /// The kernel reads and writes the image file itself.
    pub(crate) passthrough: bool,
}

/// How many file systems may stand on each other when the kernel reads and writes the image file itself: ours on one that
/// stands on none.
const STACK_DEPTH: u32 = 1;

/// What the kernel said of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) max_readahead: u32,
    pub(crate) flags: u64,
}

/// Answers an INIT, or says why this kernel is of no use.
pub(crate) fn answer(offer: Offer, wish: Wish) -> Result<InitOut, String> {
    let Offer {
        major,
        minor,
        max_readahead,
        flags: offered,
    } = offer;
    let max_background = wish.max_background;
    if major != abi::MAJOR || minor < abi::OLDEST_MINOR {
        return Err(format!(
            "speaks protocol {major}.{minor}; {}.{} or later is needed (Linux 5.4)",
            abi::MAJOR,
            abi::OLDEST_MINOR
        ));
    }
    let ring = if wish.ring { init::OVER_IO_URING } else { 0 };
    let passthrough = if wish.passthrough {
        init::PASSTHROUGH
    } else {
        0
    };
    let flags = (WANTED | ring | passthrough) & offered;
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
        max_write: wish.max_request as u32,
        time_gran: 1,
        max_stack_depth: if flags & init::PASSTHROUGH == 0 {
            0
        } else {
            STACK_DEPTH
        },
        max_pages: (wish.max_request / 4096) as u16,
        ..InitOut::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(major: u32, minor: u32, flags: u64) -> Result<InitOut, String> {
        let offer = Offer {
            major,
            minor,
            max_readahead: 4096,
            flags,
        };
        let wish = Wish {
            max_background: 64,
            max_request: 1 << 20,
            ring: false,
            passthrough: false,
        };
        answer(offer, wish)
    }

    #[test]
    fn only_what_is_offered_is_asked_for() {
        let out = ask(7, 45, init::MAX_PAGES | init::ASYNC_DIO).unwrap();
        assert_eq!(u64::from(out.flags), init::MAX_PAGES | init::ASYNC_DIO);
        assert_eq!(out.flags2, 0);
        assert_eq!((out.max_background, out.congestion_threshold), (64, 48));
        assert_eq!((out.max_write, out.max_pages), (1 << 20, 256));
    }

    #[test]
    fn a_newer_kernel_is_answered_with_our_version_and_an_old_one_refused() {
        assert_eq!(ask(7, 99, u64::MAX).unwrap().minor, abi::MINOR);
        assert_eq!(ask(7, 40, u64::MAX).unwrap().minor, 40);
        assert!(ask(7, 30, u64::MAX).is_err());
        assert!(ask(8, 0, u64::MAX).is_err());
    }

    #[test]
    fn ring_and_passthrough_are_asked_for_only_by_those_who_want_them() {
        let out = ask(7, 45, u64::MAX).unwrap();
        let unwanted = init::OVER_IO_URING | init::PASSTHROUGH;
        assert_eq!(u64::from(out.flags2) << 32 & unwanted, 0);
        assert_eq!(out.max_stack_depth, 0);
    }
}
