//! `query-blockstats`: what the exports of each node have done. Only what is counted is told as more than zero.

use diskfuse_block::graph::ChildRole;
use diskfuse_fuse::Stats;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::qsd::nodes::Nodes;

/// Statistics of every node, if `nodes_too`; else of named devices, which there are none of. `exports` are the nodes'
/// names and what each export of them has done.
pub fn blockstats(nodes: &Nodes, nodes_too: bool, exports: &[(String, Stats)]) -> Result<Value> {
    if !nodes_too {
        return Ok(json!([]));
    }
    let names = nodes.graph.names();
    let all = names.iter().map(|name| one(nodes, name, exports));
    all.collect::<Result<Vec<_>>>().map(Value::Array)
}

fn one(nodes: &Nodes, name: &str, exports: &[(String, Stats)]) -> Result<Value> {
    let mut said = Map::new();
    said.insert("node-name".to_owned(), name.into());
    said.insert("stats".to_owned(), stats(name, exports));
    for (role, child) in nodes.graph.edges(name)? {
        let place = match role {
            ChildRole::Backing => "backing",
            ChildRole::File | ChildRole::Filtered => "parent",
            ChildRole::Data => continue,
        };
        said.insert(place.to_owned(), one(nodes, &child, exports)?);
    }
    Ok(Value::Object(said))
}

/// `BlockDeviceStats`.
fn stats(name: &str, exports: &[(String, Stats)]) -> Value {
    let mut sum = Stats::default();
    for (_, stats) in exports.iter().filter(|(node, _)| node == name) {
        sum.reads += stats.reads;
        sum.writes += stats.writes;
        sum.read_bytes += stats.read_bytes;
        sum.written_bytes += stats.written_bytes;
        sum.flushes += stats.flushes;
    }
    let mut said = json!({
        "rd_bytes": sum.read_bytes,
        "wr_bytes": sum.written_bytes,
        "rd_operations": sum.reads,
        "wr_operations": sum.writes,
        "flush_operations": sum.flushes,
        "account_invalid": false,
        "account_failed": false,
        "timed_stats": [],
    });
    const UNCOUNTED: [&str; 24] = [
        "unmap_bytes",
        "zone_append_bytes",
        "unmap_operations",
        "zone_append_operations",
        "rd_total_time_ns",
        "wr_total_time_ns",
        "flush_total_time_ns",
        "unmap_total_time_ns",
        "zone_append_total_time_ns",
        "wr_highest_offset",
        "rd_merged",
        "wr_merged",
        "unmap_merged",
        "zone_append_merged",
        "failed_rd_operations",
        "failed_wr_operations",
        "failed_zone_append_operations",
        "failed_flush_operations",
        "failed_unmap_operations",
        "invalid_rd_operations",
        "invalid_wr_operations",
        "invalid_zone_append_operations",
        "invalid_flush_operations",
        "invalid_unmap_operations",
    ];
    for counter in UNCOUNTED {
        said[counter] = 0.into();
    }
    said
}
