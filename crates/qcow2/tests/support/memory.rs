//! A file in memory, for images that are tried by the thousand. It resolves nothing, so that all goes through `read` and
//! `write`.

use std::future::ready;

use diskfuse_block::{
    Access, BlockStatus, Error, Extent, Kind, Limits, LocalFuture, Node, Resize, Result, SECTOR,
    Zeroes,
};
use diskfuse_ring::Buf;
use parking_lot::Mutex;

/// It has room for so many bytes more than it has in the beginning, whatever a hostile image wants.
const ROOM: u64 = 8 << 20;

pub struct Memory {
    bytes: Mutex<Vec<u8>>,
    most: u64,
    read_only: bool,
}

impl Memory {
    pub fn new(mut bytes: Vec<u8>, read_only: bool) -> Self {
        bytes.resize(bytes.len().next_multiple_of(SECTOR as usize), 0);
        Self {
            most: bytes.len() as u64 + ROOM,
            bytes: Mutex::new(bytes),
            read_only,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }

    /// Does something with a range that must exist.
    fn with<T>(&self, offset: u64, len: u64, act: impl FnOnce(&mut [u8]) -> T) -> Result<T> {
        let mut bytes = self.bytes.lock();
        let end = offset
            .checked_add(len)
            .filter(|&end| end <= bytes.len() as u64);
        match end {
            Some(end) => Ok(act(&mut bytes[offset as usize..end as usize])),
            None => Err(Error::new(
                Kind::Invalid,
                format!("{len} bytes at {offset} are past the end of memory"),
            )),
        }
    }

    fn writable(&self) -> Result<()> {
        if self.read_only {
            return Err(Error::new(Kind::ReadOnly, "this memory is read-only"));
        }
        Ok(())
    }
}

impl Node for Memory {
    fn driver(&self) -> &'static str {
        "memory"
    }
    fn size(&self) -> u64 {
        self.bytes.lock().len() as u64
    }
    fn read_only(&self) -> bool {
        self.read_only
    }
    fn limits(&self) -> Limits {
        Limits {
            request_alignment: 1,
            size_alignment: 1,
        }
    }
    fn allocated(&self) -> u64 {
        self.size()
    }
    fn filename(&self) -> Option<String> {
        Some("memory".to_owned())
    }
    fn resolve(&self, _: Access, _: u64, len: u64) -> Extent<'_> {
        Extent::Work { len }
    }
    fn read(&self, offset: u64, mut buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        let len = buf.len() as u64;
        let result = self.with(offset, len, |bytes| {
            buf.as_mut_slice().copy_from_slice(bytes);
        });
        Box::pin(ready((result, buf)))
    }
    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, (Result<()>, Buf)> {
        let write = |bytes: &mut [u8]| bytes.copy_from_slice(buf.as_slice());
        let result = self
            .writable()
            .and_then(|()| self.with(offset, buf.len() as u64, write));
        Box::pin(ready((result, buf)))
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: Zeroes) -> LocalFuture<'_, Result<()>> {
        let zero = |bytes: &mut [u8]| bytes.fill(0);
        let result = self.writable().and_then(|()| self.with(offset, len, zero));
        Box::pin(ready(result))
    }
    fn discard(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.write_zeroes(offset, len, Zeroes::MayUnmap)
    }
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(ready(Ok(())))
    }
    fn resize(&self, size: u64, how: Resize, _: bool) -> LocalFuture<'_, Result<()>> {
        let result = self.writable().and_then(|()| {
            let mut bytes = self.bytes.lock();
            let size = match how {
                Resize::Exactly => size,
                Resize::AtLeast => size.max(bytes.len() as u64),
            };
            if size > self.most {
                return Err(Error::os(
                    "grow memory",
                    std::io::Error::from_raw_os_error(28),
                ));
            }
            bytes.resize(size.next_multiple_of(SECTOR) as usize, 0);
            Ok(())
        });
        Box::pin(ready(result))
    }
    fn block_status(&self, _: u64, len: u64) -> LocalFuture<'_, Result<BlockStatus>> {
        let status = BlockStatus {
            len,
            zero: false,
            host_offset: None,
        };
        Box::pin(ready(Ok(status)))
    }
}
