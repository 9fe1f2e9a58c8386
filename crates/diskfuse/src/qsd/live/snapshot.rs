//! A new image on top of one that is in use (`blockdev-snapshot`): from then on writes go there, and the old one stays as it
//! is.

use diskfuse_block::downcast;
use diskfuse_block::graph::{Change, ChildRole};
use diskfuse_qcow2::node::Qcow2Node;

use super::{check_not_backing, find};
use crate::error::{Error, Result};
use crate::qsd::nodes::Nodes;

/// Puts `overlay`, an empty image without a backing node (`backing=null`), on top of `node`, and all who use `node` on top of
/// `overlay`.
pub fn snapshot(nodes: &Nodes, node: &str, overlay: &str) -> Result<()> {
    let below = find(nodes, node)?;
    check_not_backing(nodes, node)?;
    let above = find(nodes, overlay)?;
    let Some(image) = downcast::<Qcow2Node>(&*above) else {
        return Err(Error::refused(
            "The overlay does not support backing images",
        ));
    };
    let edges = nodes.graph.edges(overlay)?;
    if edges.iter().any(|(role, _)| *role == ChildRole::Backing) {
        return Err(Error::refused("The overlay already has a backing image"));
    }
    if node == overlay {
        return Err(Error::Refused(format!(
            "Making '{node}' a backing child of '{overlay}' would create a cycle"
        )));
    }
    // That somebody drains it is no use: a transaction may do so for another of its commands.
    let users = nodes.graph.users(overlay)?;
    if !users.is_empty() || !nodes.graph.parents(overlay).is_empty() {
        return Err(Error::refused("The overlay is already in use"));
    }
    if image.children().data_file.is_some() && image.header().data_file_raw() {
        return Err(Error::refused(
            "The overlay has a raw data file, which cannot show a backing image",
        ));
    }
    // Most of it before anybody has to wait.
    nodes.run(below.flush())??;
    let _drained = nodes.drain(node)?;
    // What was written is in the image below, whoever opens it next.
    nodes.run(below.flush())??;
    let changes = [
        Change::Replace {
            from: node.to_owned(),
            to: overlay.to_owned(),
        },
        Change::SetChild {
            parent: overlay.to_owned(),
            role: ChildRole::Backing,
            child: Some(node.to_owned()),
        },
    ];
    nodes.graph.change(&changes)?;
    Ok(())
}
