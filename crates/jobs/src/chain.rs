//! Chains of images in the graph: what stands below what as its backing, and what of a disk is held above a certain image. It
//! only looks.

use std::sync::Arc;

use diskfuse_block::graph::ChildRole;
use diskfuse_block::{Allocation, Graph, Node, Result};

/// Nodes of a chain at most: the graph has no circles, and longer ones nobody can use.
const DEEPEST: usize = 1024;

/// The node that this one shows as it is, if it is such a filter; else itself.
pub(crate) fn below_filters(graph: &Graph, name: &str) -> Result<String> {
    let mut name = name.to_owned();
    for _ in 0..DEEPEST {
        match &graph.edges(&name)?[..] {
            [(ChildRole::Filtered, child)] => name.clone_from(child),
            _ => break,
        }
    }
    Ok(name)
}

/// Whether the node `above` is `below`, or shows it as it is through such filters.
pub(crate) fn shows(graph: &Graph, above: &str, below: &str) -> Result<bool> {
    let mut name = above.to_owned();
    for _ in 0..DEEPEST {
        if name == below {
            return Ok(true);
        }
        match &graph.edges(&name)?[..] {
            [(ChildRole::Filtered, child)] => name.clone_from(child),
            _ => break,
        }
    }
    Ok(false)
}

/// The node where writes to the one come to what the other shows or keeps its data in, if there is such a node. Those that show
/// different parts of one node share nothing.
pub(crate) fn shared_storage(graph: &Graph, a: &str, b: &str) -> Result<Option<String>> {
    let (by_a, by_b) = (graph.written_by(a)?, graph.written_by(b)?);
    if by_a.iter().any(|name| name == b) {
        return Ok(Some(b.to_owned()));
    }
    if by_b.iter().any(|name| name == a) {
        return Ok(Some(a.to_owned()));
    }
    let size = graph.get(a)?.size();
    for name in by_a.iter().filter(|name| by_b.contains(name)) {
        let whole = graph.get(name)?.size() == size;
        if whole && shows(graph, a, name)? && shows(graph, b, name)? {
            return Ok(Some(name.clone()));
        }
    }
    Ok(None)
}

/// The backing node of a node, or of what it filters.
pub(crate) fn backing(graph: &Graph, name: &str) -> Result<Option<String>> {
    let image = below_filters(graph, name)?;
    let edges = graph.edges(&image)?;
    let backing = edges
        .into_iter()
        .find(|(role, _)| *role == ChildRole::Backing);
    Ok(backing.map(|(_, name)| name))
}

/// The node and those below it, from above to below.
pub(crate) fn chain(graph: &Graph, top: &str) -> Result<Vec<String>> {
    let mut chain = vec![top.to_owned()];
    while let Some(next) = backing(graph, &chain[chain.len() - 1])? {
        chain.push(next);
        if chain.len() >= DEEPEST {
            break;
        }
    }
    Ok(chain)
}

/// The nodes of a chain, and the images that they show through filters: those that read what is below in it.
pub(crate) fn readers(graph: &Graph, chain: &[String]) -> Result<Vec<String>> {
    let images = chain.iter().map(|name| below_filters(graph, name));
    let mut readers = images.collect::<Result<Vec<_>>>()?;
    readers.extend_from_slice(chain);
    Ok(readers)
}

/// The nodes of these names.
pub(crate) fn nodes(graph: &Graph, names: &[String]) -> Result<Vec<Arc<dyn Node>>> {
    names.iter().map(|name| graph.get(name)).collect()
}

/// Whether one of `layers`, the first of which is the uppermost, holds what is shown at `at`, rather than what is below all
/// of them; `len` bytes at most.
pub(crate) async fn held_above(layers: &[Arc<dyn Node>], at: u64, len: u64) -> Result<Allocation> {
    let mut found = Allocation {
        len,
        allocated: false,
    };
    for layer in layers {
        let there = layer.size().saturating_sub(at).min(found.len);
        if there == 0 {
            // Past its end it shows zeroes, whatever is below.
            found.allocated = true;
            break;
        }
        let here = layer.allocation(at, there).await?;
        found = Allocation {
            len: here.len.clamp(1, there),
            allocated: here.allocated,
        };
        if found.allocated {
            break;
        }
    }
    Ok(found)
}
