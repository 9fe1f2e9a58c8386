//! `query-blockstats`: what the exports of each node have done. Only what is counted is told as more than zero.

use diskfuse_block::graph::ChildRole;
use diskfuse_fuse::Stats;
use diskfuse_monitor::commands::{BlockDeviceStats, BlockStats};

use crate::error::Result;
use crate::qsd::nodes::Nodes;

/// Statistics of every node. `exports` are the nodes' names and what each export of them has done.
pub fn blockstats(nodes: &Nodes, exports: &[(String, Stats)]) -> Result<Vec<BlockStats>> {
    let names = nodes.graph.names();
    let mut all = Vec::new();
    for name in &names {
        match one(nodes, name, exports) {
            // A job may have taken it out since.
            Err(_) if nodes.graph.bare(name).is_err() => {}
            told => all.push(told?),
        }
    }
    Ok(all)
}

fn one(nodes: &Nodes, name: &str, exports: &[(String, Stats)]) -> Result<BlockStats> {
    let mut said = BlockStats {
        device: None,
        node_name: Some(name.to_owned()),
        stats: stats(name, exports),
        parent: None,
        backing: None,
    };
    let edges = nodes.graph.edges(name)?;
    let of = |wanted| edges.iter().find(|(role, _)| *role == wanted);
    // Where the data is. What is below as a backing image is left out when nodes are asked for, as each has an entry of its own.
    let holder = [ChildRole::Data, ChildRole::File, ChildRole::Filtered];
    if let Some((_, child)) = holder.into_iter().find_map(of) {
        said.parent = Some(Box::new(one(nodes, child, exports)?));
    }
    Ok(said)
}

fn stats(name: &str, exports: &[(String, Stats)]) -> BlockDeviceStats {
    let mut said = BlockDeviceStats::default();
    for (_, stats) in exports.iter().filter(|(node, _)| node == name) {
        said.rd_operations += stats.reads;
        said.wr_operations += stats.writes;
        said.rd_bytes += stats.read_bytes;
        said.wr_bytes += stats.written_bytes;
        said.flush_operations += stats.flushes;
    }
    said
}
