//! What the graph knows, under its one lock: nodes, edges, users. Permissions flow down: whoever uses a node uses what
//! is below it. Everything here is bookkeeping but one thing: image locks follow the permissions.

use std::collections::HashSet;
use std::sync::Arc;

use super::drain::Brake;
use super::{User, busy, names};
use crate::error::{Error, Kind, Result};
use crate::node::Node;
use crate::permissions::Permissions;

pub(super) struct UserEntry {
    id: u64,
    pub(super) name: String,
    perm: Permissions,
    shared: Permissions,
    brake: Arc<Brake>,
}

pub(super) struct Entry {
    name: String,
    pub(super) node: Arc<dyn Node>,
    pub(super) children: Vec<String>,
    pub(super) users: Vec<UserEntry>,
    /// Nobody named it: it goes with the last node above it.
    nameless: bool,
    drains: usize,
}

/// Nodes are few (hundreds), and none of this is on the way of a request: lists do.
#[derive(Default)]
pub(super) struct State {
    entries: Vec<Entry>,
    next_name: u64,
    next_user: u64,
}

impl State {
    fn find(&self, name: &str) -> Result<usize> {
        let found = self.entries.iter().position(|e| e.name == name);
        found.ok_or_else(|| names::not_found(name, self.entries.iter().map(|e| e.name.as_str())))
    }

    pub(super) fn entry(&self, name: &str) -> Result<&Entry> {
        self.find(name).map(|index| &self.entries[index])
    }

    pub(super) fn names(&self) -> Vec<String> {
        let of = |nameless| {
            let fitting = self.entries.iter().filter(move |e| e.nameless == nameless);
            fitting.map(|e| e.name.clone())
        };
        of(false).chain(of(true)).collect()
    }

    pub(super) fn insert(
        &mut self,
        name: Option<&str>,
        node: Arc<dyn Node>,
        children: &[&str],
    ) -> Result<String> {
        if let Some(name) = name {
            names::check(name)?;
            if self.entries.iter().any(|e| e.name == name) {
                let message = format!("Duplicate nodes with node-name='{name}'");
                return Err(Error::new(Kind::Exists, message));
            }
        }
        for child in children {
            self.find(child)?;
        }
        let given = name.is_some();
        let name = name.map_or_else(|| self.make_name(), str::to_owned);
        self.entries.push(Entry {
            name: name.clone(),
            node,
            children: children.iter().map(|&c| c.to_owned()).collect(),
            users: Vec::new(),
            nameless: !given,
            drains: 0,
        });
        self.update_node(self.entries.len() - 1).inspect_err(|_| {
            self.entries.pop();
        })?;
        Ok(name)
    }

    fn make_name(&mut self) -> String {
        self.next_name += 1;
        format!("#block{:03}", self.next_name)
    }

    fn parents<'s>(&'s self, name: &'s str) -> impl Iterator<Item = &'s Entry> {
        let above = move |e: &&Entry| e.children.iter().any(|c| c == name);
        self.entries.iter().filter(above)
    }

    /// Takes a node out, and those below that nobody named and nobody needs.
    pub(super) fn remove(&mut self, name: &str) -> Result<Vec<Arc<dyn Node>>> {
        let index = self.find(name)?;
        let user = self.entries[index].users.first().map(|u| u.name.clone());
        let parent = self.parents(name).next().map(|e| e.name.clone());
        if let Some(by) = user.or_else(|| parent.map(|p| format!("node '{p}'"))) {
            return Err(busy(format!("Node {name} is in use by {by}")));
        }
        if self.entries[index].drains > 0 {
            return Err(busy(format!("Node {name} is in use: it is being drained")));
        }
        let entry = self.entries.remove(index);
        let mut removed = vec![entry.node];
        for child in entry.children {
            let orphan = self.entry(&child).is_ok_and(|c| c.nameless);
            // A child that somebody else needs refuses, and stays.
            if orphan && let Ok(more) = self.remove(&child) {
                removed.extend(more);
            }
        }
        Ok(removed)
    }

    /// The indices of a node and of everything reachable from it by `next`.
    fn reach(&self, from: usize, next: impl Fn(&Self, usize) -> Vec<usize>) -> Vec<usize> {
        let mut seen = HashSet::from([from]);
        let mut found = vec![from];
        let mut at = 0;
        while at < found.len() {
            for index in next(self, found[at]) {
                if seen.insert(index) {
                    found.push(index);
                }
            }
            at += 1;
        }
        found
    }

    fn with_descendants(&self, index: usize) -> Vec<usize> {
        self.reach(index, |state, i| {
            let children = &state.entries[i].children;
            children.iter().filter_map(|c| state.find(c).ok()).collect()
        })
    }

    fn with_ancestors(&self, index: usize) -> Vec<usize> {
        self.reach(index, |state, i| {
            let name = &state.entries[i].name;
            let above = state.entries.iter().enumerate();
            let above = above.filter(|(_, e)| e.children.contains(name));
            above.map(|(i, _)| i).collect()
        })
    }

    /// Everyone whose permissions reach this node.
    fn claims(&self, index: usize) -> impl Iterator<Item = &UserEntry> {
        let nodes = self.with_ancestors(index).into_iter();
        nodes.flat_map(|i| &self.entries[i].users)
    }

    pub(super) fn attach(&mut self, name: &str, user: User) -> Result<(Arc<dyn Node>, u64)> {
        let index = self.find(name)?;
        let writes = Permissions::WRITE | Permissions::RESIZE;
        if !(user.perm & writes).is_empty() && self.entries[index].node.read_only() {
            let message = format!("Node '{name}' is read-only: {} cannot write it", user.name);
            return Err(Error::new(Kind::ReadOnly, message));
        }
        if self.entries[index].drains > 0 {
            let message = format!("Node '{name}' is being drained: {} must wait", user.name);
            return Err(busy(message));
        }
        for below in self.with_descendants(index) {
            let at = &self.entries[below].name;
            for other in self.claims(below) {
                conflict(at, &user, other)?;
            }
        }
        self.next_user += 1;
        let id = self.next_user;
        self.entries[index].users.push(UserEntry {
            id,
            name: user.name,
            perm: user.perm,
            shared: user.shared,
            brake: Brake::new(user.drain),
        });
        if let Err(error) = self.update_below(index) {
            drop(self.detach(name, id));
            return Err(error);
        }
        Ok((Arc::clone(&self.entries[index].node), id))
    }

    pub(super) fn detach(&mut self, name: &str, id: u64) -> Option<UserEntry> {
        let index = self.find(name).ok()?;
        let users = &mut self.entries[index].users;
        let position = users.iter().position(|u| u.id == id)?;
        let gone = users.remove(position);
        if let Err(error) = self.update_below(index) {
            // Holding less than before meets no conflict; only a failing fcntl gets here, and leaves too many locks.
            tracing::warn!(node = name, %error, "cannot relax the permissions of a node");
        }
        Some(gone)
    }

    fn update_below(&self, index: usize) -> Result<()> {
        for below in self.with_descendants(index) {
            self.update_node(below)?;
        }
        Ok(())
    }

    fn update_node(&self, index: usize) -> Result<()> {
        let fold = |(used, shared), user: &UserEntry| (used | user.perm, shared & user.shared);
        let nobody = (Permissions::NONE, Permissions::ALL);
        let (used, shared) = self.claims(index).fold(nobody, fold);
        self.entries[index].node.set_permissions(used, shared)
    }

    /// Notes a drain on the node and those above, and hands out the brakes of their users.
    pub(super) fn drain_begins(&mut self, name: &str) -> Result<(Vec<String>, Vec<Arc<Brake>>)> {
        let index = self.find(name)?;
        let mut brakes = Vec::new();
        let mut nodes = Vec::new();
        for above in self.with_ancestors(index) {
            let entry = &mut self.entries[above];
            entry.drains += 1;
            nodes.push(entry.name.clone());
            brakes.extend(entry.users.iter().map(|u| Arc::clone(&u.brake)));
        }
        Ok((nodes, brakes))
    }

    pub(super) fn drain_ended(&mut self, nodes: &[String]) {
        for entry in &mut self.entries {
            if nodes.contains(&entry.name) {
                entry.drains -= 1;
            }
        }
    }
}

fn conflict(node: &str, new: &User, old: &UserEntry) -> Result<()> {
    let refused = new.perm & !old.shared;
    if !refused.is_empty() {
        let (new, old) = (&new.name, &old.name);
        return Err(busy(format!(
            "Conflict on node '{node}': {new} needs {refused}, which {old} does not share"
        )));
    }
    let denied = old.perm & !new.shared;
    if !denied.is_empty() {
        let (new, old) = (&new.name, &old.name);
        return Err(busy(format!(
            "Conflict on node '{node}': {old} has {denied}, which {new} does not share"
        )));
    }
    Ok(())
}
