//! What the graph knows, under its one lock: nodes, edges, users. Everything here is bookkeeping but one thing: image
//! locks follow the permissions.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::Mutex;

use super::claims::ChildRole;
use super::drain::{Brake, Drain};
use super::{User, busy, names};
use crate::error::{Error, Kind, Result};
use crate::node::{Node, Wrap};
use crate::permissions::Permissions;

#[derive(Clone, Debug)]
pub(super) struct UserEntry {
    pub(super) id: u64,
    pub(super) name: Arc<str>,
    pub(super) perm: Permissions,
    pub(super) shared: Permissions,
    /// Nodes that may see the node beside it; `None` if everybody may.
    pub(super) readers: Option<Arc<[String]>>,
    /// The node whose copy it keeps here.
    pub(super) copies: Option<Arc<str>>,
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
    /// Nobody named it.
    pub(super) nameless: bool,
    /// It goes with the last node above it: nobody named it, or it was made along with that one.
    pub(super) goes_along: bool,
    /// What it reads of its backing node is put into it before somebody changes it there.
    pub(super) fleeces: bool,
    /// Nodes between which there is a way of edges have the same number; others may have. What happens to one node concerns
    /// nobody else.
    island: u64,
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

    pub(super) fn read_only(&self) -> bool {
        match &self.occupant {
            Occupant::Opening { read_only } => *read_only,
            Occupant::Node { bare, .. } => bare.read_only(),
        }
    }

    pub(super) fn is_above(&self, name: &str) -> bool {
        self.children.iter().any(|(child, _)| **child == *name)
    }
}

/// None of this is on the way of a request. There may be thousands of nodes, of many images: what is done to one looks at those of
/// its island, and passes the others by.
#[derive(Clone, Default)]
pub(super) struct State {
    /// Each node stands behind those below it.
    pub(super) entries: Vec<Entry>,
    /// Where each of them stands.
    pub(super) places: HashMap<Arc<str>, usize>,
    /// Those that there are.
    pub(super) drains: Vec<Drain>,
    next_drain: u64,
    next_island: u64,
    next_name: u64,
    next_user: u64,
}

impl State {
    pub(super) fn find(&self, name: &str) -> Result<usize> {
        let found = self.places.get(name).copied();
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
            if self.places.contains_key(name) {
                let message = format!("Duplicate nodes with node-name='{name}'");
                return Err(Error::new(Kind::Exists, message));
            }
        }
        let given = name.is_some();
        let name = name.map_or_else(|| self.make_name(), str::to_owned);
        self.next_island += 1;
        let shared: Arc<str> = name.as_str().into();
        self.places.insert(Arc::clone(&shared), self.entries.len());
        self.entries.push(Entry {
            name: shared,
            occupant: Occupant::Opening { read_only },
            wraps: Vec::new(),
            children: Vec::new(),
            users: Vec::new(),
            nameless: !given,
            goes_along: !given,
            fleeces: false,
            island: self.next_island,
        });
        Ok(name)
    }

    /// Puts the node of this name, which is being opened, above another one.
    pub(super) fn add_child(&mut self, name: &str, child: &str, role: ChildRole) -> Result<()> {
        let mut index = self.find(name)?;
        let below = self.entry(child)?;
        below.node()?;
        let (child, island) = (Arc::clone(&below.name), below.island);
        let joined = self.entries[index].island;
        for entry in self.entries.iter_mut().filter(|e| e.island == island) {
            entry.island = joined;
        }
        // The child may have come after the place was taken. Nothing stands on a node that is being opened.
        if self.find(&child)? > index {
            index = self.move_behind_all(index);
        }
        let before = self.claims_around(index);
        self.entries[index].children.push((child, role));
        self.settle(&before).inspect_err(|_| {
            let before = self.claims_around(index);
            self.entries[index].children.pop();
            self.relax(&before);
        })
    }

    /// Puts a node that nothing stands on behind all others, and returns its index.
    fn move_behind_all(&mut self, index: usize) -> usize {
        let entry = self.entries.remove(index);
        for place in self.places.values_mut().filter(|place| **place > index) {
            *place -= 1;
        }
        let last = self.entries.len();
        self.places.insert(Arc::clone(&entry.name), last);
        self.entries.push(entry);
        last
    }

    /// Puts the node at its place. On an error the place stays as it was.
    pub(super) fn fill(&mut self, name: &str, node: Arc<dyn Node>) -> Result<()> {
        let index = self.find(name)?;
        let before = self.claims_around(index);
        let there = &mut self.entries[index].occupant;
        let opening = std::mem::replace(there, Occupant::unwrapped(node));
        self.settle(&before)
            .and_then(|()| self.update_node(index, before.on(index)))
            .inspect_err(|_| {
                let before = self.claims_around(index);
                self.entries[index].occupant = opening;
                self.relax(&before);
            })
    }

    fn make_name(&mut self) -> String {
        self.next_name += 1;
        format!("#block{:03}", self.next_name)
    }

    /// The node goes with the last node above it from now on, though somebody named it.
    pub(super) fn goes_along(&mut self, name: &str) -> Result<()> {
        let index = self.find(name)?;
        self.entries[index].goes_along = true;
        Ok(())
    }

    /// Takes a node out, and those below that go along and that nobody needs.
    pub(super) fn remove(&mut self, name: &str) -> Result<Vec<Arc<dyn Node>>> {
        let index = self.check_unused(name)?;
        let mut before = self.claims_around(index);
        before.forget(index);
        let entry = self.entries.remove(index);
        self.places.remove(&entry.name);
        for place in self.places.values_mut().filter(|place| **place > index) {
            *place -= 1;
        }
        self.relax(&before);
        let mut removed = match entry.occupant {
            Occupant::Node { bare, .. } => vec![bare],
            Occupant::Opening { .. } => Vec::new(),
        };
        for (child, _) in entry.children {
            let orphan = self.entry(&child).is_ok_and(|c| c.goes_along);
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
        let parent = self.parents(name).into_iter().next();
        let parent = parent.map(|parent| format!("node '{parent}'"));
        if let Some(by) = user.or(parent) {
            return Err(busy(format!("Node {name} is in use by {by}")));
        }
        if self.drains_of(name).next().is_some() {
            let message = format!("Node {name} is in use: it is being drained");
            return Err(Error::new(Kind::Drained, message));
        }
        Ok(index)
    }

    /// A node, and those below it that go along and that nobody else needs, those above first.
    pub(super) fn goes_with(&self, name: &str) -> Vec<String> {
        let mut gone: Vec<String> = Vec::new();
        // From above to below: what stands above a node is behind it in the list.
        for entry in self.entries.iter().rev() {
            let above = self.parents(&entry.name);
            let orphaned = !above.is_empty() && above.iter().all(|parent| gone.contains(parent));
            let goes = entry.goes_along && entry.users.is_empty() && orphaned;
            if goes || *entry.name == *name {
                gone.push(entry.name.to_string());
            }
        }
        gone
    }

    pub(super) fn parents(&self, name: &str) -> Vec<String> {
        let Ok(below) = self.entry(name) else {
            return Vec::new();
        };
        let near = self.entries.iter().filter(|e| e.island == below.island);
        let above = near.filter(|e| e.is_above(name));
        above.map(|e| e.name.to_string()).collect()
    }

    /// The indices of all nodes of the island of one, ascending.
    pub(super) fn island(&self, index: usize) -> Vec<usize> {
        let island = self.entries[index].island;
        let all = self.entries.iter().enumerate();
        let here = all.filter(|(_, entry)| entry.island == island);
        here.map(|(index, _)| index).collect()
    }

    /// Notes anew where everyone stands, and who belongs together, when entries have been moved or put on others.
    pub(super) fn reindex(&mut self) {
        let names = self.entries.iter().enumerate();
        self.places = names.map(|(at, e)| (Arc::clone(&e.name), at)).collect();
        for index in 0..self.entries.len() {
            self.next_island += 1;
            let own = self.next_island;
            self.entries[index].island = own;
            // What is below is in front of it.
            let children = self.entries[index].children.iter();
            let below = children.filter_map(|(child, _)| self.places.get(child));
            let joined: Vec<u64> = below.map(|at| self.entries[*at].island).collect();
            let before = self.entries[..index].iter_mut();
            for entry in before.filter(|e| joined.contains(&e.island)) {
                entry.island = own;
            }
        }
    }

    /// The indices of a node and of everything above it.
    fn with_ancestors(&self, from: usize) -> Vec<usize> {
        let mut seen = HashSet::from([from]);
        let mut found = vec![from];
        let mut at = 0;
        while at < found.len() {
            let name = &self.entries[found[at]].name;
            for index in self.island(from) {
                if self.entries[index].is_above(name) && seen.insert(index) {
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

    pub(super) fn attach(&mut self, name: &str, user: User) -> Result<u64> {
        let index = self.find(name)?;
        let node = self.entries[index].node()?;
        let writes = Permissions::WRITE | Permissions::RESIZE;
        if !(user.perm & writes).is_empty() && node.read_only() {
            let message = format!(
                "Block node is read-only ('{name}', which {} needs to write)",
                user.name
            );
            return Err(Error::new(Kind::ReadOnly, message));
        }
        if self.drains_of(name).next().is_some() {
            let message = format!("Node '{name}' is being drained: {} must wait", user.name);
            return Err(Error::new(Kind::Drained, message));
        }
        let before = self.claims_around(index);
        self.next_user += 1;
        let id = self.next_user;
        self.entries[index].users.push(UserEntry {
            id,
            name: user.name.into(),
            perm: user.perm,
            shared: user.shared,
            readers: None,
            copies: None,
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
        self.change_user(id, |user| user.perm = perm)
    }

    /// Lets nobody but a user, and the nodes of these names, see its node.
    pub(super) fn show_only_to(&mut self, id: u64, readers: Arc<[String]>) -> Result<()> {
        self.change_user(id, |user| user.readers = Some(readers))
    }

    pub(super) fn change_user(
        &mut self,
        id: u64,
        change: impl FnOnce(&mut UserEntry),
    ) -> Result<()> {
        let Some((index, position)) = self.user(id) else {
            return Ok(());
        };
        let before = self.claims_around(index);
        let old = self.entries[index].users[position].clone();
        change(&mut self.entries[index].users[position]);
        self.settle(&before).inspect_err(|_| {
            let before = self.claims_around(index);
            self.entries[index].users[position] = old;
            self.relax(&before);
        })
    }

    pub(super) fn detach(&mut self, id: u64) -> Option<UserEntry> {
        let (index, position) = self.user(id)?;
        let before = self.claims_around(index);
        let gone = self.entries[index].users.remove(position);
        self.relax(&before);
        Some(gone)
    }

    /// Notes a drain of the node, and says which nodes it concerns, and the brakes of their users. Those are in it, and not held yet.
    pub(super) fn drain_begins(
        &mut self,
        name: &str,
        is_left_out: impl Fn(&Brake) -> bool,
    ) -> Result<(Drain, Vec<String>, Vec<Arc<Brake>>)> {
        let index = self.find(name)?;
        let (mut brakes, mut nodes) = (Vec::new(), Vec::new());
        for above in self.with_ancestors(index) {
            let entry = &self.entries[above];
            nodes.push(entry.name.to_string());
            brakes.extend(entry.users.iter().map(|u| Arc::clone(&u.brake)));
        }
        brakes.retain(|brake| !is_left_out(brake));
        // Also one that is put above the node later.
        let users = self.entries.iter().flat_map(|entry| &entry.users);
        let left_out = users.filter(|user| is_left_out(&user.brake));
        let left_out = left_out.map(|user| Arc::clone(&user.brake)).collect();
        self.next_drain += 1;
        let drain = Drain {
            id: self.next_drain,
            node: Arc::clone(&self.entries[index].name),
            held: Arc::new(Mutex::new(brakes.clone())),
            left_out,
        };
        self.drains.push(drain.clone());
        Ok((drain, nodes, brakes))
    }

    pub(super) fn drain_ended(&mut self, id: u64) {
        self.drains.retain(|drain| drain.id != id);
    }

    /// The drains that concern whoever stands on a node: of itself and of what is below it, by whatever way it came there.
    pub(super) fn drains_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Drain> {
        let below = match self.drains.is_empty() {
            true => HashSet::new(),
            false => self.names_below(name),
        };
        let drains = self.drains.iter();
        drains.filter(move |drain| below.contains(&*drain.node))
    }

    /// The names of a node and of those below it.
    fn names_below<'a>(&'a self, name: &'a str) -> HashSet<&'a str> {
        let mut found = HashSet::from([name]);
        // From above to below: what stands above a node is behind it in the list.
        for entry in self.entries.iter().rev() {
            if found.contains(&*entry.name) {
                found.extend(entry.children.iter().map(|(child, _)| &**child));
            }
        }
        found
    }
}
