//! `null-co` and `null-aio`: a disk that holds nothing, for measuring everything else. It keeps nothing that is
//! written to it.

use std::sync::Arc;
use std::time::Duration;

use diskfuse_ring::{Buf, sleep};

use crate::error::{Error, Kind, Result};
use crate::node::{Access, BlockStatus, Extent, Limits, LocalFuture, Node, Resize, Zeroes};
use crate::{SECTOR, check_range};

/// What a null disk is like.
#[derive(Clone, Copy, Debug)]
pub struct NullConfig {
    /// The name it goes by: `null-co` or `null-aio`, which are the same here.
    pub driver: &'static str,
    /// Bytes; rounded up to whole sectors.
    pub size: u64,
    /// Whether it promises to read as zeroes. It does in any case; this is what it says of itself.
    pub read_zeroes: bool,
    /// How long every request takes.
    pub latency: Duration,
    /// Refuse writes.
    pub read_only: bool,
}

impl Default for NullConfig {
    fn default() -> Self {
        Self {
            driver: "null-co",
            size: 1 << 30,
            read_zeroes: false,
            latency: Duration::ZERO,
            read_only: false,
        }
    }
}

/// A disk that holds nothing.
#[derive(Debug)]
pub struct NullNode {
    config: NullConfig,
    size: u64,
}

/// Makes a null disk. [`Kind::Invalid`] if its size cannot be rounded up to whole sectors.
pub fn open_null(config: &NullConfig) -> Result<Arc<NullNode>> {
    let size = config.size.checked_next_multiple_of(SECTOR);
    let size = size.filter(|&s| i64::try_from(s).is_ok()).ok_or_else(|| {
        let message = format!("a disk of {} bytes is too large", config.size);
        Error::new(Kind::Invalid, message)
    })?;
    Ok(Arc::new(NullNode {
        config: *config,
        size,
    }))
}

impl NullNode {
    async fn request(&self, offset: u64, len: u64, writes: bool) -> Result<()> {
        check_range(self.size, offset, len)?;
        if writes && self.config.read_only {
            return Err(Error::new(Kind::ReadOnly, "the null disk is read-only"));
        }
        if !self.config.latency.is_zero() {
            sleep(self.config.latency).await;
        }
        Ok(())
    }
}

impl Node for NullNode {
    fn driver(&self) -> &'static str {
        self.config.driver
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn read_only(&self) -> bool {
        self.config.read_only
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: 1,
            size_alignment: SECTOR as u32,
        }
    }

    fn allocated(&self) -> u64 {
        0
    }

    fn filename(&self) -> Option<String> {
        None
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        let slow = !self.config.latency.is_zero();
        let refused = access == Access::Write && self.config.read_only;
        if slow || refused || check_range(self.size, offset, len).is_err() {
            return Extent::Work { len };
        }
        Extent::Void { len }
    }

    fn read(&self, offset: u64, mut buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            let result = self.request(offset, buf.len() as u64, false).await;
            if result.is_ok() {
                buf.as_mut_slice().fill(0);
            }
            (result, buf)
        })
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        Box::pin(async move {
            let result = self.request(offset, buf.len() as u64, true).await;
            (result, buf)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, _how: Zeroes) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.request(offset, len, true))
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.request(offset, len, true))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.request(0, 0, false))
    }

    fn resize(&self, size: u64, how: Resize, _: bool) -> LocalFuture<'_, Result<()>> {
        let same = size == self.size || (how == Resize::AtLeast && size < self.size);
        Box::pin(std::future::ready(if same {
            Ok(())
        } else {
            let message = "the size of a null disk is fixed";
            Err(Error::new(Kind::Unsupported, message))
        }))
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        let status = check_range(self.size, offset, len).map(|()| BlockStatus {
            len,
            zero: self.config.read_zeroes,
            host_offset: None,
        });
        Box::pin(std::future::ready(status))
    }
}
