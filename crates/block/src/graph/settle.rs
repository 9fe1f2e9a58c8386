//! What everybody does with each node, and that nothing of it conflicts: looked at whenever the graph changes, for the nodes that
//! the change may concern. It asks nodes for locks on images and for nothing else.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::claims::{self, Above, Claim, Claims, Holder};
use super::state::{Entry, Occupant, State};
use crate::error::{Error, Kind, Result};
use crate::permissions::Permissions;

impl State {
    /// Everybody's claims on each node.
    pub(super) fn claims(&self) -> Claims {
        self.claims_on((0..self.entries.len()).collect())
    }

    /// Everybody's claims on the nodes that what happens to this one may concern.
    pub(super) fn claims_around(&self, index: usize) -> Claims {
        self.claims_on(self.island(index))
    }

    /// Everybody's claims on the nodes of these indices, which are whole islands, ascending.
    fn claims_on(&self, indices: Vec<usize>) -> Claims {
        let own = indices
            .iter()
            .map(|index| own_claims(&self.entries[*index]));
        let mut all: Vec<Vec<Claim>> = own.collect();
        // There may be thousands on one node: a partition each.
        let holders =
            |claims: &Vec<Claim>| claims.iter().map(|claim| claim.holder.clone()).collect();
        let mut seen: Vec<HashSet<Holder>> = all.iter().map(holders).collect();
        // From above to below: what stands above a node is behind it in the list.
        for (at, index) in indices.iter().enumerate().rev() {
            let entry = &self.entries[*index];
            for (number, (child, role)) in entry.children.iter().enumerate() {
                let node = Above {
                    name: &entry.name,
                    read_only: entry.read_only(),
                    fleeces: entry.fleeces,
                };
                let flow = claims::below(&all[at], &node, number, *role);
                let below = self.places.get(child);
                let Some(child) = below.and_then(|below| indices.binary_search(below).ok()) else {
                    continue;
                };
                for claim in flow {
                    // A user may reach a node by two ways.
                    if seen[child].insert(claim.holder.clone()) {
                        all[child].push(claim);
                    }
                }
            }
        }
        Claims { indices, all }
    }

    /// Whether somebody does more with a node than read it.
    pub(super) fn is_written(&self, name: &str) -> Result<bool> {
        let index = self.find(name)?;
        let (used, _) = claims::fold(self.claims_around(index).on(index));
        Ok(!(used & !Permissions::CONSISTENT_READ).is_empty())
    }

    /// Something was added since the claims were `before`: refused if that conflicts with what was there, if it writes
    /// what cannot be written, or if another process holds an image. Undo it then, and [`State::relax`].
    pub(super) fn settle(&self, before: &Claims) -> Result<()> {
        let after = self.claims_on(before.indices.clone());
        let changes = || before.all.iter().zip(after.iter());
        for (old, (index, new)) in changes().filter(|(old, (_, new))| old[..] != **new) {
            let entry = &self.entries[index];
            let old: HashMap<&Holder, &Claim> = old.iter().map(|c| (&c.holder, c)).collect();
            let is_new = |claim: &Claim| old.get(&claim.holder) != Some(&claim);
            claims::check(&entry.name, new, is_new)?;
            let writes = Permissions::WRITE | Permissions::RESIZE | Permissions::WRITE_UNCHANGED;
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
        for (old, (index, new)) in changes() {
            if old != new {
                self.update_node(index, new)?;
            }
        }
        Ok(())
    }

    /// Something was taken away since the claims were `before`.
    pub(super) fn relax(&self, before: &Claims) {
        let after = self.claims_on(before.indices.clone());
        for (old, (index, new)) in before.all.iter().zip(after.iter()) {
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
        for (index, claims) in self.claims().iter() {
            if let Err(error) = self.update_node(index, claims) {
                let node = &*self.entries[index].name;
                tracing::error!(node, %error, "cannot restore the permissions of a node");
            }
        }
    }

    pub(super) fn update_node(&self, index: usize, claims: &[Claim]) -> Result<()> {
        let (used, shared) = claims::fold(claims);
        match &self.entries[index].occupant {
            Occupant::Node { bare, .. } => bare.set_permissions(used, shared),
            Occupant::Opening { .. } => Ok(()),
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
        readers: user.readers.clone(),
    });
    users.collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Change, ChildRole, Graph, User, busy};
    use super::*;
    use crate::drivers::{NullConfig, RawConfig, open_null, open_raw};

    /// What is done to a graph; numbers choose among the nodes or users that there are.
    #[derive(Clone, Debug)]
    enum Step {
        Leaf,
        Over(usize),
        Attach(usize, bool),
        Detach(usize),
        Remove(usize),
        Put(usize, usize),
        Replace(usize, usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let which = || 0..64usize;
        let step = prop_oneof![
            Just(Step::Leaf),
            which().prop_map(Step::Over),
            (which(), any::<bool>()).prop_map(|(node, writes)| Step::Attach(node, writes)),
            which().prop_map(Step::Detach),
            which().prop_map(Step::Remove),
            (which(), which()).prop_map(|(parent, child)| Step::Put(parent, child)),
            (which(), which()).prop_map(|(from, to)| Step::Replace(from, to)),
        ];
        proptest::collection::vec(step, 1..60)
    }

    /// Steps that do not go are errors, and change nothing.
    fn take(graph: &Graph, users: &mut Vec<u64>, step: &Step) -> Result<()> {
        let names = graph.0.lock().names();
        let name = |number: usize| names.get(number % names.len().max(1)).cloned();
        let name = |number| name(number).ok_or_else(|| busy("there is none".to_owned()));
        match step {
            Step::Leaf => graph
                .insert(None, open_null(&NullConfig::default())?, &[])
                .map(drop),
            Step::Over(below) => {
                let below = name(*below)?;
                let node = open_raw(graph.get(&below)?, &RawConfig::default())?;
                let above = format!("over-{}-{}", below.replace('#', ""), names.len());
                graph.insert(Some(&above), node, &[&below]).map(drop)
            }
            Step::Attach(node, writes) => {
                let (perm, shared) = match writes {
                    true => (Permissions::WRITER, !Permissions::RESIZE),
                    false => (Permissions::READER, Permissions::ALL),
                };
                let user = User {
                    name: "somebody".to_owned(),
                    perm,
                    shared,
                    drain: None,
                    follows: true,
                };
                users.push(graph.0.lock().attach(&name(*node)?, user)?);
                Ok(())
            }
            Step::Detach(number) => {
                if !users.is_empty() {
                    let user = users.swap_remove(number % users.len());
                    drop(graph.0.lock().detach(user));
                }
                Ok(())
            }
            Step::Remove(node) => graph.0.lock().remove(&name(*node)?).map(drop),
            Step::Put(parent, child) => {
                let change = Change::SetChild {
                    parent: name(*parent)?,
                    role: ChildRole::Filtered,
                    child: Some(name(*child)?),
                };
                graph.change(&[change]).map(drop)
            }
            Step::Replace(from, to) => {
                let (from, to) = (name(*from)?, name(*to)?);
                graph.change(&[Change::Replace { from, to }]).map(drop)
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// What is looked at for one node is what a look at the whole graph would show of it, whatever was done before.
        #[test]
        fn nobody_beyond_a_node_s_island_is_concerned(steps in steps()) {
            let graph = Graph::new();
            let mut users = Vec::new();
            for step in &steps {
                let _ = take(&graph, &mut users, step);
                let state = graph.0.lock();
                let all = state.claims();
                for (index, entry) in state.entries.iter().enumerate() {
                    prop_assert_eq!(state.find(&entry.name).unwrap(), index);
                    let near = state.claims_around(index);
                    prop_assert_eq!(near.on(index), all.on(index));
                    for (child, _) in &entry.children {
                        prop_assert!(state.find(child).unwrap() < index);
                        prop_assert!(state.parents(child).contains(&entry.name.to_string()));
                    }
                }
            }
        }
    }
}
