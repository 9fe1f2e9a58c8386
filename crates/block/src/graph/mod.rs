//! The named nodes of a process: who is above whom, who uses what, and who must stop when something is about to
//! change. It never does I/O, and its one lock is never held while somebody waits.

mod change;
mod claims;
mod copies;
mod drain;
mod names;
mod place;
mod settle;
mod state;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

pub use change::Change;
pub use claims::ChildRole;
pub use drain::{DrainHook, Drained};
pub use place::Place;

use crate::error::{Error, Kind, Result};
use crate::node::{LetGo, Node};
use crate::permissions::Permissions;
use state::{State, UserEntry};

/// Somebody who wants to use a node, for example an export.
pub struct User {
    /// What people call it, for messages: `export 'e0'`.
    pub name: String,
    /// What it does with the node.
    pub perm: Permissions,
    /// What it lets others do with the node meanwhile.
    pub shared: Permissions,
    /// How to make it stop for a while; `None` if it never has requests in flight of its own accord.
    pub drain: Option<Weak<dyn DrainHook>>,
    /// Whether it goes along when everyone above the node is put on another one ([`Change::Replace`]). What works on the node
    /// itself, as jobs do, stays.
    pub follows: bool,
}

/// The nodes of a process. A handle: clones are the same graph. May be used from any thread.
#[derive(Clone, Default)]
pub struct Graph(Arc<Mutex<State>>, Arc<Mutex<Changing>>);

/// Held over a whole change, until everybody knows of it: of two changes nobody hears the later one first.
#[derive(Default)]
struct Changing;

impl Graph {
    /// A graph without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a node that shows what is in `children`, which are in the graph already, or a part of it
    /// ([`ChildRole::Filtered`]). Returns and refuses as [`Graph::insert_above`] does.
    pub fn insert(
        &self,
        name: Option<&str>,
        node: Arc<dyn Node>,
        children: &[&str],
    ) -> Result<String> {
        let children: Vec<_> = children
            .iter()
            .map(|child| (*child, ChildRole::Filtered))
            .collect();
        self.insert_above(name, node, &children)
    }

    /// Adds a node above `children`, which are in the graph already, and returns its name. Without a name it gets
    /// one (`#block` and a number), and goes when the last node above it is removed. A node whose children must not be
    /// changed by others from the moment when they are first read is opened at a place that was
    /// [reserved](Graph::reserve) before.
    ///
    /// [`Kind::Invalid`] if the name is not well-formed (a letter, then letters, digits, `-`, `.` and `_`, 31
    /// characters at most), [`Kind::Exists`] if it is taken, [`Kind::NotFound`] for an unknown child; [`Kind::Busy`] or
    /// [`Kind::ReadOnly`] if the node may not do with a child what the role says.
    pub fn insert_above(
        &self,
        name: Option<&str>,
        node: Arc<dyn Node>,
        children: &[(&str, ChildRole)],
    ) -> Result<String> {
        let mut place = self.reserve(name, node.read_only())?;
        for (child, role) in children {
            place.stand_on(child, *role)?;
        }
        place.fill(node)
    }

    /// The node of this name, else [`Kind::NotFound`] with the nearest name there is, or [`Kind::Busy`] while it is being
    /// opened.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Node>> {
        self.0.lock().entry(name)?.node().cloned()
    }

    /// The node of this name as it is, without what is wrapped around it for its users; errors as [`Graph::get`]'s.
    pub fn bare(&self, name: &str) -> Result<Arc<dyn Node>> {
        self.0.lock().entry(name)?.bare().cloned()
    }

    /// [`Kind::Busy`], and by whom, if the node is in use and so cannot be removed; [`Kind::Drained`] while it is drained.
    pub fn check_unused(&self, name: &str) -> Result<()> {
        self.0.lock().check_unused(name).map(drop)
    }

    /// The nodes that [`Graph::remove`] would take away with this one, and itself: those above first.
    pub fn goes_with(&self, name: &str) -> Vec<String> {
        self.0.lock().goes_with(name)
    }

    /// Removes a node, and those nodes below it that go along ([`Graph::make_go_along`]) and that nobody else needs.
    /// Errors as [`Graph::check_unused`]'s. What was written is not flushed by this: close it
    /// first ([`Graph::check_unused`], [`Node::close`]).
    pub fn remove(&self, name: &str) -> Result<()> {
        // The nodes are dropped, which closes files, when the lock is free again.
        let removed = self.0.lock().remove(name)?;
        drop(removed);
        Ok(())
    }

    /// All names, those given first, in the order of insertion.
    pub fn names(&self) -> Vec<String> {
        self.0.lock().names()
    }

    /// The names of the nodes directly below a node.
    pub fn children(&self, name: &str) -> Result<Vec<String>> {
        Ok(self.0.lock().entry(name)?.children())
    }

    /// The names of the nodes directly below a node, and what it needs them for.
    pub fn edges(&self, name: &str) -> Result<Vec<(ChildRole, String)>> {
        Ok(self.0.lock().entry(name)?.edges())
    }

    /// The names of the nodes directly above a node.
    pub fn parents(&self, name: &str) -> Vec<String> {
        self.0.lock().parents(name)
    }

    /// The node, which was made along with one above it, goes with the last node above it, as those do that were never given a
    /// name. [`Kind::NotFound`] if there is no such node.
    pub fn make_go_along(&self, name: &str) -> Result<()> {
        self.0.lock().goes_along(name)
    }

    /// Whether the node goes with the last node above it, and so is not to be removed by itself.
    pub fn goes_along(&self, name: &str) -> bool {
        self.0
            .lock()
            .entry(name)
            .is_ok_and(|entry| entry.goes_along)
    }

    /// Whether the node was never given a name.
    pub fn is_nameless(&self, name: &str) -> bool {
        self.0
            .lock()
            .entry(name)
            .is_ok_and(state::Entry::is_nameless)
    }

    /// Whether somebody writes the node or may: a user of it or of a node above, or a node above that keeps its tables there.
    pub fn is_written(&self, name: &str) -> Result<bool> {
        self.0.lock().is_written(name)
    }

    /// The names of those who use a node itself, in the order in which they came.
    pub fn users(&self, name: &str) -> Result<Vec<String>> {
        let state = self.0.lock();
        let users = &state.entry(name)?.users;
        Ok(users.iter().map(|u| u.name.to_string()).collect())
    }

    /// Whether somebody drains the node or one below it, so that nobody can [attach](Graph::attach) to it; false if there is no such
    /// node. It may be over, or begin, the next moment.
    pub fn is_drained(&self, name: &str) -> bool {
        self.0.lock().drains_of(name).next().is_some()
    }

    /// Makes `user` a user of the node for as long as the attachment lives. Refused, with both named, if it conflicts
    /// with another user of the node, of one above or of one below ([`Kind::Busy`]); if another process holds the
    /// image ([`Kind::Busy`]); if it writes and the node cannot ([`Kind::ReadOnly`]); while the node is drained
    /// ([`Kind::Drained`]).
    pub fn attach(&self, name: &str, user: User) -> Result<Attachment> {
        let mut state = self.0.lock();
        let id = state.attach(name, user)?;
        Ok(Attachment {
            graph: self.clone(),
            id,
        })
    }

    fn detach(&self, id: u64) {
        // The user's hook is dropped when the lock is free again.
        let gone: Option<UserEntry> = self.0.lock().detach(id);
        drop(gone);
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Graph").field(&self.names()).finish()
    }
}

/// The right to use a node. Dropping it gives the right back; drop it only when nothing is in flight.
#[must_use = "dropping it detaches at once"]
pub struct Attachment {
    graph: Graph,
    id: u64,
}

impl Attachment {
    /// The node that it is attached to now.
    pub fn node(&self) -> Result<Arc<dyn Node>> {
        self.graph.get(&self.node_name())
    }

    /// The name of that node.
    pub fn node_name(&self) -> String {
        let name = self.graph.0.lock().node_of(self.id);
        // The user is there for as long as this is.
        name.unwrap_or_default()
    }

    /// From now on the user does this with the node. [`Kind::Busy`] or [`Kind::ReadOnly`], as for [`Graph::attach`], if it
    /// may not; then all is as it was.
    pub fn use_for(&self, perm: Permissions) -> Result<()> {
        self.graph.0.lock().use_for(self.id, perm)
    }

    /// From now on, for as long as this lives, nobody but the user and the nodes of these names, standing directly on the node,
    /// may read it: for a user whose writes must not be seen until it is done. [`Kind::Busy`] if somebody else does; then all
    /// is as it was.
    pub fn show_only_to(&self, readers: &[String]) -> Result<()> {
        let readers = readers.into();
        self.graph.0.lock().show_only_to(self.id, readers)
    }

    /// From now on, for as long as this lives, what is written to `source` is written to the user's node as well, and whoever
    /// drains the node drains `source` along with it. [`Kind::Busy`] if a write, or a drain, could then go around in a circle; then
    /// all is as it was. Later [changes](Graph::change) that would close a circle are refused.
    pub fn copies(&self, source: &str) -> Result<()> {
        self.graph.0.lock().copies(self.id, source.into())
    }

    /// For a user that waits for the end of what it has in flight: see [`Graph::let_go`].
    pub fn let_go(&self) -> Vec<LetGo> {
        self.graph.let_go(&[self.node_name()])
    }
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Attachment")
            .field(&self.node_name())
            .finish()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.graph.detach(self.id);
    }
}

fn busy(message: String) -> Error {
    Error::new(Kind::Busy, message)
}
