//! A raw image that nobody called raw: it was taken for one because nothing else claims it. Its guest must not be able
//! to make it claim something else, or the next one to open it would follow what the guest wrote there (a backing file
//! of its choice, for example). So a write that would make the first sector look like another format is refused, as in
//! QEMU. Everything else goes to the file as it is.

use std::sync::Arc;

use diskfuse_block::{
    Access, BlockStatus, Error, Extent, Kind, Limits, LocalFuture, Node, RangeQueue, Resize,
    Result, Zeroes, io,
};
use diskfuse_ring::{Buf, SharedFd};

use crate::format::{PROBED_BYTES, Probed, probe_bytes};

/// A file that was probed as raw.
pub struct ProbedRaw {
    file: Arc<dyn Node>,
    /// Writers of the first sector, one after the other: each looks at what it will make of it.
    writers: RangeQueue,
}

impl ProbedRaw {
    /// Shows `file`, which [`probe_bytes`] says is raw.
    pub fn new(file: Arc<dyn Node>) -> Arc<Self> {
        Arc::new(Self {
            file,
            writers: RangeQueue::default(),
        })
    }

    /// [`Kind::Os`] with EPERM if the first sector would look like another format once `len` bytes at `offset` are
    /// `data`, or zeroes if there is none.
    async fn check(&self, offset: u64, len: u64, data: Option<&[u8]>) -> Result<()> {
        let (Ok(start), Ok(size)) = (
            usize::try_from(offset),
            usize::try_from(self.file.size().min(PROBED_BYTES as u64)),
        ) else {
            return Ok(());
        };
        let end = start
            .saturating_add(usize::try_from(len).unwrap_or(usize::MAX))
            .min(size);
        if start >= end {
            return Ok(());
        }
        let mut head = Buf::new(size).map_err(|error| Error::os("get memory", error))?;
        if start > 0 || end < size {
            let result;
            (result, head) = io::read(&*self.file, 0, head).await;
            result?;
        }
        let bytes = head.as_mut_slice();
        if let Some(changed) = bytes.get_mut(start..end) {
            match data.and_then(|data| data.get(..end - start)) {
                Some(data) => changed.copy_from_slice(data),
                None => changed.fill(0),
            }
        }
        let format = match probe_bytes(bytes) {
            Probed::Raw => return Ok(()),
            Probed::Qcow2 => "qcow2",
            Probed::Other(format) => format,
        };
        let name = self.filename().unwrap_or_default();
        Err(Error::new(
            Kind::Os(libc::EPERM),
            format!(
                "write {len} bytes at {offset} of '{name}': that would make the image look like a {format} image, and \
                 nobody said that it is raw; open it with --format raw to allow it"
            ),
        ))
    }

    fn touches_head(offset: u64, len: u64) -> bool {
        offset < PROBED_BYTES as u64 && len > 0
    }
}

impl Node for ProbedRaw {
    fn driver(&self) -> &'static str {
        "raw"
    }

    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read_only(&self) -> bool {
        self.file.read_only()
    }

    fn limits(&self) -> Limits {
        self.file.limits()
    }

    fn allocated(&self) -> u64 {
        self.file.allocated()
    }

    fn filename(&self) -> Option<String> {
        self.file.filename()
    }

    fn plain_file(&self, write: bool) -> std::result::Result<SharedFd, String> {
        if write {
            return Err(
                "nobody said that the image is raw, so not every write is let through \
                 (--format raw says it)"
                    .to_owned(),
            );
        }
        self.file.plain_file(write)
    }

    fn resolve(&self, access: Access, offset: u64, len: u64) -> Extent<'_> {
        match access == Access::Write && Self::touches_head(offset, len) {
            true => Extent::Work { len },
            false => self.file.resolve(access, offset, len),
        }
    }

    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        self.file.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        if !Self::touches_head(offset, buf.len() as u64) {
            return self.file.write(offset, buf);
        }
        Box::pin(async move {
            let _turn = self.writers.turn(0, PROBED_BYTES as u64).await;
            let len = buf.len() as u64;
            if let Err(error) = self.check(offset, len, Some(buf.as_slice())).await {
                return (Err(error), buf);
            }
            self.file.write(offset, buf).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, how: Zeroes) -> LocalFuture<'_, Result<()>> {
        if !Self::touches_head(offset, len) {
            return self.file.write_zeroes(offset, len, how);
        }
        Box::pin(async move {
            let _turn = self.writers.turn(0, PROBED_BYTES as u64).await;
            self.check(offset, len, None).await?;
            self.file.write_zeroes(offset, len, how).await
        })
    }

    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        if !Self::touches_head(offset, len) {
            return self.file.discard(offset, len);
        }
        Box::pin(async move {
            let _turn = self.writers.turn(0, PROBED_BYTES as u64).await;
            // What is discarded may read as zeroes.
            self.check(offset, len, None).await?;
            self.file.discard(offset, len).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.file.flush()
    }

    fn close(&self) -> LocalFuture<'_, Result<()>> {
        self.file.close()
    }

    fn resize(&self, size: u64, how: Resize, preallocate: bool) -> LocalFuture<'_, Result<()>> {
        self.file.resize(size, how, preallocate)
    }

    fn block_status(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        self.file.block_status(offset, len)
    }
}
