//! FUSE over io_uring, the kernel's side of one thread: entries that wait in the kernel's queues for requests. An entry's
//! memory is either with the kernel (while its command is in flight), or with whoever serves the request in it; the
//! answer goes back with the command that asks for the next request. It must never touch memory that is with the kernel,
//! and never answer a request twice.
//!
//! Source: `Documentation/filesystems/fuse/fuse-io-uring.rst`, `include/uapi/linux/fuse.h`, `fs/fuse/dev_uring.c` of Linux.
//! * There is one queue for each CPU that may ever be. A request goes to the queue of the CPU that its caller runs on,
//!   and none is served before every queue has an entry.
//! * A registration that fails makes the kernel go back to `/dev/fuse`, unless all queues have an entry already.
//! * FORGET and INTERRUPT come through `/dev/fuse` all the same.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::{Rc, Weak};

use diskfuse_ring::{
    Buf, CancelKey, Command, CommandSink, SharedFd, command, command_again, end_commands,
    release_command_memory,
};
use zerocopy::IntoBytes;

use super::RingPlan;
use crate::abi::{OutHeader, RingCommand, ring_command, ring_header};
use crate::queue::Queue;
use crate::request::parse_ring;
use crate::slot::{DATA, SlotBuf};

/// Bytes of data that a thread's idle entries may keep resident before those that hold much are made to give it back.
const RESIDENT: usize = 16 << 20;
/// What an entry may keep in any case.
const SMALL: usize = 64 << 10;

/// One entry.
struct Entry {
    /// The kernel's queue that it belongs to.
    queue: u16,
    /// Absent while a request in it is served; without its memory while the kernel has that.
    memory: Cell<Option<SlotBuf>>,
    /// The kernel's name for the request in it.
    commit_id: Cell<u64>,
    /// The ring's name for its commands, from its registration until the kernel has no use for it any more.
    key: Cell<Option<CancelKey>>,
    /// A request in it is being served, or held.
    with_us: Cell<bool>,
}

/// All entries of one thread.
pub(crate) struct Entries {
    device: SharedFd,
    queue: RefCell<Weak<Queue>>,
    this: Weak<Self>,
    all: Box<[Entry]>,
    /// The kernel's queues that they belong to; so many entries are the first of theirs.
    queues: usize,
    /// Bytes of data that may be resident in entries that the kernel has.
    resident: Cell<usize>,
    /// Entries that the kernel has, or that are being served.
    alive: Cell<usize>,
    /// What the kernel said to a registration, a positive errno.
    refused: Cell<Option<i32>>,
}

/// The kernel's queues that thread `thread` of `threads` serves.
pub(crate) fn queues_of(thread: usize, threads: usize, queues: u16) -> impl Iterator<Item = u16> {
    (0..queues).filter(move |&queue| usize::from(queue) % threads == thread)
}

impl Entries {
    /// Entries for the queues of thread `thread` of `threads`, each with memory for `memory` bytes of data, which
    /// is not resident before it is used. Fails with ENOMEM when there is no address space for it.
    pub(crate) fn new(
        device: &SharedFd,
        plan: &RingPlan,
        thread: usize,
        threads: usize,
        memory: usize,
    ) -> io::Result<Rc<Self>> {
        let queues: Vec<u16> = queues_of(thread, threads, plan.queues).collect();
        let depth = usize::from(plan.depth);
        let piece = DATA + memory;
        let mut rest = match queues.len() * depth {
            0 => None,
            count => {
                let bytes = count.checked_mul(piece);
                Some(Buf::new(bytes.ok_or(io::ErrorKind::OutOfMemory)?)?)
            }
        };
        let mut all = Vec::with_capacity(queues.len() * depth);
        let count = queues.len();
        // First one of each queue, then the second of each.
        for queue in std::iter::repeat_n(queues, depth).flatten() {
            let Some(mut buf) = rest.take() else { break };
            if buf.capacity() > piece {
                rest = Some(buf.split_off(piece));
            }
            all.push(Entry {
                queue,
                memory: Cell::new(Some(SlotBuf::of(buf))),
                commit_id: Cell::new(0),
                key: Cell::new(None),
                with_us: Cell::new(true),
            });
        }
        Ok(Rc::new_cyclic(|this| Self {
            device: device.clone(),
            queue: RefCell::new(Weak::new()),
            this: Weak::clone(this),
            resident: Cell::new(0),
            alive: Cell::new(all.len()),
            all: all.into(),
            queues: count,
            refused: Cell::new(None),
        }))
    }

    /// Offers all entries to the kernel; requests in them go to `queue`. Whether the kernel takes them is known after the next
    /// turn of the loop: see [`Entries::refused`].
    pub(crate) fn register(&self, queue: &Rc<Queue>) {
        *self.queue.borrow_mut() = Rc::downgrade(queue);
        for (index, entry) in (0u32..).zip(&self.all) {
            if let Some(memory) = entry.memory.take() {
                self.give(index, entry, memory, ring_command::REGISTER);
            }
        }
    }

    /// What the kernel said to a registration, if it refused all of some queue's, so that it will not use the ring.
    pub(crate) fn refused(&self) -> Option<io::Error> {
        let has_one = |queue: usize| {
            let entries = self.all.iter().skip(queue).step_by(self.queues);
            entries.into_iter().any(|entry| entry.key.get().is_some())
        };
        let error = io::Error::from_raw_os_error(self.refused.get()?);
        let all = (0..self.queues).all(has_one);
        if all {
            tracing::warn!(%error, "the kernel refuses some entries; it has others of each queue");
        }
        (!all).then_some(error)
    }

    /// Answers the request in entry `index`, whose memory this is, with a header and `len` bytes of data, and lets the kernel
    /// use the entry for the next one.
    pub(crate) fn commit(&self, index: u32, mut memory: SlotBuf, header: &OutHeader, len: usize) {
        let Some(entry) = self.all.get(index as usize) else {
            return;
        };
        memory.put_ring_answer(header, len);
        // What the kernel has cannot be taken back, so this is the only occasion.
        if memory.touched() > SMALL && len <= SMALL && self.resident.get() > RESIDENT {
            memory.release_beyond(len);
        }
        self.give(index, entry, memory, ring_command::COMMIT_AND_FETCH);
    }

    fn give(&self, index: u32, entry: &Entry, mut memory: SlotBuf, op: u32) {
        let arguments = RingCommand {
            commit_id: entry.commit_id.get(),
            queue: entry.queue,
            ..RingCommand::default()
        };
        let mut order = Command {
            op,
            arguments: [0; size_of::<RingCommand>()],
            memory: None,
        };
        order.arguments.copy_from_slice(arguments.as_bytes());
        self.resident.set(self.resident.get() + memory.touched());
        let buf = memory.take_for_command();
        entry.memory.set(Some(memory));
        entry.with_us.set(false);
        if let Some(key) = entry.key.get() {
            return command_again(key, order, buf);
        }
        order.memory = Some(DATA);
        let sink: Weak<dyn CommandSink> = self.this.clone();
        let key = command(&self.device, order, buf, sink, index);
        entry.key.set(Some(key));
    }

    /// Bytes of data that may be resident in entries that the kernel has.
    pub(crate) fn resident(&self) -> usize {
        self.resident.get()
    }

    /// Gives the data memory of idle entries back. The kernel fills an entry only while this thread submits or waits, so it
    /// does not do so now.
    pub(crate) fn release_idle(&self) {
        for entry in &self.all {
            let (false, Some(key)) = (entry.with_us.get(), entry.key.get()) else {
                continue;
            };
            let Some(mut memory) = entry.memory.take() else {
                continue;
            };
            let before = memory.touched();
            if before > 0 && release_command_memory(key, DATA) {
                memory.released();
                self.resident.set(self.resident.get() - before);
            }
            entry.memory.set(Some(memory));
        }
    }

    /// The kernel has no use for an entry any more.
    fn gone(&self, errno: i32) {
        let left = self.alive.get().saturating_sub(1);
        self.alive.set(left);
        // Without a queue the export has ended, and that is why.
        let Some(queue) = self.queue.borrow().upgrade() else {
            return;
        };
        match errno {
            libc::ENOTCONN | libc::ECONNABORTED | libc::ENODEV | libc::ECANCELED => {
                queue.ring_gone();
            }
            errno if !queue.registering() => queue.ring_failed(errno, left),
            errno => self.refused.set(Some(errno)),
        }
    }
}

impl Drop for Entries {
    /// What the kernel has comes back to the ring; the others are told of here.
    fn drop(&mut self) {
        for entry in &self.all {
            if let (true, Some(key)) = (entry.with_us.get(), entry.key.get()) {
                end_commands(key);
            }
        }
    }
}

impl CommandSink for Entries {
    fn completed(&self, index: u32, result: i32, buf: Buf) {
        let Some(entry) = self.all.get(index as usize) else {
            return;
        };
        let Some(mut memory) = entry.memory.take() else {
            return;
        };
        memory.put(buf);
        entry.with_us.set(true);
        self.resident.set(self.resident.get() - memory.touched());
        if result < 0 {
            entry.memory.set(Some(memory));
            entry.key.set(None);
            return self.gone(result.saturating_neg());
        }
        let Some(queue) = self.queue.borrow().upgrade() else {
            entry.memory.set(Some(memory));
            return;
        };
        let room = memory.size();
        let parsed = memory.ring_headers().map(|h| parse_ring(h, room));
        let Some((said, request)) = parsed else {
            return;
        };
        entry.commit_id.set(said.commit_id);
        memory.dirty(memory.size().min(said.payload_size as usize));
        queue.requested(index, memory, request);
    }
}

const _: () = assert!(ring_header::SIZE <= DATA);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_queue_is_served_by_one_thread() {
        for threads in [1, 2, 3, 8] {
            let mut served: Vec<u16> = (0..threads)
                .flat_map(|thread| queues_of(thread, threads, 5))
                .collect();
            served.sort_unstable();
            assert_eq!(served, [0, 1, 2, 3, 4]);
        }
    }
}
