//! Keeps those apart who write one sector at once, where one of them must read it first, and who changes the size from
//! all that write. Most writers write whole sectors and need nothing of each other: they only say that they are there, on a
//! counter that few threads share, and look at a flag. Who modifies a sector by reading it first raises the flag and waits
//! until the writers that were there before are gone; while the flag is up everyone takes a range in a queue. Nobody's
//! thread is ever blocked: waiting is done with wakers.
//!
//! Why nothing is lost: a writer counts itself in and then looks at the flag; a modifier raises the flag and then
//! looks at the counters (both sequentially consistent). So either the writer sees the flag and takes a range, or the
//! modifier sees the writer and waits for it.

use std::cell::Cell;
use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::task::{Poll, Waker};

use parking_lot::Mutex;

use crate::range_queue::{RangeQueue, Turn};

/// Counters to spread threads over. More threads than this share some, which costs speed only.
const SHARDS: usize = 16;

#[repr(align(128))]
#[derive(Default)]
struct Shard(AtomicUsize);

/// See the head of this file.
pub(super) struct Gate {
    /// Modifiers that are at work or wait for their turn: the flag.
    modifiers: AtomicUsize,
    shards: [Shard; SHARDS],
    queue: RangeQueue,
    /// Modifiers that wait for the counters.
    watchers: Mutex<Vec<Waker>>,
}

/// The right to write whole sectors, until it is dropped.
pub(super) enum Pass<'g> {
    /// It is counted.
    Counted { _counted: Counted<'g> },
    /// Its range is taken.
    Turn { _turn: Turn<'g> },
    /// It is not whole sectors after all.
    Modifying { _modifying: Modifying<'g> },
}

/// One more on a counter.
pub(super) struct Counted<'g> {
    gate: &'g Gate,
    shard: usize,
}

/// The right to read a range and write it back, until it is dropped.
pub(super) struct Modifying<'g> {
    // Dropped in this order: whoever waits for the range finds the flag as it was.
    _turn: Turn<'g>,
    _flag: Flag<'g>,
}

struct Flag<'g>(&'g Gate);

thread_local! {
    static SHARD: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The counter of this thread.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let mine = SHARD.get();
    if mine != usize::MAX {
        return mine;
    }
    let mine = NEXT.fetch_add(1, SeqCst) % SHARDS;
    SHARD.set(mine);
    mine
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            modifiers: AtomicUsize::new(0),
            shards: std::array::from_fn(|_| Shard::default()),
            queue: RangeQueue::default(),
            watchers: Mutex::new(Vec::new()),
        }
    }

    /// Lets a writer of whole sectors in at once; `None` while somebody modifies: then [`Gate::enter`].
    pub(super) fn try_enter(&self) -> Option<Pass<'_>> {
        let shard = shard();
        self.shards[shard].0.fetch_add(1, SeqCst);
        let counted = Counted { gate: self, shard };
        // Dropping the count again, else, wakes whoever watches it.
        (self.modifiers.load(SeqCst) == 0).then_some(Pass::Counted { _counted: counted })
    }

    /// Lets a writer of whole sectors in when nobody modifies any of them.
    pub(super) async fn enter(&self, offset: u64, len: u64) -> Pass<'_> {
        if let Some(pass) = self.try_enter() {
            return pass;
        }
        Pass::Turn {
            _turn: self.queue.turn(offset, len).await,
        }
    }

    /// Lets one who reads and writes back in, when nobody writes any of the range.
    pub(super) async fn modify(&self, offset: u64, len: u64) -> Modifying<'_> {
        self.modifiers.fetch_add(1, SeqCst);
        let flag = Flag(self);
        let turn = self.queue.turn(offset, len).await;
        self.wait_for_counted().await;
        Modifying {
            _turn: turn,
            _flag: flag,
        }
    }

    /// Waits until all who were counted before the flag went up are gone. A counter that was once seen at zero
    /// stays there but for writers that look in, see the flag, and leave.
    async fn wait_for_counted(&self) {
        for shard in &self.shards {
            poll_fn(|cx| {
                // The lock first: who leaves after our look finds the waker.
                let mut watchers = self.watchers.lock();
                if shard.0.load(SeqCst) == 0 {
                    return Poll::Ready(());
                }
                watchers.push(cx.waker().clone());
                Poll::Pending
            })
            .await;
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.gate.shards[self.shard].0.fetch_sub(1, SeqCst);
        if self.gate.modifiers.load(SeqCst) != 0 {
            let watchers = std::mem::take(&mut *self.gate.watchers.lock());
            watchers.into_iter().for_each(Waker::wake);
        }
    }
}

impl Drop for Flag<'_> {
    fn drop(&mut self) {
        self.0.modifiers.fetch_sub(1, SeqCst);
    }
}
