//! Commands about nodes: made, taken away, resized, made images of.

use std::path::PathBuf;

use diskfuse_block::graph::{Attachment, ChildRole, User};
use diskfuse_block::{BackingName, Permissions, Resize, SECTOR};
use diskfuse_image::{Preallocation, create};
use diskfuse_jobs::{JobConfig, JobType, run as run_job};
use diskfuse_monitor::BlockdevOptions;
use diskfuse_monitor::commands::{
    BlockResize, BlockdevCreate, BlockdevDel, BlockdevReopen, BlockdevSnapshotDeleteInternal,
    ChangeBackingFile, CompressionType, CreateFile, CreateOptions, CreateQcow2, Kind, PreallocMode,
    Qcow2Version,
};
use diskfuse_qcow2::create::CreateOptions as Qcow2Create;
use diskfuse_qcow2::format::{Backing, Compression};
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
    let ((Some(name), None) | (None, Some(name))) = (&what.node_name, &what.device) else {
        let message = "Need exactly one of 'device' and 'node-name'";
        return Err(Error::refused(message));
    };
    let Ok(size) = u64::try_from(what.size) else {
        return Err(Error::refused("Parameter 'size' expects a >0 size"));
    };
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
    live::find(&host.nodes, name)?;
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

/// `blockdev-create`.
pub fn create(host: &Commands, what: &BlockdevCreate) -> Result<()> {
    let config = JobConfig {
        auto_dismiss: false,
        ..JobConfig::new(what.job_id.clone())
    };
    match &what.options {
        CreateOptions::File(file) => create_file(host, config, file),
        CreateOptions::Qcow2(qcow2) => create_qcow2(host, config, qcow2),
    }
}

fn create_file(host: &Commands, config: JobConfig, file: &CreateFile) -> Result<()> {
    let preallocation = preallocation(file.preallocation);
    let (path, size) = (PathBuf::from(&file.filename), file.size);
    let work = move || async move { create::raw_file(&path, size, preallocation).await };
    run_job(&host.jobs, JobType::Create, config, work)?;
    Ok(())
}

fn create_qcow2(host: &Commands, config: JobConfig, what: &CreateQcow2) -> Result<()> {
    let file = to_be_written(host, &what.file.0)?;
    let data_file = match &what.data_file {
        None => None,
        Some(data) => Some(to_be_written(host, &data.0)?),
    };
    let name_of_data = match &data_file {
        None => None,
        Some(data) => Some(data.node()?.filename().ok_or_else(|| {
            Error::Refused(format!("Node '{}' has no file name", data.node_name()))
        })?),
    };
    let options = qcow2_options(what, name_of_data)?;
    let preallocation = preallocation(what.preallocation);
    let work = move || async move {
        if let Some(data) = data_file {
            let size = options.size;
            data.node()?.resize(size, Resize::Exactly, false).await?;
        }
        create::qcow2_on(&*file.node()?, &options, preallocation).await
    };
    run_job(&host.jobs, JobType::Create, config, work)?;
    Ok(())
}

/// The right to write a whole image to a node, which nobody else may be using for something that this would spoil.
fn to_be_written(host: &Commands, name: &str) -> Result<Attachment> {
    live::find(&host.nodes, name)?;
    let user = User {
        name: "blockdev-create".to_owned(),
        perm: Permissions::WRITER,
        // Whoever writes there would lose it.
        shared: Permissions::CONSISTENT_READ,
        drain: None,
        follows: false,
    };
    Ok(host.nodes.graph.attach(name, user)?)
}

fn qcow2_options(what: &CreateQcow2, data_file: Option<String>) -> Result<Qcow2Create> {
    let defaults = Qcow2Create::default();
    if !what.size.is_multiple_of(SECTOR) {
        return Err(Error::refused("Image size must be a multiple of 512 bytes"));
    }
    let refcount_bits = match what.refcount_bits.map(u32::try_from) {
        None => defaults.refcount_bits,
        Some(Ok(bits)) => bits,
        Some(Err(_)) => {
            return Err(Error::refused(
                "Refcount width must be a power of two and may not exceed 64 bits",
            ));
        }
    };
    Ok(Qcow2Create {
        size: what.size,
        version: match what.version {
            Some(Qcow2Version::V2) => 2,
            Some(Qcow2Version::V3) | None => 3,
        },
        cluster_size: what.cluster_size.unwrap_or(defaults.cluster_size),
        refcount_bits,
        extended_l2: what.extended_l2.unwrap_or(false),
        lazy_refcounts: what.lazy_refcounts.unwrap_or(false),
        backing: what.backing_file.clone().map(|name| Backing {
            name,
            format: what.backing_fmt.clone(),
        }),
        data_file,
        data_file_raw: what.data_file_raw.unwrap_or(false),
        compression: match what.compression_type {
            Some(CompressionType::Zstd) => Compression::Zstd,
            Some(CompressionType::Zlib) | None => Compression::Zlib,
        },
        ..defaults
    })
}

fn preallocation(mode: Option<PreallocMode>) -> Preallocation {
    match mode {
        None | Some(PreallocMode::Off) => Preallocation::Off,
        Some(PreallocMode::Metadata) => Preallocation::Metadata,
        Some(PreallocMode::Falloc) => Preallocation::Falloc,
        Some(PreallocMode::Full) => Preallocation::Full,
    }
}
