//! A node whose writes, or reads, fail while they are told to, or wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use diskfuse_block::{
    Access, BlockStatus, Error, Extent, Limits, LocalFuture, Node, Resize, Result, Zeroes,
};
use diskfuse_ring::{Buf, sleep};

pub struct Faulty {
    node: Arc<dyn Node>,
    /// The errno of writes, 0 for none.
    pub write_errno: AtomicI32,
    pub read_errno: AtomicI32,
    /// The next read waits,
    pub stall: AtomicBool,
    /// and does so until this is false again; then it reads.
    pub stalled: AtomicBool,
    /// Bytes written.
    pub written: AtomicU64,
}

impl Faulty {
    pub fn new(node: Arc<dyn Node>) -> Arc<Self> {
        Arc::new(Self {
            node,
            write_errno: AtomicI32::new(0),
            read_errno: AtomicI32::new(0),
            stall: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            written: AtomicU64::new(0),
        })
    }

    fn check(errno: &AtomicI32) -> Result<()> {
        match errno.load(SeqCst) {
            0 => Ok(()),
            errno => {
                let source = std::io::Error::from_raw_os_error(errno);
                Err(Error::os("faulty", source))
            }
        }
    }
}

impl Node for Faulty {
    fn driver(&self) -> &'static str {
        "faulty"
    }
    fn size(&self) -> u64 {
        self.node.size()
    }
    fn read_only(&self) -> bool {
        false
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
    fn resolve(&self, _access: Access, _offset: u64, len: u64) -> Extent<'_> {
        Extent::Work { len }
    }
    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        match Self::check(&self.read_errno) {
            Ok(()) if self.stall.swap(false, SeqCst) => {
                self.stalled.store(true, SeqCst);
                Box::pin(async move {
                    while self.stalled.load(SeqCst) {
                        sleep(Duration::from_millis(1)).await;
                    }
                    self.node.read(offset, buf).await
                })
            }
            Ok(()) => self.node.read(offset, buf),
            Err(error) => Box::pin(std::future::ready((Err(error), buf))),
        }
    }
    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        match Self::check(&self.write_errno) {
            Ok(()) => {
                self.written.fetch_add(buf.len() as u64, SeqCst);
                self.node.write(offset, buf)
            }
            Err(error) => Box::pin(std::future::ready((Err(error), buf))),
        }
    }
    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        match Self::check(&self.write_errno) {
            Ok(()) => self.node.write_zeroes(offset, len, how),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
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
        self.node.block_status(offset, len)
    }
}
