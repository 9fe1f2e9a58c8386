//! What the graph knows, under its one lock: nodes, edges, users. Everything here is bookkeeping but one thing: image
//! locks follow the permissions.

use std::collections::HashSet;
use std::sync::Arc;

use super::claims::{self, ChildRole, Claim, Holder};
use super::drain::Brake;
use super::{User, busy, names};
use crate::error::{Error, Kind, Result};
use crate::node::{Node, Wrap};
use crate::permissions::Permissions;

#[derive(Clone, Debug)]
pub(super) struct UserEntry {
    id: u64,
    pub(super) name: Arc<str>,
    perm: Permissions,
    shared: Permissions,
    pub(super) brake: Arc<Brake>,
    pub(super) follows: bool,
}

impl UserEntry {
    pub(super) fn is(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

/// What stands at a place.
#[derive(Clone)]
pub(super) enum Occupant {
    /// It is being opened, to be written or not.
    Opening { read_only: bool },
    /// A node.
    Node {
        /// Itself.
        bare: Arc<dyn Node>,
        /// What those above see: the node in its wraps.
        shown: Arc<dyn Node>,
    },
}

impl Occupant {
    pub(super) fn unwrapped(node: Arc<dyn Node>) -> Self {
        Self::Node {
            shown: Arc::clone(&node),
            bare: node,
        }
    }
}

#[derive(Clone)]
pub(super) struct Entry {
    pub(super) name: Arc<str>,
    pub(super) occupant: Occupant,
    /// What is between the node and those above it, the innermost first.
    pub(super) wraps: Vec<Arc<dyn Wrap>>,
    pub(super) children: Vec<(Arc<str>, ChildRole)>,
    pub(super) users: Vec<UserEntry>,
    /// Nobody named it: it goes with the last node above it.
    pub(super) nameless: bool,
    drains: usize,
}

impl Entry {
    /// What those above see, unless it is still being opened.
    pub(super) fn node(&self) -> Result<&Arc<dyn Node>> {
        match &self.occupant {
            Occupant::Node { shown, .. } => Ok(shown),
            Occupant::Opening { .. } => Err(self.opening()),
        }
    }

    /// The node itself, unless it is still being opened.
    pub(super) fn bare(&self) -> Result<&Arc<dyn Node>> {
        match &self.occupant {
            Occupant::Node { bare, .. } => Ok(bare),
            Occupant::Opening { .. } => Err(self.opening()),
        }
    }

    fn opening(&self) -> Error {
        busy(format!("Node '{}' is being opened", self.name))
    }

    pub(super) fn edges(&self) -> Vec<(ChildRole, String)> {
        let children = self.children.iter();
        children
            .map(|(child, role)| (*role, child.to_string()))
            .collect()
    }

    pub(super) fn is_nameless(&self) -> bool {
        self.nameless
    }

    pub(super) fn children(&self) -> Vec<String> {
        let children = self.children.iter();
        children.map(|(child, _)| child.to_string()).collect()
    }

    fn read_only(&self) -> bool {
        match &self.occupant {
            Occupant::Opening { read_only } => *read_only,
            Occupant::Node { bare, .. } => bare.read_only(),
        }
    }

    pub(super) fn is_above(&self, name: &str) -> bool {
        self.children.iter().any(|(child, _)| **child == *name)
    }
}

/// Nodes are few (hundreds), and none of this is on the way of a request: lists do.
#[derive(Clone, Default)]
pub(super) struct State {
    /// Each node stands behind those below it.
    pub(super) entries: Vec<Entry>,
    next_name: u64,
    next_user: u64,
}

impl State {
    pub(super) fn find(&self, name: &str) -> Result<usize> {
        let found = self.entries.iter().position(|e| *e.name == *name);
        found.ok_or_else(|| names::not_found(name, self.entries.iter().map(|e| &*e.name)))
    }

    pub(super) fn entry(&self, name: &str) -> Result<&Entry> {
        self.find(name).map(|index| &self.entries[index])
    }

    pub(super) fn names(&self) -> Vec<String> {
        let of = |nameless| {
            let fitting = self.entries.iter().filter(move |e| e.nameless == nameless);
            fitting.map(|e| e.name.to_string())
        };
        of(false).chain(of(true)).collect()
    }

    /// Takes the name, for a node that will stand above nothing so far.
    pub(super) fn reserve(&mut self, name: Option<&str>, read_only: bool) -> Result<String> {
        if let Some(name) = name {
            names::check(name)?;
            if self.entries.iter().any(|e| *e.name == *name) {
                let message = format!("Duplicate nodes with node-name='{name}'");
                return Err(Error::new(Kind::Exists, message));
            }
        }
        let given = name.is_some();
        let name = name.map_or_else(|| self.make_name(), str::to_owned);
        self.entries.push(Entry {
            name: name.as_str().into(),
            occupant: Occupant::Opening { read_only },
            wraps: Vec::new(),
            children: Vec::new(),
            users: Vec::new(),
            nameless: !given,
            drains: 0,
        });
        Ok(name)
    }

    /// Puts the node of this name, which is being opened, above another one.
    pub(super) fn add_child(&mut self, name: &str, child: &str, role: ChildRole) -> Result<()> {
        let index = self.find(name)?;
        let below = self.entry(child)?;
        below.node()?;
        let child = Arc::clone(&below.name);
        let before = self.claims();
        self.entries[index].children.push((child, role));
        self.settle(&before).inspect_err(|_| {
            let before = self.claims();
            self.entries[index].children.pop();
            self.relax(&before);
        })
    }

    /// Puts the node at its place. On an error the place stays as it was.
    pub(super) fn fill(&mut self, name: &str, node: Arc<dyn Node>) -> Result<()> {
        let index = self.find(name)?;
        let before = self.claims();
        let there = &mut self.entries[index].occupant;
        let opening = std::mem::replace(there, Occupant::unwrapped(node));
        self.settle(&before)
            .and_then(|()| self.update_node(index, &before[index]))
            .inspect_err(|_| {
                let before = self.claims();
                self.entries[index].occupant = opening;
                self.relax(&before);
            })
    }

    fn make_name(&mut self) -> String {
        self.next_name += 1;
        format!("#block{:03}", self.next_name)
    }

    /// Takes a node out, and those below that nobody named and nobody needs.
    pub(super) fn remove(&mut self, name: &str) -> Result<Vec<Arc<dyn Node>>> {
        let index = self.check_unused(name)?;
        let mut before = self.claims();
        before.remove(index);
        let entry = self.entries.remove(index);
        self.relax(&before);
        let mut removed = match entry.occupant {
            Occupant::Node { bare, .. } => vec![bare],
            Occupant::Opening { .. } => Vec::new(),
        };
        for (child, _) in entry.children {
            let orphan = self.entry(&child).is_ok_and(|c| c.nameless);
            // A child that somebody else needs refuses, and stays.
            if orphan && let Ok(more) = self.remove(&child) {
                removed.extend(more);
            }
        }
        Ok(removed)
    }

    /// The index of a node that could be removed.
    pub(super) fn check_unused(&self, name: &str) -> Result<usize> {
        let index = self.find(name)?;
        let user = self.entries[index]
            .users
            .first()
            .map(|u| u.name.to_string());
        let parent = self.entries.iter().find(|e| e.is_above(name));
        let parent = parent.map(|e| format!("node '{}'", e.name));
        if let Some(by) = user.or(parent) {
            return Err(busy(format!("Node {name} is in use by {by}")));
        }
        if self.entries[index].drains > 0 {
            return Err(busy(format!("Node {name} is in use: it is being drained")));
        }
        Ok(index)
    }

    /// A node, and those below it that nobody named and that nobody else needs, those above first.
    pub(super) fn goes_with(&self, name: &str) -> Vec<String> {
        let mut gone: Vec<String> = Vec::new();
        // From above to below: what stands above a node is behind it in the list.
        for entry in self.entries.iter().rev() {
            let above = self.parents(&entry.name);
            let orphaned = !above.is_empty() && above.iter().all(|parent| gone.contains(parent));
            let goes = entry.nameless && entry.users.is_empty() && orphaned;
            if goes || *entry.name == *name {
                gone.push(entry.name.to_string());
            }
        }
        gone
    }

    pub(super) fn parents(&self, name: &str) -> Vec<String> {
        let above = self.entries.iter().filter(|e| e.is_above(name));
        above.map(|e| e.name.to_string()).collect()
    }

    /// The indices of a node and of everything above it.
    fn with_ancestors(&self, from: usize) -> Vec<usize> {
        let mut seen = HashSet::from([from]);
        let mut found = vec![from];
        let mut at = 0;
        while at < found.len() {
            let name = &self.entries[found[at]].name;
            for (index, entry) in self.entries.iter().enumerate() {
                if entry.is_above(name) && seen.insert(index) {
                    found.push(index);
                }
            }
            at += 1;
        }
        found
    }

    /// The nodes of these names, and those below them.
    pub(super) fn with_descendants(&self, names: &[String]) -> Vec<Arc<dyn Node>> {
        let mut wanted: HashSet<&str> = names.iter().map(String::as_str).collect();
        let mut found = Vec::new();
        // From above to below: what stands above a node is behind it in the list.
        for entry in self.entries.iter().rev() {
            if wanted.contains(&*entry.name) {
                wanted.extend(entry.children.iter().map(|(child, _)| &**child));
                found.extend(entry.bare().ok().cloned());
            }
        }
        found
    }

    /// Everybody's claims on each node.
    pub(super) fn claims(&self) -> Vec<Vec<Claim>> {
        let mut all: Vec<Vec<Claim>> = self.entries.iter().map(own_claims).collect();
        // From above to below: what stands above a node is behind it in the list.
        for (index, entry) in self.entries.iter().enumerate().rev() {
            for (number, (child, role)) in entry.children.iter().enumerate() {
                let (name, read_only) = (&entry.name, entry.read_only());
                let flow = claims::below(&all[index], name, read_only, number, *role);
                let Ok(child) = self.find(child) else {
                    continue;
                };
                for claim in flow {
                    // A user may reach a node by two ways.
                    if all[child].iter().all(|other| other.holder != claim.holder) {
                        all[child].push(claim);
                    }
                }
            }
        }
        all
    }

    pub(super) fn is_written(&self, name: &str) -> Result<bool> {
        let (used, _) = claims::fold(&self.claims()[self.find(name)?]);
        Ok(!(used & !Permissions::CONSISTENT_READ).is_empty())
    }

    /// Something was added since the claims were `before`: refused if that conflicts with what was there, if it writes
    /// what cannot be written, or if another process holds an image. Undo it then, and [`State::relax`].
    pub(super) fn settle(&self, before: &[Vec<Claim>]) -> Result<()> {
        let after = self.claims();
        let changes = || self.entries.iter().zip(before.iter().zip(&after));
        for (entry, (old, new)) in changes() {
            let is_new = |claim: &Claim| !old.contains(claim);
            claims::check(&entry.name, new, is_new)?;
            let writes = Permissions::WRITE | Permissions::RESIZE;
            let writes = |claim: &&Claim| !(claim.perm & writes).is_empty() && is_new(claim);
            if let Some(claim) = new.iter().find(writes)
                && entry.read_only()
            {
                let (name, who) = (&entry.name, &claim.who);
                let message =
                    format!("Block node is read-only ('{name}', which {who} needs to write)");
                return Err(Error::new(Kind::ReadOnly, message));
            }
        }
        for (index, (_, (old, new))) in changes().enumerate() {
            if old != new {
                self.update_node(index, new)?;
            }
        }
        Ok(())
    }

    /// Something was taken away since the claims were `before`.
    pub(super) fn relax(&self, before: &[Vec<Claim>]) {
        let after = self.claims();
        for (index, (old, new)) in before.iter().zip(&after).enumerate() {
            if old != new
                && let Err(error) = self.update_node(index, new)
            {
                // Holding less than before meets no conflict; only a failing fcntl gets here, and leaves too many
                // locks.
                let node = &*self.entries[index].name;
                tracing::warn!(node, %error, "cannot relax the permissions of a node");
            }
        }
    }

    /// Tells every node again what is done with it, after some were told of what did not come to be.
    pub(super) fn restore(&self) {
        for (index, claims) in self.claims().iter().enumerate() {
            if let Err(error) = self.update_node(index, claims) {
                let node = &*self.entries[index].name;
                tracing::error!(node, %error, "cannot restore the permissions of a node");
            }
        }
    }

    fn update_node(&self, index: usize, claims: &[Claim]) -> Result<()> {
        let (used, shared) = claims::fold(claims);
        match &self.entries[index].occupant {
            Occupant::Node { bare, .. } => bare.set_permissions(used, shared),
            Occupant::Opening { .. } => Ok(()),
        }
    }

    pub(super) fn attach(&mut self, name: &str, user: User) -> Result<u64> {
        let index = self.find(name)?;
        let node = self.entries[index].node()?;
        let writes = Permissions::WRITE | Permissions::RESIZE;
        if !(user.perm & writes).is_empty() && node.read_only() {
            let message = format!("Node '{name}' is read-only: {} cannot write it", user.name);
            return Err(Error::new(Kind::ReadOnly, message));
        }
        if self.entries[index].drains > 0 {
            let message = format!("Node '{name}' is being drained: {} must wait", user.name);
            return Err(busy(message));
        }
        let before = self.claims();
        self.next_user += 1;
        let id = self.next_user;
        self.entries[index].users.push(UserEntry {
            id,
            name: user.name.into(),
            perm: user.perm,
            shared: user.shared,
            brake: Brake::new(user.drain),
            follows: user.follows,
        });
        if let Err(error) = self.settle(&before) {
            drop(self.detach(id));
            return Err(error);
        }
        Ok(id)
    }

    /// Where a user is: the index of its node, and its own there.
    fn user(&self, id: u64) -> Option<(usize, usize)> {
        let mut nodes = self.entries.iter().enumerate();
        nodes.find_map(|(index, entry)| {
            let position = entry.users.iter().position(|user| user.id == id)?;
            Some((index, position))
        })
    }

    pub(super) fn node_of(&self, id: u64) -> Option<String> {
        let (index, _) = self.user(id)?;
        Some(self.entries[index].name.to_string())
    }

    /// Changes what a user does with its node.
    pub(super) fn use_for(&mut self, id: u64, perm: Permissions) -> Result<()> {
        let Some((index, position)) = self.user(id) else {
            return Ok(());
        };
        let before = self.claims();
        let old = std::mem::replace(&mut self.entries[index].users[position].perm, perm);
        self.settle(&before).inspect_err(|_| {
            let before = self.claims();
            self.entries[index].users[position].perm = old;
            self.relax(&before);
        })
    }

    pub(super) fn detach(&mut self, id: u64) -> Option<UserEntry> {
        let (index, position) = self.user(id)?;
        let before = self.claims();
        let gone = self.entries[index].users.remove(position);
        self.relax(&before);
        Some(gone)
    }

    /// Notes a drain on the node and those above, and hands out the brakes of their users.
    pub(super) fn drain_begins(&mut self, name: &str) -> Result<(Vec<String>, Vec<Arc<Brake>>)> {
        let index = self.find(name)?;
        let mut brakes = Vec::new();
        let mut nodes = Vec::new();
        for above in self.with_ancestors(index) {
            let entry = &mut self.entries[above];
            entry.drains += 1;
            nodes.push(entry.name.to_string());
            brakes.extend(entry.users.iter().map(|u| Arc::clone(&u.brake)));
        }
        Ok((nodes, brakes))
    }

    pub(super) fn drain_ended(&mut self, nodes: &[String]) {
        for entry in &mut self.entries {
            if nodes.iter().any(|name| **name == *entry.name) {
                entry.drains -= 1;
            }
        }
    }
}

/// Those of the node's own users.
fn own_claims(entry: &Entry) -> Vec<Claim> {
    let users = entry.users.iter().map(|user| Claim {
        holder: Holder::User(user.id),
        who: Arc::clone(&user.name),
        perm: user.perm,
        shared: user.shared,
    });
    users.collect()
}
