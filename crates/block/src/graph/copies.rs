//! Nodes of which users keep copies on other nodes ([`Attachment::copies`]). A write to such a node writes to the copy first; if
//! that came to such a node again, one write could make writes without end. So it must come to none.
//!
//! [`Attachment::copies`]: super::Attachment::copies

use std::collections::HashSet;
use std::sync::Arc;

use super::claims::ChildRole;
use super::state::{Entry, State};
use super::{Graph, busy};
use crate::error::Result;

impl ChildRole {
    /// Whether whoever writes to the node above may write to the one below by that.
    fn passes_writes_on(self) -> bool {
        match self {
            Self::Filtered | Self::File | Self::Data => true,
            Self::Backing => false,
        }
    }
}

impl Graph {
    /// The names of the node and of those that a write to it may be made to: what it filters, its file and its data file, and
    /// theirs. Its backing node is only read.
    pub fn written_by(&self, name: &str) -> Result<Vec<String>> {
        let state = self.0.lock();
        state.entry(name)?;
        let written = state.reach(name, ChildRole::passes_writes_on);
        Ok(written.iter().map(|entry| entry.name.to_string()).collect())
    }

    /// Whether the node `above` is `below`, or stands on it by whatever way.
    pub fn stands_on(&self, above: &str, below: &str) -> Result<bool> {
        let state = self.0.lock();
        state.entry(above)?;
        let found = state.reach(above, |_| true);
        Ok(found.iter().any(|entry| *entry.name == *below))
    }
}

impl State {
    /// The node, if it is there, and those below it that can be come to by edges of these roles.
    fn reach(&self, name: &str, follow: impl Fn(ChildRole) -> bool) -> Vec<&Entry> {
        let (mut found, mut seen) = (Vec::new(), HashSet::new());
        let mut next: Vec<&Entry> = self.entry(name).into_iter().collect();
        while let Some(entry) = next.pop() {
            if !seen.insert(&entry.name) {
                continue;
            }
            found.push(entry);
            let children = entry.children.iter().filter(|(_, role)| follow(*role));
            next.extend(children.filter_map(|(child, _)| self.entry(child).ok()));
        }
        found
    }

    /// Notes that a user keeps a copy of a node on its own.
    pub(super) fn copies(&mut self, id: u64, source: Arc<str>) -> Result<()> {
        self.change_user(id, |user| user.copies = Some(source))?;
        self.check_copies().inspect_err(|_| {
            // Less than before is never refused.
            let _ = self.change_user(id, |user| user.copies = None);
        })
    }

    /// Refuses a graph in which what is written to a copy is copied again, or in which a drain would come back to itself.
    pub(super) fn check_copies(&self) -> Result<()> {
        let copies: Vec<Copy<'_>> = self.entries.iter().flat_map(Copy::kept_on).collect();
        for copy in &copies {
            for written in self.reach(copy.target, ChildRole::passes_writes_on) {
                if copies.iter().any(|other| *other.source == *written.name) {
                    return Err(busy(copy.comes_to(&written.name)));
                }
            }
        }
        // Whoever drains what a copy stands on drains its source, and with it the copies that stand on that one.
        let below = |copy: &Copy<'_>| -> HashSet<&str> {
            let found = self.reach(copy.target, |_| true).into_iter();
            found.map(|entry| &*entry.name).collect()
        };
        let mut left: Vec<_> = copies.iter().map(|copy| (copy, below(copy))).collect();
        loop {
            let leads_on = |(at, (copy, _)): (usize, &(&Copy<'_>, HashSet<&str>))| {
                let mut others = left.iter().enumerate();
                others.any(|(other, (_, below))| other != at && below.contains(copy.source))
            };
            let go_on: Vec<bool> = left.iter().enumerate().map(leads_on).collect();
            if let (Some((copy, _)), true) = (left.last(), go_on.iter().all(|on| *on)) {
                let Copy { source, target } = copy;
                return Err(busy(format!(
                    "Node '{source}' cannot be copied to node '{target}', which stands on nodes that are copied to what stands on '{source}'"
                )));
            }
            if left.is_empty() {
                return Ok(());
            }
            let mut go_on = go_on.into_iter();
            left.retain(|_| go_on.next().unwrap_or(false));
        }
    }
}

/// A copy that a user keeps.
struct Copy<'s> {
    source: &'s str,
    target: &'s str,
}

impl<'s> Copy<'s> {
    fn kept_on(entry: &'s Entry) -> impl Iterator<Item = Self> {
        let sources = entry.users.iter().filter_map(|user| user.copies.as_deref());
        let target = &*entry.name;
        sources.map(move |source| Self { source, target })
    }

    /// That what is written to it is copied again, at a node.
    fn comes_to(&self, again: &str) -> String {
        let Self { source, target } = self;
        let by = match again == *target {
            true => String::new(),
            false => format!(", by way of node '{target}'"),
        };
        match again == *source {
            true => format!("Node '{source}' cannot be copied to itself{by}"),
            false => format!(
                "Node '{again}' cannot be copied while the copy of node '{source}' is written to it{by}"
            ),
        }
    }
}
