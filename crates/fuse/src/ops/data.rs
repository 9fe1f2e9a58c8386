//! READ, WRITE, FLUSH, FSYNC: the hot path. Nothing here allocates or locks for a range that the node resolves.

use diskfuse_block::{Access, Extent, Resize, SECTOR, io};
use zerocopy::IntoBytes;

use super::{Answer, disk_error};
use crate::abi::WriteOut;
use crate::queue::Queue;
use crate::shared::bump;
use crate::slot::SlotBuf;

/// Reads are short at the end of the disk, and empty past it.
pub(super) async fn read(queue: &Queue, slot: &mut SlotBuf, offset: u64, size: u32) -> Answer {
    let node = &*queue.shared.node;
    let left = node.size().saturating_sub(offset);
    let len = u64::from(size).min(slot.size() as u64).min(left);
    let bytes = len as usize;
    if len == 0 {
        return Ok(0);
    }
    let whole = |l: u64| l == len;
    let (result, buf) = match node.resolve(Access::Read, offset, len) {
        Extent::Void { len: l } if whole(l) => {
            slot.zero(bytes);
            count_read(queue, len);
            return Ok(bytes);
        }
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
pub(super) async fn write(queue: &Queue, slot: &mut SlotBuf, offset: u64, size: u32) -> Answer {
    let shared = &*queue.shared;
    if !shared.options.writable {
        return Err(libc::EROFS);
    }
    let len = fit(queue, offset, u64::from(size)).await?;
    if len > 0 {
        let node = &*shared.node;
        let bytes = len as usize;
        let whole = |l: u64| l == len;
        let (result, buf) = match node.resolve(Access::Write, offset, len) {
            Extent::Void { len: l } if whole(l) => (Ok(()), slot.take_for_data(bytes)),
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
        shared.attributes.mark_written();
    }
    bump(&queue.lane().writes, 1);
    bump(&queue.lane().written_bytes, len);
    let out = WriteOut {
        size: len as u32,
        padding: 0,
    };
    debug_assert_eq!(out.as_bytes().len(), 8);
    Ok(slot.put_struct(&out))
}

/// How much of a write at `offset` fits, after growing the disk if that is allowed.
async fn fit(queue: &Queue, offset: u64, size: u64) -> Result<u64, i32> {
    let shared = &*queue.shared;
    let disk = shared.node.size();
    let end = offset.checked_add(size).ok_or(libc::EFBIG)?;
    if end <= disk || size == 0 {
        return Ok(size);
    }
    if shared.options.growable {
        let grown = end.checked_next_multiple_of(SECTOR).ok_or(libc::EFBIG)?;
        let resized = shared.node.resize(grown, Resize::AtLeast, false).await;
        resized.map_err(|e| disk_error(queue, &e))?;
        return Ok(size);
    }
    if offset >= disk {
        Err(libc::ENOSPC)
    } else {
        Ok(disk - offset)
    }
}

/// Everything that was answered before is on stable storage when this is answered.
pub(super) async fn flush(queue: &Queue) -> Answer {
    let shared = &*queue.shared;
    if shared.options.writable {
        shared
            .node
            .flush()
            .await
            .map_err(|e| disk_error(queue, &e))?;
    }
    bump(&queue.lane().flushes, 1);
    Ok(0)
}
