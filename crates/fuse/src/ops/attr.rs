//! GETATTR, SETATTR, OPEN: the exported file as stat(2), chmod(2), truncate(2) and open(2) see it.

use diskfuse_block::{Access, Resize};

use super::{Answer, disk_error};
use crate::abi::{AttrOut, OpenOut, fattr, fopen};
use crate::attributes::nanoseconds;
use crate::file::Local;
use crate::passthrough::Backing;
use crate::queue::Queue;
use crate::request::Setattr;
use crate::slot::SlotBuf;

/// Seconds for which the kernel may show attributes without asking. It asks again by itself after a write of its
/// own; another export of the node can change them unseen for this long.
pub(super) const ATTRIBUTES_VALID: u64 = 1;

pub(super) fn getattr(file: &Local, slot: &mut SlotBuf) -> usize {
    let node = file.node();
    let attr = file.file.attributes.attr(node.size(), node.allocated());
    slot.put_struct(&AttrOut {
        attr_valid: ATTRIBUTES_VALID,
        attr,
        ..AttrOut::default()
    })
}

/// Size, mode, times, and with allow-other the owner. Everything is checked before anything is changed.
pub(super) async fn setattr(
    queue: &Queue,
    file: &Local,
    slot: &mut SlotBuf,
    change: &Setattr,
) -> Answer {
    const SERVED: u32 = fattr::MODE
        | fattr::UID
        | fattr::GID
        | fattr::SIZE
        | fattr::ATIME
        | fattr::MTIME
        | fattr::ATIME_NOW
        | fattr::MTIME_NOW
        | fattr::CTIME
        // These name a handle and a lock owner, or ask for bits to go that are never set; nothing is to be done.
        | fattr::FH
        | fattr::LOCKOWNER
        | fattr::KILL_SUIDGID;
    let shared = &*queue.shared;
    let has = |bits: u32| change.valid & bits != 0;
    let others = shared
        .others_allowed
        .load(std::sync::atomic::Ordering::Relaxed);
    if has(!SERVED) || (has(fattr::UID | fattr::GID) && !others) {
        return Err(libc::EOPNOTSUPP);
    }
    if has(fattr::MODE) {
        if !file.file.writable && change.mode & 0o222 != 0 {
            return Err(libc::EROFS);
        }
        if !others && change.mode & 0o077 != 0 {
            return Err(libc::EPERM);
        }
    }
    if has(fattr::SIZE) {
        truncate(queue, file, change.size).await?;
    }
    let attributes = &file.file.attributes;
    if has(fattr::MODE) {
        attributes.set_mode(change.mode);
    }
    if has(fattr::UID) {
        attributes.set_uid(change.uid);
    }
    if has(fattr::GID) {
        attributes.set_gid(change.gid);
    }
    if has(fattr::ATIME | fattr::ATIME_NOW) {
        attributes.set_accessed((!has(fattr::ATIME_NOW)).then(|| nanoseconds(change.atime)));
    }
    if has(fattr::MTIME | fattr::MTIME_NOW) {
        attributes.set_modified((!has(fattr::MTIME_NOW)).then(|| nanoseconds(change.mtime)));
    }
    Ok(getattr(file, slot))
}

async fn truncate(queue: &Queue, file: &Local, size: u64) -> Result<(), i32> {
    if !file.file.writable {
        return Err(libc::EROFS);
    }
    // The sizes of off_t; past them a host file cannot go.
    if i64::try_from(size).is_err() {
        return Err(libc::EFBIG);
    }
    let node = file.node();
    if !size.is_multiple_of(u64::from(node.limits().size_alignment)) {
        return Err(libc::EINVAL);
    }
    let resized = super::resize(file, size, Resize::Exactly, false).await;
    resized.map_err(|e| disk_error(queue, Access::Write, &e))?;
    file.file.wrote(0, 0);
    Ok(())
}

/// Direct I/O with parallel writes. O_TRUNC is ignored on a disk of fixed size, as on a block device, so that
/// `cat image > export` works.
pub(super) async fn open(queue: &Queue, file: &Local, slot: &mut SlotBuf, flags: u32) -> Answer {
    let mode = flags & libc::O_ACCMODE as u32;
    if !file.file.writable && mode != libc::O_RDONLY as u32 {
        return Err(libc::EACCES);
    }
    if !file.file.opened() {
        // The kernel remembered a name that is gone.
        return Err(libc::ESTALE);
    }
    if file.file.growable
        && flags & libc::O_TRUNC as u32 != 0
        && let Err(errno) = truncate(queue, file, 0).await
    {
        super::names::release(queue, file).await;
        return Err(errno);
    }
    if let Some(id) = queue.shared.backing.get().and_then(Backing::id) {
        return Ok(slot.put_struct(&OpenOut {
            open_flags: fopen::PASSTHROUGH,
            backing_id: id,
            ..OpenOut::default()
        }));
    }
    Ok(slot.put_struct(&OpenOut {
        open_flags: fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
        ..OpenOut::default()
    }))
}
