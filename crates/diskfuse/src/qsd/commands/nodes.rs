//! Commands about nodes: made, taken away, resized, made images of.

use std::path::PathBuf;
use std::sync::Arc;

use diskfuse_block::{Node, SECTOR, downcast};
use diskfuse_image::{Preallocation, create};
use diskfuse_jobs::{JobConfig, run as run_job};
use diskfuse_monitor::commands::{
    BlockDirtyInfo, BlockResize, BlockdevCreate, BlockdevDel, ChangeBackingFile, CompressionType,
    CreateFile, CreateOptions, CreateQcow2, PreallocMode, Qcow2Version,
};
use diskfuse_qcow2::create::CreateOptions as Qcow2Create;
use diskfuse_qcow2::format::{Backing, Compression};
use diskfuse_qcow2::node::Qcow2Node;

use super::Host;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::qsd::live;

/// `blockdev-del`.
pub fn delete(host: &Host, what: &BlockdevDel) -> Result<()> {
    let name = &what.node_name;
    if let Some(job) = host.jobs.job_on(name) {
        return Err(Error::Refused(format!(
            "Node '{name}' is busy: block device is in use by block job: {job}"
        )));
    }
    host.nodes.remove(name)
}

/// `block_resize`.
pub fn resize(host: &Host, daemon: &Daemon, what: &BlockResize) -> Result<()> {
    let name = match (&what.node_name, &what.device) {
        (Some(name), None) | (None, Some(name)) => name,
        _ => return Err(Error::refused("Need exactly one of 'device' and 'node-name'")),
    };
    let Ok(size) = u64::try_from(what.size) else {
        return Err(Error::refused("Parameter 'size' expects a >0 size"));
    };
    let node = live::find(&host.nodes, name)?;
    if !size.is_multiple_of(SECTOR) && node.limits().size_alignment > 1 {
        return Err(Error::refused("The new size must be a multiple of 512"));
    }
    if let Some(job) = host.jobs.job_on(name) {
        return Err(Error::Refused(format!(
            "Node '{name}' is busy: block device is in use by block job: {job}"
        )));
    }
    live::resize::resize(&host.nodes, name, size)?;
    daemon.sizes_changed();
    Ok(())
}

/// `change-backing-file`: the header of an image that is in use says another name.
pub fn change_backing_file(host: &Host, what: &ChangeBackingFile) -> Result<()> {
    let name = &what.image_node_name;
    let bare = live::find(&host.nodes, name)?;
    let Some(image) = downcast::<Qcow2Node>(&*bare) else {
        let driver = bare.driver();
        return Err(Error::Refused(format!(
            "Node '{name}' of driver '{driver}' has no backing file"
        )));
    };
    let Some(backing) = image.children().backing else {
        return Err(Error::refused("not allowing backing file change on an image without a backing file"));
    };
    let format = match backing.driver() {
        "file" | "host_device" => "raw",
        driver => driver,
    };
    let backing = Backing {
        name: what.backing_file.clone(),
        format: Some(format.to_owned()),
    };
    live::while_closed(&host.nodes, name, async |file: &dyn Node| {
        diskfuse_image::header::set_backing(file, Some(backing)).await
    })
}

/// `blockdev-create`.
pub fn create(host: &Host, what: &BlockdevCreate) -> Result<()> {
    let config = JobConfig {
        auto_dismiss: false,
        ..JobConfig::new(what.job_id.clone())
    };
    match &what.options {
        CreateOptions::File(file) => create_file(host, config, file),
        CreateOptions::Qcow2(qcow2) => create_qcow2(host, config, qcow2),
    }
}

fn create_file(host: &Host, config: JobConfig, file: &CreateFile) -> Result<()> {
    let preallocation = preallocation(file.preallocation);
    let (path, size) = (PathBuf::from(&file.filename), file.size);
    let work = move || async move { create::raw_file(&path, size, preallocation).await };
    run_job(&host.jobs, config, Vec::new(), work)?;
    Ok(())
}

fn create_qcow2(host: &Host, config: JobConfig, what: &CreateQcow2) -> Result<()> {
    let name = &what.file.0;
    let file = live::find(&host.nodes, name)?;
    let data_file = match &what.data_file {
        None => None,
        Some(data) => {
            let node = live::find(&host.nodes, &data.0)?;
            let Some(filename) = node.filename() else {
                return Err(Error::Refused(format!("Node '{}' has no file name", data.0)));
            };
            Some((node, filename))
        }
    };
    let options = qcow2_options(what, data_file.as_ref().map(|(_, name)| name.clone()))?;
    let preallocation = preallocation(what.preallocation);
    let used = std::iter::once(name.clone()).chain(what.data_file.iter().map(|d| d.0.clone()));
    let work = move || async move {
        if let Some((data, _)) = data_file {
            data.resize(options.size, diskfuse_block::Resize::Exactly, false).await?;
        }
        create::qcow2_on(&*file, &options, preallocation).await
    };
    run_job(&host.jobs, config, used.collect(), work)?;
    Ok(())
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
