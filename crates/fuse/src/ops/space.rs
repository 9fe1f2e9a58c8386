//! FALLOCATE and LSEEK: what is allocated, and where data is.

use diskfuse_block::{Resize, SECTOR, Zeroes};

use super::{Answer, disk_error};
use crate::abi::LseekOut;
use crate::file::Local;
use crate::queue::Queue;
use crate::slot::SlotBuf;

const KEEP_SIZE: u32 = libc::FALLOC_FL_KEEP_SIZE as u32;
const PUNCH_HOLE: u32 = libc::FALLOC_FL_PUNCH_HOLE as u32;
const ZERO_RANGE: u32 = libc::FALLOC_FL_ZERO_RANGE as u32;

/// Mode 0 extends at or past the end; PUNCH_HOLE | KEEP_SIZE discards; ZERO_RANGE zeroes, and without KEEP_SIZE it
/// grows any writable export. Everything else is EOPNOTSUPP.
pub(super) async fn fallocate(
    queue: &Queue,
    file: &Local,
    mode: u32,
    offset: u64,
    length: u64,
) -> Answer {
    if !file.file.writable {
        return Err(libc::EROFS);
    }
    let disk = file.node().size();
    let end = offset.checked_add(length).ok_or(libc::EFBIG)?;
    match mode {
        // Inside the file a block device has nothing to preallocate.
        0 if offset < disk => return Err(libc::EOPNOTSUPP),
        0 => grow(queue, file, end, true).await?,
        _ if mode == PUNCH_HOLE | KEEP_SIZE => {
            zero(queue, file, offset, length, Zeroes::MayUnmap).await?;
        }
        _ if mode == ZERO_RANGE | KEEP_SIZE => {
            zero(queue, file, offset, length, Zeroes::Keep).await?;
        }
        ZERO_RANGE => {
            if end > disk {
                grow(queue, file, end, false).await?;
            }
            zero(queue, file, offset, length, Zeroes::Keep).await?;
        }
        _ => return Err(libc::EOPNOTSUPP),
    }
    file.file.wrote(offset, length);
    Ok(0)
}

async fn grow(queue: &Queue, file: &Local, end: u64, preallocate: bool) -> Result<(), i32> {
    let size = end.checked_next_multiple_of(SECTOR).ok_or(libc::EFBIG)?;
    let grown = super::resize(file, size, Resize::AtLeast, preallocate).await;
    grown.map_err(|e| disk_error(queue, &e))
}

/// Zeroes a range, clipped at the end of the disk.
async fn zero(
    queue: &Queue,
    file: &Local,
    offset: u64,
    length: u64,
    how: Zeroes,
) -> Result<(), i32> {
    let node = file.node();
    let len = length.min(node.size().saturating_sub(offset));
    if len == 0 {
        return Ok(());
    }
    let zeroed = node.write_zeroes(offset, len, how).await;
    zeroed.map_err(|e| disk_error(queue, &e))
}

/// SEEK_DATA and SEEK_HOLE, as lseek(2) has them; the kernel does the others itself.
pub(super) async fn lseek(
    queue: &Queue,
    file: &Local,
    slot: &mut SlotBuf,
    offset: u64,
    whence: u32,
) -> Answer {
    let node = file.node();
    let looks_for_data = match whence as i32 {
        libc::SEEK_DATA => true,
        libc::SEEK_HOLE => false,
        _ => return Err(libc::EINVAL),
    };
    let disk = node.size();
    if offset > disk || (offset == disk && looks_for_data) {
        return Err(libc::ENXIO);
    }
    let mut at = offset;
    while at < disk {
        let status = node
            .block_status(at, disk - at)
            .await
            .map_err(|e| disk_error(queue, &e))?;
        if status.zero != looks_for_data {
            return Ok(slot.put_struct(&LseekOut { offset: at }));
        }
        at += status.len.max(1);
    }
    if looks_for_data {
        return Err(libc::ENXIO);
    }
    // The end of the disk is a hole.
    Ok(slot.put_struct(&LseekOut { offset: disk }))
}
