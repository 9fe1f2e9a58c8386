//! The node that an export shows. The graph gives it another one while nothing is in flight; each queue keeps a handle of its
//! own, so that a request counts references on its own thread only, and looks at one number that hardly ever changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use diskfuse_block::Node;
use parking_lot::Mutex;

/// See the module.
pub(crate) struct Shown {
    generation: AtomicU64,
    node: Mutex<Arc<dyn Node>>,
}

impl Shown {
    pub(crate) fn new(node: Arc<dyn Node>) -> Self {
        Self {
            generation: AtomicU64::new(0),
            node: Mutex::new(node),
        }
    }

    /// How often it was changed.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The node, and how often it had been changed before. Takes a lock: not for every request.
    pub(crate) fn get(&self) -> (u64, Arc<dyn Node>) {
        let node = self.node.lock();
        (self.generation.load(Ordering::Acquire), Arc::clone(&node))
    }

    /// From the next request on it is this one. Nothing may be in flight.
    pub(crate) fn set(&self, with: Arc<dyn Node>) {
        let mut node = self.node.lock();
        let before = std::mem::replace(&mut *node, with);
        self.generation.fetch_add(1, Ordering::Release);
        drop(node);
        drop(before);
    }
}
