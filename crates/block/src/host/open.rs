//! Opening a host file: what it is, whether it may be had, and how it wants to be used. It must never hang (a fifo
//! would) and never open anything that is not a disk image.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, OnceLock};

use diskfuse_ring::SharedFd;
use parking_lot::Mutex;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::align::Alignment;
use super::gate::Gate;
use super::{Aio, Flushes, HostFile, Inner};
use crate::error::{Error, Kind, Result};

/// What sort of file is expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum HostKind {
    /// A regular file (`file`).
    #[default]
    Regular,
    /// A block device (`host_device`).
    Device,
}

/// Hands out descriptors of a file that is not opened by its name: one that was opened for writing as well as reading, or for
/// reading only. Its name is for messages then. Whoever gets one may change its status flags, which duplicates share. Must
/// not block. Errors: `ENOENT` if there is nothing to hand out, `EACCES` if nothing was opened for this access.
#[derive(Clone)]
pub struct Opener(Arc<dyn Fn(bool) -> std::io::Result<OwnedFd> + Send + Sync>);

impl Opener {
    /// Asks this each time; the argument says whether it is to be written.
    pub fn new(open: impl Fn(bool) -> std::io::Result<OwnedFd> + Send + Sync + 'static) -> Self {
        Self(Arc::new(open))
    }

    fn open(&self, writable: bool) -> std::result::Result<OwnedFd, Errno> {
        (self.0)(writable).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opener")
    }
}

/// How to open a host file.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// What it is called in messages: the path as somebody has written it.
    pub(crate) name: String,
    /// What it must be.
    pub(crate) kind: HostKind,
    /// Who moves its bytes.
    pub(crate) aio: Aio,
    /// Bypass the page cache.
    pub(crate) direct: bool,
    /// Never flush: what is written may be lost in a power cut.
    pub(crate) no_flush: bool,
    /// Open for reading only.
    pub(crate) read_only: bool,
    /// Open for reading only if writing is not permitted.
    pub(crate) auto_read_only: bool,
    /// Where its descriptor comes from, if not from opening the path.
    pub(crate) opener: Option<Opener>,
}

impl HostFile {
    /// Opens an image that exists. The message of an error names the file and says what to do.
    pub(crate) fn open(options: &Options) -> Result<Self> {
        let path = options.name.clone();
        let refused = |errno: Errno| refused(&path, &options.path, errno);
        if options.opener.is_none() {
            let stat = rustix::fs::stat(&options.path).map_err(refused)?;
            check_type(&path, options.kind, &stat)?;
        }
        let (fd, read_only) = open_either(options).map_err(|e| match e {
            Errno::INVAL if options.direct => no_direct(&path),
            e => refused(e),
        })?;
        // Between the look and the opening somebody may have put another file there.
        let stat = rustix::fs::fstat(&fd).map_err(refused)?;
        check_type(&path, options.kind, &stat)?;
        set_flags(&fd, options).map_err(|e| match e {
            Errno::INVAL if options.direct => no_direct(&path),
            e => refused(e),
        })?;
        let size = match options.kind {
            HostKind::Regular => stat.st_size.cast_unsigned(),
            HostKind::Device => rustix::fs::seek(&fd, SeekFrom::End(0)).map_err(refused)?,
        };
        let align = match options.direct {
            true => Alignment::discover(&fd, options.kind, size).ok_or_else(|| no_direct(&path))?,
            false => Alignment::NONE,
        };
        let device_sector = match options.kind {
            HostKind::Regular => 1,
            HostKind::Device => rustix::fs::ioctl_blksszget(&fd).map_err(refused)?.max(1),
        };
        let modifies = !read_only && align.offset > 1;
        let file = Self(Arc::new(Inner {
            fd: SharedFd::new(fd),
            path,
            kind: options.kind,
            read_only,
            direct: options.direct,
            aio: options.aio,
            no_flush: options.no_flush,
            align,
            device_sector,
            // A file's size changes, and nothing may be on its way to the end that it had.
            gate: (modifies || !read_only && options.kind == HostKind::Regular).then(Gate::new),
            buffered: OnceLock::new(),
            size: Arc::new(AtomicU64::new(size)),
            misses: AtomicU32::new(0),
            grows_unseen: AtomicBool::new(false),
            resizing: Mutex::new(()),
            flushes: Flushes::default(),
            inconsistent: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_punch_hole: AtomicBool::new(false),
        }));
        let has_ragged_end = !size.is_multiple_of(u64::from(align.offset));
        if modifies && (has_ragged_end || options.kind == HostKind::Regular) {
            // For its end, which may become ragged when the file grows: a process that serves may open nothing any more.
            let again = file.buffered();
            if has_ragged_end {
                again?;
            }
        }
        Ok(file)
    }

    /// The same file through the page cache.
    pub(super) fn buffered(&self) -> Result<&SharedFd> {
        if let Some(fd) = self.0.buffered.get() {
            return Ok(fd);
        }
        let same = format!("/proc/self/fd/{}", self.0.fd.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open(same, flags, Mode::empty()).map_err(|e| {
            let what = format!("Could not open '{}' again for its last sector", self.path());
            Error::os(what, e.into())
        })?;
        Ok(self.0.buffered.get_or_init(|| SharedFd::new(fd)))
    }
}

/// The flags that the transfers count on, however the file was opened: io_uring answers EAGAIN at once, instead of waiting
/// for the disk, with `O_NONBLOCK`, and writes go elsewhere with `O_APPEND`.
fn set_flags(fd: &OwnedFd, options: &Options) -> std::result::Result<(), Errno> {
    let mut flags = rustix::fs::fcntl_getfl(fd)? - OFlags::NONBLOCK - OFlags::APPEND;
    flags.set(OFlags::DIRECT, options.direct);
    rustix::fs::fcntl_setfl(fd, flags)
}

fn open_either(options: &Options) -> std::result::Result<(OwnedFd, bool), Errno> {
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    if options.direct {
        flags |= OFlags::DIRECT;
    }
    let open = |path: &Path, access| match &options.opener {
        Some(opener) => opener.open(access == OFlags::RDWR),
        None => rustix::fs::open(path, flags | access, Mode::empty()),
    };
    if !options.read_only {
        match open(&options.path, OFlags::RDWR) {
            Err(Errno::ACCESS | Errno::PERM | Errno::ROFS) if options.auto_read_only => {}
            answer => return Ok((answer?, false)),
        }
    }
    Ok((open(&options.path, OFlags::RDONLY)?, true))
}

fn check_type(path: &str, kind: HostKind, stat: &rustix::fs::Stat) -> Result<()> {
    let is = FileType::from_raw_mode(stat.st_mode);
    let failed = |errno: i32, why: &str| {
        let message = format!("Could not open '{path}': {why}");
        Err(Error::new(Kind::Os(errno), message))
    };
    let message = match (is, kind) {
        (FileType::RegularFile, HostKind::Regular) | (FileType::BlockDevice, HostKind::Device) => {
            return Ok(());
        }
        (FileType::Directory, _) => {
            return failed(libc::EISDIR, "Is a directory (name the image file in it)");
        }
        (FileType::Socket, _) => {
            return failed(libc::ENXIO, "No such device or address (it is a socket)");
        }
        (FileType::CharacterDevice, HostKind::Device) => {
            return failed(
                libc::ENOTBLK,
                "it is a character device, which cannot hold a disk image",
            );
        }
        (is, HostKind::Regular) => {
            let hint = match is {
                FileType::BlockDevice => " (use the driver 'host_device' for a block device)",
                FileType::Fifo => " (it is a fifo, which cannot hold a disk image)",
                FileType::CharacterDevice => {
                    " (it is a character device, which cannot hold a disk image)"
                }
                _ => "",
            };
            format!("'file' driver requires '{path}' to be a regular file{hint}")
        }
        (_, HostKind::Device) => format!(
            "'host_device' driver requires '{path}' to be either a character or block device (use the driver 'file' for a regular file)"
        ),
    };
    Err(Error::new(Kind::Invalid, message))
}

fn refused(name: &str, path: &Path, errno: Errno) -> Error {
    let reason = nix::errno::Errno::from_raw(errno.raw_os_error()).desc();
    let hint = match errno {
        Errno::MFILE => " (raise the limit of open files: ulimit -n)",
        Errno::ACCESS | Errno::PERM | Errno::ROFS if is_readable(path) => {
            " (it can be read: use read-only=on)"
        }
        _ => "",
    };
    Error::new(
        Kind::Os(errno.raw_os_error()),
        format!("Could not open '{name}': {reason}{hint}"),
    )
}

fn is_readable(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::READ_OK).is_ok()
}

fn no_direct(path: &str) -> Error {
    Error::new(
        Kind::Os(libc::EINVAL),
        format!(
            "Could not open '{path}' with cache.direct=on: its file system has no O_DIRECT (use cache.direct=off)"
        ),
    )
}
