//! Opening a node where others could come in between: its name and its right to use its children are taken first, the
//! node comes when it is open.

use std::sync::Arc;

use super::{ChildRole, Graph};
use crate::error::Result;
use crate::node::Node;

/// A place in the graph for a node that is being opened. Its name is taken, and what it stands on is held as if the
/// node were there, also against other processes. Dropping it gives everything back, and takes those children away
/// that nobody named and nobody else needs.
#[must_use = "dropping it gives the place back"]
pub struct Place {
    graph: Graph,
    name: String,
    filled: bool,
}

impl Graph {
    /// Takes a place for a node that is about to be opened, for writing unless `read_only`. The name is as for
    /// [`Graph::insert_above`].
    pub fn reserve(&self, name: Option<&str>, read_only: bool) -> Result<Place> {
        let name = self.0.lock().reserve(name, read_only)?;
        Ok(Place {
            graph: self.clone(),
            name,
            filled: false,
        })
    }
}

impl Place {
    /// The name that the node will have.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node will stand on this one, which is in the graph: from now on it has the right to do with it what the role
    /// says. Errors as [`Graph::insert_above`]'s; the place stays as it was then.
    pub fn stand_on(&mut self, child: &str, role: ChildRole) -> Result<()> {
        self.graph.0.lock().add_child(&self.name, child, role)
    }

    /// Puts the node there, and returns its name. [`Kind::Busy`](crate::Kind::Busy) or
    /// [`Kind::ReadOnly`](crate::Kind::ReadOnly), with everything given back, if it can be written though the place was
    /// taken for reading and that conflicts with somebody.
    pub fn fill(mut self, node: Arc<dyn Node>) -> Result<String> {
        self.graph.0.lock().fill(&self.name, node)?;
        self.filled = true;
        Ok(self.name.clone())
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Place").field(&self.name).finish()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.filled
            && let Err(error) = self.graph.remove(&self.name)
        {
            // Nobody can use a node that is not there yet, so only a drain of what is below is in the way.
            tracing::warn!(node = self.name, %error, "a place in the graph is left over");
        }
    }
}
