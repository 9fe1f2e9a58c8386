//! What each request does to the disk. An operation puts its answer into the slot and returns the answer's length, or
//! an errno (positive). It never answers itself: that is the queue's business, exactly once.

mod attr;
mod data;
mod names;
mod space;

use diskfuse_block::{Error, Kind, Resize};

use crate::abi::{StatfsOut, init};
use crate::file::Local;
use crate::handshake::{self, Offer, Wish};
use crate::queue::Queue;
use crate::request::{Operation, Request};
use crate::shared::bump;
use crate::slot::SlotBuf;

/// Bytes of data that the reply carries, or an errno.
pub(crate) type Answer = Result<usize, i32>;

/// Counts an error of the disk, says it to the log, and makes an errno of it.
pub(crate) fn disk_error(queue: &Queue, error: &Error) -> i32 {
    let errors = &queue.lane().errors;
    // Full disks and refused operations are the writer's business, and errors that were asked for nobody's; of the others
    // the first few tell the story.
    let seen = errors.load(std::sync::atomic::Ordering::Relaxed);
    let expected = matches!(
        error.errno(),
        libc::ENOSPC | libc::EDQUOT | libc::EOPNOTSUPP | libc::EINVAL
    ) || matches!(error.kind(), Kind::Injected(_));
    if expected || seen >= 10 {
        tracing::debug!(export = %queue.shared.options.id, %error, "request failed");
    } else {
        tracing::warn!(export = %queue.shared.options.id, %error, "request failed");
    }
    bump(errors, 1);
    // The kernel takes 1 to 511 (fuse_dev_do_write), and takes ENOSYS for "never ask again".
    match error.errno() {
        errno @ 1..=511 if errno != libc::ENOSYS => errno,
        _ => libc::EIO,
    }
}

/// Does what was asked if that takes no waiting; `None`, and nothing is done, if it may take some.
pub(crate) fn at_once(queue: &Queue, slot: &mut SlotBuf, request: &Request) -> Option<Answer> {
    let file = queue.local(request.nodeid)?;
    data::at_once(queue, &file, slot, &request.operation)
}

/// Does what was asked. `INIT` is here too: the queue sees to it that it comes first.
pub(crate) async fn perform(queue: &Queue, slot: &mut SlotBuf, request: Request) -> Answer {
    let Request {
        nodeid, operation, ..
    } = request;
    match queue.local(nodeid) {
        Some(file) => on_file(queue, &file, slot, operation).await,
        None => on_others(queue, nodeid, slot, operation).await,
    }
}

async fn on_file(queue: &Queue, file: &Local, slot: &mut SlotBuf, operation: Operation) -> Answer {
    match operation {
        Operation::Read { offset, size } => data::read(queue, file, slot, offset, size).await,
        Operation::Write { offset, size } => data::write(queue, file, slot, offset, size).await,
        Operation::Flush => data::flush(queue, file, true).await,
        Operation::Fsync => data::flush(queue, file, false).await,
        Operation::Getattr => Ok(attr::getattr(file, slot)),
        Operation::Setattr(ref change) => attr::setattr(queue, file, slot, change).await,
        Operation::Open { flags } => attr::open(queue, file, slot, flags).await,
        Operation::Release => {
            names::release(queue, file).await;
            Ok(0)
        }
        Operation::Fallocate {
            mode,
            offset,
            length,
        } => space::fallocate(queue, file, mode, offset, length).await,
        Operation::Lseek { offset, whence } => {
            space::lseek(queue, file, slot, offset, whence).await
        }
        Operation::Statfs => Ok(statfs(Some(file), slot)),
        // A file has no names inside itself.
        Operation::Lookup { .. } => Err(libc::ENOENT),
        Operation::Opendir
        | Operation::Readdir { .. }
        | Operation::Fsyncdir
        | Operation::Releasedir
        | Operation::Rename => Err(libc::ENOTDIR),
        Operation::Readlink => Err(libc::EINVAL),
        other => without_inode(queue, slot, other),
    }
}

/// What is asked of a directory, a link or a text, or of nothing that has an inode number.
async fn on_others(queue: &Queue, ino: u64, slot: &mut SlotBuf, operation: Operation) -> Answer {
    match operation {
        Operation::Init { .. }
        | Operation::Destroy
        | Operation::Silent
        | Operation::Unknown { .. } => without_inode(queue, slot, operation),
        Operation::Statfs => Ok(statfs(None, slot)),
        other => match queue.shared.content.tree() {
            Some(tree) => names::perform(tree, ino, slot, other).await,
            None => Err(libc::ESTALE),
        },
    }
}

fn without_inode(queue: &Queue, slot: &mut SlotBuf, operation: Operation) -> Answer {
    match operation {
        Operation::Init {
            major,
            minor,
            max_readahead,
            flags,
        } => {
            let offer = Offer {
                major,
                minor,
                max_readahead,
                flags,
            };
            init(queue, slot, offer)
        }
        // Silent requests go unanswered before they come here.
        Operation::Destroy | Operation::Silent => Ok(0),
        other => {
            tracing::trace!(?other, "not served");
            Err(libc::ENOSYS)
        }
    }
}

fn init(queue: &Queue, slot: &mut SlotBuf, offer: Offer) -> Answer {
    let shared = &*queue.shared;
    let wish = Wish {
        max_background: shared.options.max_background,
        max_request: shared.plan.max_request,
        ring: shared.offers_ring(),
        passthrough: shared.backing.get().is_some(),
    };
    let answered = handshake::answer(offer, wish).map_err(|why| format!("the kernel's FUSE {why}"));
    let answered = answered.and_then(|out| {
        let got = u64::from(out.flags) | u64::from(out.flags2) << 32;
        shared.agreed_on(got & init::OVER_IO_URING != 0, got & init::PASSTHROUGH != 0)?;
        Ok((out, got))
    });
    match answered {
        Ok((out, got)) => {
            tracing::debug!(
                minor = offer.minor,
                async_dio = got & init::ASYNC_DIO != 0,
                uring = got & init::OVER_IO_URING != 0,
                "the kernel's FUSE"
            );
            Ok(slot.put_struct(&out))
        }
        Err(why) => {
            shared.greet(Err(why));
            Err(libc::EPROTO)
        }
    }
}

/// Changes the disk's size, which a growable export may do at any time and others must ask for.
async fn resize(
    file: &Local,
    size: u64,
    how: Resize,
    preallocate: bool,
) -> diskfuse_block::Result<()> {
    let shown = &*file.file;
    let asked = (!shown.growable).then(|| shown.right.to_resize());
    let _right = asked.transpose()?;
    file.node().resize(size, how, preallocate).await
}

fn statfs(file: Option<&Local>, slot: &mut SlotBuf) -> usize {
    const BLOCK: u32 = 512;
    let node = file.map(Local::node);
    let size = node.as_ref().map_or(0, |node| node.size());
    let allocated = node.as_ref().map_or(0, |node| node.allocated()).min(size);
    let free = (size - allocated) / u64::from(BLOCK);
    slot.put_struct(&StatfsOut {
        blocks: size / u64::from(BLOCK),
        bfree: free,
        bavail: free,
        files: 1,
        ffree: 0,
        bsize: BLOCK,
        frsize: BLOCK,
        namelen: 255,
        ..StatfsOut::default()
    })
}
