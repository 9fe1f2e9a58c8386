//! Changing what stands where while it is in use: several changes at once, all or none. Whoever is given another node has been
//! drained before. Nodes are immutable as far as what they stand on goes: those above a change are made anew
//! ([`Node::on_children`]), up to the users. It never does I/O.

use std::collections::HashSet;
use std::sync::Arc;

use super::claims::{ChildRole, Claim, Claims};
use super::drain::{Brake, DrainHook};
use super::state::{Entry, Occupant, State};
use super::{Graph, busy};
use crate::error::{Error, Kind, Result};
use crate::node::{Node, Wrap};

/// One change of [`Graph::change`].
pub enum Change {
    /// Puts something between a node and all who are above it.
    Wrap {
        /// The node.
        node: String,
        /// What is put there, outside of what is there already.
        wrap: Arc<dyn Wrap>,
    },
    /// Takes it away again.
    Unwrap {
        /// The node.
        node: String,
        /// The same one as was given before.
        wrap: Arc<dyn Wrap>,
    },
    /// Puts a node on another one than before, or on one more, or on one less.
    SetChild {
        /// The node above.
        parent: String,
        /// What it needs the other one for; if there are several for that, the first is meant.
        role: ChildRole,
        /// The node below; `None` takes the edge away.
        child: Option<String>,
    },
    /// Everyone above one node, users that [follow](super::User::follows) and nodes, is put on another one, which itself stays
    /// where it is.
    Replace {
        /// The node that they stand on.
        from: String,
        /// The node that they will stand on.
        to: String,
    },
    /// What a node reads of its backing node is, from now on or not any more, put into it before somebody changes it there: so
    /// others may write the backing node while it is used, but not change its size.
    Fleece {
        /// The node above.
        node: String,
        /// Whether it is so.
        on: bool,
    },
    /// The node of this name is another object from now on.
    Swap {
        /// The node.
        node: String,
        /// What takes its place; made on what is below it after all of the changes.
        with: Arc<dyn Node>,
    },
}

/// Whom to tell about which node.
struct Tell {
    hook: Arc<dyn DrainHook>,
    node: Arc<dyn Node>,
    /// What keeps the user stopped, and the name of the node.
    brake: Arc<Brake>,
    name: Arc<str>,
}

type Told = Vec<Tell>;

impl Graph {
    /// Makes all of the changes, or none. Whoever is to see another node from then on must be drained ([`Graph::drain`]) and
    /// stays so; nodes that go with those above, and that nothing stands on any more, are taken out and returned, so that
    /// they can be closed ([`Node::close`]).
    ///
    /// [`Kind::NotFound`] for unknown names; [`Kind::Busy`] if what somebody does with a node conflicts with what others let
    /// them after the change, if somebody cannot be given another node, or if what is
    /// [copied](super::Attachment::copies) would come to be copied again; [`Kind::ReadOnly`] if somebody writes what cannot be
    /// written then; [`Kind::Invalid`] for a node above itself; [`Kind::Unsupported`] if a node cannot be put on another.
    pub fn change(&self, changes: &[Change]) -> Result<Vec<Arc<dyn Node>>> {
        // Dropped after all locks: it may hold the last of a user.
        let mut told = Told::new();
        let _one_at_a_time = self.1.lock();
        let (before, removed) = {
            let mut state = self.0.lock();
            let mut next = state.clone();
            let swapped = next.apply(changes)?;
            next.sort()?;
            next.reindex();
            next.check_copies()?;
            next.rebuild(&state, &swapped)?;
            let removed = next.take_orphans(&state);
            next.reindex();
            next.whom_to_tell(&state, &mut told)?;
            next.settle_after(&state)?;
            next.hand_over(&told);
            (std::mem::replace(&mut *state, next), removed)
        };
        // Nobody has anything in flight, and whoever drained them lets them go on later than this.
        for one in &told {
            one.hook.switch(Arc::clone(&one.node));
        }
        drop(before);
        Ok(removed)
    }
}

impl State {
    /// What the changes say, without any node being made. Returns the names of nodes that were swapped.
    fn apply(&mut self, changes: &[Change]) -> Result<HashSet<Arc<str>>> {
        let mut swapped = HashSet::new();
        for change in changes {
            match change {
                Change::Wrap { node, wrap } => {
                    let index = self.present(node)?;
                    self.entries[index].wraps.push(Arc::clone(wrap));
                }
                Change::Unwrap { node, wrap } => {
                    let index = self.present(node)?;
                    let wraps = &mut self.entries[index].wraps;
                    wraps.retain(|there| !same(there, wrap));
                }
                Change::SetChild {
                    parent,
                    role,
                    child,
                } => self.set_child(parent, *role, child.as_deref())?,
                Change::Replace { from, to } => self.replace(from, to)?,
                Change::Fleece { node, on } => {
                    let index = self.present(node)?;
                    self.entries[index].fleeces = *on;
                }
                Change::Swap { node, with } => {
                    let index = self.present(node)?;
                    let entry = &mut self.entries[index];
                    entry.occupant = Occupant::unwrapped(Arc::clone(with));
                    swapped.insert(Arc::clone(&entry.name));
                }
            }
        }
        Ok(swapped)
    }

    /// The index of a node that is open.
    fn present(&self, name: &str) -> Result<usize> {
        let index = self.find(name)?;
        self.entries[index].bare()?;
        Ok(index)
    }

    fn set_child(&mut self, parent: &str, role: ChildRole, child: Option<&str>) -> Result<()> {
        let index = self.present(parent)?;
        let child = child.map(|name| self.present(name)).transpose()?;
        let child = child.map(|index| Arc::clone(&self.entries[index].name));
        let children = &mut self.entries[index].children;
        let edge = children.iter().position(|(_, there)| *there == role);
        match (edge, child) {
            (Some(edge), Some(child)) => children[edge].0 = child,
            (Some(edge), None) => drop(children.remove(edge)),
            (None, Some(child)) => children.push((child, role)),
            (None, None) => {}
        }
        Ok(())
    }

    fn replace(&mut self, from: &str, to: &str) -> Result<()> {
        let (old, new) = (self.present(from)?, self.present(to)?);
        if old == new {
            return Ok(());
        }
        let users = std::mem::take(&mut self.entries[old].users);
        let (follow, stay): (Vec<_>, Vec<_>) = users.into_iter().partition(|user| user.follows);
        self.entries[old].users = stay;
        self.entries[new].users.extend(follow);
        let to = Arc::clone(&self.entries[new].name);
        for entry in self.entries.iter_mut().filter(|entry| entry.name != to) {
            for (child, _) in &mut entry.children {
                if **child == *from {
                    *child = Arc::clone(&to);
                }
            }
        }
        Ok(())
    }

    /// Puts each node behind those below it again.
    fn sort(&mut self) -> Result<()> {
        let mut rest = std::mem::take(&mut self.entries);
        let mut placed: HashSet<Arc<str>> = HashSet::new();
        while !rest.is_empty() {
            let stands = |entry: &Entry| entry.children.iter().all(|(c, _)| placed.contains(c));
            let Some(next) = rest.iter().position(stands) else {
                let name = &rest[0].name;
                let message = format!("Node '{name}' would stand above itself");
                return Err(Error::new(Kind::Invalid, message));
            };
            let entry = rest.remove(next);
            placed.insert(Arc::clone(&entry.name));
            self.entries.push(entry);
        }
        Ok(())
    }

    /// Makes those nodes anew below which something is not as it was, and wraps those anew that need it.
    fn rebuild(&mut self, before: &Self, swapped: &HashSet<Arc<str>>) -> Result<()> {
        let mut moved: HashSet<Arc<str>> = HashSet::new();
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            let old = before.entry(&entry.name)?;
            let (Occupant::Node { bare, shown }, Ok(old_shown)) = (&entry.occupant, old.node())
            else {
                continue;
            };
            let is_swapped = swapped.contains(&entry.name);
            let stale = old.children != entry.children
                || entry
                    .children
                    .iter()
                    .any(|(child, _)| moved.contains(child));
            let remade = stale && !is_swapped;
            let bare = match remade {
                true => bare.on_children(&self.below(entry)?)?,
                false => Arc::clone(bare),
            };
            let rewrapped = entry.wraps.len() != old.wraps.len()
                || entry.wraps.iter().zip(&old.wraps).any(|(a, b)| !same(a, b));
            let shown = match remade || rewrapped || is_swapped {
                true => {
                    let wraps = entry.wraps.iter();
                    wraps.fold(Arc::clone(&bare), |node, wrap| wrap.over(node))
                }
                false => Arc::clone(shown),
            };
            if !same(&shown, old_shown) {
                moved.insert(Arc::clone(&entry.name));
            }
            self.entries[index].occupant = Occupant::Node { bare, shown };
        }
        Ok(())
    }

    fn below(&self, entry: &Entry) -> Result<Vec<(ChildRole, Arc<dyn Node>)>> {
        let children = entry.children.iter();
        let child = |(name, role): &(Arc<str>, ChildRole)| {
            Ok((*role, Arc::clone(self.entry(name)?.node()?)))
        };
        children.map(child).collect()
    }

    /// Takes out what goes with those above, nobody uses and, other than before, nothing stands on.
    fn take_orphans(&mut self, before: &Self) -> Vec<Arc<dyn Node>> {
        let mut taken = Vec::new();
        // From above to below, as what goes may leave others alone.
        for index in (0..self.entries.len()).rev() {
            let entry = &self.entries[index];
            let alone = entry.goes_along && entry.users.is_empty();
            let alone = alone && self.parents(&entry.name).is_empty();
            if alone && !before.parents(&entry.name).is_empty() {
                let entry = self.entries.remove(index);
                taken.extend(entry.bare().cloned());
            }
        }
        taken
    }

    /// The users who see another node than before.
    fn whom_to_tell(&self, before: &Self, told: &mut Told) -> Result<()> {
        for entry in &self.entries {
            let Ok(shown) = entry.node() else { continue };
            for user in &entry.users {
                let mut nodes = before.entries.iter();
                let had = nodes.find(|e| e.users.iter().any(|u| u.is(user)));
                let had = had.and_then(|e| e.node().ok());
                if had.is_some_and(|old| same(old, shown)) {
                    continue;
                }
                let who = &user.name;
                if !user.brake.has_hook() {
                    return Err(busy(format!("{who} cannot be given another node")));
                }
                let Some(hook) = user.brake.hook() else {
                    // It is on its way out, and uses nothing any more.
                    continue;
                };
                told.push(Tell {
                    hook,
                    node: Arc::clone(shown),
                    brake: Arc::clone(&user.brake),
                    name: Arc::clone(&entry.name),
                });
                if !user.brake.is_held() {
                    return Err(busy(format!("{who} is not drained")));
                }
            }
        }
        Ok(())
    }

    /// Whoever is put on a node that somebody else drains stands still for that drain as well. What was drained for the change is
    /// let go on later than it, so all of them are held.
    fn hand_over(&self, told: &Told) {
        for one in told {
            for drain in self.drains_of(&one.name) {
                let mut held = drain.held.lock();
                let mut known = held.iter().chain(&drain.left_out);
                let known = known.any(|brake| Arc::ptr_eq(brake, &one.brake));
                if !known && one.brake.hold_too() {
                    held.push(Arc::clone(&one.brake));
                }
            }
        }
    }

    /// As [`State::settle`], for changes that may take away as well as add, with everything put back on an error.
    fn settle_after(&self, before: &Self) -> Result<()> {
        let claims = before.claims();
        let had = |entry: &Entry| -> Vec<Claim> {
            let there = before.find(&entry.name).ok();
            // A node that was swapped has not been told of any permission.
            let there = there.filter(|at| is_same_bare(&before.entries[*at], entry));
            there.map_or(Vec::new(), |at| claims.on(at).to_vec())
        };
        let had = Claims {
            indices: (0..self.entries.len()).collect(),
            all: self.entries.iter().map(had).collect(),
        };
        self.settle(&had).inspect_err(|_| before.restore())
    }
}

fn is_same_bare(a: &Entry, b: &Entry) -> bool {
    matches!((a.bare(), b.bare()), (Ok(a), Ok(b)) if same(a, b))
}

fn same<T: ?Sized>(a: &Arc<T>, b: &Arc<T>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(a), Arc::as_ptr(b))
}
