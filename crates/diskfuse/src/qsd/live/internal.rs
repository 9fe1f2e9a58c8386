//! Snapshots inside a qcow2 image that is in use (`blockdev-snapshot-internal-sync` and its counterpart).

use std::time::SystemTime;

use diskfuse_block::{Kind, Node, downcast};
use diskfuse_qcow2::node::Qcow2Node;
use diskfuse_qcow2::snapshots::{self, SnapshotInfo};

use super::{find, while_closed};
use crate::error::{Error, Result};
use crate::qsd::nodes::Nodes;

/// Takes a snapshot of the disk as it is at this moment.
pub fn create(nodes: &Nodes, device: &str, name: &str) -> Result<()> {
    let image = check(nodes, device)?;
    if name.is_empty() {
        return Err(Error::refused("Name is empty"));
    }
    let there = nodes.run(snapshots::list(&*image))??;
    if there.iter().any(|snapshot| snapshot.name == name) {
        return Err(Error::Refused(format!(
            "Snapshot with name '{name}' already exists on device '{device}'"
        )));
    }
    while_closed(nodes, device, async |file: &dyn Node| {
        snapshots::create(file, name, SystemTime::now()).await
    })
}

/// Deletes the snapshot that has this id and this name, as far as they are given.
pub fn delete(
    nodes: &Nodes,
    device: &str,
    id: Option<&str>,
    name: Option<&str>,
) -> Result<SnapshotInfo> {
    check(nodes, device)?;
    if id.is_none() && name.is_none() {
        return Err(Error::refused("Name or id must be provided"));
    }
    let deleted = while_closed(nodes, device, async |file: &dyn Node| {
        snapshots::delete_exactly(file, id, name).await
    });
    match deleted {
        Err(Error::Block(error)) if error.kind() == Kind::NotFound => {
            let shown = |word: Option<&str>| word.unwrap_or("null").to_owned();
            Err(Error::Refused(format!(
                "Snapshot with id '{}' and name '{}' does not exist on device '{device}'",
                shown(id),
                shown(name)
            )))
        }
        outcome => outcome,
    }
}

/// The image's file, if the node can have snapshots.
fn check(nodes: &Nodes, device: &str) -> Result<std::sync::Arc<dyn Node>> {
    let bare = find(nodes, device)?;
    let Some(image) = downcast::<Qcow2Node>(&*bare) else {
        let driver = bare.driver();
        return Err(Error::Refused(format!(
            "Block format '{driver}' used by device '{device}' does not support internal snapshots"
        )));
    };
    if image.read_only() {
        return Err(Error::Refused(format!("Device '{device}' is read only")));
    }
    Ok(image.children().file)
}
