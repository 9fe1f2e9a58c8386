//! What requests each node likes, in the terms of QEMU (`BlockLimitsInfo`): what a node has of its own, and what it takes over from
//! those below it.

use diskfuse_block::downcast;
use diskfuse_block::drivers::FileNode;
use diskfuse_monitor::commands::BlockLimitsInfo;
use diskfuse_qcow2::node::Qcow2Node;

use super::nodes::signed;
use crate::error::Result;
use crate::qsd::nodes::Nodes;

/// Pieces of memory that one request may have, as the kernel has it (`UIO_MAXIOV`).
const PIECES: i64 = 1024;

/// The limits of a node.
pub fn limits(nodes: &Nodes, name: &str) -> Result<BlockLimitsInfo> {
    let node = nodes.graph.bare(name)?;
    let mut limits = BlockLimitsInfo {
        request_alignment: 1,
        discard_alignment: None,
        write_zeroes_alignment: None,
        max_hw_transfer: None,
        max_iov: PIECES,
        min_mem_alignment: 1,
        opt_mem_alignment: signed(rustix::param::page_size() as u64),
    };
    for (_, child) in nodes.graph.edges(name)? {
        let below = self::limits(nodes, &child)?;
        limits.discard_alignment = limits.discard_alignment.max(below.discard_alignment);
        limits.min_mem_alignment = limits.min_mem_alignment.max(below.min_mem_alignment);
        limits.opt_mem_alignment = limits.opt_mem_alignment.max(below.opt_mem_alignment);
        // The smallest that there is.
        let transfers = [limits.max_hw_transfer, below.max_hw_transfer];
        limits.max_hw_transfer = transfers.into_iter().flatten().min();
    }
    let alignment = i64::from(node.limits().request_alignment);
    match node.driver() {
        "null-co" | "null-aio" => limits.min_mem_alignment = SECTOR,
        "blkdebug" => limits.request_alignment = alignment,
        "file" | "host_device" => {
            limits.request_alignment = alignment;
            limits.min_mem_alignment = alignment;
            limits.opt_mem_alignment = limits.opt_mem_alignment.max(alignment);
        }
        _ => {}
    }
    if let Some(device) = downcast::<FileNode>(&*node).filter(|file| file.host().is_device()) {
        limits.write_zeroes_alignment = of_queue(device, "logical_block_size");
        let kibibytes = of_queue(device, "max_sectors_kb");
        limits.max_hw_transfer = kibibytes.map(|kibibytes| kibibytes.saturating_mul(1 << 10));
    }
    if let Some(image) = downcast::<Qcow2Node>(&*node) {
        let geometry = image.header().geometry;
        limits.discard_alignment = Some(signed(geometry.cluster_size()));
        limits.write_zeroes_alignment = Some(signed(geometry.subcluster_size()));
    }
    Ok(limits)
}

/// Bytes of a sector.
const SECTOR: i64 = diskfuse_block::SECTOR as i64;

/// What the kernel says of a block device's queue (`Documentation/ABI/stable/sysfs-block`); `None` if it does not.
fn of_queue(device: &FileNode, what: &str) -> Option<i64> {
    let number = rustix::fs::fstat(device.host().fd()).ok()?.st_rdev;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let text = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/queue/{what}"));
    text.ok()?.trim().parse().ok()
}
