//! `query-named-block-nodes`: what every node is.

use diskfuse_block::graph::ChildRole;
use diskfuse_image::info::{self, Snapshot};
use diskfuse_monitor::blockdev::DetectZeroes;
use diskfuse_monitor::commands::{
    BlockDeviceInfo, BlockdevCacheInfo, DetectZeroesMode, ImageInfo, SnapshotInfo,
};
use diskfuse_monitor::{BlockDriver, BlockdevOptions};

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
    let names = nodes.graph.names();
    let mut all = Vec::new();
    for name in names.iter().rev() {
        match one(nodes, bitmaps, thresholds, name, flat) {
            // A job may have taken it out since.
            Err(_) if nodes.graph.bare(name).is_err() => {}
            told => all.push(told?),
        }
    }
    Ok(all)
}

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
        Some(backing) => nodes.graph.bare(&backing)?.filename(),
        None => None,
    };
    let cache = options.as_ref().map(|o| o.cache).unwrap_or_default();
    Ok(BlockDeviceInfo {
        file: image.filename.clone(),
        node_name: Some(name.to_owned()),
        ro: node.read_only(),
        drv: node.driver().to_owned(),
        backing_file: backing,
        backing_file_depth: depth(nodes, name)?,
        active: true,
        encrypted: false,
        detect_zeroes: detect_zeroes(options.as_ref()),
        // Limits are a throttle group's, never a node's.
        bps: 0,
        bps_rd: 0,
        bps_wr: 0,
        iops: 0,
        iops_rd: 0,
        iops_wr: 0,
        image,
        group: group(options.as_ref()),
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

/// The throttle group that keeps the node to its limits.
fn group(options: Option<&BlockdevOptions>) -> Option<String> {
    match &options?.driver {
        BlockDriver::Throttle(throttle) => Some(throttle.throttle_group.clone()),
        _ => None,
    }
}

fn detect_zeroes(options: Option<&BlockdevOptions>) -> DetectZeroesMode {
    match options.map(|o| o.detect_zeroes) {
        None | Some(DetectZeroes::Off) => DetectZeroesMode::Off,
        Some(DetectZeroes::On) => DetectZeroesMode::On,
        Some(DetectZeroes::Unmap) => DetectZeroesMode::Unmap,
    }
}

/// With `chain` the backing image is in it.
fn image(nodes: &Nodes, name: &str, chain: bool) -> Result<ImageInfo> {
    let node = nodes.graph.bare(name)?;
    let info = nodes.run(info::of_node(&*node))??;
    let specific = info.format_specific.map(serde_json::to_value).transpose();
    let below = match chain {
        true => below(nodes, name, ChildRole::Backing)?,
        false => None,
    };
    let snapshots: Vec<_> = info.snapshots.into_iter().map(snapshot_info).collect();
    Ok(ImageInfo {
        filename: info.filename,
        format: info.format,
        dirty_flag: Some(info.dirty_flag),
        actual_size: Some(signed(info.actual_size)),
        virtual_size: signed(info.virtual_size),
        cluster_size: info.cluster_size.map(signed),
        encrypted: info.encrypted,
        compressed: None,
        backing_filename: info.backing_filename,
        full_backing_filename: info.full_backing_filename,
        backing_filename_format: info.backing_filename_format,
        snapshots: (!snapshots.is_empty()).then_some(snapshots),
        format_specific: specific.map_err(|error| Error::refused(error.to_string()))?,
        backing_image: match below {
            Some(below) => Some(Box::new(image(nodes, &below, true)?)),
            None => None,
        },
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

/// How many images are below.
fn depth(nodes: &Nodes, name: &str) -> Result<i64> {
    let mut depth = 0;
    let mut at = name.to_owned();
    while let Some(backing) = below(nodes, &at, ChildRole::Backing)? {
        depth += 1;
        at = backing;
    }
    Ok(depth)
}

fn below(nodes: &Nodes, name: &str, wanted: ChildRole) -> Result<Option<String>> {
    let edges = nodes.graph.edges(name)?;
    let mut of_role = edges.into_iter().filter(|(role, _)| *role == wanted);
    Ok(of_role.next().map(|(_, child)| child))
}
