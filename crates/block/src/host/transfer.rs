//! Moving bytes between a buffer and the host file: the hot path, and what to do when the host moves less than it was
//! asked to. A transfer that the host takes as it is costs one operation of the ring and nothing else.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::time::Duration;

use diskfuse_ring::{
    Buf, BufOp, pool_read_at, pool_write_at, read_at, read_cached, sleep, write_at, yield_now,
};

use super::{Aio, HostFile};
use crate::error::{Error, Kind, Result};

/// How often a host that says EAGAIN or EINTR is asked again, a millisecond apart after the first few times.
const PATIENCE: u32 = 1000;

/// Reads in a row that were not in the page cache before looking for them there becomes an exception.
const MISSES: u32 = 16;
/// Of how many reads one looks then.
const LOOK_EVERY: u32 = 16;

impl HostFile {
    /// Fills the window of `buf` from byte `offset`; what is past the end of the file reads as zeroes. Any offset,
    /// length and memory will do; those that are aligned ([`HostFile::alignment`]) are not copied.
    ///
    /// A file that ends before the size that it had when it was opened (or was last resized to by us) was truncated
    /// by somebody else: that is EIO, not zeroes.
    pub async fn read(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        if buf.is_empty() {
            return (Ok(()), buf);
        }
        if !self.fits(offset, &buf) {
            return Box::pin(self.read_bounced(offset, buf)).await;
        }
        let mut buf = buf;
        if self.read_from_cache(offset, &mut buf) {
            return (Ok(()), buf);
        }
        let (first, buf) = self.start_read(offset, buf).await;
        match first {
            Ok(n) if n == buf.len() => (Ok(()), buf),
            first => Box::pin(self.read_rest(offset, first, buf)).await,
        }
    }

    /// Reads what is in the page cache in place: cheaper than an operation of the ring. False if it is not all there. While
    /// it is not, most reads do not look.
    fn read_from_cache(&self, offset: u64, buf: &mut Buf) -> bool {
        if self.0.direct || self.0.aio != Aio::IoUring {
            return false;
        }
        let misses = self.0.misses.load(Ordering::Relaxed);
        if misses > MISSES && !misses.is_multiple_of(LOOK_EVERY) {
            self.0
                .misses
                .store(misses.wrapping_add(1), Ordering::Relaxed);
            return false;
        }
        let hit = read_cached(&self.0.fd, buf, offset).is_ok_and(|n| n == buf.len());
        match (hit, misses) {
            (true, 0) => {}
            (true, _) => self.0.misses.store(0, Ordering::Relaxed),
            (false, _) => self
                .0
                .misses
                .store(misses.wrapping_add(1), Ordering::Relaxed),
        }
        hit
    }

    /// Writes the window of `buf` at byte `offset`; past the end the file grows. Any offset, length and memory will
    /// do. After an error some of it may have been written.
    pub async fn write(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        if self.read_only() {
            return (Err(self.is_read_only()), buf);
        }
        if buf.is_empty() {
            return (Ok(()), buf);
        }
        if !self.fits(offset, &buf) {
            return Box::pin(self.write_bounced(offset, buf)).await;
        }
        let _pass = match &self.0.gate {
            None => None,
            Some(gate) => match gate.try_enter() {
                Some(pass) => Some(pass),
                None => Some(Box::pin(gate.enter(offset, buf.len() as u64)).await),
            },
        };
        self.write_through(offset, buf).await
    }

    /// Writes what fits, past the gate: for those who are through it already.
    pub(super) async fn write_through(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        let end = offset.saturating_add(buf.len() as u64);
        let (first, buf) = self.start_write(offset, buf).await;
        let (result, buf) = match first {
            Ok(n) if n == buf.len() => (Ok(()), buf),
            first => Box::pin(self.write_rest(offset, first, buf)).await,
        };
        if result.is_ok() {
            self.written_to(end);
        }
        (result, buf)
    }

    pub(super) fn is_read_only(&self) -> Error {
        let message = format!("'{}' is open for reading only", self.path());
        Error::new(Kind::ReadOnly, message)
    }

    fn start_read(&self, offset: u64, buf: Buf) -> BufOp {
        match self.0.aio {
            Aio::IoUring => read_at(&self.0.fd, buf, offset),
            Aio::Threads => pool_read_at(&self.0.fd, buf, offset),
        }
    }

    fn start_write(&self, offset: u64, buf: Buf) -> BufOp {
        match self.0.aio {
            Aio::IoUring => write_at(&self.0.fd, buf, offset),
            Aio::Threads => pool_write_at(&self.0.fd, buf, offset),
        }
    }

    /// Goes on after a first answer that was not the whole. `buf` and `offset` are those of the whole, and fit.
    pub(super) async fn read_rest(
        &self,
        offset: u64,
        first: io::Result<usize>,
        mut buf: Buf,
    ) -> (Result<()>, Buf) {
        let mut progress = Progress::new(self, "read", offset, &buf);
        let mut answer = first;
        let result = loop {
            let moved = match answer {
                Ok(n) => progress.moved(n),
                Err(error) => match progress.refused(error).await {
                    Ok(()) => true,
                    Err(error) => break Err(error),
                },
            };
            if progress.is_done() {
                break Ok(());
            }
            let at = progress.position();
            if at >= self.size() {
                buf.set_window(progress.rest());
                buf.as_mut_slice().fill(0);
                break Ok(());
            }
            if !moved {
                break Err(self.truncated(at));
            }
            let (from, window) = progress.next();
            buf.set_window(window);
            (answer, buf) = self.start_read(from, buf).await;
        };
        buf.set_window(progress.window);
        (result, buf)
    }

    async fn write_rest(
        &self,
        offset: u64,
        first: io::Result<usize>,
        mut buf: Buf,
    ) -> (Result<()>, Buf) {
        let mut progress = Progress::new(self, "write", offset, &buf);
        let mut answer = first;
        let result = loop {
            let moved = match answer {
                Ok(n) => progress.moved(n),
                Err(error) => match progress.refused(error).await {
                    Ok(()) => true,
                    Err(error) => break Err(error),
                },
            };
            if progress.is_done() {
                break Ok(());
            }
            if !moved {
                break Err(progress.stuck());
            }
            let (from, window) = progress.next();
            buf.set_window(window);
            (answer, buf) = self.start_write(from, buf).await;
        };
        buf.set_window(progress.window);
        (result, buf)
    }

    fn truncated(&self, at: u64) -> Error {
        let (path, size) = (self.path(), self.size());
        Error::new(
            Kind::Os(libc::EIO),
            format!(
                "'{path}' ends at byte {at} but had {size} bytes: somebody truncated it while it was in use; the bytes after that are lost"
            ),
        )
    }
}

/// How far a transfer has come.
struct Progress<'f> {
    file: &'f HostFile,
    what: &'static str,
    offset: u64,
    window: Range<usize>,
    done: usize,
    /// Where the operation under way began, in bytes from the beginning of the transfer.
    started: usize,
    refusals: u32,
}

impl<'f> Progress<'f> {
    fn new(file: &'f HostFile, what: &'static str, offset: u64, buf: &Buf) -> Self {
        Self {
            file,
            what,
            offset,
            window: buf.window(),
            done: 0,
            started: 0,
            refusals: 0,
        }
    }

    /// Counts what an operation did; false if the transfer is no further than before.
    fn moved(&mut self, bytes: usize) -> bool {
        let reached = self.started + bytes;
        let further = reached > self.done;
        self.done = self.done.max(reached);
        further
    }

    /// Waits if trying again makes sense, else says what failed.
    async fn refused(&mut self, error: io::Error) -> Result<()> {
        let again = matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR));
        if !again || self.refusals >= PATIENCE {
            return Err(self.failed(error));
        }
        self.refusals += 1;
        if self.refusals < 4 {
            yield_now().await;
        } else {
            sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    fn failed(&self, error: io::Error) -> Error {
        let (what, path) = (self.what, self.file.path());
        let (len, at) = (self.window.len() - self.done, self.position());
        Error::os(format!("{what} {len} bytes at {at} of '{path}'"), error)
    }

    fn stuck(&self) -> Error {
        self.failed(io::Error::from_raw_os_error(libc::EIO))
    }

    fn is_done(&self) -> bool {
        self.done >= self.window.len()
    }

    /// The first byte of the file that was not moved.
    fn position(&self) -> u64 {
        self.offset + self.done as u64
    }

    fn rest(&self) -> Range<usize> {
        self.window.start + self.done..self.window.end
    }

    /// The next operation: where in the file and which window. It begins at an aligned place, if need be before
    /// bytes that were moved already: those come out the same again.
    fn next(&mut self) -> (u64, Range<usize>) {
        let align = self.file.0.align;
        let step = align.offset.max(align.memory) as usize;
        self.started = self.done / step * step;
        let start = self.window.start + self.started;
        (self.offset + self.started as u64, start..self.window.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{HostKind, Options};

    /// Hosts stop at sectors, but nothing says that they must.
    #[test]
    fn a_short_transfer_goes_on_at_an_aligned_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("short.raw");
        std::fs::write(&path, [0; 8192]).unwrap();
        let file = HostFile::open(&Options {
            path,
            name: "short.raw".to_owned(),
            kind: HostKind::Regular,
            aio: Aio::IoUring,
            direct: true,
            no_flush: false,
            read_only: false,
            auto_read_only: false,
            opener: None,
        })
        .unwrap();
        let align = file.alignment();
        let step = align.offset.max(align.memory) as usize;
        let buf = Buf::new(16_384).unwrap().with_window(4096..12_288);
        let mut progress = Progress::new(&file, "read", 8192, &buf);
        assert!(progress.moved(step + step / 2));
        assert_eq!(progress.next(), (8192 + step as u64, 4096 + step..12_288));
        // What was read again is no progress.
        assert!(!progress.moved(step / 2));
        assert!(progress.moved(8192 - step));
        assert!(progress.is_done());
    }
}
