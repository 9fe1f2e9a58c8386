//! Image locks as QEMU sets them, so that two programs never write one image by mistake. They are advisory byte-range
//! locks of the open file description (`F_OFD_SETLK`, fcntl(2)): byte 100 + *bit* is read-locked while a permission
//! is used, byte 200 + *bit* while others may not use it (QEMU, `block/file-posix.c`, `RAW_LOCK_PERM_BASE` and
//! `RAW_LOCK_SHARED_BASE`). Whoever wants something takes its own locks first and then looks for somebody who
//! objects; so of two that come at once at least one sees the other. A lock is never waited for.

use diskfuse_ring::SharedFd;
use nix::fcntl::{FcntlArg, fcntl};
use parking_lot::Mutex;

use crate::error::{Error, Kind, Result};
use crate::permissions::Permissions;

const USED_BASE: i64 = 100;
const UNSHARED_BASE: i64 = 200;

/// Whether to set image locks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Where the file system has such locks.
    #[default]
    Auto,
    /// Or refuse to open the image.
    On,
    /// Never: the user knows that nobody else writes.
    Off,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    used: Permissions,
    unshared: Permissions,
}

impl std::ops::BitOr for Held {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self {
            used: self.used | other.used,
            unshared: self.unshared | other.unshared,
        }
    }
}

impl Held {
    fn without(self, other: Self) -> Self {
        Self {
            used: self.used & !other.used,
            unshared: self.unshared & !other.unshared,
        }
    }

    fn bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used.bits().map(|(bit, _)| USED_BASE + i64::from(bit));
        let unshared = self.unshared.bits();
        used.chain(unshared.map(|(bit, _)| UNSHARED_BASE + i64::from(bit)))
    }
}

/// The locks of one open file. They go with its last descriptor.
#[derive(Debug)]
pub(crate) struct ImageLock {
    fd: SharedFd,
    path: String,
    mode: Locking,
    // Held for a handful of fcntl calls that do not wait.
    held: Mutex<Option<Held>>,
}

impl ImageLock {
    /// Nothing is locked yet.
    pub(crate) fn new(fd: SharedFd, path: String, mode: Locking) -> Self {
        Self {
            fd,
            path,
            mode,
            held: Mutex::new(Some(Held::default())),
        }
    }

    /// Holds exactly these from now on, or, with [`Kind::Busy`], what was held before.
    pub(crate) fn hold(&self, used: Permissions, unshared: Permissions) -> Result<()> {
        let mut state = self.held.lock();
        let (false, Some(before)) = (self.mode == Locking::Off, *state) else {
            return Ok(());
        };
        let wanted = Held { used, unshared };
        let new = wanted.without(before);
        match self.take(new).and_then(|()| self.nobody_objects(new)) {
            Ok(()) => {
                self.release(before.without(wanted));
                *state = Some(wanted);
                Ok(())
            }
            Err(error) if self.mode == Locking::Auto && without_locks(&error) => {
                let path = &self.path;
                tracing::warn!(
                    path,
                    "the file system has no locks; other programs may write the image"
                );
                *state = None;
                Ok(())
            }
            Err(error) => {
                self.release(new);
                Err(error)
            }
        }
    }

    /// Whether locks are set at all: not if the user does not want them, or the file system has none.
    pub(crate) fn is_real(&self) -> bool {
        self.mode != Locking::Off && self.held.lock().is_some()
    }

    /// Sets locks on `other`, another description of the same file, that go with its last descriptor. Whether somebody
    /// else objects is not looked at: whoever calls holds, or is about to ask for, the same here.
    pub(crate) fn lock_beside(
        &self,
        other: &SharedFd,
        used: Permissions,
        unshared: Permissions,
    ) -> Result<()> {
        if self.mode == Locking::Off {
            return Ok(());
        }
        let beside = Self::new(other.clone(), self.path.clone(), self.mode);
        match beside.take(Held { used, unshared }) {
            Err(error) if self.mode == Locking::Auto && without_locks(&error) => Ok(()),
            outcome => outcome,
        }
    }

    fn take(&self, new: Held) -> Result<()> {
        for byte in new.bytes() {
            self.set(byte, libc::F_RDLCK).map_err(|errno| match errno {
                // A foreign program has a write lock there; QEMU never does.
                nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES => {
                    self.busy(&format!("Failed to lock byte {byte}"))
                }
                errno => Error::os(format!("Could not lock '{}'", self.path), errno.into()),
            })?;
        }
        Ok(())
    }

    fn release(&self, old: Held) {
        for byte in old.bytes() {
            if let Err(error) = self.set(byte, libc::F_UNLCK) {
                tracing::warn!(path = self.path, byte, %error, "cannot release an image lock");
            }
        }
    }

    fn nobody_objects(&self, new: Held) -> Result<()> {
        for (bit, name) in new.used.bits() {
            if self.is_locked(UNSHARED_BASE + i64::from(bit))? {
                return Err(self.busy(&format!("Failed to get \"{name}\" lock")));
            }
        }
        for (bit, name) in new.unshared.bits() {
            if self.is_locked(USED_BASE + i64::from(bit))? {
                return Err(self.busy(&format!("Failed to get shared \"{name}\" lock")));
            }
        }
        Ok(())
    }

    fn busy(&self, what: &str) -> Error {
        let hint = format!("Is another process using the image [{}]?", self.path);
        Error::new(Kind::Busy, format!("{what}\n{hint}"))
    }

    fn set(&self, byte: i64, kind: libc::c_int) -> nix::Result<()> {
        fcntl(&self.fd, FcntlArg::F_OFD_SETLK(&range(byte, kind))).map(drop)
    }

    /// Whether another open file description has any lock on this byte.
    fn is_locked(&self, byte: i64) -> Result<bool> {
        let mut probe = range(byte, libc::F_WRLCK);
        match fcntl(&self.fd, FcntlArg::F_OFD_GETLK(&mut probe)) {
            Ok(_) => Ok(libc::c_int::from(probe.l_type) != libc::F_UNLCK),
            Err(errno) => Err(Error::os(
                format!("Could not query the locks of '{}'", self.path),
                errno.into(),
            )),
        }
    }
}

fn range(byte: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn without_locks(error: &Error) -> bool {
    matches!(
        error.kind(),
        Kind::Os(libc::ENOLCK | libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)
    )
}
