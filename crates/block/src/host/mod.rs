//! An open file or block device of the host: where bytes really are. It hides what the host is picky about: alignment
//! of O_DIRECT, short transfers, the end of the file. It must never invent bytes that the host did not give, never
//! lose a byte of one writer to another, and never allocate, lock or make a second system call for a plain aligned
//! transfer.

mod align;
mod bounce;
mod gate;
mod open;
mod space;
mod transfer;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use diskfuse_ring::{Buf, SharedFd};
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};

pub use align::Alignment;
pub use open::Opener;
pub(crate) use open::{HostKind, Options};

use crate::error::{Error, Result};
use crate::range_queue::RangeQueue;
use gate::Gate;

/// Who moves the bytes of a host file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// The ring of the thread that asks (io_uring where there is one).
    #[default]
    IoUring,
    /// The worker threads of the process.
    Threads,
}

/// An open host file. A handle: clones are the same open file. May be used from any thread; its futures run on the
/// thread that made them, which must run a ring.
#[derive(Clone)]
pub struct HostFile(Arc<Inner>);

struct Inner {
    fd: SharedFd,
    path: String,
    kind: HostKind,
    read_only: bool,
    direct: bool,
    aio: Aio,
    no_flush: bool,
    align: Alignment,
    /// Bytes of a sector of a device; 1 for a file.
    device_sector: u32,
    /// Keeps read-modify-write, and changes of the size, apart from writers; `None` where neither happens.
    gate: Option<Gate>,
    /// The file once more, through the page cache, for what O_DIRECT cannot express. See `bounce`.
    buffered: OnceLock<SharedFd>,
    /// Bytes. What was found when it was opened, and what we made of it since. Shared with those that the same file is opened as
    /// in its place, as it may still grow until they take that.
    size: Arc<AtomicU64>,
    /// Reads in a row that were not in the page cache.
    misses: AtomicU32,
    /// Others write it, and may make it larger.
    grows_unseen: AtomicBool,
    /// One change of the size at a time. Taken by worker threads only, for as long as the change takes.
    resizing: Mutex<()>,
    flushes: Flushes,
    /// A flush failed: what the page cache holds is not what the disk holds, and no later flush would tell.
    inconsistent: AtomicBool,
    /// What the host turned out not to be able to do, so that it is not asked again.
    no_zero_range: AtomicBool,
    no_punch_hole: AtomicBool,
}

/// One flush at a time, so that the error of one is not taken for another's success, and those that wait share the
/// next one.
#[derive(Default)]
struct Flushes {
    queue: RangeQueue,
    /// How many have begun; also their numbers.
    begun: AtomicU64,
    /// The number of the last one that succeeded.
    succeeded: AtomicU64,
}

impl HostFile {
    /// The file as it was named.
    pub fn path(&self) -> &str {
        &self.0.path
    }

    /// The descriptor, for what has no form of its own here (locks, passthrough). Whoever uses it must not change
    /// its flags.
    pub fn fd(&self) -> &SharedFd {
        &self.0.fd
    }

    /// Whether both are the same file of the host.
    pub(crate) fn is_same_file(&self, other: &Self) -> Result<bool> {
        let identity = |file: &Self| {
            let stat = rustix::fs::fstat(&file.0.fd).map_err(|errno| {
                Error::os(format!("Could not stat '{}'", file.path()), errno.into())
            })?;
            Ok::<_, Error>((stat.st_dev, stat.st_ino))
        };
        Ok(identity(self)? == identity(other)?)
    }

    /// Whether it is open for reading only.
    pub fn read_only(&self) -> bool {
        self.0.read_only
    }

    /// Whether the page cache is bypassed (`cache.direct=on`).
    pub fn direct(&self) -> bool {
        self.0.direct
    }

    /// Who moves its bytes.
    pub fn aio(&self) -> Aio {
        self.0.aio
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.0.kind == HostKind::Device
    }

    /// What transfers without copying must be aligned to.
    pub fn alignment(&self) -> Alignment {
        self.0.align
    }

    /// Bytes of the file or device, to the byte. Changes by our own writes and resizes only.
    pub fn size(&self) -> u64 {
        if self.0.grows_unseen.load(Ordering::Relaxed)
            && let Err(error) = self.refresh_size()
        {
            tracing::warn!(%error, "cannot find out how large the file is");
        }
        self.0.size.load(Ordering::Relaxed)
    }

    /// Whether others write the file.
    pub(crate) fn grows_unseen(&self) -> bool {
        self.0.grows_unseen.load(Ordering::Relaxed)
    }

    /// Whether from now on the file may grow by what others write, so that its size is looked up each time.
    pub(crate) fn set_grows_unseen(&self, unseen: bool) {
        self.0.grows_unseen.store(unseen, Ordering::Relaxed);
    }

    /// The same file opened once more, for reading and (unless it is open for reading only) writing.
    pub(crate) fn open_again(&self) -> Result<SharedFd> {
        let access = match self.read_only() {
            true => OFlags::RDONLY,
            false => OFlags::RDWR,
        };
        let name = format!("/proc/self/fd/{}", self.0.fd.as_raw_fd());
        let opened = rustix::fs::open(name, access | OFlags::CLOEXEC, Mode::empty());
        opened.map(SharedFd::new).map_err(|errno| {
            Error::os(
                format!("Could not open '{}' again", self.path()),
                errno.into(),
            )
        })
    }

    /// Has one that was just opened, and that nobody uses, know of each change of the size that `other`, the same file, makes.
    pub(crate) fn follow_size_of(&mut self, other: &Self) {
        if let Some(inner) = Arc::get_mut(&mut self.0) {
            inner.size = Arc::clone(&other.0.size);
        }
    }

    /// Looks the size up again: another process may have changed it while nobody here used the file.
    pub(crate) fn refresh_size(&self) -> Result<()> {
        if self.is_device() {
            return Ok(());
        }
        let size = self.stat()?.st_size;
        self.0.size.store(size.cast_unsigned(), Ordering::Relaxed);
        Ok(())
    }

    fn stat(&self) -> Result<rustix::fs::Stat> {
        rustix::fs::fstat(&self.0.fd)
            .map_err(|e| Error::os(format!("Could not query '{}'", self.path()), e.into()))
    }

    /// Remembers that a write reached `end`. Growth through writes past the end is rare; the usual case is one load.
    fn written_to(&self, end: u64) {
        if !self.is_device() && end > self.size() {
            self.0.size.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Whether the host takes this transfer as it is.
    fn fits(&self, offset: u64, buf: &Buf) -> bool {
        let align = self.0.align;
        let place = offset | buf.len() as u64;
        let memory = buf.as_slice().as_ptr().addr() as u64;
        place & u64::from(align.offset - 1) == 0 && memory & u64::from(align.memory - 1) == 0
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl std::fmt::Debug for HostFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostFile")
            .field("path", &self.0.path)
            .field("read_only", &self.0.read_only)
            .field("direct", &self.0.direct)
            .field("align", &self.0.align)
            .finish_non_exhaustive()
    }
}
