//! A byte of a disk that writes are noticed to go beyond, once (`block-set-write-threshold`). It only looks: it must never hold a
//! write back, change it, or wait.

use std::fmt;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::node::{LocalFuture, Node, Wrap};
use crate::watch::{Edit, Edited, Watch, Watched};

/// A write that went beyond a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// The byte that was not to be passed unseen.
    pub threshold: u64,
    /// How many bytes beyond it the write ended.
    pub amount: u64,
}

type Tell = Box<dyn Fn(Exceeded) + Send + Sync>;

/// Tells of the first write that ends beyond a byte, and is off from then on. May be used from any thread.
#[derive(Default)]
pub struct WriteThreshold {
    /// The byte; 0: off.
    at: AtomicU64,
    tell: OnceLock<Tell>,
}

impl WriteThreshold {
    /// The first write that ends beyond byte `at` is told of, with what the first caller gave; 0: none is. `tell` is called by
    /// the thread that writes, before the write is made, and must not wait.
    pub fn set(&self, at: u64, tell: impl Fn(Exceeded) + Send + Sync + 'static) {
        self.tell.get_or_init(|| Box::new(tell));
        // Whoever sees the byte sees whom to tell.
        self.at.store(at, Ordering::Release);
    }

    /// The byte; 0 if no write is going to be told of.
    pub fn get(&self) -> u64 {
        self.at.load(Ordering::Relaxed)
    }

    /// A range is about to be written. On the way of every write: one load.
    #[inline]
    pub fn note(&self, offset: u64, len: u64) {
        let at = self.at.load(Ordering::Relaxed);
        if at != 0 && offset.saturating_add(len) > at {
            self.exceed(at, offset.saturating_add(len));
        }
    }

    #[cold]
    fn exceed(&self, threshold: u64, end: u64) {
        let off = self
            .at
            .compare_exchange(threshold, 0, Ordering::Acquire, Ordering::Relaxed);
        // Of several writes at once one is told of.
        if off.is_ok()
            && let Some(tell) = self.tell.get()
        {
            tell(Exceeded {
                threshold,
                amount: end - threshold,
            });
        }
    }
}

impl fmt::Debug for WriteThreshold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WriteThreshold").field(&self.get()).finish()
    }
}

impl Watch for WriteThreshold {
    fn lets_through(&self, offset: u64, len: u64) -> bool {
        self.note(offset, len);
        true
    }

    fn edit<'a>(&'a self, node: &'a dyn Node, edit: Edit) -> LocalFuture<'a, Edited> {
        if !matches!(edit, Edit::Resize { .. }) {
            let range = edit.range(node.size());
            self.note(range.start, range.end - range.start);
        }
        Box::pin(edit.apply(node))
    }
}

/// Puts a threshold around a node that has none of its own, as [`FileNode`](crate::drivers::FileNode) does.
pub struct Threshold(pub Arc<WriteThreshold>);

impl Wrap for Threshold {
    fn over(&self, node: Arc<dyn Node>) -> Arc<dyn Node> {
        let threshold = Arc::clone(&self.0);
        Arc::new(Watched::new(node, threshold))
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    #[test]
    fn of_many_writes_at_once_one_is_told_of() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let threshold = WriteThreshold::default();
        let arm = |at| {
            let told = Arc::clone(&told);
            threshold.set(at, move |exceeded| told.lock().push(exceeded));
        };
        threshold.note(0, u64::MAX);
        for round in 1..200 {
            arm(4096);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        threshold.note(0, 4096);
                        threshold.note(4096, 512);
                    });
                }
            });
            assert_eq!((told.lock().len(), threshold.get()), (round, 0));
        }
        let expected = Exceeded {
            threshold: 4096,
            amount: 512,
        };
        assert!(told.lock().iter().all(|one| *one == expected));
        told.lock().clear();
        arm(4096);
        arm(0);
        threshold.note(0, 8192);
        assert_eq!(*told.lock(), []);
        arm(u64::MAX);
        threshold.note(u64::MAX, u64::MAX);
        assert_eq!((told.lock().len(), threshold.get()), (0, u64::MAX));
    }
}
