//! Commands about nodes: made, taken away, resized, made snapshots of.

use diskfuse_block::graph::ChildRole;
use diskfuse_block::{BackingName, SECTOR};
use diskfuse_monitor::BlockdevOptions;
use diskfuse_monitor::commands::{
    BlockResize, BlockdevDel, BlockdevReopen, BlockdevSnapshotDeleteInternal, ChangeBackingFile,
    Kind,
};
use serde_json::Value;

use super::Commands;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::qsd::{live, query};

/// `blockdev-add`.
pub fn add(host: &Commands, options: &BlockdevOptions) -> Result<()> {
    if options.node_name.is_none() {
        return Err(Error::refused(
            "'node-name' must be specified for the root node",
        ));
    }
    host.nodes.add(options).map(drop)
}

/// `blockdev-del`.
pub fn delete(host: &mut Commands, what: &BlockdevDel) -> Result<()> {
    let name = &what.node_name;
    if !host.nodes.graph.names().contains(name) {
        return Err(Error::Refused(format!(
            "Failed to find node with node-name='{name}'"
        )));
    }
    if host.nodes.graph.goes_along(name) {
        return Err(Error::Refused(format!(
            "Node {name} is not owned by the monitor"
        )));
    }
    check_free(host, name)?;
    live::check_not_backing(&host.nodes, name)?;
    host.nodes.remove(name)?;
    host.bitmaps.forget(&host.nodes);
    host.thresholds.forget(&host.nodes);
    Ok(())
}

/// `blockdev-reopen`.
pub fn reopen(host: &mut Commands, daemon: &Daemon, what: &BlockdevReopen) -> Result<()> {
    for options in &what.options {
        if let Some(name) = &options.node_name {
            check_free(host, name)?;
        }
    }
    live::reopen::reopen(&host.nodes, &what.options)?;
    host.bitmaps.forget(&host.nodes);
    host.bitmaps.resized(&host.nodes);
    host.thresholds.forget(&host.nodes);
    daemon.sizes_changed();
    Ok(())
}

/// `blockdev-snapshot`.
pub fn snapshot(host: &Commands, daemon: &Daemon, node: &str, overlay: &str) -> Result<()> {
    check_free(host, node)?;
    live::snapshot::snapshot(&host.nodes, node, overlay)?;
    live::writable::seal(&host.nodes, node);
    daemon.sizes_changed();
    Ok(())
}

/// `blockdev-snapshot-internal-sync`.
pub(super) fn snapshot_inside(host: &Commands, device: &str, name: &str) -> Result<()> {
    check_free(host, device)?;
    live::internal::create(&host.nodes, device, name)
}

/// `blockdev-snapshot-delete-internal-sync`.
pub(super) fn delete_snapshot_inside(
    host: &Commands,
    what: &BlockdevSnapshotDeleteInternal,
) -> Result<Value> {
    check_free(host, &what.device)?;
    let (id, name) = (what.id.as_deref(), what.name.as_deref());
    let gone = live::internal::delete(&host.nodes, &what.device, id, name)?;
    Ok(query::snapshot_info(gone.into()).to_value())
}

/// Refuses if a job works on the node.
pub(super) fn check_free(host: &Commands, name: &str) -> Result<()> {
    match host.jobs.job_on(name) {
        None => Ok(()),
        Some(job) => Err(Error::Refused(format!(
            "Node '{name}' is busy: block device is in use by block job: {job}"
        ))),
    }
}

/// `block_resize`.
pub fn resize(host: &Commands, daemon: &Daemon, what: &BlockResize) -> Result<()> {
    let (device, node) = (what.device.as_deref(), what.node_name.as_deref());
    let name = live::named(&host.nodes, device, node)?;
    let Ok(size) = u64::try_from(what.size) else {
        return Err(Error::refused("Parameter 'size' expects a >0 size"));
    };
    live::check_not_backing(&host.nodes, name)?;
    let node = live::find(&host.nodes, name)?;
    if !size.is_multiple_of(SECTOR) && node.limits().size_alignment > 1 {
        return Err(Error::refused("The new size must be a multiple of 512"));
    }
    check_free(host, name)?;
    live::resize::resize(&host.nodes, name, size)?;
    host.bitmaps.resized(&host.nodes);
    daemon.sizes_changed();
    Ok(())
}

/// `change-backing-file`: the header of an image that is in use says another name.
pub fn change_backing_file(host: &Commands, what: &ChangeBackingFile) -> Result<()> {
    let name = &what.image_node_name;
    live::find(&host.nodes, &what.device)?;
    host.nodes.check_node(name)?;
    let edges = host.nodes.graph.edges(name)?;
    let Some((_, below)) = edges.iter().find(|(role, _)| *role == ChildRole::Backing) else {
        return Err(Error::refused(
            "not allowing backing file change on an image without a backing file",
        ));
    };
    let format = match host.nodes.graph.bare(below)?.driver() {
        "file" | "host_device" => "raw",
        driver => driver,
    };
    let backing = BackingName {
        name: what.backing_file.clone(),
        format: Some(format.to_owned()),
    };
    let opened = live::writable::make(&host.nodes, name)?;
    // It is another one if it was opened anew.
    let image = live::find(&host.nodes, name)?;
    let changed = host.nodes.run(image.change_backing(Some(backing)));
    if let Some(opened) = opened {
        live::writable::undo(&host.nodes, &opened);
    }
    Ok(changed??)
}
