//! What each request does to the disk. An operation puts its answer into the slot and returns the answer's length, or
//! an errno (positive). It never answers itself: that is the queue's business, exactly once.

mod attr;
mod data;
mod space;

use diskfuse_block::{Access, Error, Kind, Resize};

use crate::abi::{StatfsOut, init};
use crate::handshake::{self, Offer, Wish};
use crate::queue::Queue;
use crate::request::Operation;
use crate::shared::bump;
use crate::slot::SlotBuf;
use crate::trouble;

/// Bytes of data that the reply carries, or an errno.
pub(crate) type Answer = Result<usize, i32>;

/// Counts an error of the disk, says it to the log and to whoever wants to know, and makes an errno of it.
pub(crate) fn disk_error(queue: &Queue, access: Access, error: &Error) -> i32 {
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
    tell_of(queue, access, error);
    // The kernel takes 1 to 511 (fuse_dev_do_write), and takes ENOSYS for "never ask again".
    match error.errno() {
        errno @ 1..=511 if errno != libc::ENOSYS => errno,
        _ => libc::EIO,
    }
}

/// Tells whoever wants to know of requests that fail.
fn tell_of(queue: &Queue, access: Access, error: &Error) {
    let shared = &*queue.shared;
    if let Some(to) = &shared.options.on_error
        && trouble::is_failure(error)
        && shared.pace.allows()
    {
        to.tell(&shared.right.node_name(), access, error);
    }
}

/// Does what was asked if that takes no waiting; `None`, and nothing is done, if it may take some.
pub(crate) fn at_once(queue: &Queue, slot: &mut SlotBuf, operation: &Operation) -> Option<Answer> {
    data::at_once(queue, slot, operation)
}

/// Does what was asked. `INIT` is here too: the queue sees to it that it comes first.
pub(crate) async fn perform(queue: &Queue, slot: &mut SlotBuf, operation: Operation) -> Answer {
    match operation {
        Operation::Read { offset, size } => data::read(queue, slot, offset, size).await,
        Operation::Write { offset, size } => data::write(queue, slot, offset, size).await,
        Operation::Flush | Operation::Fsync => data::flush(queue).await,
        Operation::Getattr => Ok(attr::getattr(queue, slot)),
        Operation::Setattr(ref change) => attr::setattr(queue, slot, change).await,
        Operation::Open { flags } => attr::open(queue, slot, flags).await,
        Operation::Fallocate {
            mode,
            offset,
            length,
        } => space::fallocate(queue, mode, offset, length).await,
        Operation::Lseek { offset, whence } => space::lseek(queue, slot, offset, whence).await,
        Operation::Statfs => Ok(statfs(queue, slot)),
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
        // The only file has no name inside itself.
        Operation::Lookup => Err(libc::ENOENT),
        // Silent requests go unanswered before they come here.
        Operation::Release | Operation::Destroy | Operation::Silent => Ok(0),
        Operation::Unknown { opcode } => {
            tracing::trace!(opcode, "not served");
            Err(libc::ENOSYS)
        }
    }
}

fn init(queue: &Queue, slot: &mut SlotBuf, offer: Offer) -> Answer {
    let shared = &*queue.shared;
    let wish = Wish {
        max_background: shared.options.max_background,
        max_request: shared.plan.max_request,
        ring: shared.plan.ring.is_some(),
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
    queue: &Queue,
    size: u64,
    how: Resize,
    preallocate: bool,
) -> diskfuse_block::Result<()> {
    let shared = &*queue.shared;
    let asked = (!shared.options.growable).then(|| shared.right.to_resize());
    let _right = asked.transpose()?;
    queue.node().resize(size, how, preallocate).await
}

fn statfs(queue: &Queue, slot: &mut SlotBuf) -> usize {
    const BLOCK: u32 = 512;
    let node = queue.node();
    let size = node.size();
    let allocated = node.allocated().min(size);
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
