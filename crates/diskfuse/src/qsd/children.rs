//! The nodes below one that is being made: found by their names, or written inside it and made with it. On an error
//! those made go again, so that the graph is as it was.

use std::sync::Arc;

use diskfuse_block::Node;
use diskfuse_monitor::{BlockRef, BlockdevOptions};

use super::nodes::Nodes;
use crate::error::Result;

/// A node of the graph.
pub(super) struct Child {
    pub(super) name: String,
    pub(super) node: Arc<dyn Node>,
}

/// What was made for a node that is being made itself. Dropping it takes all of it away.
pub(super) struct Children<'n> {
    nodes: &'n Nodes,
    made: Vec<String>,
}

impl<'n> Children<'n> {
    /// Nothing so far.
    pub(super) fn new(nodes: &'n Nodes) -> Self {
        Self {
            nodes,
            made: Vec::new(),
        }
    }

    /// The node that is meant, if it is there already; else makes it.
    pub(super) fn get(&mut self, reference: &BlockRef) -> Result<Child> {
        match reference {
            BlockRef::Name(name) => self.find(name),
            BlockRef::Inline(options) => self.make(options),
        }
    }

    /// The node of this name.
    pub(super) fn find(&self, name: &str) -> Result<Child> {
        self.nodes.check_there(name)?;
        Ok(Child {
            name: name.to_owned(),
            node: self.nodes.graph.get(name)?,
        })
    }

    /// A new node.
    pub(super) fn make(&mut self, options: &BlockdevOptions) -> Result<Child> {
        let name = self.nodes.add(options)?;
        self.adopt(name)
    }

    /// A node that was made for this one by other means.
    pub(super) fn adopt(&mut self, name: String) -> Result<Child> {
        let node = self.nodes.graph.get(&name)?;
        self.made.push(name.clone());
        Ok(Child { name, node })
    }

    /// The node above is made: its children stay.
    pub(super) fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Children<'_> {
    fn drop(&mut self) {
        let graph = &self.nodes.graph;
        for name in self.made.iter().rev() {
            // One without a name goes with the node above it.
            if graph.get(name).is_ok()
                && let Err(error) = graph.remove(name)
            {
                tracing::warn!(%error, "a node is left over");
            }
        }
    }
}
