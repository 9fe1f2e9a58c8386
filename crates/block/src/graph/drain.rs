//! Drain: everyone who has requests in flight on a node stops, waits for them, and stays stopped until told. Users are
//! told to go on exactly once, when the last drain that stopped them is over. It never holds the graph's lock while
//! it waits.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
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
    drains: AtomicUsize,
    /// Somebody lets the user go on. The graph's lock may be taken under it, never the other way round.
    resuming: Mutex<()>,
}

impl std::fmt::Debug for Brake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let drains = self.drains.load(SeqCst);
        f.debug_tuple("Brake").field(&drains).finish()
    }
}

impl Brake {
    pub(super) fn new(hook: Option<Weak<dyn DrainHook>>) -> Arc<Self> {
        Arc::new(Self {
            hook,
            drains: AtomicUsize::new(0),
            resuming: Mutex::new(()),
        })
    }

    /// Whether the user can be stopped, or could until it went.
    pub(super) fn has_hook(&self) -> bool {
        self.hook.is_some()
    }

    /// What makes the user stop, if it is still there. Not to be dropped under the graph's lock: it may be the last of the user.
    pub(super) fn hook(&self) -> Option<Arc<dyn DrainHook>> {
        self.hook.as_ref()?.upgrade()
    }

    /// Whether it is the brake of the user with this hook. Looks at addresses only, so it may be called under the graph's lock.
    fn is_of(&self, hook: &dyn DrainHook) -> bool {
        let own = self.hook.as_ref();
        own.is_some_and(|own| std::ptr::addr_eq(own.as_ptr(), hook))
    }

    /// Whether some drain keeps the user stopped.
    pub(super) fn is_held(&self) -> bool {
        self.drains.load(SeqCst) > 0
    }

    /// One more drain keeps the user stopped, whom others keep stopped already; false if they do not. Never waits.
    pub(super) fn hold_too(&self) -> bool {
        let more = |drains: usize| (drains > 0).then_some(drains + 1);
        self.drains.fetch_update(SeqCst, SeqCst, more).is_ok()
    }

    /// Whoever lets the user go on just now has done so when this returns, so that it can be stopped again.
    fn hold(&self) {
        self.drains.fetch_add(1, SeqCst);
        drop(self.resuming.lock());
    }

    /// A drain that starts now is counted before, or stops the user after it has been let go on.
    fn let_go(&self) {
        let _resuming = self.resuming.lock();
        if self.drains.fetch_sub(1, SeqCst) == 1
            && let Some(hook) = self.hook()
        {
            hook.resume();
        }
    }
}

/// Whom a drain keeps stopped: those whom it found, and those who were put on its node since.
pub(super) type Held = Arc<Mutex<Vec<Arc<Brake>>>>;

/// A drain, as the graph knows it.
#[derive(Clone, Debug)]
pub(super) struct Drain {
    pub(super) id: u64,
    /// The node that it is of. It concerns whoever stands there or above.
    pub(super) node: Arc<str>,
    pub(super) held: Held,
    /// Who is never held by it: the user that it comes from, which lets go of it when it goes on itself.
    pub(super) left_out: Vec<Arc<Brake>>,
}

/// Keeps the users of a node stopped; dropping it lets them go on.
#[must_use = "dropping it ends the drain at once"]
pub struct Drained {
    graph: Graph,
    drain: Drain,
    /// So that nobody waits for a node that takes its time on purpose.
    _let_go: Vec<LetGo>,
}

impl std::fmt::Debug for Drained {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Drained").field(&self.drain.node).finish()
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        // From then on nobody is added to it.
        self.graph.0.lock().drain_ended(self.drain.id);
        let held = std::mem::take(&mut *self.drain.held.lock());
        for brake in held {
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
        // Those it found: who is put on the node from now on is held by whoever puts him there.
        let (drain, nodes, brakes) = self.0.lock().drain_begins(name, |_| false)?;
        self.stop(drain, &nodes, &brakes).await
    }

    /// [`Graph::drain`] of another node, for a user that is being drained and has stopped, but for what those write to its node
    /// who use that one: the user itself is left out, wherever it is. Called by its hook.
    pub async fn drain_along(&self, name: &str, hook: &dyn DrainHook) -> Result<Drained> {
        let is_left_out = |brake: &Brake| brake.is_of(hook);
        let (drain, nodes, brakes) = self.0.lock().drain_begins(name, is_left_out)?;
        self.stop(drain, &nodes, &brakes).await
    }

    async fn stop(&self, drain: Drain, nodes: &[String], brakes: &[Arc<Brake>]) -> Result<Drained> {
        for brake in brakes {
            brake.hold();
        }
        // From here on a drop of this future, too, lets everyone go on.
        let drained = Drained {
            graph: self.clone(),
            drain,
            _let_go: self.let_go(nodes),
        };
        let hooks: Vec<_> = brakes.iter().filter_map(|brake| brake.hook()).collect();
        if let Some(why) = hooks.iter().find_map(|hook| hook.immovable()) {
            let name = &drained.drain.node;
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
