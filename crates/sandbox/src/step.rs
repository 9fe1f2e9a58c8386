//! What each thread does itself, as the kernel keeps these things by thread: in a signal handler, so nothing here but system
//! calls and atomics; it must never allocate, lock or panic.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// `_LINUX_CAPABILITY_VERSION_3` of `include/uapi/linux/capability.h`: sets of 64 bits, in two halves.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Of `include/uapi/linux/prctl.h`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: libc::c_int,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct CapabilityHalf {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// One thread's part, and how it went in all of them.
pub(crate) struct Step {
    /// Landlock's rules, or -1.
    rules: libc::c_int,
    drop_capabilities: bool,
    /// The first errno, or 0.
    failed: AtomicI32,
    flusher: AtomicI32,
}

impl Step {
    /// `rules` must stay open until all threads are through.
    pub(crate) fn new(rules: Option<&OwnedFd>, drop_capabilities: bool) -> Self {
        Self {
            rules: rules.map_or(-1, AsRawFd::as_raw_fd),
            drop_capabilities,
            failed: AtomicI32::new(0),
            flusher: AtomicI32::new(0),
        }
    }

    /// Done by each thread for itself. Changes errno.
    pub(crate) fn perform(&self) {
        // Before the capability is gone that it takes (CAP_SYS_RESOURCE). Linux 5.6.
        // SAFETY: no memory is passed.
        note(
            &self.flusher,
            unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) }.into(),
        );
        // SAFETY: no memory is passed.
        note(
            &self.failed,
            unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into(),
        );
        if self.rules >= 0 {
            // SAFETY: no memory is passed.
            note(&self.failed, unsafe {
                libc::syscall(libc::SYS_landlock_restrict_self, self.rules, 0)
            });
        }
        if self.drop_capabilities {
            let header = CapabilityHeader {
                version: CAPABILITY_VERSION_3,
                pid: 0,
            };
            let none = [CapabilityHalf {
                effective: 0,
                permitted: 0,
                inheritable: 0,
            }; 2];
            // SAFETY: both live through the call and are laid out as the kernel's structs of that version.
            note(&self.failed, unsafe {
                libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr())
            });
        }
    }

    /// The first error of what every thread must be able to do.
    pub(crate) fn failed(&self) -> Option<io::Error> {
        error(&self.failed)
    }

    /// Why some thread could not say that it writes back for others, which takes a capability.
    pub(crate) fn flusher_refused(&self) -> Option<io::Error> {
        error(&self.flusher)
    }
}

fn error(first: &AtomicI32) -> Option<io::Error> {
    let errno = first.load(Ordering::Acquire);
    (errno != 0).then(|| io::Error::from_raw_os_error(errno))
}

fn note(first: &AtomicI32, outcome: libc::c_long) {
    if outcome != 0 {
        // SAFETY: the pointer is this thread's errno.
        let errno = unsafe { *libc::__errno_location() };
        // Only the first one is kept.
        let _ = first.compare_exchange(0, errno, Ordering::AcqRel, Ordering::Relaxed);
    }
}
