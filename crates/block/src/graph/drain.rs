//! Drain: everyone who has requests in flight on a node stops, waits for them, and stays stopped until told. Users are
//! told to go on exactly once, when the last drain that stopped them is over. It never holds the graph's lock while
//! it waits.

use std::sync::{Arc, Weak};
use std::task::Poll;

use parking_lot::Mutex;

use super::{Graph, busy};
use crate::error::Result;
use crate::node::{LetGo, LocalFuture, Node};

/// How the graph makes a user of a node stop.
pub trait DrainHook: Send + Sync {
    /// Starts nothing new and resolves when nothing is in flight. May be called again, also while an earlier call is
    /// still waiting, before [`DrainHook::resume`]: each call resolves when nothing is in flight. Runs on the ring of
    /// whoever drains.
    fn quiesce(&self) -> LocalFuture<'_, ()>;

    /// Goes on. Called once after one or more [`DrainHook::quiesce`], from any thread, also when one of those was
    /// given up before it resolved; must not block.
    fn resume(&self);

    /// The node it uses is this one from now on. Called between [`DrainHook::quiesce`] and [`DrainHook::resume`], from any
    /// thread; must not block.
    fn switch(&self, node: Arc<dyn Node>);

    /// Why it cannot stop or be given another node, if so: then it is not drained at all.
    fn immovable(&self) -> Option<String> {
        None
    }
}

/// A user's hook and how many drains keep the user stopped.
pub(super) struct Brake {
    hook: Option<Weak<dyn DrainHook>>,
    drains: Mutex<usize>,
}

impl std::fmt::Debug for Brake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Brake").field(&*self.drains.lock()).finish()
    }
}

impl Brake {
    pub(super) fn new(hook: Option<Weak<dyn DrainHook>>) -> Arc<Self> {
        Arc::new(Self {
            hook,
            drains: Mutex::new(0),
        })
    }

    /// Whether some drain keeps the user stopped.
    pub(super) fn is_held(&self) -> bool {
        *self.drains.lock() > 0
    }

    /// What makes the user stop, if it is still there.
    pub(super) fn hook(&self) -> Option<Arc<dyn DrainHook>> {
        self.hook.as_ref()?.upgrade()
    }

    fn is_of(&self, hook: &dyn DrainHook) -> bool {
        self.hook()
            .is_some_and(|own| std::ptr::addr_eq(Arc::as_ptr(&own), hook))
    }

    fn hold(&self) {
        *self.drains.lock() += 1;
    }

    /// The lock is held over `resume`, so that a drain that starts now is counted before or after, not in between.
    fn let_go(&self) {
        let mut drains = self.drains.lock();
        *drains -= 1;
        if *drains == 0
            && let Some(hook) = self.hook()
        {
            hook.resume();
        }
    }
}

/// Keeps the users of a node stopped; dropping it lets them go on.
#[must_use = "dropping it ends the drain at once"]
pub struct Drained {
    graph: Graph,
    nodes: Vec<String>,
    brakes: Vec<Arc<Brake>>,
    /// So that nobody waits for a node that takes its time on purpose.
    _let_go: Vec<LetGo>,
}

impl std::fmt::Debug for Drained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Drained").field(&self.nodes).finish()
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.graph.0.lock().drain_ended(&self.nodes);
        for brake in &self.brakes {
            brake.let_go();
        }
    }
}

impl Graph {
    /// Makes the nodes of these names, and those below them, hold back no requests of their own accord until what is
    /// returned is dropped: for whoever is going to wait for what is in flight there. [`Graph::drain`] does so by itself.
    pub fn let_go(&self, names: &[String]) -> Vec<LetGo> {
        let nodes = self.0.lock().with_descendants(names);
        nodes.iter().filter_map(|node| node.let_go()).collect()
    }

    /// Stops every user of the node and of the nodes above it, and resolves when nothing of theirs is in flight.
    /// Drains nest and may overlap. While a node is drained nobody can attach to it. Must run on a ring's thread;
    /// a user's hook that lives on another thread is waited for, not blocked on.
    ///
    /// [`Kind::NotFound`](crate::Kind::NotFound) if there is no such node, [`Kind::Busy`](crate::Kind::Busy) if one of the users
    /// cannot be stopped; then nobody is.
    pub async fn drain(&self, name: &str) -> Result<Drained> {
        let (nodes, brakes) = self.0.lock().drain_begins(name)?;
        self.stop(name, nodes, brakes).await
    }

    /// [`Graph::drain`] of another node, for a user that is being drained and has stopped, but for what those write to its node
    /// who use that one: the user itself is left out, wherever it is. Called by its hook.
    pub async fn drain_along(&self, name: &str, hook: &dyn DrainHook) -> Result<Drained> {
        let (nodes, mut brakes) = self.0.lock().drain_begins(name)?;
        brakes.retain(|brake| !brake.is_of(hook));
        self.stop(name, nodes, brakes).await
    }

    async fn stop(
        &self,
        name: &str,
        nodes: Vec<String>,
        brakes: Vec<Arc<Brake>>,
    ) -> Result<Drained> {
        for brake in &brakes {
            brake.hold();
        }
        // From here on a drop of this future, too, lets everyone go on.
        let drained = Drained {
            graph: self.clone(),
            _let_go: self.let_go(&nodes),
            nodes,
            brakes,
        };
        let hooks: Vec<_> = drained.brakes.iter().filter_map(|b| b.hook()).collect();
        if let Some(why) = hooks.iter().find_map(|hook| hook.immovable()) {
            return Err(busy(format!("Node '{name}' cannot be drained: {why}")));
        }
        // All at once: one may wait for what another lets go of.
        let mut waiting: Vec<_> = hooks.iter().map(|hook| hook.quiesce()).collect();
        std::future::poll_fn(|cx| {
            waiting.retain_mut(|quiet| quiet.as_mut().poll(cx).is_pending());
            match waiting.is_empty() {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
        Ok(drained)
    }
}
