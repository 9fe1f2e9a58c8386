//! `/dev/fuse`: opening it, and joining further descriptors to a mount. A descriptor is one queue; the kernel hands a
//! request to whichever reads first. They are always non-blocking: a queue that blocked in read(2) for a request that
//! another queue took would stall its disk I/O.
//!
//! Source: `include/uapi/linux/fuse.h` (`FUSE_DEV_IOC_CLONE`), `fs/fuse/dev.c` of Linux.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use diskfuse_ring::SharedFd;
use rustix::fs::{Mode, OFlags};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, ioctl, opcode};

use zerocopy::IntoBytes;

use crate::abi::{BackingMap, NOTIFY_INVAL_INODE, NotifyInvalInodeOut, OUT_HEADER, OutHeader};

/// `FUSE_DEV_IOC_CLONE`: `_IOR(229, 0, uint32_t)`.
const CLONE: Opcode = opcode::read::<u32>(229, 0);

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

/// Tells the kernel that what it knows of the file's attributes is not true any more.
pub(crate) fn forget_attributes(connection: &SharedFd, ino: u64) -> io::Result<()> {
    let notice = NotifyInvalInodeOut {
        ino,
        off: -1,
        len: 0,
    };
    let header = OutHeader {
        len: (OUT_HEADER + size_of_val(&notice)) as u32,
        error: NOTIFY_INVAL_INODE,
        unique: 0,
    };
    let words = [header.as_bytes(), notice.as_bytes()].concat();
    rustix::io::write(connection.as_fd(), &words)?;
    Ok(())
}

/// `FUSE_DEV_IOC_BACKING_OPEN`: `_IOW(229, 1, struct fuse_backing_map)`.
const BACKING_OPEN: Opcode = opcode::write::<BackingMap>(229, 1);

struct OpenBacking(BackingMap);

// SAFETY: the kernel reads one `struct fuse_backing_map` through the pointer and writes nothing; its return value is the
// answer.
unsafe impl Ioctl for OpenBacking {
    type Output = i32;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        BACKING_OPEN
    }

    fn as_ptr(&mut self) -> *mut libc::c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut libc::c_void) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// Gives the kernel a file to read and write by itself, and returns its name for it.
pub(crate) fn open_backing(connection: &SharedFd, file: BorrowedFd<'_>) -> io::Result<i32> {
    let map = BackingMap {
        fd: file.as_raw_fd(),
        ..BackingMap::default()
    };
    // SAFETY: as `OpenBacking` says; the descriptor is open meanwhile.
    Ok(unsafe { ioctl(connection.as_fd(), OpenBacking(map))? })
}
