//! Transfers that O_DIRECT does not take as they are: through a buffer of our own, and, where a write covers part of a
//! sector only, by reading the sector first. It must never write a sector that somebody else is writing, never change
//! a byte outside of the request, and never make a file longer than the request does.
//!
//! The last of these is why the end of a file whose size is not a multiple of the alignment is written through the
//! page cache: O_DIRECT can only write whole sectors there. The kernel keeps both views coherent as long as nobody
//! writes the same pages both ways at once, which the gate sees to.

use std::ops::Range;

use diskfuse_ring::{Buf, PAGE, spawn, write_at};

use super::HostFile;
use crate::error::{Error, Result};

/// Bytes copied at once; bounds what one odd request can cost.
const BOUNCE: u64 = 256 << 10;

impl HostFile {
    pub(super) async fn read_bounced(&self, offset: u64, mut buf: Buf) -> (Result<()>, Buf) {
        let result = self.read_pieces(offset, &mut buf).await;
        (result, buf)
    }

    async fn read_pieces(&self, offset: u64, buf: &mut Buf) -> Result<()> {
        let end = end_of(offset, buf)?;
        let mut bounce = self.bounce_for(offset, end)?;
        let mut at = offset;
        while at < end {
            let piece = at..end.min(self.down(at) + BOUNCE);
            bounce = self.read_sectors(self.around(&piece), bounce).await?;
            let skip = (at - self.down(at)) as usize;
            let to = (at - offset) as usize;
            let len = (piece.end - at) as usize;
            buf.as_mut_slice()[to..to + len].copy_from_slice(&bounce.as_slice()[skip..skip + len]);
            at = piece.end;
        }
        Ok(())
    }

    pub(super) async fn write_bounced(&self, offset: u64, buf: Buf) -> (Result<()>, Buf) {
        let len = buf.len() as u64;
        if self.down(offset) == offset && self.down(len) == len {
            return self.write_copied(offset, buf).await;
        }
        // A task of its own: if whoever asked goes away between the read and the write, the sectors must stay taken
        // until the write has landed. Only the end of the whole ring cuts it short.
        let file = self.clone();
        let modified = async move {
            let mut buf = buf;
            let result = file.modify(offset, &mut buf).await;
            (result, buf)
        };
        spawn(modified).await
    }

    /// Whole sectors, in memory that the host does not take.
    async fn write_copied(&self, offset: u64, mut buf: Buf) -> (Result<()>, Buf) {
        let mut bounce = match self.bounce_for(offset, offset + buf.len() as u64) {
            Ok(bounce) => bounce,
            Err(error) => return (Err(error), buf),
        };
        let window = buf.window();
        let mut at = 0;
        while at < window.len() {
            let len = (window.len() - at).min(BOUNCE as usize);
            bounce.set_window(0..len);
            buf.set_window(window.start + at..window.start + at + len);
            bounce.as_mut_slice().copy_from_slice(buf.as_slice());
            let result;
            (result, bounce) = Box::pin(self.write(offset + at as u64, bounce)).await;
            if let Err(error) = result {
                buf.set_window(window);
                return (Err(error), buf);
            }
            at += len;
        }
        buf.set_window(window);
        (Ok(()), buf)
    }

    /// Writes a range that begins or ends within a sector.
    async fn modify(&self, offset: u64, buf: &mut Buf) -> Result<()> {
        let end = end_of(offset, buf)?;
        let page = |n: u64| n / PAGE as u64 * PAGE as u64;
        let pages = page(self.down(offset))..page(self.up(end).saturating_add(PAGE as u64 - 1));
        let _modifying = match &self.0.gate {
            Some(gate) => Some(gate.modify(pages.start, pages.end - pages.start).await),
            None => None,
        };
        let cut = self.direct_until(offset, end);
        let mut bounce = self.bounce_for(offset, end)?;
        let mut at = offset;
        while at < end {
            let last = if at < cut { cut } else { end };
            let piece = at..last.min(self.down(at) + BOUNCE);
            let from = (at - offset) as usize..(piece.end - offset) as usize;
            let data = &buf.as_slice()[from];
            bounce = if at < cut {
                self.modify_piece(piece.clone(), data, bounce).await?
            } else {
                self.write_end(at, data, bounce).await?
            };
            at = piece.end;
        }
        Ok(())
    }

    /// Up to where a write of `offset..end` can go by whole sectors: its end, or the beginning of its last sector if
    /// the whole of that would make the file longer than it is or the request makes it.
    fn direct_until(&self, offset: u64, end: u64) -> u64 {
        if self.is_device() || self.up(end) <= self.size().max(end) {
            end
        } else {
            self.down(end).max(offset)
        }
    }

    async fn modify_piece(&self, piece: Range<u64>, data: &[u8], mut bounce: Buf) -> Result<Buf> {
        let sectors = self.around(&piece);
        let align = u64::from(self.0.align.offset);
        let len = (sectors.end - sectors.start) as usize;
        if sectors.start < piece.start {
            let first = sectors.start..sectors.start + align;
            bounce.set_window(0..align as usize);
            bounce = self.read_window(first.start, bounce).await?;
        }
        let last = sectors.end - align;
        if piece.end < sectors.end && (last > sectors.start || sectors.start == piece.start) {
            bounce.set_window(len - align as usize..len);
            bounce = self.read_window(last, bounce).await?;
        }
        bounce.set_window(0..len);
        let skip = (piece.start - sectors.start) as usize;
        bounce.as_mut_slice()[skip..skip + data.len()].copy_from_slice(data);
        let (result, bounce) = self.write_through(sectors.start, bounce).await;
        result.map(|()| bounce)
    }

    /// Writes exactly these bytes through the page cache.
    async fn write_end(&self, offset: u64, data: &[u8], mut bounce: Buf) -> Result<Buf> {
        let fd = self.buffered()?;
        let mut done = 0;
        while done < data.len() {
            bounce.set_window(0..data.len() - done);
            bounce.as_mut_slice().copy_from_slice(&data[done..]);
            let at = offset + done as u64;
            let answer;
            (answer, bounce) = write_at(fd, bounce, at).await;
            done += match answer {
                Ok(0) => return Err(self.at_end(at, std::io::Error::from_raw_os_error(libc::EIO))),
                Ok(n) => n,
                Err(error) => return Err(self.at_end(at, error)),
            };
        }
        self.written_to(offset + data.len() as u64);
        Ok(bounce)
    }

    fn at_end(&self, at: u64, error: std::io::Error) -> Error {
        Error::os(format!("write the end of '{}' at {at}", self.path()), error)
    }

    async fn read_sectors(&self, sectors: Range<u64>, mut bounce: Buf) -> Result<Buf> {
        bounce.set_window(0..(sectors.end - sectors.start) as usize);
        self.read_window(sectors.start, bounce).await
    }

    async fn read_window(&self, offset: u64, bounce: Buf) -> Result<Buf> {
        // Aligned, so this does not come back here.
        let (result, bounce) = Box::pin(self.read(offset, bounce)).await;
        result.map(|()| bounce)
    }

    /// A buffer for the sectors of one piece of a request.
    fn bounce_for(&self, offset: u64, end: u64) -> Result<Buf> {
        let len = (self.up(end) - self.down(offset)).min(BOUNCE);
        Buf::new(len as usize).map_err(|e| Error::os(format!("a bounce buffer of {len} bytes"), e))
    }

    fn down(&self, n: u64) -> u64 {
        n & !u64::from(self.0.align.offset - 1)
    }

    fn up(&self, n: u64) -> u64 {
        self.down(n.saturating_add(u64::from(self.0.align.offset - 1)))
    }

    fn around(&self, piece: &Range<u64>) -> Range<u64> {
        self.down(piece.start)..self.up(piece.end)
    }
}

/// The end of a request that the host can express at all.
fn end_of(offset: u64, buf: &Buf) -> Result<u64> {
    // The kernel counts in signed numbers.
    let limit = i64::MAX.cast_unsigned() - (1 << 20);
    crate::check_range(limit, offset, buf.len() as u64)?;
    Ok(offset + buf.len() as u64)
}
