//! The nodes as a whole: their order, what their caches do, and their end when nobody uses them any more.

use diskfuse_block::Graph;
use diskfuse_ring::{Config, Ring};

use crate::control::counters::CacheCounters;
use crate::error::Result;

/// Closes every node that can be written, those above first: an image may have metadata to put in order. Nobody uses
/// them any more. All are closed whatever happens; the error is the first one.
pub(super) fn close_nodes(graph: &Graph) -> Result<()> {
    let mut nodes = Vec::new();
    for name in names_from_above(graph) {
        let node = graph.bare(&name)?;
        if !node.read_only() {
            nodes.push((name, node));
        }
    }
    if nodes.is_empty() {
        return Ok(());
    }
    let ring = Ring::new(&Config::default())?;
    let mut outcome = Ok(());
    for (name, node) in nodes {
        if let Err(error) = ring.block_on(node.close()) {
            tracing::debug!(name, %error, "cannot close a node");
            outcome = outcome.and(Err(error.into()));
        }
    }
    outcome
}

/// How the metadata caches of a node, and of all that it stands on, do; `None` if there is none.
pub(super) fn cache_use(graph: &Graph, name: &str) -> Option<CacheCounters> {
    let mut below = Vec::new();
    add_from_below(graph, name.to_owned(), &mut below);
    let nodes = below.iter().filter_map(|name| graph.bare(name).ok());
    let mut sum: Option<CacheCounters> = None;
    for counted in nodes.filter_map(|node| node.cache_use()) {
        sum.get_or_insert_default().add(counted);
    }
    sum
}

/// The names of all nodes, each before those below it.
pub fn names_from_above(graph: &Graph) -> Vec<String> {
    let mut found = Vec::new();
    for name in graph.names() {
        add_from_below(graph, name, &mut found);
    }
    found.reverse();
    found
}

/// Adds a node behind those below it, unless it is there already.
fn add_from_below(graph: &Graph, name: String, found: &mut Vec<String>) {
    if found.contains(&name) {
        return;
    }
    for child in graph.children(&name).unwrap_or_default() {
        add_from_below(graph, child, found);
    }
    found.push(name);
}
