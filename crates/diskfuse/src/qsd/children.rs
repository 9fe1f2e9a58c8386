//! The nodes below one that is being made: found by their names, or written inside it and made with it. On an error
//! those made go again, so that the graph is as it was.

use std::sync::Arc;

use diskfuse_block::Node;
use diskfuse_monitor::blockdev::{DetectZeroes, Discard};
use diskfuse_monitor::{BlockRef, BlockdevOptions};

use super::nodes::Nodes;
use crate::error::{Error, Result};

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

    /// The node that a filter of these options stands on.
    pub(super) fn filtered(
        &mut self,
        reference: &BlockRef,
        filter: &BlockdevOptions,
    ) -> Result<Child> {
        match reference {
            BlockRef::Name(name) => {
                refuse_zero_detection(filter)?;
                self.find(name)
            }
            BlockRef::Inline(inside) => self.make(&with_outer_say(inside, filter)),
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

    /// The node above is made: its children stay, for as long as it does.
    pub(super) fn keep(mut self) {
        for name in self.made.drain(..) {
            // It is there: it was made for this.
            let _ = self.nodes.graph.make_go_along(&name);
        }
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

/// Filters hand discards and zeroes down as they are, so a node written inside one acts on what the filter says: it
/// discards only if both do, and looks for zeroes if one of them does.
pub(super) fn with_outer_say(inside: &BlockdevOptions, outer: &BlockdevOptions) -> BlockdevOptions {
    let mut inside = inside.clone();
    if outer.discard == Discard::Ignore {
        inside.discard = Discard::Ignore;
    }
    if outer.detect_zeroes != DetectZeroes::Off {
        inside.detect_zeroes = outer.detect_zeroes;
    }
    inside
}

fn refuse_zero_detection(options: &BlockdevOptions) -> Result<()> {
    if options.detect_zeroes == DetectZeroes::Off {
        return Ok(());
    }
    let driver = options.driver.name();
    Err(Error::Refused(format!(
        "Parameter 'detect-zeroes' of a {driver} node over a named node is not built into this version yet \
         (set it on the node below)"
    )))
}
