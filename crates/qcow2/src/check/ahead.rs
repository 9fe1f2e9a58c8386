//! Reading many pieces of a file in order, several in flight at once. It must never keep more in memory than
//! [`IN_FLIGHT`] bytes and one piece.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use diskfuse_block::{Error, LocalFuture, Node, Result, io};
use diskfuse_ring::Buf;

/// Bytes that may be read ahead.
const IN_FLIGHT: u64 = 8 << 20;

/// Bytes of a piece that is made of smaller ones which lie side by side.
pub(crate) const PIECE: u64 = 1 << 20;

/// A part of the file to be read at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where, in bytes.
    pub(crate) offset: u64,
    /// How many bytes.
    pub(crate) len: u64,
    /// What it is for: the number of the first thing in it, as the caller counts.
    pub(crate) first: usize,
}

/// Joins things of `len` bytes at `offsets` where they lie side by side, up to [`PIECE`] bytes.
pub(crate) fn join(offsets: impl Iterator<Item = u64>, len: u64) -> impl Iterator<Item = Piece> {
    let mut offsets = offsets.enumerate().peekable();
    std::iter::from_fn(move || {
        let (first, offset) = offsets.next()?;
        let mut piece = Piece { offset, len, first };
        while piece.len + len <= PIECE
            && let Some((_, next)) = offsets.next_if(|&(_, next)| next == offset + piece.len)
        {
            debug_assert_eq!(next, offset + piece.len);
            piece.len += len;
        }
        Some(piece)
    })
}

/// Cuts `len` bytes at `offset` into pieces; `first` of a piece is the byte of the range that it begins with.
pub(crate) fn cut(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
    (0..len.div_ceil(PIECE)).map(move |number| {
        let from = number * PIECE;
        Piece {
            offset: offset.saturating_add(from),
            len: PIECE.min(len - from),
            first: from as usize,
        }
    })
}

/// Reads `len` bytes at `offset`; what is past the end of the file is zero.
pub(crate) async fn read(file: &dyn Node, offset: u64, len: u64) -> Result<Buf> {
    let size = usize::try_from(len).unwrap_or(usize::MAX);
    let mut buf = Buf::new(size).map_err(|e| Error::os(format!("{len} bytes of memory"), e))?;
    let within = file.size().saturating_sub(offset).min(len) as usize;
    if within > 0 {
        buf.set_window(0..within);
        let result;
        (result, buf) = io::read(file, offset, buf).await;
        result?;
    }
    buf.set_window(0..size);
    Ok(buf)
}

enum Slot<'a> {
    Reading(LocalFuture<'a, Result<Buf>>),
    Read(Result<Buf>),
}

/// See the module.
pub(crate) struct Ahead<'a, I> {
    file: &'a dyn Node,
    pieces: I,
    slots: VecDeque<(Piece, Slot<'a>)>,
    bytes: u64,
}

impl<'a, I: Iterator<Item = Piece> + Unpin> Ahead<'a, I> {
    /// Reads `pieces` of the file, in that order.
    pub(crate) fn new(file: &'a dyn Node, pieces: I) -> Self {
        Self {
            file,
            pieces,
            slots: VecDeque::new(),
            bytes: 0,
        }
    }

    /// The next piece; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Result<(Piece, Buf)>> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<(Piece, Buf)>>> {
        while self.bytes < IN_FLIGHT
            && let Some(piece) = self.pieces.next()
        {
            let reading = Box::pin(read(self.file, piece.offset, piece.len));
            self.slots.push_back((piece, Slot::Reading(reading)));
            self.bytes += piece.len;
        }
        for (_, slot) in &mut self.slots {
            if let Slot::Reading(reading) = slot
                && let Poll::Ready(result) = Pin::new(reading).poll(cx)
            {
                *slot = Slot::Read(result);
            }
        }
        match self.slots.pop_front() {
            None => Poll::Ready(None),
            Some((piece, Slot::Read(result))) => {
                self.bytes -= piece.len;
                Poll::Ready(Some(result.map(|buf| (piece, buf))))
            }
            Some(first) => {
                self.slots.push_front(first);
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_together_up_to_a_limit() {
        let size = PIECE / 2;
        let offsets = [0, size, 2 * size, 7 * size];
        let pieces: Vec<_> = join(offsets.into_iter(), size).collect();
        let piece = |offset, len, first| Piece { offset, len, first };
        assert_eq!(
            pieces,
            [
                piece(0, PIECE, 0),
                piece(2 * size, size, 2),
                piece(7 * size, size, 3)
            ]
        );
    }

    #[test]
    fn a_range_is_cut_without_a_gap() {
        let pieces: Vec<_> = cut(512, 2 * PIECE + 8).collect();
        assert_eq!(pieces.len(), 3);
        assert_eq!(pieces.iter().map(|p| p.len).sum::<u64>(), 2 * PIECE + 8);
        assert_eq!(pieces[2].offset, 512 + 2 * PIECE);
    }
}
