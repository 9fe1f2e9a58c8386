//! Pieces of a disk in memory, read when somebody wants them: parsers that cannot wait look at what is there, and what they
//! miss is read before they begin again. It never holds more than a bounded number of pieces.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::Range;

use diskfuse_block::{Error, Kind, Node, Result, io as block_io};
use diskfuse_ring::Buf;

/// Bytes of a piece.
const PIECE: u64 = 4096;

/// Pieces at most: 16 MiB. Tables of the largest size that is read, and one piece for each of the most partitions.
const MOST_PIECES: usize = 4096;

/// Where a parser looked and nothing was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lacking {
    /// It has to be read first.
    Unread,
    /// The disk ends before it.
    PastEnd,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Blocks {
    /// Bytes of the disk.
    size: u64,
    pieces: BTreeMap<u64, Vec<u8>>,
    /// The first piece that somebody missed.
    missed: Cell<Option<u64>>,
}

impl Blocks {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            pieces: BTreeMap::new(),
            missed: Cell::new(None),
        }
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// `N` bytes from `offset` on.
    pub(crate) fn get<const N: usize>(&self, offset: u64) -> std::result::Result<[u8; N], Lacking> {
        let mut bytes = [0; N];
        let end = offset.checked_add(N as u64).filter(|&end| end <= self.size);
        end.ok_or(Lacking::PastEnd)?;
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..)
            && !rest.is_empty()
        {
            done += self.copy(offset + done as u64, rest)?;
        }
        Ok(bytes)
    }

    /// Copies what is there from `offset` on, as far as one piece goes; the number of bytes is not zero.
    fn copy(&self, offset: u64, to: &mut [u8]) -> std::result::Result<usize, Lacking> {
        let index = offset / PIECE;
        let Some(piece) = self.pieces.get(&index) else {
            if self.missed.get().is_none() {
                self.missed.set(Some(index));
            }
            return Err(Lacking::Unread);
        };
        let from = (offset % PIECE) as usize;
        let there = piece.get(from..).unwrap_or_default();
        let len = there.len().min(to.len());
        match (there.get(..len), to.get_mut(..len)) {
            (Some(there), Some(to)) if len > 0 => to.copy_from_slice(there),
            _ => return Err(Lacking::PastEnd),
        }
        Ok(len)
    }

    /// Reads what covers a range, as far as the disk goes.
    pub(crate) async fn load(&mut self, node: &dyn Node, range: Range<u64>) -> Result<()> {
        let end = range.end.min(self.size).div_ceil(PIECE);
        for index in range.start / PIECE..end {
            if !self.pieces.contains_key(&index) {
                self.load_piece(node, index).await?;
            }
        }
        Ok(())
    }

    async fn load_piece(&mut self, node: &dyn Node, index: u64) -> Result<()> {
        if self.pieces.len() >= MOST_PIECES {
            let message = "the partition table is spread over more places than are looked at";
            return Err(Error::new(Kind::Invalid, message));
        }
        let offset = index * PIECE;
        let len = PIECE.min(self.size.saturating_sub(offset)) as usize;
        let buf = Buf::new(PIECE as usize).map_err(|error| Error::os("get memory", error))?;
        let (read, buf) = block_io::read(node, offset, buf.with_window(0..len)).await;
        read?;
        self.pieces.insert(index, buf.as_slice().to_vec());
        Ok(())
    }

    /// Reads what was missed first. False if nothing was.
    pub(crate) async fn load_missed(&mut self, node: &dyn Node) -> Result<bool> {
        match self.missed.take() {
            None => Ok(false),
            Some(index) => {
                self.load_piece(node, index).await?;
                Ok(true)
            }
        }
    }
}

/// The same bytes as a file, for a crate that wants one. Some sectors can be hidden: they read as zeroes.
#[derive(Debug)]
pub(crate) struct View<'b> {
    blocks: &'b Blocks,
    position: u64,
    hidden: Vec<Range<u64>>,
}

impl<'b> View<'b> {
    pub(crate) fn new(blocks: &'b Blocks, hidden: Vec<Range<u64>>) -> Self {
        Self {
            blocks,
            position: 0,
            hidden,
        }
    }
}

impl Read for View<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.blocks.size.saturating_sub(self.position);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let Some(to) = buf.get_mut(..len).filter(|to| !to.is_empty()) else {
            return Ok(0);
        };
        let copied = self.blocks.copy(self.position, to);
        let len = copied.map_err(|_| io::Error::other("not read yet"))?;
        for (byte, at) in to.iter_mut().zip(self.position..).take(len) {
            if self.hidden.iter().any(|hidden| hidden.contains(&at)) {
                *byte = 0;
            }
        }
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for View<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.blocks.size.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

/// The crate `gpt` wants it, and is never asked to write.
impl Write for View<'_> {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
