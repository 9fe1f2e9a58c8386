//! Fleecing: the target stands on the source, so it shows the disk as it was when the job began, by what was saved and by what
//! was not changed yet. It must never show what was written later.
//!
//! Who reads the target may look its tables up before a cluster is saved, and read the source after it was overwritten. So
//! everybody reads the target through [`Fleeced`], which looks at the bits of [`Before`] once more afterwards: a cluster that is
//! still left was not overwritten before then, and if one is not left any more, it reads again. Nobody waits for anybody.

use std::sync::Arc;

use diskfuse_block::graph::{Change, ChildRole};
use diskfuse_block::{
    Access, Allocation, BackingName, BlockStatus, Error, Extent, Graph, Kind, Limits, LocalFuture,
    Node, Permissions, Resize, Result, Wrap, Zeroes, io,
};
use diskfuse_ring::{Buf, SharedFd};

use super::before::Before;
use super::{BackupConfig, BackupSync};
use crate::chain;

/// Bytes that are looked at in one go for what a long range holds.
const AT_ONCE: u64 = 1 << 30;

/// The image that stands on the source of a backup and that the target is, or shows as it is. A bitmap says nothing of the rest
/// of the disk, so what is saved because of it makes no disk of one moment.
pub(super) fn overlay(graph: &Graph, config: &BackupConfig) -> Result<Option<String>> {
    let image = chain::below_filters(graph, &config.target)?;
    let on_source = (ChildRole::Backing, config.source.clone());
    let fleeces = config.sync != BackupSync::Bitmap
        && graph.edges(&image)?.contains(&on_source)
        && graph.get(&image)?.size() == graph.get(&config.source)?.size();
    Ok(fleeces.then_some(image))
}

/// The overlay of a backup, and what is around it.
pub(super) struct Fleece {
    overlay: String,
    around: Arc<dyn Wrap>,
}

impl Fleece {
    pub(super) fn new(overlay: String, before: &Arc<Before>) -> Self {
        let around = Arc::new(AroundOverlay(Arc::clone(before)));
        Self { overlay, around }
    }

    /// What must be changed along with what is done to the source, when the job begins,
    pub(super) fn begins(&self) -> [Change; 2] {
        let (node, wrap) = (self.overlay.clone(), Arc::clone(&self.around));
        [self.fleeces(true), Change::Wrap { node, wrap }]
    }

    /// and when it is over.
    pub(super) fn ends(&self) -> [Change; 2] {
        let (node, wrap) = (self.overlay.clone(), Arc::clone(&self.around));
        [self.fleeces(false), Change::Unwrap { node, wrap }]
    }

    fn fleeces(&self, on: bool) -> Change {
        let node = self.overlay.clone();
        Change::Fleece { node, on }
    }
}

struct AroundOverlay(Arc<Before>);

impl Wrap for AroundOverlay {
    fn over(&self, node: Arc<dyn Node>) -> Arc<dyn Node> {
        let before = Arc::clone(&self.0);
        Arc::new(Fleeced { node, before })
    }
}

/// The overlay as its readers see it.
struct Fleeced {
    node: Arc<dyn Node>,
    before: Arc<Before>,
}

impl Fleeced {
    /// Whether what the overlay showed in a range while so many bytes of it were left is what was there when the job began.
    fn stands(&self, offset: u64, len: u64, left: u64) -> Result<bool> {
        if left == 0 {
            return Ok(true);
        }
        if self.before.is_over() {
            let (id, driver) = (self.before.job.id(), self.node.driver());
            let name = self.node.filename().unwrap_or_else(|| driver.to_owned());
            let message = format!(
                "'{name}': {len} bytes at {offset} were not saved before block job '{id}' ended, and may have been overwritten since"
            );
            return Err(Error::new(Kind::Os(libc::EIO), message));
        }
        Ok(self.before.left_within(offset, len) == left)
    }

    /// How far from `offset` on all is left, or nothing is.
    fn run(&self, offset: u64, len: u64) -> (u64, bool) {
        let len = len.min(AT_ONCE);
        let end = offset.saturating_add(len);
        match self.before.left.next_dirty(offset, end, u64::MAX) {
            None => (len, false),
            Some(left) if left.start > offset => (left.start - offset, false),
            Some(left) => (left.end - offset, true),
        }
    }

    async fn fill(&self, offset: u64, mut buf: Buf) -> (Result<()>, Buf) {
        let len = buf.len() as u64;
        loop {
            let left = self.before.left_within(offset, len);
            let (result, back) = io::read(&*self.node, offset, buf).await;
            buf = back;
            let stands = match result {
                Ok(()) => self.stands(offset, len, left),
                Err(error) => Err(error),
            };
            match stands {
                Ok(true) => return (Ok(()), buf),
                Ok(false) => {}
                Err(error) => return (Err(error), buf),
            }
        }
    }

    async fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        loop {
            let (len, left) = self.run(offset, len);
            let status = self.node.block_status(offset, len).await?;
            let left = if left { status.len } else { 0 };
            match self.stands(offset, status.len, left) {
                Ok(true) => return Ok(status),
                Ok(false) => {}
                // Something is there, which cannot be read.
                Err(_) => {
                    return Ok(BlockStatus {
                        zero: false,
                        host_offset: None,
                        ..status
                    });
                }
            }
        }
    }
}

impl Node for Fleeced {
    fn driver(&self) -> &'static str {
        self.node.driver()
    }

    fn size(&self) -> u64 {
        self.node.size()
    }

    fn read_only(&self) -> bool {
        self.node.read_only()
    }

    fn limits(&self) -> Limits {
        self.node.limits()
    }

    fn allocated(&self) -> u64 {
        self.node.allocated()
    }

    fn filename(&self) -> Option<String> {
        self.node.filename()
    }

    fn plain_file(&self, _write: bool) -> std::result::Result<SharedFd, String> {
        Err("it shows what a job saves".to_owned())
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        if access == Access::Read && self.before.left.is_dirty(offset, len) {
            return Extent::Work { len };
        }
        self.node.resolve(access, offset, len)
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(self.fill(offset, buf))
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.node.write(offset, buf)
    }

    fn compresses(&self) -> bool {
        self.node.compresses()
    }

    fn write_compressed(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.node.write_compressed(offset, buf)
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        self.node.write_zeroes(offset, len, how)
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.node.discard(offset, len)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.node.flush()
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        self.node.resize(size, how, preallocate)
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        Box::pin(self.status(offset, len))
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.node.close()
    }

    fn set_permissions(&self, used: Permissions, shared: Permissions) -> Result<()> {
        self.node.set_permissions(used, shared)
    }

    fn cluster_size(&self) -> Option<u64> {
        self.node.cluster_size()
    }

    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<Allocation>> {
        self.node.allocation(offset, len)
    }

    fn populate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.node.populate(offset, len)
    }

    fn change_backing(&self, backing: Option<BackingName>) -> LocalFuture<'_, Result<()>> {
        self.node.change_backing(backing)
    }
}
