//! The image as a disk: where each byte is, and what to do where it is nowhere yet. It stands on the metadata store
//! ([`crate::meta`]), which knows the tables and the order in which they reach the disk. It must never link a cluster
//! whose data are not written, give up one that is still linked, or move bytes without a hold or a turn.
//!
//! # Who may do what
//! * A transfer in place takes a *hold* before it looks its place up, and keeps it until it is over: meanwhile the place
//!   is not used for anything else. It takes no turn.
//! * Whatever changes the mapping of guest clusters takes a *turn* on them first, and looks again: one change at a time.
//!   It never waits for a turn, or for a table, with a hold in its hands.
//! * Data are written, then linked, then what was there is freed.

mod bitmaps;
mod compressed;
mod config;
mod cow;
mod layer;
mod open;
mod pieces;
mod populate;
mod read;
mod reopen;
mod resize;
mod resolve;
mod scratch;
mod status;
mod walk;
mod write;
mod zeroes;

use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use diskfuse_block::drivers::DetectZeroes;
use diskfuse_block::graph::ChildRole;
use diskfuse_block::{
    Access, Allocation, BackingName, BlockStatus, CacheUse, DirtyBitmap, Error, Extent, Kind,
    Limits, LocalFuture, Node, RangeQueue, Resize, Result, Zeroes,
};
use diskfuse_ring::Buf;

use crate::bitmaps::Persistent;
use crate::format::{Compression, Geometry, Header};
use crate::meta::Meta;
use compressed::Cache;

pub use config::{Children, OnCorrupt, OverlapCheck, Qcow2Config};
pub use reopen::Anew;
pub use status::{LayerStatus, Layered};

/// An open image.
pub struct Qcow2Node {
    image: Arc<OpenImage>,
    backing: Option<Arc<dyn Node>>,
    /// Bitmaps in which changes are recorded, those among them that do record.
    recorded: Arc<[Arc<DirtyBitmap>]>,
}

/// What all nodes of one open image share: everything but the backing node. Only for this crate's use.
pub struct OpenImage {
    meta: Meta,
    file: Arc<dyn Node>,
    /// Where the data are: the image file, or a file of their own.
    data: Arc<dyn Node>,
    config: Qcow2Config,
    /// As it was read.
    header: Header,
    geometry: Geometry,
    version: u32,
    compression: Compression,
    /// The data are in a file of their own,
    external: bool,
    /// which is a raw image of the disk as well.
    raw_data: bool,
    read_only: bool,
    options: Options,
    /// Not read-only and not closed.
    open_for_writing: AtomicBool,
    /// Turns on guest bytes, whole clusters.
    turns: RangeQueue,
    resizing: RangeQueue,
    decompressed: Cache,
    persistent: Persistent,
}

impl std::ops::Deref for Qcow2Node {
    type Target = OpenImage;
    fn deref(&self) -> &OpenImage {
        &self.image
    }
}

/// What of the configuration is needed while the image is open.
struct Options {
    compress: bool,
    discard: bool,
    detect_zeroes: DetectZeroes,
    discard_no_unref: bool,
    pass_discard_request: bool,
    pass_discard_other: bool,
}

impl Options {
    fn new(config: &Qcow2Config) -> Self {
        Self {
            compress: config.compress,
            discard: config.discard,
            detect_zeroes: config.detect_zeroes,
            discard_no_unref: config.discard_no_unref,
            pass_discard_request: config.passes_discard_requests(),
            pass_discard_other: config.pass_discard_other,
        }
    }
}

impl Qcow2Node {
    fn name(&self) -> String {
        self.meta.name()
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.meta.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => {
                let name = self.name();
                let message = format!(
                    "'{name}': {len} bytes at {offset} are not within the disk's {size} bytes"
                );
                Err(Error::new(Kind::Invalid, message))
            }
        }
    }

    /// Before any change: whether it may be, and that the image is ready for it.
    async fn check_write(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        if self.read_only {
            let message = format!("'{}' is open for reading only", self.name());
            return Err(Error::new(Kind::ReadOnly, message));
        }
        if !self.open_for_writing.load(Ordering::SeqCst) {
            let message = format!("'{}' is closed", self.name());
            return Err(Error::new(Kind::Ended, message));
        }
        self.meta.prepare_to_write().await
    }

    /// Brings the table of a guest offset into memory: [`Meta::load`].
    async fn load(&self, guest: u64) -> Result<()> {
        match self.meta.load(guest).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.found(error).await),
        }
    }

    /// After a lookup, before a write in place: whatever contradicts itself was found when its table was loaded, that is
    /// before it could be looked up.
    fn check_still_writable(&self) -> Result<()> {
        match self.meta.is_prepared() {
            true => Ok(()),
            false => self.meta.check_writable(),
        }
    }

    /// What was found in the tables cannot be: the image says so from now on, if it may be written.
    async fn found(&self, error: Error) -> Error {
        match error.kind() {
            Kind::Corrupt if !self.read_only => self.meta.mark_corrupt(&error.to_string()).await,
            Kind::Corrupt => {
                self.meta.tell_corrupt(&error.to_string());
                error
            }
            _ => error,
        }
    }
}

impl Node for Qcow2Node {
    fn driver(&self) -> &'static str {
        "qcow2"
    }

    fn size(&self) -> u64 {
        self.meta.size()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: self.data.limits().request_alignment,
            size_alignment: diskfuse_block::SECTOR as u32,
        }
    }

    fn allocated(&self) -> u64 {
        let data = if self.external {
            self.data.allocated()
        } else {
            0
        };
        self.file.allocated().saturating_add(data)
    }

    fn filename(&self) -> Option<String> {
        self.file.filename()
    }

    fn cache_use(&self) -> Option<CacheUse> {
        Some(self.meta.cache_use())
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        let end = offset.checked_add(len);
        if len == 0 || end.is_none_or(|end| end > self.meta.size()) {
            return Extent::Work { len };
        }
        match access {
            Access::Read => self.resolve_read(offset, len),
            Access::Write => self.resolve_write(offset, len),
        }
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        match self.check_range(offset, buf.len() as u64) {
            Ok(()) => Box::pin(self.fill(offset, buf)),
            Err(error) => Box::pin(ready((Err(error), buf))),
        }
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(self.write_now(offset, buf))
    }

    fn compresses(&self) -> bool {
        self.can_compress()
    }

    fn write_compressed(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(self.write_compressed_now(offset, buf))
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.write_zeroes_now(offset, len, how))
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.discard_now(offset, len))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.meta.commit())
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.resize_now(size, how, preallocate))
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        Box::pin(self.status(offset, len))
    }

    fn on_children(&self, children: &[(ChildRole, Arc<dyn Node>)]) -> Result<Arc<dyn Node>> {
        self.above(children)
    }

    fn cluster_size(&self) -> Option<u64> {
        Some(self.geometry.cluster_size())
    }

    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<Allocation>> {
        Box::pin(self.allocation_now(offset, len))
    }

    fn populate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.populate_now(offset, len))
    }

    fn change_backing(&self, backing: Option<BackingName>) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.change_backing_now(backing))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.close_now())
    }
}

impl std::fmt::Debug for Qcow2Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2Node")
            .field("meta", &self.meta)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}
