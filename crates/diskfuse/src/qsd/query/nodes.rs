//! `query-named-block-nodes`: `BlockDeviceInfo` of QEMU's `qapi/block-core.json` for every node.

use diskfuse_block::Node;
use diskfuse_block::graph::ChildRole;
use diskfuse_image::info;
use diskfuse_monitor::BlockdevOptions;
use diskfuse_monitor::blockdev::DetectZeroes;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::qsd::nodes::Nodes;

/// Every node, the youngest first. Unless `flat`, each tells of the images below it as well.
pub fn named_block_nodes(nodes: &Nodes, flat: bool) -> Result<Value> {
    let names = nodes.graph.names();
    let all = names.iter().rev().map(|name| one(nodes, name, flat));
    all.collect::<Result<Vec<_>>>().map(Value::Array)
}

fn one(nodes: &Nodes, name: &str, flat: bool) -> Result<Value> {
    let node = nodes.graph.bare(name)?;
    let options = nodes.options(name);
    let backing = below(nodes, name, ChildRole::Backing)?;
    let mut said = Map::new();
    if let Some(filename) = node.filename() {
        said.insert("file".to_owned(), filename.into());
    }
    let image = image(nodes, name, !flat)?;
    said.insert("node-name".to_owned(), name.into());
    said.insert("ro".to_owned(), node.read_only().into());
    said.insert("drv".to_owned(), node.driver().into());
    if let Some(backing) = &backing
        && let Some(filename) = nodes.graph.bare(backing)?.filename()
    {
        said.insert("backing_file".to_owned(), filename.into());
    }
    let depth = depth(nodes, name)?;
    said.insert("backing_file_depth".to_owned(), depth.into());
    said.insert("encrypted".to_owned(), false.into());
    said.insert("active".to_owned(), true.into());
    let detect = detect_zeroes(options.as_ref());
    said.insert("detect_zeroes".to_owned(), detect.into());
    for limit in ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"] {
        // Limits are a throttle group's, never a node's.
        said.insert(limit.to_owned(), 0.into());
    }
    said.insert("image".to_owned(), image);
    let cache = options.map(|o| o.cache).unwrap_or_default();
    let cache = json!({"writeback": true, "direct": cache.direct, "no-flush": cache.no_flush});
    said.insert("cache".to_owned(), cache);
    said.insert("write_threshold".to_owned(), 0.into());
    Ok(Value::Object(said))
}

fn detect_zeroes(options: Option<&BlockdevOptions>) -> &'static str {
    match options.map(|o| o.detect_zeroes) {
        None | Some(DetectZeroes::Off) => "off",
        Some(DetectZeroes::On) => "on",
        Some(DetectZeroes::Unmap) => "unmap",
    }
}

/// `ImageInfo`; with `chain` the backing image is in it.
fn image(nodes: &Nodes, name: &str, chain: bool) -> Result<Value> {
    let node = nodes.graph.bare(name)?;
    let info = nodes.run(info::of_node(&*node))??;
    let mut said = serde_json::to_value(info).map_err(|e| Error::refused(e.to_string()))?;
    if let Value::Object(members) = &mut said {
        members.remove("children");
        if chain && let Some(backing) = below(nodes, name, ChildRole::Backing)? {
            let backing = image(nodes, &backing, true)?;
            members.insert("backing-image".to_owned(), backing);
        }
    }
    Ok(said)
}

/// How many images are below.
fn depth(nodes: &Nodes, name: &str) -> Result<u64> {
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
