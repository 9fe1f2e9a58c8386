//! READ, WRITE, FLUSH, FSYNC: the hot path. Nothing here allocates or locks for a range that the node resolves.

use diskfuse_block::{Access, Extent, Resize, SECTOR, io};

use super::{Answer, disk_error};
use crate::abi::WriteOut;
use crate::file::Local;
use crate::queue::Queue;
use crate::request::Operation;
use crate::shared::bump;
use crate::slot::SlotBuf;

/// Reads are short at the end of the disk, and empty past it.
pub(super) async fn read(
    queue: &Queue,
    file: &Local,
    slot: &mut SlotBuf,
    offset: u64,
    size: u32,
) -> Answer {
    let node = file.node();
    let node = &**node;
    let left = node.size().saturating_sub(offset);
    let len = u64::from(size).min(slot.size() as u64).min(left);
    let bytes = len as usize;
    if len == 0 {
        return Ok(0);
    }
    let whole = |l: u64| l == len;
    let (result, buf) = match node.resolve(Access::Read, offset, len) {
        Extent::Void { len: l } if whole(l) => return Ok(read_void(queue, slot, len)),
        Extent::Host {
            file,
            offset,
            len: l,
            hold: _hold,
        } if whole(l) => file.read(offset, slot.take_for_data(bytes)).await,
        _ => io::read(node, offset, slot.take_for_data(bytes)).await,
    };
    slot.put(buf);
    slot.dirty(bytes);
    result.map_err(|e| disk_error(queue, &e))?;
    count_read(queue, len);
    Ok(bytes)
}

fn count_read(queue: &Queue, len: u64) {
    bump(&queue.lane().reads, 1);
    bump(&queue.lane().read_bytes, len);
}

/// Writes over the end are short, or grow a growable disk; at or past the end of a fixed one they meet ENOSPC, as on
/// a block device.
pub(super) async fn write(
    queue: &Queue,
    shown: &Local,
    slot: &mut SlotBuf,
    offset: u64,
    size: u32,
) -> Answer {
    if !shown.file.writable {
        return Err(libc::EROFS);
    }
    let len = fit(queue, shown, offset, u64::from(size)).await?;
    if len > 0 {
        let node = shown.node();
        let node = &**node;
        let bytes = len as usize;
        let whole = |l: u64| l == len;
        let (result, buf) = match node.resolve(Access::Write, offset, len) {
            Extent::Void { len: l } if whole(l) => {
                return Ok(wrote(queue, shown, slot, offset, len));
            }
            Extent::Host {
                file,
                offset,
                len: l,
                hold: _hold,
            } if whole(l) => file.write(offset, slot.take_for_data(bytes)).await,
            _ => io::write(node, offset, slot.take_for_data(bytes)).await,
        };
        slot.put(buf);
        result.map_err(|e| disk_error(queue, &e))?;
    }
    Ok(wrote(queue, shown, slot, offset, len))
}

/// The answer to a read of `len` bytes where there is nothing.
fn read_void(queue: &Queue, slot: &mut SlotBuf, len: u64) -> usize {
    slot.zero(len as usize);
    queue.found_void(true);
    count_read(queue, len);
    len as usize
}

/// The answer to a write at `offset` of which `len` bytes are done.
fn wrote(queue: &Queue, file: &Local, slot: &mut SlotBuf, offset: u64, len: u64) -> usize {
    if len > 0 {
        file.file.wrote(offset, len);
    }
    bump(&queue.lane().writes, 1);
    bump(&queue.lane().written_bytes, len);
    slot.put_struct(&WriteOut {
        size: len as u32,
        padding: 0,
    })
}

/// Does what takes no waiting: reads and writes where there is nothing. `None`, and nothing is done, if it is not that.
pub(super) fn at_once(
    queue: &Queue,
    file: &Local,
    slot: &mut SlotBuf,
    operation: &Operation,
) -> Option<Answer> {
    let node = file.node();
    let (access, offset, size) = match *operation {
        Operation::Read { offset, size } => (Access::Read, offset, size),
        Operation::Write { offset, size } if file.file.writable => (Access::Write, offset, size),
        _ => return None,
    };
    let len = u64::from(size);
    let fits = offset.checked_add(len)? <= node.size() && len <= slot.size() as u64;
    if len == 0 || !fits {
        return None;
    }
    match (node.resolve(access, offset, len), access) {
        (Extent::Void { len: l }, Access::Read) if l == len => {
            Some(Ok(read_void(queue, slot, len)))
        }
        (Extent::Void { len: l }, Access::Write) if l == len => {
            queue.found_void(true);
            Some(Ok(wrote(queue, file, slot, offset, len)))
        }
        _ => {
            queue.found_void(false);
            None
        }
    }
}

/// How much of a write at `offset` fits, after growing the disk if that is allowed.
async fn fit(queue: &Queue, file: &Local, offset: u64, size: u64) -> Result<u64, i32> {
    let node = file.node();
    let disk = node.size();
    let end = offset.checked_add(size).ok_or(libc::EFBIG)?;
    if end <= disk || size == 0 {
        return Ok(size);
    }
    if file.file.growable {
        let grown = end.checked_next_multiple_of(SECTOR).ok_or(libc::EFBIG)?;
        let resized = super::resize(file, grown, Resize::AtLeast, false).await;
        resized.map_err(|e| disk_error(queue, &e))?;
        return Ok(size);
    }
    if offset >= disk {
        Err(libc::ENOSPC)
    } else {
        Ok(disk - offset)
    }
}

/// Everything that was answered before is on stable storage when this is answered. `closed` if the file is being closed: then,
/// or now, a tree may have to look different.
pub(super) async fn flush(queue: &Queue, file: &Local, closed: bool) -> Answer {
    let shown = &*file.file;
    if shown.writable {
        let flushed = file.node().flush().await;
        flushed.map_err(|e| disk_error(queue, &e))?;
    }
    bump(&queue.lane().flushes, 1);
    if let Some(watch) = &shown.watch
        && watch.is_due(closed)
        && let Some(tree) = queue.shared.content.tree()
    {
        tree.refresh().await;
    }
    Ok(0)
}
