//! `/dev/fuse`: opening it, and joining further descriptors to a mount. A descriptor is one queue; the kernel hands a
//! request to whichever reads first. They are always non-blocking: a queue that blocked in read(2) for a request that
//! another queue took would stall its disk I/O.
//!
//! Source: `include/uapi/linux/fuse.h` (`FUSE_DEV_IOC_CLONE`), `fs/fuse/dev.c` of Linux.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use diskfuse_ring::SharedFd;
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Setter, ioctl, opcode};

/// `FUSE_DEV_IOC_CLONE`: `_IOR(229, 0, uint32_t)`.
const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);

/// Opens `/dev/fuse`.
pub(crate) fn open() -> io::Result<SharedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    Ok(SharedFd::new(rustix::fs::open(
        "/dev/fuse",
        flags,
        Mode::empty(),
    )?))
}

/// Opens `/dev/fuse` once more and joins it to the mount of `first`.
pub(crate) fn clone_of(first: &SharedFd) -> io::Result<SharedFd> {
    let fd = open()?;
    let number = first.as_raw_fd() as u32;
    // SAFETY: the kernel reads one u32 through the pointer, which `Setter` provides, and changes only `fd`.
    unsafe { ioctl(fd.as_fd(), Setter::<CLONE, u32>::new(number))? };
    Ok(fd)
}
