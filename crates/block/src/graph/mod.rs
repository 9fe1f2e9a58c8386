//! The named nodes of a process: who is above whom, who uses what, and who must stop when something is about to
//! change. It never does I/O, and its one lock is never held while somebody waits.

mod claims;
mod drain;
mod names;
mod place;
mod state;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

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
}

/// The nodes of a process. A handle: clones are the same graph. May be used from any thread.
#[derive(Clone, Default)]
pub struct Graph(Arc<Mutex<State>>);

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

    /// Removes a node, and those nodes below it that were never given a name and that nobody else needs.
    /// [`Kind::Busy`] if somebody uses it or a node stands above it. What was written is not flushed by this: flush
    /// first.
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

    /// The names of those who use a node itself, in the order in which they came.
    pub fn users(&self, name: &str) -> Result<Vec<String>> {
        let state = self.0.lock();
        let users = &state.entry(name)?.users;
        Ok(users.iter().map(|u| u.name.to_string()).collect())
    }

    /// Makes `user` a user of the node for as long as the attachment lives. Refused, with both named, if it conflicts
    /// with another user of the node, of one above or of one below ([`Kind::Busy`]); if another process holds the
    /// image ([`Kind::Busy`]); if it writes and the node cannot ([`Kind::ReadOnly`]); while the node is drained
    /// ([`Kind::Busy`]).
    pub fn attach(&self, name: &str, user: User) -> Result<Attachment> {
        let mut state = self.0.lock();
        let (node, id) = state.attach(name, user)?;
        Ok(Attachment {
            graph: self.clone(),
            node,
            name: name.to_owned(),
            id,
        })
    }

    fn detach(&self, name: &str, id: u64) {
        // The user's hook is dropped when the lock is free again.
        let gone: Option<UserEntry> = self.0.lock().detach(name, id);
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
    node: Arc<dyn Node>,
    name: String,
    id: u64,
}

impl Attachment {
    /// The node.
    pub fn node(&self) -> &Arc<dyn Node> {
        &self.node
    }

    /// For a user that waits for the end of what it has in flight: see [`Graph::let_go`].
    pub fn let_go(&self) -> Vec<LetGo> {
        self.graph.let_go(std::slice::from_ref(&self.name))
    }

    /// The node's name.
    pub fn node_name(&self) -> &str {
        &self.name
    }
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Attachment").field(&self.name).finish()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.graph.detach(&self.name, self.id);
    }
}

fn busy(message: String) -> Error {
    Error::new(Kind::Busy, message)
}
