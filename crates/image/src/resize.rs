//! Changing the size of a disk. It never throws data away unless told to.

use diskfuse_block::{Error, Kind, Node, Resize, Result, io};
use diskfuse_ring::Buf;

use crate::preallocation::Preallocation;
use crate::session::Session;

/// A size as it is written: absolute, or how much more or less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    Exactly(u64),
    /// So many more.
    More(u64),
    /// So many less.
    Less(u64),
}

impl NewSize {
    /// In bytes, from the present size; rounded up to whole sectors.
    pub fn from(self, now: u64) -> Result<u64> {
        let size = match self {
            Self::Exactly(size) => Some(size),
            Self::More(more) => now.checked_add(more),
            Self::Less(less) => now.checked_sub(less),
        };
        size.and_then(|size| size.checked_next_multiple_of(diskfuse_block::SECTOR))
            .filter(|&size| i64::try_from(size).is_ok())
            .ok_or_else(|| {
                let message = format!("a disk of {now} bytes cannot be changed by so much");
                Error::new(Kind::Invalid, message)
            })
    }
}

/// Changes the size of an open, writable image, which is closed by whoever opened it. Returns the old size and the new
/// one, in bytes.
///
/// # Errors
/// [`Kind::Invalid`] if it would shrink and `shrink` is not set, or the format knows no such preallocation; those of the
/// disk.
pub async fn resize(
    image: &Session,
    size: NewSize,
    shrink: bool,
    preallocation: Preallocation,
) -> Result<(u64, u64)> {
    let node = image.node();
    let old = node.size();
    let new = size.from(old)?;
    if new < old && !shrink {
        let message = format!(
            "shrinking the disk from {old} to {new} bytes deletes all data beyond the new end; say --shrink if that is \
             meant"
        );
        return Err(Error::new(Kind::Invalid, message));
    }
    if new < old && preallocation != Preallocation::Off {
        let message = "preallocation is for disks that grow";
        return Err(Error::new(Kind::Invalid, message));
    }
    preallocation.check(image.format())?;
    let preallocate = preallocation != Preallocation::Off;
    node.resize(new, Resize::Exactly, preallocate).await?;
    if preallocation == Preallocation::Full {
        write_zeroes(&**node, old, new).await?;
    }
    node.flush().await?;
    Ok((old, new))
}

/// Really writes them, so that the space is not only reserved.
pub(crate) async fn write_zeroes(node: &dyn Node, start: u64, end: u64) -> Result<()> {
    const PIECE: u64 = 2 << 20;
    let room = usize::try_from(PIECE).unwrap_or(usize::MAX);
    let mut buf = Buf::new(room).map_err(|error| Error::os("get memory", error))?;
    let mut at = start;
    while at < end {
        let len = (end - at).min(PIECE - at % PIECE);
        buf.set_window(0..usize::try_from(len).unwrap_or(room));
        let result;
        (result, buf) = io::write(node, at, buf).await;
        result?;
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_relative_or_absolute_and_whole_sectors() {
        assert_eq!(NewSize::Exactly(1000).from(0).unwrap(), 1024);
        assert_eq!(NewSize::More(512).from(1024).unwrap(), 1536);
        assert_eq!(NewSize::Less(512).from(1024).unwrap(), 512);
        assert!(NewSize::Less(2048).from(1024).is_err());
        assert!(NewSize::More(u64::MAX).from(1024).is_err());
        assert!(NewSize::Exactly(u64::MAX - 600).from(1024).is_err());
    }
}
