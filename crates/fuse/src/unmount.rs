//! Taking a mount away, and nothing else that may be in its place: by this process, or by another one for a process that has given
//! up the right to. It must never touch a mount that was not named by its id.
//!
//! Source: umount(2), proc_pid_mountinfo(5).

use std::io;
use std::path::Path;

use rustix::mount::UnmountFlags;

use crate::fusermount;
use crate::mount::mount_at;

/// What becomes of those who use the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// Nothing: as long as there are any, the mount stays, and the answer is EBUSY.
    UnlessBusy,
    /// They go on, without the name.
    Lazily,
    /// What they have asked for fails.
    Forcibly,
}

/// Who takes one mount away in the place of its export's process. Called from any thread, one call at a time for each.
pub trait Unmounter: Send + std::fmt::Debug {
    /// What [`unmount`] promises.
    fn unmount(&self, manner: Manner) -> io::Result<()>;
}

/// Takes the mount `id` on `path`, which is absolute, away; does nothing if it is gone, or another one is on top of it. Blocks
/// while the kernel writes back what it has of the file, if `manner` lets it.
///
/// # Errors
/// EBUSY: somebody uses the file, and was to be left alone.
pub fn unmount(path: &Path, id: u64, manner: Manner) -> io::Result<()> {
    // Somebody may have taken it away, or mounted something else there since.
    if mount_at(path)?.map(|mount| mount.id) != Some(id) {
        return Ok(());
    }
    let flags = match manner {
        Manner::UnlessBusy => UnmountFlags::empty(),
        Manner::Lazily => UnmountFlags::DETACH,
        Manner::Forcibly => UnmountFlags::FORCE | UnmountFlags::DETACH,
    };
    match take_away(path, flags) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => Ok(()),
        outcome => outcome,
    }
}

/// Unmounts what is on `path`, which is absolute; by fusermount3 where the kernel does not let us do it ourselves.
pub(crate) fn take_away(path: &Path, how: UnmountFlags) -> io::Result<()> {
    match rustix::mount::unmount(path, how | UnmountFlags::NOFOLLOW) {
        Err(rustix::io::Errno::PERM) => {
            fusermount::unmount(path, how.contains(UnmountFlags::DETACH))
        }
        outcome => Ok(outcome?),
    }
}
