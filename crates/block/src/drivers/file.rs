//! `file` and `host_device`: an image that is byte for byte a file or a block device of the host. It must never open
//! what another process holds for writing, nor write what it only holds for reading.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskfuse_ring::{Buf, SharedFd};
use parking_lot::Mutex;

use crate::error::{Error, Kind, Result};
use crate::hold::Hold;
use crate::host::{Aio, HostFile, HostKind, Opener, Options};
use crate::lock::{ImageLock, Locking};
use crate::node::{Access, BlockStatus, Extent, Limits, LocalFuture, Node, Resize, Zeroes};
use crate::permissions::Permissions;
use crate::threshold::WriteThreshold;
use crate::{SECTOR, check_range, io};

/// What to do with space that is not needed any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discard {
    /// Keep it.
    #[default]
    Ignore,
    /// Give it back to the host.
    Unmap,
}

/// What to do with a write of nothing but zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectZeroes {
    /// Write it.
    #[default]
    Off,
    /// Let the host zero the range.
    On,
    /// The same, and give the space back if `discard=unmap`.
    Unmap,
}

/// How to open an image file.
#[derive(Clone, Debug, Default)]
pub struct FileConfig {
    /// Where it is.
    pub filename: PathBuf,
    /// Who moves the bytes.
    pub aio: Aio,
    /// `cache.direct`: bypass the page cache.
    pub direct: bool,
    /// `cache.no-flush`: never ask for stable storage.
    pub no_flush: bool,
    /// Open it for reading only.
    pub read_only: bool,
    /// Open it for reading only if writing is not permitted.
    pub auto_read_only: bool,
    /// What discarding does.
    pub discard: Discard,
    /// What writing zeroes does.
    pub detect_zeroes: DetectZeroes,
    /// Image locks.
    pub locking: Locking,
    /// Where its descriptor comes from, if not from opening `filename`.
    pub opener: Option<Opener>,
}

/// An image file or block device.
pub struct FileNode {
    host: HostFile,
    place: PathBuf,
    config: FileConfig,
    driver: &'static str,
    discard: Discard,
    detect_zeroes: DetectZeroes,
    /// Shared with those that the same file was opened as before: it is locked once.
    lock: Arc<ImageLock>,
    /// In here and not around it, as an image that is open cannot be put on another node. Shared as the lock is.
    threshold: Arc<WriteThreshold>,
    /// Whether anybody uses it. Written by the graph only.
    used: Mutex<bool>,
}

/// Opens a regular file. The message of an error names the file and what to do.
pub fn open_file(config: &FileConfig) -> Result<Arc<FileNode>> {
    open(config, HostKind::Regular, "file")
}

/// Opens a block device.
pub fn open_host_device(config: &FileConfig) -> Result<Arc<FileNode>> {
    open(config, HostKind::Device, "host_device")
}

fn open(config: &FileConfig, kind: HostKind, driver: &'static str) -> Result<Arc<FileNode>> {
    // A daemon goes to another folder when it has opened what its command line names.
    let place = std::path::absolute(&config.filename).unwrap_or_else(|_| config.filename.clone());
    let host = open_host(config, kind, place.clone())?;
    let lock = ImageLock::new(host.fd().clone(), host.path().to_owned(), config.locking);
    let node = with_lock(host, place, driver, config, Arc::new(lock), Arc::default());
    node.set_permissions(Permissions::NONE, Permissions::ALL)?;
    Ok(Arc::new(node))
}

fn open_host(config: &FileConfig, kind: HostKind, path: PathBuf) -> Result<HostFile> {
    HostFile::open(&Options {
        path,
        name: config.filename.display().to_string(),
        kind,
        aio: config.aio,
        direct: config.direct,
        no_flush: config.no_flush,
        read_only: config.read_only,
        auto_read_only: config.auto_read_only,
        opener: config.opener.clone(),
    })
}

fn with_lock(
    host: HostFile,
    place: PathBuf,
    driver: &'static str,
    config: &FileConfig,
    lock: Arc<ImageLock>,
    threshold: Arc<WriteThreshold>,
) -> FileNode {
    FileNode {
        host,
        place,
        driver,
        discard: config.discard,
        detect_zeroes: config.detect_zeroes,
        lock,
        threshold,
        config: config.clone(),
        used: Mutex::new(false),
    }
}

impl FileNode {
    /// What it was opened with.
    pub fn config(&self) -> &FileConfig {
        &self.config
    }

    /// Where it is, whatever folder the process has gone to since: an absolute path, if there was one when it was opened.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// The same file opened anew with other options, of which the name is not looked at. It takes this node's place in the
    /// graph, and shares its image locks: others never see the file unlocked. Everything written before is to be
    /// flushed; afterwards this node is not used any more.
    pub fn reopen(&self, config: &FileConfig) -> Result<Arc<Self>> {
        let kind = match self.host.is_device() {
            true => HostKind::Device,
            false => HostKind::Regular,
        };
        // It comes from where it came from before.
        let config = FileConfig {
            filename: self.config.filename.clone(),
            opener: self.config.opener.clone(),
            ..config.clone()
        };
        let mut host = open_host(&config, kind, self.place.clone())?;
        if !host.is_same_file(&self.host)? {
            let path = host.path();
            let message = format!("'{path}' is not the file any more that it was opened as");
            return Err(Error::new(Kind::Invalid, message));
        }
        host.follow_size_of(&self.host);
        let lock = Arc::clone(&self.lock);
        let threshold = Arc::clone(&self.threshold);
        Ok(Arc::new(with_lock(
            host,
            self.place.clone(),
            self.driver,
            &config,
            lock,
            threshold,
        )))
    }

    /// What notices writes beyond a byte, of this node and of those that the same file is [reopened](Self::reopen) as.
    /// [`Kind::Busy`] if the kernel writes the file by itself ([`Node::plain_file`]), which nobody notices.
    pub fn write_threshold(&self) -> Result<&Arc<WriteThreshold>> {
        match self.host.grows_unseen() {
            false => Ok(&self.threshold),
            true => {
                let path = self.host.path();
                let message = format!(
                    "'{path}' is written by the kernel itself, unseen by its node (passthrough)"
                );
                Err(Error::new(Kind::Busy, message))
            }
        }
    }

    /// The open file itself.
    pub fn host(&self) -> &HostFile {
        &self.host
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        check_range(self.size(), offset, len)
            .map_err(|error| Error::new(error.kind(), format!("'{}': {error}", self.host.path())))
    }

    fn may_unmap(&self, how: Zeroes) -> bool {
        how != Zeroes::Keep && self.discard == Discard::Unmap
    }

    async fn write_now(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        let len = buf.len() as u64;
        if let Err(error) = self.check(offset, len) {
            return (Err(error), buf);
        }
        self.threshold.note(offset, len);
        if self.detect_zeroes == DetectZeroes::Off || !io::is_zero(buf.as_slice()) {
            return self.host.write(offset, buf).await;
        }
        let how = match self.detect_zeroes {
            DetectZeroes::Unmap => Zeroes::MayUnmap,
            DetectZeroes::On | DetectZeroes::Off => Zeroes::Keep,
        };
        (self.zero(offset, len, how).await, buf)
    }

    async fn zero(&self, offset: u64, len: u64, how: Zeroes) -> Result<()> {
        self.check(offset, len)?;
        self.threshold.note(offset, len);
        let range = offset..offset + len;
        self.host.write_zeroes(range, self.may_unmap(how)).await
    }
}

impl Node for FileNode {
    fn driver(&self) -> &'static str {
        self.driver
    }

    fn size(&self) -> u64 {
        // The kernel's file sizes are far below the overflow.
        self.host.size().next_multiple_of(SECTOR)
    }

    fn read_only(&self) -> bool {
        self.host.read_only()
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: self.host.alignment().offset,
            size_alignment: 1,
        }
    }

    fn allocated(&self) -> u64 {
        self.host.allocated()
    }

    fn filename(&self) -> Option<String> {
        Some(self.host.path().to_owned())
    }

    fn plain_file(&self, write: bool) -> std::result::Result<SharedFd, String> {
        if self.host.is_device() {
            return Err("the image is a block device".to_owned());
        }
        if self.host.size() != self.size() {
            return Err("the file does not end with a whole sector of 512 bytes".to_owned());
        }
        if write && self.detect_zeroes != DetectZeroes::Off {
            return Err("the kernel does not detect zeroes".to_owned());
        }
        if write && self.host.read_only() {
            return Err("the image is open for reading only".to_owned());
        }
        if write && self.threshold.get() != 0 {
            return Err("its writes are watched (block-set-write-threshold)".to_owned());
        }
        let file = self.host.open_again().map_err(|error| error.to_string())?;
        let (used, alone) = match write {
            true => (
                Permissions::WRITER,
                Permissions::WRITE | Permissions::RESIZE,
            ),
            false => (Permissions::READER, Permissions::NONE),
        };
        let locked = self.lock.lock_beside(&file, used, alone);
        locked.map_err(|error| error.to_string())?;
        if write {
            self.host.set_grows_unseen(true);
        }
        Ok(file)
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        let work = access == Access::Write
            && (self.host.read_only() || self.detect_zeroes != DetectZeroes::Off);
        if work || check_range(self.size(), offset, len).is_err() {
            return Extent::Work { len };
        }
        if access == Access::Write {
            self.threshold.note(offset, len);
        }
        Extent::Host {
            file: &self.host,
            offset,
            len,
            hold: Hold::none(),
        }
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        match self.check(offset, buf.len() as u64) {
            Ok(()) => Box::pin(self.host.read(offset, buf)),
            Err(error) => Box::pin(std::future::ready((Err(error), buf))),
        }
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(self.write_now(offset, buf))
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.zero(offset, len, how))
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check(offset, len)?;
            match self.discard {
                Discard::Ignore => Ok(()),
                Discard::Unmap => {
                    self.threshold.note(offset, len);
                    self.host.discard(offset..offset + len).await
                }
            }
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.host.flush())
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.host.resize(size, how, preallocate))
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        Box::pin(async move {
            self.check(offset, len)?;
            self.host.status(offset, len).await
        })
    }

    /// Beside whoever uses it, no other process may write or resize it; inside the process the graph decides that.
    fn set_permissions(&self, used: Permissions, shared: Permissions) -> Result<()> {
        let mut was_used = self.used.lock();
        let is_used = !used.is_empty();
        if is_used {
            let alone = Permissions::WRITE | Permissions::RESIZE;
            // What changes nothing for those above here does change the file for other processes that read it.
            let used = match used.contains(Permissions::WRITE_UNCHANGED) {
                true => used | Permissions::WRITE,
                false => used,
            };
            self.lock.hold(used, !shared | alone)?;
        } else {
            self.lock
                .hold(Permissions::CONSISTENT_READ, Permissions::NONE)?;
        }
        if is_used && !*was_used {
            // Nobody else holds the locks of a writer, so the kernel has let go of what it was given to write.
            if self.lock.is_real() {
                self.host.set_grows_unseen(false);
            }
            self.host.refresh_size()?;
        }
        *was_used = is_used;
        Ok(())
    }
}
