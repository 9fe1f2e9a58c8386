//! Copying a range from one node to the same place of another, with as little written as can be. It must never skip a zero
//! that the target may not show.

use std::ops::Range;

use diskfuse_block::{DirtyBitmap, Error, Node, Result, Zeroes, io};
use diskfuse_ring::Buf;

use crate::event::Operation;

/// Bytes of one read and write at most. With [`WORKERS`] it is what stands in the disk's queue in front of a guest's request: eight
/// pieces of 512 KiB made its p99 five to ten times as long, and the job hardly faster (docs/BENCHMARKS.md).
pub(crate) const PIECE: u64 = 128 << 10;
/// Pieces of a job that are in flight at most.
pub(crate) const WORKERS: usize = 4;
/// Stretches of a target that are looked at before it is taken for one that holds something.
const LOOKS: usize = 4096;

/// An error, and on which side.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) operation: Operation,
    pub(crate) error: Error,
}

/// How copying ended.
pub(crate) type Copied = std::result::Result<(), Failure>;

impl Failure {
    pub(crate) fn read(error: Error) -> Self {
        let operation = Operation::Read;
        Self { operation, error }
    }

    pub(crate) fn write(error: Error) -> Self {
        let operation = Operation::Write;
        Self { operation, error }
    }
}

/// Memory for one piece, mapped when it is first needed and kept.
#[derive(Default)]
pub(crate) struct Bounce(Option<Buf>);

impl Bounce {
    fn take(&mut self, len: u64) -> Result<Buf> {
        let len = len as usize;
        let buf = match self.0.take() {
            Some(buf) if buf.capacity() >= len => buf,
            _ => Buf::new(len.max(PIECE as usize)).map_err(|e| Error::os("get memory", e))?,
        };
        Ok(buf.with_window(0..len))
    }
}

/// What is known of what the target holds.
#[derive(Clone, Copy)]
pub(crate) enum Holds<'a> {
    /// Nothing.
    Anything,
    /// Zeroes where it was not copied to, and each place is copied to once.
    Zeroes,
    /// Zeroes, but for what is marked here.
    ZeroesBut(&'a DirtyBitmap),
}

/// Makes a range of the target show what the source shows. After an error some of it may.
pub(crate) async fn copy(
    source: &dyn Node,
    target: &dyn Node,
    range: Range<u64>,
    bounce: &mut Bounce,
    holds: Holds<'_>,
) -> Copied {
    let mut at = range.start;
    while at < range.end {
        let most = (range.end - at).min(PIECE);
        let (len, zero) = stretch(source, at, most).await.map_err(Failure::read)?;
        match zero {
            true => write_zeroes(target, at, len, holds).await?,
            false => {
                if let Holds::ZeroesBut(written) = holds {
                    written.mark(at, len);
                }
                let buf = bounce.take(len).map_err(Failure::read)?;
                let (result, buf) = move_piece(source, target, at, buf, false).await;
                bounce.0 = Some(buf);
                result?;
            }
        }
        at += len;
    }
    Ok(())
}

/// [`copy`] of whole units of `unit` bytes, a power of two, which the target keeps compressed.
pub(crate) async fn copy_compressed(
    source: &dyn Node,
    target: &dyn Node,
    range: Range<u64>,
    unit: u64,
    bounce: &mut Bounce,
    holds: Holds<'_>,
) -> Copied {
    let mut at = range.start;
    while at < range.end {
        let most = (range.end - at).min(PIECE.max(unit));
        let (len, zero) = stretch(source, at, most).await.map_err(Failure::read)?;
        // A unit is zero as a whole or data as a whole.
        let zeroes = if len == most { len } else { len / unit * unit };
        let len = match zero && zeroes > 0 {
            true => {
                write_zeroes(target, at, zeroes, holds).await?;
                zeroes
            }
            false => {
                let len = len.next_multiple_of(unit).min(most);
                let buf = bounce.take(len).map_err(Failure::read)?;
                let (result, buf) = move_piece(source, target, at, buf, true).await;
                bounce.0 = Some(buf);
                result?;
                len
            }
        };
        at += len;
    }
    Ok(())
}

async fn move_piece(
    source: &dyn Node,
    target: &dyn Node,
    at: u64,
    buf: Buf,
    compressed: bool,
) -> (Copied, Buf) {
    let (read, buf) = io::read(source, at, buf).await;
    if let Err(error) = read {
        return (Err(Failure::read(error)), buf);
    }
    let (written, buf) = match compressed {
        true => target.write_compressed(at, buf).await,
        false => io::write(target, at, buf).await,
    };
    (written.map_err(Failure::write), buf)
}

async fn write_zeroes(target: &dyn Node, at: u64, len: u64, holds: Holds<'_>) -> Copied {
    let needed = match holds {
        Holds::Anything => true,
        Holds::Zeroes => false,
        Holds::ZeroesBut(written) => written.is_dirty(at, len),
    };
    if needed {
        // The target may be put on something else than it stands on now.
        let written = target.write_zeroes(at, len, Zeroes::Held).await;
        written.map_err(Failure::write)?;
    }
    Ok(())
}

/// How far from `at` on, `most` bytes at most, the source is all known to be zero, or is not.
pub(crate) async fn stretch(source: &dyn Node, at: u64, most: u64) -> Result<(u64, bool)> {
    let first = source.block_status(at, most).await?;
    let mut len = first.len.clamp(1, most);
    while len < most {
        let next = source.block_status(at + len, most - len).await?;
        if next.zero != first.zero {
            break;
        }
        len += next.len.clamp(1, most - len);
    }
    Ok((len, first.zero))
}

/// Whether a node is known to show nothing but zeroes.
pub(crate) async fn is_zero(node: &dyn Node) -> Result<bool> {
    let mut at = 0;
    for _ in 0..LOOKS {
        let left = node.size().saturating_sub(at);
        if left == 0 {
            return Ok(true);
        }
        let status = node.block_status(at, left).await?;
        if !status.zero {
            return Ok(false);
        }
        at += status.len.max(1);
    }
    Ok(false)
}
