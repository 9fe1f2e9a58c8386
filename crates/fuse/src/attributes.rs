//! What stat(2) shows of the exported file, as far as the disk behind it does not say. Never anything that decides
//! what the daemon itself may do.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::abi::Attr;
use crate::error::{Error, Result};
use crate::shared::AllowOther;

/// Bytes of a block that stat suggests for I/O.
const BLOCK: u32 = 4096;

/// Whose the exported file is and what its mode says, until somebody changes it; the kernel lets each caller do what
/// they allow (`default_permissions`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ownership {
    /// The owner; by default who runs the daemon.
    pub uid: Option<u32>,
    /// The group; by default that of who runs the daemon.
    pub gid: Option<u32>,
    /// Permission bits, 0 to 0o777; by default 0o600, and 0o400 if the file cannot be written.
    pub mode: Option<u32>,
}

impl Ownership {
    pub(crate) fn uid(&self) -> u32 {
        self.uid.unwrap_or_else(own_uid)
    }

    pub(crate) fn gid(&self) -> u32 {
        self.gid.unwrap_or_else(own_gid)
    }

    /// Permission bits of a folder: whoever may read the files may look into it.
    pub(crate) fn folder_mode(&self) -> u32 {
        let reads = self.mode.map_or(0o444, |mode| mode & 0o444);
        reads | reads >> 2
    }

    /// [`Error::Options`] if somebody would be promised what the mount does not let him do.
    pub(crate) fn check(&self, others: AllowOther) -> Result<()> {
        let open = self.mode.is_some_and(|mode| mode & 0o077 != 0);
        let foreign = self.uid.is_some_and(|uid| uid != own_uid())
            || self.gid.is_some_and(|gid| gid != own_gid());
        let refused = |message: &str| Err(Error::Options(message.to_owned()));
        if self.mode.is_some_and(|mode| mode > 0o777) {
            return refused("the mode must be permission bits, 0 to 0777");
        }
        match others {
            AllowOther::Off if open || foreign => refused(
                "a mode for group or others, or another owner or group, means nothing unless others are let in \
                 (allow-other)",
            ),
            AllowOther::Root if open || foreign => refused(
                "with allow-root the file is this user's and its mode lets nobody else in; allow-other goes by owner, \
                 group and mode",
            ),
            _ => Ok(()),
        }
    }
}

fn own_uid() -> u32 {
    rustix::process::getuid().as_raw()
}

fn own_gid() -> u32 {
    rustix::process::getgid().as_raw()
}

/// Mutable attributes; each stands for itself, so plain atomics do.
pub(crate) struct Attributes {
    ino: u64,
    mode: AtomicU32,
    uid: AtomicU32,
    gid: AtomicU32,
    /// Nanoseconds since the epoch.
    accessed: AtomicU64,
    modified: AtomicU64,
    /// Something was written since `modified` was set: the clock is read when somebody asks, not at each write.
    written: AtomicBool,
    /// Something was written at all.
    ever_written: AtomicBool,
}

fn now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds from what SETATTR carries.
pub(crate) fn nanoseconds((seconds, nanos): (u64, u32)) -> u64 {
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanos.into())
}

impl Attributes {
    pub(crate) fn new(ino: u64, writable: bool, ownership: Ownership) -> Self {
        let now = now();
        Self {
            ino,
            mode: AtomicU32::new(
                ownership
                    .mode
                    .unwrap_or(if writable { 0o600 } else { 0o400 }),
            ),
            uid: AtomicU32::new(ownership.uid()),
            gid: AtomicU32::new(ownership.gid()),
            accessed: AtomicU64::new(now),
            modified: AtomicU64::new(now),
            written: AtomicBool::new(false),
            ever_written: AtomicBool::new(false),
        }
    }

    pub(crate) fn set_mode(&self, mode: u32) {
        self.mode.store(mode & 0o7777, Ordering::Relaxed);
    }

    pub(crate) fn set_uid(&self, uid: u32) {
        self.uid.store(uid, Ordering::Relaxed);
    }

    pub(crate) fn set_gid(&self, gid: u32) {
        self.gid.store(gid, Ordering::Relaxed);
    }

    /// Sets the time of the last access: `None` is now.
    pub(crate) fn set_accessed(&self, nanoseconds: Option<u64>) {
        self.accessed
            .store(nanoseconds.unwrap_or_else(now), Ordering::Relaxed);
    }

    /// Sets the time of the last change: `None` is now.
    pub(crate) fn set_modified(&self, nanoseconds: Option<u64>) {
        self.written.store(false, Ordering::Relaxed);
        self.modified
            .store(nanoseconds.unwrap_or_else(now), Ordering::Relaxed);
    }

    /// Notes that the contents changed.
    pub(crate) fn mark_written(&self) {
        // Looked at first: a line that all queues only read stays in all their caches.
        if !self.written.load(Ordering::Relaxed) {
            self.written.store(true, Ordering::Relaxed);
            self.ever_written.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the contents ever changed.
    pub(crate) fn ever_written(&self) -> bool {
        self.ever_written.load(Ordering::Relaxed)
    }

    /// The kernel's struct, for a disk of `size` bytes that takes `allocated` bytes on the host.
    pub(crate) fn attr(&self, size: u64, allocated: u64) -> Attr {
        if self.written.swap(false, Ordering::Relaxed) {
            self.modified.store(now(), Ordering::Relaxed);
        }
        let time = |t: &AtomicU64| {
            let t = t.load(Ordering::Relaxed);
            (t / 1_000_000_000, (t % 1_000_000_000) as u32)
        };
        let (atime, atimensec) = time(&self.accessed);
        let (mtime, mtimensec) = time(&self.modified);
        Attr {
            ino: self.ino,
            size,
            blocks: allocated.div_ceil(512),
            atime,
            mtime,
            ctime: mtime,
            atimensec,
            mtimensec,
            ctimensec: mtimensec,
            mode: libc::S_IFREG | self.mode.load(Ordering::Relaxed),
            nlink: 1,
            uid: self.uid.load(Ordering::Relaxed),
            gid: self.gid.load(Ordering::Relaxed),
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        }
    }
}
