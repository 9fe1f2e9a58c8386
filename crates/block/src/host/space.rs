//! Everything about a host file but its bytes: stable storage, zeroes, holes, size. What the host cannot do at once is
//! done in another way that has the same effect, or refused; never skipped.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use diskfuse_ring::{Buf, fallocate, fdatasync, offload};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::gate::Pass;
use super::{HostFile, Inner};
use crate::SECTOR;
use crate::error::{Error, Kind, Result};
use crate::node::{BlockStatus, Resize};

/// Bytes of zeroes written at once where the host knows no better way.
const ZEROES: u64 = 1 << 20;

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl HostFile {
    /// Everything written before is on stable storage when it resolves: `fdatasync(2)`. With `cache.no-flush` it does
    /// nothing. Once it has failed on a file whose bytes go through the page cache it fails for ever: the kernel
    /// reports the error once and then takes the lost pages for clean.
    pub async fn flush(&self) -> Result<()> {
        if self.0.no_flush || self.read_only() {
            return Ok(());
        }
        let flushes = &self.0.flushes;
        let before = flushes.begun.load(Ordering::SeqCst);
        let _turn = flushes.queue.turn(0, 1).await;
        self.check_consistent()?;
        if flushes.succeeded.load(Ordering::SeqCst) > before {
            // One that began after this was asked for has done it.
            return Ok(());
        }
        let number = flushes.begun.fetch_add(1, Ordering::SeqCst) + 1;
        loop {
            match fdatasync(&self.0.fd).await {
                Ok(_) => {
                    flushes.succeeded.store(number, Ordering::SeqCst);
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => {
                    // What the kernel writes for a passthrough goes through the page cache.
                    let unseen = self.0.grows_unseen.load(Ordering::Relaxed);
                    if !self.direct() || unseen || self.0.buffered.get().is_some() {
                        self.0.inconsistent.store(true, Ordering::SeqCst);
                    }
                    return Err(Error::os(format!("flush '{}'", self.path()), error));
                }
            }
        }
    }

    fn check_consistent(&self) -> Result<()> {
        if !self.0.inconsistent.load(Ordering::SeqCst) {
            return Ok(());
        }
        let path = self.path();
        Err(Error::new(
            Kind::Os(libc::EIO),
            format!(
                "flush '{path}': an earlier flush failed, so the page cache is inconsistent with the disk; check the disk, then open the image again"
            ),
        ))
    }

    /// Makes a range read as zeroes; with `unmap` its space may be given back. Any range will do; the size stays.
    pub async fn write_zeroes(&self, range: Range<u64>, unmap: bool) -> Result<()> {
        if self.read_only() {
            return Err(self.is_read_only());
        }
        let end = self.clipped(&range);
        if range.start >= end {
            return Ok(());
        }
        // A device takes whole sectors only; what is left at both sides is little.
        let whole = self.whole_sectors(&(range.start..end));
        if whole.is_empty() {
            return self.write_plain_zeroes(range.start..end).await;
        }
        if !self.zero_quickly(&whole, unmap).await? {
            return self.write_plain_zeroes(range.start..end).await;
        }
        self.write_plain_zeroes(range.start..whole.start).await?;
        self.write_plain_zeroes(whole.end..end).await
    }

    /// False if the host has no way but writing.
    async fn zero_quickly(&self, range: &Range<u64>, unmap: bool) -> Result<bool> {
        let Inner {
            no_punch_hole,
            no_zero_range,
            ..
        } = &*self.0;
        if unmap && self.try_allocate(PUNCH_HOLE, range, no_punch_hole).await? {
            return Ok(true);
        }
        self.try_allocate(ZERO_RANGE, range, no_zero_range).await
    }

    /// Gives the space of a range back; what it reads as afterwards is zeroes or what it was. Where the host cannot,
    /// nothing happens.
    pub async fn discard(&self, range: Range<u64>) -> Result<()> {
        if self.read_only() {
            return Err(self.is_read_only());
        }
        let end = self.clipped(&range);
        let whole = self.whole_sectors(&(range.start..end));
        if whole.is_empty() {
            return Ok(());
        }
        self.try_allocate(PUNCH_HOLE, &whole, &self.0.no_punch_hole)
            .await
            .map(drop)
    }

    /// False if the host has no such operation, which is remembered.
    async fn try_allocate(
        &self,
        mode: i32,
        range: &Range<u64>,
        never: &AtomicBool,
    ) -> Result<bool> {
        if never.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let (start, len) = (range.start, range.end - range.start);
        let _pass = self.pass(range).await;
        loop {
            let Err(error) = fallocate(&self.0.fd, mode, start, len).await else {
                return Ok(true);
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY) => {
                    never.store(true, Ordering::Relaxed);
                    return Ok(false);
                }
                _ => {
                    let path = self.path();
                    let what = format!("zero or discard {len} bytes at {start} of '{path}'");
                    return Err(Error::os(what, error));
                }
            }
        }
    }

    /// Keeps writers that read sectors first away from a range; see the gate.
    async fn pass(&self, range: &Range<u64>) -> Option<Pass<'_>> {
        let gate = self.0.gate.as_ref()?;
        let (start, len) = (range.start, range.end - range.start);
        let aligned = (start | len) & u64::from(self.0.align.offset - 1) == 0;
        Some(if aligned {
            gate.enter(start, len).await
        } else {
            Pass::Modifying {
                _modifying: gate.modify(start, len).await,
            }
        })
    }

    async fn write_plain_zeroes(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let size = (range.end - range.start).min(ZEROES);
        let mut buf = Buf::new(size as usize)
            .map_err(|e| Error::os(format!("a buffer of {size} zeroes"), e))?;
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(size);
            buf.set_window(0..len as usize);
            let result;
            (result, buf) = self.write(at, buf).await;
            result?;
            at += len;
        }
        Ok(())
    }

    /// The end of a range, but not past the end of the file: there it reads as zeroes already.
    fn clipped(&self, range: &Range<u64>) -> u64 {
        range.end.min(self.size())
    }

    fn whole_sectors(&self, range: &Range<u64>) -> Range<u64> {
        let sector = u64::from(self.0.device_sector);
        let start = range.start.checked_next_multiple_of(sector);
        start.unwrap_or(u64::MAX)..range.end / sector * sector
    }

    /// Changes the size; new bytes read as zeroes and, with `preallocate`, have their space. On an error the size is
    /// as it was. Writes that are under way must not reach past the new end. A device keeps its size.
    pub async fn resize(&self, size: u64, how: Resize, preallocate: bool) -> Result<()> {
        if how == Resize::AtLeast && size <= self.size() {
            return Ok(());
        }
        if self.is_device() {
            let path = self.path();
            let message = format!("'{path}' is a block device: its size cannot be changed here");
            return Err(Error::new(Kind::Unsupported, message));
        }
        if self.read_only() {
            return Err(self.is_read_only());
        }
        // Who reads a sector before the change and writes it after would bring back what was cut off. And what the kernel
        // has written past the end that is remembered here would be taken for leftovers, or that end for the file's.
        let _alone = match &self.0.gate {
            Some(gate) => Some(gate.modify(0, u64::MAX).await),
            None => None,
        };
        let file = self.clone();
        let changed = offload(move || file.resize_now(size, how, preallocate)).await;
        changed.unwrap_or_else(|_| Err(Error::new(Kind::Ended, "the worker threads have ended")))
    }

    /// On a worker thread.
    fn resize_now(&self, size: u64, how: Resize, preallocate: bool) -> Result<()> {
        let _one_at_a_time = self.0.resizing.lock();
        let old = self.size();
        if how == Resize::AtLeast && size <= old {
            return Ok(());
        }
        let failed = |e: Errno| {
            Error::os(
                format!("resize '{}' from {old} to {size} bytes", self.path()),
                e.into(),
            )
        };
        if size <= old {
            // Readers must not take the new end for a truncation by somebody else.
            self.0.size.store(size, Ordering::SeqCst);
            return rustix::fs::ftruncate(&self.0.fd, size).map_err(|e| {
                self.0.size.store(old, Ordering::SeqCst);
                failed(e)
            });
        }
        self.lengthen(old, size)?.map_err(failed)?;
        if preallocate && let Err(error) = self.preallocate(old, size) {
            // What the kernel may have written meanwhile must not be cut off.
            let others_write = self.0.grows_unseen.load(Ordering::Relaxed);
            if !others_write && let Err(error) = rustix::fs::ftruncate(&self.0.fd, old) {
                tracing::warn!(path = self.path(), %error, "cannot undo a resize that failed");
            }
            return Err(failed(error));
        }
        self.0.size.store(size, Ordering::SeqCst);
        Ok(())
    }

    /// Makes the file `size` bytes long, which had `old`. The inner error is the host's.
    fn lengthen(&self, old: u64, size: u64) -> Result<std::result::Result<(), Errno>> {
        if self.0.grows_unseen.load(Ordering::Relaxed) {
            // The kernel may have made it longer meanwhile, and that must stay: unlike ftruncate(2) this never makes it
            // shorter.
            match rustix::fs::fallocate(&self.0.fd, FallocateFlags::empty(), size - 1, 1) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                answer => return Ok(answer),
            }
            if self.stat()?.st_size.cast_unsigned() >= size {
                return Ok(Ok(()));
            }
        } else if self.stat()?.st_size.cast_unsigned() > old {
            // A write that failed may have left bytes past the end, which must not come back.
            if let Err(errno) = rustix::fs::ftruncate(&self.0.fd, old) {
                return Ok(Err(errno));
            }
        }
        Ok(rustix::fs::ftruncate(&self.0.fd, size))
    }

    fn preallocate(&self, from: u64, to: u64) -> std::result::Result<(), Errno> {
        loop {
            match rustix::fs::fallocate(&self.0.fd, FallocateFlags::empty(), from, to - from) {
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
                answer => return answer,
            }
        }
        let zeroes = vec![0; ZEROES.min(to - from) as usize];
        let fd = self
            .buffered()
            .map_err(|e| Errno::from_raw_os_error(e.errno()))?;
        let mut at = from;
        while at < to {
            let len = zeroes.len().min((to - at) as usize);
            match rustix::io::pwrite(fd, &zeroes[..len], at) {
                Err(Errno::INTR) => {}
                Ok(0) => return Err(Errno::IO),
                answer => at += answer? as u64,
            }
        }
        Ok(())
    }

    /// What `len` bytes from `offset` on hold, as far as the host tells without reading: `lseek(2)`, SEEK_DATA and
    /// SEEK_HOLE. `len` must not be 0.
    pub async fn status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        if self.is_device() {
            return Ok(data(offset, len));
        }
        let file = self.clone();
        let answer = offload(move || file.status_now(offset, len)).await;
        answer.map_err(|_| Error::new(Kind::Ended, "the worker threads have ended"))
    }

    /// On a worker thread. The position of the descriptor is nobody's.
    fn status_now(&self, offset: u64, len: u64) -> BlockStatus {
        let hole = |len| BlockStatus {
            len,
            zero: true,
            host_offset: Some(offset),
        };
        if offset >= self.size() {
            return hole(len);
        }
        match rustix::fs::seek(&self.0.fd, SeekFrom::Data(offset)) {
            Ok(next) if next > offset => hole(len.min(next - offset)),
            Ok(_) => match rustix::fs::seek(&self.0.fd, SeekFrom::Hole(offset)) {
                // Holes begin at blocks, but for the one at the end of the file, which is no hole to a disk.
                Ok(next) if next > offset => {
                    data(offset, len.min(next.next_multiple_of(SECTOR) - offset))
                }
                _ => data(offset, len),
            },
            Err(Errno::NXIO) => hole(len),
            Err(_) => data(offset, len),
        }
    }

    /// Bytes that the file takes on the host, as `du` counts; of a device, all of it.
    pub fn allocated(&self) -> u64 {
        if self.is_device() {
            return self.size();
        }
        // fstat(2): st_blocks counts 512 bytes, whatever the file system's blocks are.
        self.stat()
            .map_or(0, |stat| stat.st_blocks.cast_unsigned() * 512)
    }
}

fn data(offset: u64, len: u64) -> BlockStatus {
    BlockStatus {
        len,
        zero: false,
        host_offset: Some(offset),
    }
}
