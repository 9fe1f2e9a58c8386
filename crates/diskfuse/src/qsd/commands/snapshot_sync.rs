//! `blockdev-snapshot-sync`: the overlay of a snapshot, made or opened before it is put on top. It must never overwrite an
//! image that is in use, nor leave one behind that nobody has asked to keep.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use diskfuse_block::downcast;
use diskfuse_block::drivers::FileNode;
use diskfuse_block::graph::ChildRole;
use diskfuse_image::create::{Created, NewImage, create};
use diskfuse_image::format::Format;
use diskfuse_image::options::NewImageOptions;
use diskfuse_monitor::blockdev::Discard;
use diskfuse_monitor::commands::{BlockdevSnapshot, BlockdevSnapshotSync, NewImageMode};
use diskfuse_monitor::{BlockDriver, BlockdevOptions};
use serde_json::json;

use super::Commands;
use super::nodes::{check_free, snapshot};
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::qsd::live;
use crate::qsd::nodes::Nodes;

/// A new image and its node, which nobody stands on yet.
pub struct Overlay {
    /// What is to be put on what.
    pub what: BlockdevSnapshot,
    created: Option<Created>,
    /// Bytes of the disk when it was made.
    size: u64,
}

impl Overlay {
    /// It is in its place; the file stays.
    pub fn keep(self) {
        if let Some(created) = self.created {
            created.keep();
        }
    }

    /// The disk stands still: an image that was made while it grew is made anew, as it would cut off what was written since.
    ///
    /// # Errors
    /// Then there is no overlay any more.
    pub fn fit(self, nodes: &Nodes, what: &BlockdevSnapshotSync) -> Result<Self> {
        let below = live::find(nodes, &self.what.node)?;
        if self.created.is_none() || self.size == below.size() {
            return Ok(self);
        }
        self.discard(nodes)?;
        make(nodes, what)
    }

    /// Takes the node away, and the file if it was made for it. Nobody may stand on it any more.
    pub fn discard(self, nodes: &Nodes) -> Result<()> {
        nodes.remove(&self.what.overlay)
    }
}

/// The whole command.
pub fn run(host: &Commands, daemon: &Daemon, what: &BlockdevSnapshotSync) -> Result<()> {
    let nodes = &host.nodes;
    check_free(host, node(nodes, what)?)?;
    let overlay = make(nodes, what)?;
    let stand_still = |node: &str| {
        // Most of it before anybody has to wait.
        nodes.run(live::find(nodes, node)?.flush())??;
        nodes.drain(node)
    };
    let (overlay, outcome) = match stand_still(&overlay.what.node) {
        Ok(_drained) => {
            let overlay = overlay.fit(nodes, what)?;
            let BlockdevSnapshot { node, overlay: top } = &overlay.what;
            let outcome = snapshot(host, daemon, node, top);
            (overlay, outcome)
        }
        Err(error) => (overlay, Err(error)),
    };
    match outcome {
        Ok(()) => {
            overlay.keep();
            Ok(())
        }
        Err(error) => {
            if let Err(error) = overlay.discard(nodes) {
                tracing::warn!(%error, "the overlay of a snapshot that failed is left over");
            }
            Err(error)
        }
    }
}

/// The node that is meant.
pub fn node<'w>(nodes: &Nodes, what: &'w BlockdevSnapshotSync) -> Result<&'w str> {
    live::named(nodes, what.device.as_deref(), what.node_name.as_deref())
}

/// Makes the image, if it is to be made, and its node.
pub fn make(nodes: &Nodes, what: &BlockdevSnapshotSync) -> Result<Overlay> {
    let node = node(nodes, what)?;
    let below = live::find(nodes, node)?;
    live::check_not_backing(nodes, node)?;
    let Some(overlay) = &what.snapshot_node_name else {
        return Err(Error::refused("New overlay node-name missing"));
    };
    if nodes.graph.names().contains(overlay) {
        return Err(Error::refused("New overlay node-name already in use"));
    }
    check_format(what)?;
    let file = Path::new(&what.snapshot_file);
    let size = below.size();
    let created = match what.mode {
        Some(NewImageMode::Existing) => None,
        Some(NewImageMode::AbsolutePaths) | None => {
            check_unused(nodes, file)?;
            let new = NewImage {
                path: file.to_owned(),
                format: Format::Qcow2,
                options: NewImageOptions {
                    size: Some(size),
                    backing_file: Some(path_of(nodes, node)?),
                    backing_fmt: Some(format_of(nodes, node)?),
                    ..NewImageOptions::default()
                },
                force: true,
                // Our own node has it open.
                unchecked_backing: true,
            };
            Some(nodes.run(create(&new))??)
        }
    };
    // Dropped, it removes the file again.
    nodes.add(&options(nodes, node, file, overlay)?)?;
    Ok(Overlay {
        what: BlockdevSnapshot {
            node: node.to_owned(),
            overlay: overlay.clone(),
        },
        created,
        size,
    })
}

/// Only a qcow2 image can stand on another one.
fn check_format(what: &BlockdevSnapshotSync) -> Result<()> {
    let is_there = what.mode == Some(NewImageMode::Existing);
    let message = match (what.format.as_deref(), is_there) {
        (None | Some("qcow2"), _) => return Ok(()),
        (Some("raw"), true) => "The overlay does not support backing images".to_owned(),
        (Some("raw"), false) => "Backing file not supported for file format 'raw'".to_owned(),
        (Some(format), true) => format!("Unknown driver '{format}'"),
        (Some(format), false) => format!("Unknown file format '{format}'"),
    };
    Err(Error::Refused(message))
}

/// The overlay is cached, and discards, as what it stands on.
fn options(nodes: &Nodes, node: &str, file: &Path, overlay: &str) -> Result<BlockdevOptions> {
    let below = nodes.options(node);
    let (direct, no_flush, discards) = below.map_or((false, false, false), |below| {
        let discards = below.discard == Discard::Unmap;
        (below.cache.direct, below.cache.no_flush, discards)
    });
    let is_device = std::fs::metadata(file).is_ok_and(|stat| stat.file_type().is_block_device());
    let cache = json!({"direct": direct, "no-flush": no_flush});
    let text = json!({
        "driver": "qcow2", "node-name": overlay, "backing": null, "cache": cache,
        "discard": if discards { "unmap" } else { "ignore" },
        "file": {
            "driver": if is_device { "host_device" } else { "file" },
            "filename": file, "cache": cache, "discard": "unmap",
        },
    });
    Ok(BlockdevOptions::parse(&text.to_string())?)
}

/// A file that one of our nodes has open is not overwritten, also where the user wants no locks.
fn check_unused(nodes: &Nodes, file: &Path) -> Result<()> {
    let Ok(stat) = std::fs::metadata(file) else {
        return Ok(());
    };
    for name in nodes.graph.names() {
        let node = nodes.graph.bare(&name)?;
        if let Some(there) = downcast::<FileNode>(&*node)
            && let Ok(open) = rustix::fs::fstat(there.host().fd())
            && (open.st_dev, open.st_ino) == (stat.dev(), stat.ino())
        {
            let file = file.display();
            return Err(Error::Refused(format!(
                "'{file}' is in use by node '{name}' and is not overwritten"
            )));
        }
    }
    Ok(())
}

/// What a header says of the node, wherever the header is.
fn path_of(nodes: &Nodes, name: &str) -> Result<String> {
    let bare = nodes.graph.bare(name)?;
    let no_name = |why: &str| {
        Error::Refused(format!(
            "Node '{name}' {why} that a new image could name; make the image and say mode=existing"
        ))
    };
    let path = bare.filename().ok_or_else(|| no_name("has no file"))?;
    if Path::new(&path).is_absolute() {
        return Ok(path);
    }
    // It is relative to the folder that the process was in when it opened the file.
    let place = place_of(nodes, name).filter(|place| place.is_absolute() && place.exists());
    let place = place.ok_or_else(|| no_name("has no absolute path"))?;
    let place = place.into_os_string().into_string();
    place.map_err(|_| no_name("has no name in UTF-8"))
}

/// Where the file is that a node has its name from.
fn place_of(nodes: &Nodes, name: &str) -> Option<PathBuf> {
    let mut name = name.to_owned();
    loop {
        let node = nodes.graph.bare(&name).ok()?;
        if let Some(file) = downcast::<FileNode>(&*node) {
            return Some(file.place().to_owned());
        }
        let edges = nodes.graph.edges(&name).ok()?;
        let is_below = |role: &ChildRole| matches!(role, ChildRole::File | ChildRole::Filtered);
        name = edges.into_iter().find(|(role, _)| is_below(role))?.1;
    }
}

/// The format of the image that the node shows. A filter shows that of the node below it.
fn format_of(nodes: &Nodes, name: &str) -> Result<Format> {
    let mut name = name.to_owned();
    loop {
        let driver = nodes.graph.bare(&name)?.driver();
        match driver {
            "qcow2" => return Ok(Format::Qcow2),
            "file" | "host_device" => return Ok(Format::Raw),
            "raw" if !shows_a_part(nodes, &name) => return Ok(Format::Raw),
            "throttle" | "blkdebug" => {
                if let Some(below) = nodes.graph.children(&name)?.into_iter().next() {
                    name = below;
                    continue;
                }
            }
            _ => {}
        }
        return Err(Error::Refused(format!(
            "Node '{name}' of driver '{driver}' is no image that a new image could name; make the image and say mode=existing"
        )));
    }
}

/// Whether a raw node shows less than its file, which no header can say.
fn shows_a_part(nodes: &Nodes, name: &str) -> bool {
    let options = nodes.options(name);
    options.is_none_or(|options| match options.driver {
        BlockDriver::Raw(raw) => raw.offset > 0 || raw.size.is_some(),
        _ => true,
    })
}
