//! `raw`: another node, or a part of it, as a disk. It only shifts offsets; it must never let anything outside of its
//! part be touched.

use std::sync::Arc;

use diskfuse_ring::{Buf, SharedFd};

use crate::error::{Error, Kind, Result};
use crate::graph::ChildRole;
use crate::node::{
    Access, Allocation, BlockStatus, Extent, Limits, LocalFuture, Node, Resize, Zeroes,
};
use crate::{SECTOR, check_range};

/// Which part of the child to show.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawConfig {
    /// Where the part begins, in bytes.
    pub offset: u64,
    /// Its bytes, a multiple of 512; all that follows if not given.
    pub size: Option<u64>,
    /// Refuse writes even if the child takes them.
    pub read_only: bool,
}

/// A part of another node.
pub struct RawNode {
    child: Arc<dyn Node>,
    config: RawConfig,
}

/// Shows a part of `child`. [`Kind::Invalid`] if the part does not lie within the child or is not whole sectors.
pub fn open_raw(child: Arc<dyn Node>, config: &RawConfig) -> Result<Arc<RawNode>> {
    let invalid = |message: String| Err(Error::new(Kind::Invalid, message));
    let whole = child.size();
    let RawConfig { offset, size, .. } = *config;
    match size {
        Some(size) if !size.is_multiple_of(SECTOR) => {
            return invalid(format!(
                "Specified size is not multiple of {SECTOR} (it is {size})"
            ));
        }
        None if offset > whole => {
            return invalid(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({whole})"
            ));
        }
        None if !offset.is_multiple_of(SECTOR) => {
            return invalid(format!(
                "raw: offset {offset} is not a multiple of {SECTOR}; give the size as well"
            ));
        }
        Some(size) if check_range(whole, offset, size).is_err() => {
            // With two spaces, as QEMU has it.
            return invalid(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the containing file ({whole})"
            ));
        }
        _ => {}
    }
    Ok(Arc::new(RawNode {
        child,
        config: *config,
    }))
}

impl RawNode {
    /// What it was opened with.
    pub fn config(&self) -> &RawConfig {
        &self.config
    }

    /// The offset in the child, if the range is ours.
    fn shifted(&self, offset: u64, len: u64) -> Result<u64> {
        check_range(self.size(), offset, len)?;
        Ok(offset + self.config.offset)
    }

    fn writable(&self) -> Result<()> {
        if !self.config.read_only {
            return Ok(());
        }
        Err(Error::new(Kind::ReadOnly, "the raw node is read-only"))
    }

    fn resized(&self, size: u64) -> Result<u64> {
        self.writable()?;
        if self.config.size.is_some() {
            let message = "a raw node with a size of its own cannot be resized";
            return Err(Error::new(Kind::Unsupported, message));
        }
        let total = size.checked_add(self.config.offset);
        total.filter(|&t| i64::try_from(t).is_ok()).ok_or_else(|| {
            let message = format!("a disk of {size} bytes is too large");
            Error::new(Kind::Invalid, message)
        })
    }
}

fn refuse<'a, T: 'a>(error: Error) -> LocalFuture<'a, Result<T>> {
    Box::pin(std::future::ready(Err(error)))
}

impl Node for RawNode {
    fn driver(&self) -> &'static str {
        "raw"
    }

    fn size(&self) -> u64 {
        let rest = || self.child.size().saturating_sub(self.config.offset);
        self.config.size.unwrap_or_else(rest)
    }

    fn read_only(&self) -> bool {
        self.config.read_only || self.child.read_only()
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }

    fn allocated(&self) -> u64 {
        self.child.allocated()
    }

    fn filename(&self) -> Option<String> {
        self.child.filename()
    }

    fn plain_file(&self, write: bool) -> std::result::Result<SharedFd, String> {
        if self.config.offset != 0 || self.config.size.is_some() {
            return Err("the disk is a part of a file only".to_owned());
        }
        self.child.plain_file(write)
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        let refused = access == Access::Write && self.config.read_only;
        match self.shifted(offset, len) {
            Ok(offset) if !refused => self.child.resolve(access, offset, len),
            _ => Extent::Work { len },
        }
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        match self.shifted(offset, buf.len() as u64) {
            Ok(offset) => self.child.read(offset, buf),
            Err(error) => Box::pin(std::future::ready((Err(error), buf))),
        }
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        let len = buf.len() as u64;
        match self.writable().and_then(|()| self.shifted(offset, len)) {
            Ok(offset) => self.child.write(offset, buf),
            Err(error) => Box::pin(std::future::ready((Err(error), buf))),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        match self.writable().and_then(|()| self.shifted(offset, len)) {
            Ok(offset) => self.child.write_zeroes(offset, len, how),
            Err(error) => refuse(error),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        match self.writable().and_then(|()| self.shifted(offset, len)) {
            Ok(offset) => self.child.discard(offset, len),
            Err(error) => refuse(error),
        }
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.child.flush()
    }

    fn on_children(&self, children: &[(ChildRole, Arc<dyn Node>)]) -> Result<Arc<dyn Node>> {
        let [(_, child)] = children else {
            let message = "a raw node stands on one other node";
            return Err(Error::new(Kind::Invalid, message));
        };
        Ok(open_raw(Arc::clone(child), &self.config)?)
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        if size == self.size() || (how == Resize::AtLeast && size < self.size()) {
            return Box::pin(std::future::ready(Ok(())));
        }
        match self.resized(size) {
            Ok(total) => self.child.resize(total, how, preallocate),
            Err(error) => refuse(error),
        }
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        match self.shifted(offset, len) {
            Ok(offset) => self.child.block_status(offset, len),
            Err(error) => refuse(error),
        }
    }

    fn cluster_size(&self) -> Option<u64> {
        let size = self.child.cluster_size();
        size.filter(|size| self.config.offset.is_multiple_of(*size))
    }

    fn allocation(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<Allocation>> {
        match self.shifted(offset, len) {
            Ok(offset) => self.child.allocation(offset, len),
            Err(error) => refuse(error),
        }
    }

    fn populate(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        match self.writable().and_then(|()| self.shifted(offset, len)) {
            Ok(offset) => self.child.populate(offset, len),
            Err(error) => refuse(error),
        }
    }
}
