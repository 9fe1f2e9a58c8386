//! Filters of the storage daemon: `throttle`, which finds its group among the objects, and `blkdebug`, whose rules may
//! stand in a file.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use diskfuse_block::Node;
use diskfuse_block::drivers::{self, BlkdebugConfig, Event, InjectError, IoType, SetState};
use diskfuse_monitor::blockdev::blkdebug::{
    BlkdebugIoType, BlkdebugRules, InjectErrorOptions, SetStateOptions,
};
use diskfuse_monitor::{BlkdebugOptions, BlockdevOptions, ThrottleOptions};

use super::children::Children;
use super::nodes::Nodes;
use crate::error::{Error, Result};

/// Makes a `throttle` node.
pub(super) fn add_throttle(
    nodes: &Nodes,
    throttle: &ThrottleOptions,
    options: &BlockdevOptions,
) -> Result<String> {
    let mut children = Children::new(nodes);
    let below = children.filtered(&throttle.file, options)?;
    let node = throttle_on(nodes, below.node, throttle, options)?;
    let name = options.node_name.as_deref();
    let name = nodes.graph.insert(name, node, &[&below.name])?;
    children.keep();
    Ok(name)
}

/// The node over one that is there.
pub(super) fn throttle_on(
    nodes: &Nodes,
    below: Arc<dyn Node>,
    throttle: &ThrottleOptions,
    options: &BlockdevOptions,
) -> Result<Arc<dyn Node>> {
    let group = nodes.objects.throttle_group(&throttle.throttle_group)?;
    Ok(drivers::open_throttle(below, &group, options.read_only))
}

/// Makes a `blkdebug` node.
pub(super) fn add_blkdebug(
    nodes: &Nodes,
    blkdebug: &BlkdebugOptions,
    options: &BlockdevOptions,
) -> Result<String> {
    let mut children = Children::new(nodes);
    let below = children.filtered(&blkdebug.image, options)?;
    let node = blkdebug_on(below.node, blkdebug, options)?;
    let name = options.node_name.as_deref();
    let name = nodes.graph.insert(name, node, &[&below.name])?;
    children.keep();
    Ok(name)
}

/// The node over one that is there.
pub(super) fn blkdebug_on(
    below: Arc<dyn Node>,
    blkdebug: &BlkdebugOptions,
    options: &BlockdevOptions,
) -> Result<Arc<dyn Node>> {
    let read = blkdebug.config.as_deref().map(read_rules).transpose()?;
    let mut rules = read.unwrap_or_default();
    rules.errors.extend(blkdebug.rules.errors.iter().cloned());
    rules.changes.extend(blkdebug.rules.changes.iter().cloned());
    let config = BlkdebugConfig {
        errors: rules.errors.iter().filter_map(inject_error).collect(),
        changes: rules.changes.iter().filter_map(set_state).collect(),
        align: blkdebug.align,
        read_only: options.read_only,
    };
    Ok(drivers::open_blkdebug(below, config))
}

/// Far more than [`diskfuse_monitor::blockdev::blkdebug::MAX_RULES`] take.
const LONGEST_CONFIG: u64 = 1 << 20;

fn read_rules(path: &Path) -> Result<BlkdebugRules> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST_CONFIG + 1).read_to_string(&mut text))
        .map_err(Error::system("Could not read blkdebug config file"))?;
    if text.len() as u64 > LONGEST_CONFIG {
        let path = path.display();
        return Err(Error::Refused(format!(
            "Could not read blkdebug config file '{path}': more than 1 MiB"
        )));
    }
    BlkdebugRules::parse(&text).map_err(|error| {
        let path = path.display();
        Error::Refused(format!(
            "Could not parse blkdebug config file '{path}': {error}"
        ))
    })
}

/// A rule whose event speaks of the insides of QEMU's formats never comes in force: it is left out.
fn inject_error(rule: &InjectErrorOptions) -> Option<InjectError> {
    Some(InjectError {
        event: Event::named(rule.event)?,
        state: rule.state,
        io_type: rule.iotype.map(|io_type| match io_type {
            BlkdebugIoType::Read => IoType::Read,
            BlkdebugIoType::Write => IoType::Write,
            BlkdebugIoType::WriteZeroes => IoType::WriteZeroes,
            BlkdebugIoType::Discard => IoType::Discard,
            BlkdebugIoType::Flush => IoType::Flush,
            BlkdebugIoType::BlockStatus => IoType::BlockStatus,
        }),
        errno: rule.errno,
        delay: Duration::from_nanos(rule.delay_ns),
        sector: rule.sector,
        once: rule.once,
    })
}

fn set_state(rule: &SetStateOptions) -> Option<SetState> {
    Some(SetState {
        event: Event::named(rule.event)?,
        state: rule.state,
        new_state: rule.new_state,
    })
}
