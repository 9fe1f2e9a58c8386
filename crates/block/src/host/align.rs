//! What O_DIRECT wants to be aligned to: asked of the kernel, and where it does not say, found by trying. Only ever
//! reads.

use std::os::fd::{AsFd, OwnedFd};

use diskfuse_ring::{Buf, PAGE};
use rustix::fs::{AtFlags, StatxFlags};

use super::HostKind;

/// What a transfer without copying must be aligned to. Powers of two, in bytes; 1 where it does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alignment {
    /// Of the memory.
    pub memory: u32,
    /// Of the offset in the file and of the length.
    pub offset: u32,
}

/// Larger than any disk's sectors; a kernel that wants more than this is not believed. Memory cannot be aligned to more
/// than a page, as buffers are not.
const LARGEST: u32 = 64 << 10;

impl Alignment {
    pub(super) const NONE: Self = Self {
        memory: 1,
        offset: 1,
    };

    /// For a file that is open with O_DIRECT. `None` if it cannot be used that way.
    pub(super) fn discover(fd: &OwnedFd, kind: HostKind, size: u64) -> Option<Self> {
        match ask(fd) {
            Answer::Alignment(align) => return Some(align),
            Answer::Impossible => return None,
            Answer::Unknown => {}
        }
        if kind == HostKind::Device
            && let Ok(sector) = rustix::fs::ioctl_blksszget(fd)
        {
            // Before Linux 6.0 memory had to be aligned to sectors as well.
            return Self::checked(sector, sector);
        }
        Some(probe(fd, size))
    }

    fn checked(memory: u32, offset: u32) -> Option<Self> {
        let sound = |n: u32, most: u32| n.is_power_of_two() && n <= most;
        (sound(memory, PAGE as u32) && sound(offset, LARGEST)).then_some(Self { memory, offset })
    }
}

enum Answer {
    Alignment(Alignment),
    Impossible,
    Unknown,
}

/// statx(2), STATX_DIOALIGN, since Linux 6.1.
fn ask(fd: impl AsFd) -> Answer {
    let Ok(statx) = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else {
        return Answer::Unknown;
    };
    if statx.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Answer::Unknown;
    }
    match (statx.stx_dio_mem_align, statx.stx_dio_offset_align) {
        (_, 0) => Answer::Impossible,
        (memory, offset) => {
            Alignment::checked(memory.max(1), offset).map_or(Answer::Unknown, Answer::Alignment)
        }
    }
}

/// Reads at the beginning of the file, less and less aligned, until the host minds. An empty file tells nothing:
/// hosts answer 0 before they look at the alignment.
fn probe(fd: &OwnedFd, size: u64) -> Alignment {
    let coarse = Alignment {
        memory: PAGE as u32,
        offset: PAGE as u32,
    };
    let Ok(mut buf) = Buf::new(2 * PAGE) else {
        return coarse;
    };
    let mut readable = |memory: usize, len: usize| {
        buf.set_window(memory..memory + len);
        let answer = rustix::io::pread(fd, buf.as_mut_slice(), 0);
        answer.is_ok_and(|n| n > 0)
    };
    if size < PAGE as u64 {
        return coarse;
    }
    let steps = [1, 512, 1024, 2048];
    let offset = steps.into_iter().find(|&len| readable(0, len));
    let memory = steps.into_iter().find(|&at| readable(at, PAGE));
    Alignment {
        memory: memory.unwrap_or(PAGE) as u32,
        offset: offset.unwrap_or(PAGE) as u32,
    }
}
