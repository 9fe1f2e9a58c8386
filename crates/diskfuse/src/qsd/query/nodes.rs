//! `query-named-block-nodes`: what every node is.

use diskfuse_block::drivers::FileNode;
use diskfuse_block::graph::ChildRole;
use diskfuse_block::{Kind, downcast};
use diskfuse_image::info::{self, Snapshot};
use diskfuse_monitor::BlockdevOptions;
use diskfuse_monitor::blockdev::DetectZeroes;
use diskfuse_monitor::commands::{
    BlockDeviceInfo, BlockdevCacheInfo, BlockdevChild, DetectZeroesMode, ImageInfo, SnapshotInfo,
};
use diskfuse_qcow2::node::Qcow2Node;
use serde_json::json;

use super::filename::{child_name, filename};
use super::limits::limits;
use crate::error::{Error, Result};
use crate::qsd::commands::bitmaps::Bitmaps;
use crate::qsd::commands::thresholds::Thresholds;
use crate::qsd::nodes::Nodes;

/// Every node, the youngest first. Unless `flat`, each tells of the images below it as well.
pub fn named_block_nodes(
    nodes: &Nodes,
    bitmaps: &Bitmaps,
    thresholds: &Thresholds,
    flat: bool,
) -> Result<Vec<BlockDeviceInfo>> {
    let look = || {
        let names = nodes.graph.names().into_iter().rev();
        names
            .map(|name| one(nodes, bitmaps, thresholds, &name, flat))
            .collect::<Result<Vec<_>>>()
    };
    let mut told = look();
    for _ in 1..LOOKS {
        // A job may have taken one out meanwhile, or put one on another.
        match &told {
            Err(Error::Block(error)) if error.kind() == Kind::NotFound => told = look(),
            _ => break,
        }
    }
    told
}

/// How often is looked at nodes that change meanwhile. Jobs do so once, when they end.
const LOOKS: usize = 10;

fn one(
    nodes: &Nodes,
    bitmaps: &Bitmaps,
    thresholds: &Thresholds,
    name: &str,
    flat: bool,
) -> Result<BlockDeviceInfo> {
    let node = nodes.graph.bare(name)?;
    let options = nodes.options(name);
    let image = image(nodes, name, !flat)?;
    let backing = match below(nodes, name, ChildRole::Backing)? {
        Some(backing) => Some(filename(nodes, &backing)?),
        None => None,
    };
    let cache = options.as_ref().map(|o| o.cache).unwrap_or_default();
    Ok(BlockDeviceInfo {
        file: image.filename.clone(),
        node_name: Some(name.to_owned()),
        ro: node.read_only(),
        drv: node.driver().to_owned(),
        backing_file: backing,
        backing_file_depth: depth(&image),
        active: true,
        encrypted: false,
        children: children(nodes, name)?,
        detect_zeroes: detect_zeroes(options.as_ref()),
        // Limits are a throttle group's, never a node's.
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image,
        cache: BlockdevCacheInfo {
            writeback: true,
            direct: cache.direct,
            no_flush: cache.no_flush,
        },
        // QMP's integers have a sign, and QEMU shows the bits.
        write_threshold: thresholds.of(nodes, name)?.cast_signed(),
        dirty_bitmaps: bitmaps.of(nodes, name),
    })
}

/// The nodes directly below, the last that came first.
fn children(nodes: &Nodes, name: &str) -> Result<Vec<BlockdevChild>> {
    let driver = nodes.graph.bare(name)?.driver();
    let edges = nodes.graph.edges(name)?.into_iter().rev();
    let child = |(role, child)| BlockdevChild {
        child: child_name(driver, role).to_owned(),
        node_name: Some(child),
    };
    Ok(edges.map(child).collect())
}

fn detect_zeroes(options: Option<&BlockdevOptions>) -> DetectZeroesMode {
    match options.map(|o| o.detect_zeroes) {
        None | Some(DetectZeroes::Off) => DetectZeroesMode::Off,
        Some(DetectZeroes::On) => DetectZeroesMode::On,
        Some(DetectZeroes::Unmap) => DetectZeroesMode::Unmap,
    }
}

/// With `chain` what is shown where the image has nothing is in it: the backing image, or what a filter filters.
fn image(nodes: &Nodes, name: &str, chain: bool) -> Result<ImageInfo> {
    let node = nodes.graph.bare(name)?;
    let info = nodes.run(info::of_node(&*node))??;
    let shown = match node.driver() {
        "throttle" | "blkdebug" => ChildRole::Filtered,
        _ => ChildRole::Backing,
    };
    let shown = match chain {
        true => below(nodes, name, shown)?,
        false => None,
    };
    let snapshots: Vec<_> = info.snapshots.into_iter().map(snapshot_info).collect();
    let format_specific = match (info.format_specific, node.driver()) {
        (Some(specific), _) => Some(serde_json::to_value(specific)),
        (None, "file" | "host_device") => Some(Ok(json!({"type": "file", "data": {}}))),
        (None, _) => None,
    };
    let unit = unit(nodes, name)?;
    Ok(ImageInfo {
        filename: filename(nodes, name)?,
        format: info.format,
        dirty_flag: unit.as_ref().map(|unit| unit.dirty),
        actual_size: actual_size(nodes, name)?.map(signed),
        virtual_size: signed(info.virtual_size),
        cluster_size: unit.and_then(|unit| unit.cluster).map(signed),
        encrypted: info.encrypted,
        compressed: None,
        backing_filename: info.backing_filename,
        full_backing_filename: info.full_backing_filename,
        backing_filename_format: info.backing_filename_format,
        snapshots: (!snapshots.is_empty()).then_some(snapshots),
        format_specific: format_specific
            .transpose()
            .map_err(|error| Error::refused(error.to_string()))?,
        limits: Some(limits(nodes, name)?),
        backing_image: match shown {
            Some(shown) => Some(Box::new(image(nodes, &shown, true)?)),
            None => None,
        },
    })
}

/// What a format says of itself, also through filters and raw nodes above it.
struct Unit {
    cluster: Option<u64>,
    dirty: bool,
}

/// A null disk says nothing.
fn unit(nodes: &Nodes, name: &str) -> Result<Option<Unit>> {
    let node = nodes.graph.bare(name)?;
    if let Some(image) = downcast::<Qcow2Node>(&*node) {
        let header = image.header();
        return Ok(Some(Unit {
            cluster: Some(header.geometry.cluster_size()),
            dirty: header.is_dirty(),
        }));
    }
    if let Some(child) = below(nodes, name, ChildRole::Filtered)? {
        return unit(nodes, &child);
    }
    let is_file = downcast::<FileNode>(&*node).is_some();
    Ok(is_file.then_some(Unit {
        cluster: None,
        dirty: false,
    }))
}

/// Bytes that the node takes on the host; a device takes none, and what is below a `blkdebug` node is not told.
fn actual_size(nodes: &Nodes, name: &str) -> Result<Option<u64>> {
    let node = nodes.graph.bare(name)?;
    match node.driver() {
        "blkdebug" => return Ok(None),
        "host_device" => return Ok(Some(0)),
        _ => {}
    }
    let edges = nodes.graph.edges(name)?;
    let mut holders = edges.iter().filter(|(role, _)| *role != ChildRole::Backing);
    if edges.is_empty() {
        return Ok(Some(node.allocated()));
    }
    holders.try_fold(Some(0), |sum: Option<u64>, (_, child)| {
        let more = actual_size(nodes, child)?;
        Ok(sum.zip(more).map(|(sum, more)| sum.saturating_add(more)))
    })
}

/// As QMP tells of a snapshot.
pub fn snapshot_info(snapshot: Snapshot) -> SnapshotInfo {
    SnapshotInfo {
        id: snapshot.id,
        name: snapshot.name,
        vm_state_size: signed(snapshot.vm_state_size),
        date_sec: signed(snapshot.date_sec),
        date_nsec: signed(snapshot.date_nsec),
        vm_clock_sec: signed(snapshot.vm_clock_sec),
        vm_clock_nsec: signed(snapshot.vm_clock_nsec),
        icount: snapshot.icount.map(signed),
    }
}

/// QMP's integers have a sign.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// How many images are told of below this one.
fn depth(image: &ImageInfo) -> i64 {
    let below = image.backing_image.as_ref();
    below.map_or(0, |below| 1 + depth(below))
}

/// The node below another one in a role.
pub(super) fn below(nodes: &Nodes, name: &str, wanted: ChildRole) -> Result<Option<String>> {
    let edges = nodes.graph.edges(name)?;
    let mut of_role = edges.into_iter().filter(|(role, _)| *role == wanted);
    Ok(of_role.next().map(|(_, child)| child))
}
