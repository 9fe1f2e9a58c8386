//! Mounting on a regular file and taking the mount away again: with mount(2), which root may use and whoever is root of a
//! user namespace of his own, else by fusermount3. It must never take away a mount that is not ours: a mount is known by
//! its id, and a dead one by its type and by its answer ENOTCONN.
//!
//! Source: `Documentation/filesystems/fuse/fuse.rst`, mount(2), proc_pid_mountinfo(5).

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diskfuse_ring::SharedFd;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags, fsconfig_create, fsmount,
    fsopen,
};

use crate::error::{Error, Result};
use crate::fusermount;
use crate::transport::device;
use crate::unmount::{Manner, Unmounter, take_away, unmount};

/// The file system type of our mounts: `fuse` with our name behind it, so that they are told from others'.
pub const FS_TYPE: &str = "fuse.diskfuse";

/// A line of /proc/self/mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// The kernel's number for the mount.
    pub id: u64,
    /// Minor device number: also the name of its folder in /sys/fs/fuse/connections.
    pub minor: u32,
    /// Where it is.
    pub mountpoint: PathBuf,
    /// For example `fuse.diskfuse`.
    pub fs_type: String,
    /// What was given as its source: the image, for ours.
    pub source: OsString,
}

/// Undoes the `\040` kind of escapes.
fn unescape(text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let octal = |b: u8| (b'0'..=b'7').contains(&b).then(|| u32::from(b - b'0'));
        if let (b'\\', [a, b, c, after @ ..]) = (first, tail)
            && let (Some(a), Some(b), Some(c)) = (octal(*a), octal(*b), octal(*c))
        {
            out.push((a * 64 + b * 8 + c) as u8);
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    OsString::from_vec(out)
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&b| b == b' ');
    let text = |f: &[u8]| String::from_utf8_lossy(f).into_owned();
    let id = text(fields.next()?).parse().ok()?;
    let minor = text(fields.nth(1)?).split_once(':')?.1.parse().ok()?;
    let mountpoint = PathBuf::from(unescape(fields.nth(1)?));
    // Optional fields end at a lone dash.
    fields.by_ref().find(|f| *f == b"-")?;
    Some(MountEntry {
        id,
        minor,
        mountpoint,
        fs_type: text(fields.next()?),
        source: unescape(fields.next()?),
    })
}

/// Every mount that this process sees, in the order in which they were made.
pub fn mounts() -> io::Result<Vec<MountEntry>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|&b| b == b'\n').filter_map(parse_line).collect())
}

/// The topmost mount exactly at `path`, which must be absolute and free of links.
pub(crate) fn mount_at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rfind(|m| m.mountpoint == path))
}

/// The absolute path of a mountpoint, links resolved in its folder only: the file itself may be a dead mount, on which
/// every look-up fails.
pub fn absolute(path: &Path) -> io::Result<PathBuf> {
    match path.canonicalize() {
        Ok(whole) => Ok(whole),
        Err(_) => {
            let name = path
                .file_name()
                .ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
            let folder = match path.parent() {
                Some(folder) if folder != Path::new("") => folder,
                _ => Path::new("."),
            };
            Ok(folder.canonicalize()?.join(name))
        }
    }
}

/// How long a connection may take to end once its daemon is ending.
const ENDING: Duration = Duration::from_secs(1);

/// Whether a mount of ours is at `path` whose daemon is gone, so that everything on it answers ENOTCONN. While the daemon
/// is ending this waits for that, a second at most.
pub fn is_dead(path: &Path) -> bool {
    let Ok(path) = absolute(path) else {
        return false;
    };
    if !matches!(mount_at(&path), Ok(Some(m)) if m.fs_type == FS_TYPE) {
        return false;
    }
    let begun = Instant::now();
    loop {
        // The kernel may answer from its cache of attributes for a second after the daemon's death, unless it is forced to
        // ask.
        let flags = AtFlags::STATX_FORCE_SYNC;
        match rustix::fs::statx(rustix::fs::CWD, &path, flags, StatxFlags::BASIC_STATS) {
            Err(Errno::NOTCONN) => return true,
            // The kernel is taking the dead daemon's queues and ring down, and the question was in one of them.
            Err(Errno::CONNABORTED | Errno::CANCELED) if begun.elapsed() < ENDING => {
                std::thread::sleep(Duration::from_millis(1));
            }
            _ => return false,
        }
    }
}

/// Takes a dead mount of ours away; see [`is_dead`]. True if there was one.
pub fn heal(path: &Path) -> Result<bool> {
    if !is_dead(path) {
        return Ok(false);
    }
    let failed = |source| Error::Unmount {
        path: path.to_owned(),
        source,
    };
    let path = absolute(path).map_err(failed)?;
    take_away(&path, UnmountFlags::DETACH).map_err(failed)?;
    tracing::info!(path = %path.display(), "took a dead mount away");
    Ok(true)
}

/// Aborts the connection of a mount of ours whose daemon does not do it itself, and takes the mount away: who uses it gets
/// errors, and what the daemon had not written is lost. True if there was one. It asks the daemon nothing, so it never hangs.
pub fn abort(path: &Path) -> Result<bool> {
    let failed = |source| Error::Unmount {
        path: path.to_owned(),
        source,
    };
    let whole = absolute(path).map_err(failed)?;
    match mount_at(&whole).map_err(failed)? {
        Some(there) if there.fs_type == FS_TYPE => {
            let abort = open_abort(there.minor).map_err(failed)?;
            rustix::io::write(abort, b"1").map_err(|e| failed(e.into()))?;
            take_away(&whole, UnmountFlags::DETACH).map_err(failed)?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Opens what aborts a connection when a byte is written to it. Its number is the minor device number of its mount, which is
/// another one's soon after the connection is gone: so it is opened while the mount is certain to be ours, and what is
/// written to it later meets this connection or none.
///
/// Source: `Documentation/filesystems/fuse/fuse.rst`, "Control filesystem", and `fuse_ctl_remove_conn()` in
/// `fs/fuse/control.c`.
fn open_abort(minor: u32) -> io::Result<OwnedFd> {
    let name = format!("{minor}/abort");
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let folder = Path::new("/sys/fs/fuse/connections");
    let opened = rustix::fs::open(folder.join(&name), flags, Mode::empty());
    if let Ok(file) = opened {
        return Ok(file);
    }
    // The control file system may not be mounted here: see it without mounting it anywhere.
    let system = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&system)?;
    let none = MountAttrFlags::empty();
    let root = fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, none)?;
    Ok(rustix::fs::openat(root, name, flags, Mode::empty())?)
}

/// How a mount is to look.
pub(crate) struct MountOptions<'a> {
    /// Shown as its source in /proc/mounts.
    pub source: &'a OsStr,
    pub read_only: bool,
    pub allow_other: bool,
    /// It is mounted on a directory.
    pub directory: bool,
    /// The largest READ, in bytes.
    pub max_read: u32,
    /// [`Mount::abort`] will be called.
    pub abortable: bool,
}

/// mount(2) on `path`, which is absolute, for the connection of `device`.
fn mount_directly(path: &Path, device: &SharedFd, options: &MountOptions<'_>) -> io::Result<()> {
    let data = format!(
        "fd={},rootmode={},user_id={},group_id={},max_read={},default_permissions{}",
        device.as_raw_fd(),
        // In octal, the type bits of the root's mode.
        if options.directory { "40000" } else { "100000" },
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        options.max_read,
        if options.allow_other {
            ",allow_other"
        } else {
            ""
        },
    );
    let data = CString::new(data)?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    if options.read_only {
        flags |= MountFlags::RDONLY;
    }
    Ok(rustix::mount::mount(
        options.source,
        path,
        FS_TYPE,
        flags,
        data.as_c_str(),
    )?)
}

/// Whether mount(2) was refused for want of privilege.
fn is_reserved_for_root(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

/// A mount that exists; dropping it takes it away.
#[derive(Debug)]
pub(crate) struct Mount {
    path: PathBuf,
    entry: Option<MountEntry>,
    /// See [`open_abort`].
    abort: Option<OwnedFd>,
    /// Who takes it away, if not we.
    by: Option<Box<dyn Unmounter>>,
}

impl Mount {
    /// Mounts on the regular file or directory `path`; returns the mount and its connection's first descriptor, non-blocking.
    pub(crate) fn new(path: &Path, options: &MountOptions<'_>) -> Result<(Self, SharedFd)> {
        let failed = |source: io::Error| Error::Mount {
            path: path.to_owned(),
            source,
        };
        let mut device = device::open().map_err(|source| Error::Device { source })?;
        let path = absolute(path).map_err(failed)?;
        match mount_directly(&path, &device, options) {
            Ok(()) => {}
            Err(error) if is_reserved_for_root(&error) => {
                tracing::debug!(%error, "mounting by fusermount3");
                let mounted = fusermount::mount(&path, options);
                if mounted.is_err() {
                    // What it mounted before it failed is dead, as nobody has its connection; else there is nothing.
                    let _ = heal(&path);
                }
                device = SharedFd::new(mounted.map_err(failed)?);
            }
            Err(error) => return Err(failed(error)),
        }
        let found = mount_at(&path);
        if let Ok(Some(entry)) = found {
            let mut mount = Self {
                path,
                abort: None,
                by: None,
                entry: Some(entry.clone()),
            };
            if options.abortable {
                mount.abort = open_abort(entry.minor)
                    .inspect_err(
                        |error| tracing::debug!(%error, "cannot open what aborts the connection"),
                    )
                    .ok();
            }
            return Ok((mount, device));
        }
        // A mount that cannot be told from others could never be taken away again.
        let _ = take_away(&path, UnmountFlags::DETACH);
        Err(failed(
            found
                .err()
                .unwrap_or(io::Error::from_raw_os_error(libc::ENOENT)),
        ))
    }

    /// Whether [`Mount::abort`] reaches the connection itself; it does only if that was asked for, and allowed.
    pub(crate) fn can_abort(&self) -> bool {
        self.abort.is_some()
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's number for it; `None` when it has been taken away.
    pub(crate) fn id(&self) -> Option<u64> {
        self.entry.as_ref().map(|entry| entry.id)
    }

    /// From now on `by` takes it away.
    pub(crate) fn delegate(&mut self, by: Box<dyn Unmounter>) {
        self.by = Some(by);
    }

    /// Ends the connection with the kernel, whoever has the file open, and takes the mount away if it is still there.
    pub(crate) fn abort(&mut self) -> Result<()> {
        // The mount may be gone (`umount -l`) and the connection live on, for as long as somebody has the file open.
        if let Some(abort) = self.abort.take()
            && let Err(error) = rustix::io::write(abort, b"1")
        {
            tracing::debug!(%error, path = %self.path.display(), "cannot abort the connection");
        }
        self.take_away(Manner::Forcibly)
    }

    /// Takes the mount away if it is still there. Who has the file open keeps a file that answers nothing.
    pub(crate) fn unmount(&mut self) -> Result<()> {
        self.take_away(Manner::Lazily)
    }

    /// Takes the mount away, or leaves it as it is with [`Error::Busy`] if somebody uses the file. Blocks while the kernel
    /// writes back what it has of it.
    pub(crate) fn unmount_unless_busy(&mut self) -> Result<()> {
        self.take_away(Manner::UnlessBusy)
    }

    fn take_away(&mut self, manner: Manner) -> Result<()> {
        let Some(ours) = self.entry.take() else {
            return Ok(());
        };
        let outcome = match &self.by {
            Some(by) => by.unmount(manner),
            None => unmount(&self.path, ours.id, manner),
        };
        outcome.map_err(|source| {
            let path = self.path.clone();
            if source.raw_os_error() == Some(libc::EBUSY) {
                self.entry = Some(ours);
                return Error::Busy { path };
            }
            Error::Unmount { path, source }
        })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::error!(%error, "a mount is left behind");
        }
    }
}

/// Looks at a mountpoint before anything is mounted on it: it must be a regular file and not an export of ours. A
/// mount that a killed daemon left there is taken away first.
pub(crate) fn check(path: &Path) -> Result<()> {
    heal(path)?;
    if let Ok(whole) = absolute(path)
        && let Ok(Some(there)) = mount_at(&whole)
        && there.fs_type == FS_TYPE
    {
        return Err(Error::AlreadyExported {
            path: path.to_owned(),
        });
    }
    let stat = std::fs::metadata(path).map_err(|source| Error::Stat {
        path: path.to_owned(),
        source,
    })?;
    if !stat.is_file() {
        return Err(Error::NotRegular {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// The type of a mount that waits to be mounted over: whoever opens it asks for that. systemd makes one for
/// `x-systemd.automount`, and so do autofs's own daemons.
///
/// Source: `Documentation/filesystems/autofs.rst`.
const AUTOMOUNT: &str = "autofs";

/// Looks at a mountpoint for a tree before anything is mounted on it: it must be an empty directory of ours, and nothing may be
/// mounted there but what waits for us to be. A mount that a killed daemon left there is taken away first.
pub(crate) fn check_directory(path: &Path) -> Result<()> {
    heal(path)?;
    let there = absolute(path).and_then(|whole| mount_at(&whole));
    let there = there.ok().flatten().map(|mount| mount.fs_type);
    let awaited = match there.as_deref() {
        None => false,
        Some(AUTOMOUNT) => true,
        Some(kind) => {
            let path = path.to_owned();
            return Err(match kind == FS_TYPE {
                true => Error::AlreadyExported { path },
                false => Error::AlreadyMounted { path },
            });
        }
    };
    let failed = |source| Error::Stat {
        path: path.to_owned(),
        source,
    };
    let stat = std::fs::metadata(path).map_err(failed)?;
    if !stat.is_dir() {
        return Err(Error::NotDirectory {
            path: path.to_owned(),
        });
    }
    let user = rustix::process::geteuid();
    if !user.is_root() && stat.uid() != user.as_raw() {
        return Err(Error::NotOwned {
            path: path.to_owned(),
        });
    }
    // To open what waits for us would be to wait for ourselves; nothing can be in it.
    if !awaited && std::fs::read_dir(path).map_err(failed)?.next().is_some() {
        return Err(Error::NotEmpty {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// The entry of a path's bytes, for messages and sources.
pub(crate) fn source_name(name: Option<&str>) -> &OsStr {
    OsStr::from_bytes(name.unwrap_or("diskfuse").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_understood() {
        let line = b"36 35 0:98 / /mnt/a\\040b rw,noatime shared:1 master:2 - fuse.diskfuse /x\\134y rw,user_id=0";
        let entry = parse_line(line).unwrap();
        assert_eq!(entry.id, 36);
        assert_eq!(entry.minor, 98);
        assert_eq!(entry.mountpoint, Path::new("/mnt/a b"));
        assert_eq!(entry.fs_type, FS_TYPE);
        assert_eq!(entry.source, "/x\\y");
        assert_eq!(parse_line(b""), None);
        assert_eq!(parse_line(b"36 35 0:98 / /mnt"), None);
    }

    #[test]
    fn what_is_not_ours_is_never_dead() {
        assert!(!is_dead(Path::new("/proc")));
        assert!(!is_dead(Path::new("/no/such/file")));
        assert!(!heal(Path::new("/proc")).unwrap());
    }
}
