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
        let Ok(()) = self.look_up(|| Ok::<_, std::convert::Infallible>(with));
    }

    /// From the next request on it is what `find` says: whoever sets another one meanwhile comes after it, and one that was set
    /// before is what `find` has to find. Nothing may be in flight.
    pub(crate) fn look_up<E>(
        &self,
        find: impl FnOnce() -> std::result::Result<Arc<dyn Node>, E>,
    ) -> std::result::Result<(), E> {
        let mut node = self.node.lock();
        let before = std::mem::replace(&mut *node, find()?);
        self.generation.fetch_add(1, Ordering::Release);
        drop(node);
        drop(before);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use diskfuse_block::drivers::{NullConfig, open_null};

    use super::*;

    /// As when an export is made while a job begins: the graph's answer is on its way while the job tells of its wrap.
    #[test]
    fn what_is_set_while_another_is_looked_up_comes_after_it() {
        let null = |size| -> Arc<dyn Node> {
            let config = NullConfig {
                size,
                ..NullConfig::default()
            };
            open_null(&config).unwrap()
        };
        let shown = Shown::new(null(512));
        std::thread::scope(|scope| {
            let find = || {
                scope.spawn(|| shown.set(null(2048)));
                std::thread::sleep(std::time::Duration::from_millis(50));
                Ok::<_, ()>(null(1024))
            };
            shown.look_up(find).unwrap();
        });
        assert_eq!(shown.get().1.size(), 2048);
        assert_eq!(shown.generation(), 2);
    }
}
