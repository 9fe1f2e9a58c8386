//! How a node is called where QEMU calls it by a file name: by its file, if that and the driver say all of it, else by its options as
//! JSON (`json:{…}`), with those below it inside.

use std::path::Path;

use diskfuse_block::graph::ChildRole;
use diskfuse_block::{Node, downcast};
use diskfuse_image::name::full_name;
use diskfuse_monitor::blockdev::blkdebug::{BlkdebugIoType, InjectErrorOptions, SetStateOptions};
use diskfuse_monitor::qmp::to_text;
use diskfuse_monitor::{BlkdebugOptions, BlockDriver, NullOptions};
use diskfuse_qcow2::node::Qcow2Node;
use serde_json::{Map, Value, json};

use crate::error::Result;
use crate::qsd::nodes::Nodes;

/// The name.
pub fn filename(nodes: &Nodes, name: &str) -> Result<String> {
    Ok(Described::look(nodes, name)?.name())
}

/// A node and all that is below it, looked at once: chains are long.
struct Described {
    /// The name, if it needs no options.
    plain: Option<String>,
    /// Everything that the node was made of, with those below it.
    options: Value,
}

/// The nodes right below one.
type Children = Vec<(ChildRole, Described)>;

impl Described {
    fn look(nodes: &Nodes, name: &str) -> Result<Self> {
        let node = nodes.graph.bare(name)?;
        let made_of = nodes.options(name).map(|options| options.driver);
        let mut children = Children::new();
        for (role, child) in nodes.graph.edges(name)? {
            children.push((role, Self::look(nodes, &child)?));
        }
        let has_another_backing = has_another_backing(&*node, &children);
        Ok(Self {
            plain: plain(&*node, made_of.as_ref(), &children, has_another_backing),
            options: options(&*node, made_of.as_ref(), children, has_another_backing),
        })
    }

    fn name(self) -> String {
        let options = || format!("json:{}", to_text(&self.options, false).trim_end());
        self.plain.unwrap_or_else(options)
    }

    /// Whether this is its name. To write it down takes long if there is much below.
    fn is_called(&self, name: &str) -> bool {
        match &self.plain {
            Some(plain) => plain == name,
            None => name
                .strip_prefix("json:")
                .is_some_and(|options| to_text(&self.options, false).trim_end() == options),
        }
    }
}

fn plain(
    node: &dyn Node,
    made_of: Option<&BlockDriver>,
    children: &Children,
    has_another_backing: bool,
) -> Option<String> {
    let child = |role| {
        let child = children.iter().find(|(there, _)| *there == role);
        child.and_then(|(_, child)| child.plain.clone())
    };
    match made_of {
        Some(BlockDriver::NullCo(null) | BlockDriver::NullAio(null)) => {
            let is_all = own_options(null).is_empty();
            is_all.then(|| format!("{}://", node.driver()))
        }
        Some(BlockDriver::Raw(raw)) if raw.offset > 0 || raw.size.is_some() => None,
        Some(BlockDriver::Throttle(_)) => None,
        Some(BlockDriver::Blkdebug(blkdebug)) => {
            let is_all = blkdebug.align == 0
                && blkdebug.rules.errors.is_empty()
                && blkdebug.rules.changes.is_empty();
            let image = child(ChildRole::Filtered).filter(|_| is_all);
            let config = blkdebug.config.as_deref().unwrap_or(Path::new(""));
            image.map(|image| format!("blkdebug:{}:{image}", config.display()))
        }
        Some(BlockDriver::Raw(_)) => child(ChildRole::Filtered),
        Some(BlockDriver::Qcow2(_)) if has_another_backing => None,
        Some(BlockDriver::Qcow2(_)) => child(ChildRole::File),
        Some(BlockDriver::File(_) | BlockDriver::HostDevice(_)) | None => node.filename(),
    }
}

fn options(
    node: &dyn Node,
    made_of: Option<&BlockDriver>,
    children: Children,
    has_another_backing: bool,
) -> Value {
    let mut all = Map::new();
    all.insert("driver".to_owned(), Value::from(node.driver()));
    match made_of {
        Some(BlockDriver::NullCo(null) | BlockDriver::NullAio(null)) => {
            all.extend(own_options(null));
        }
        Some(BlockDriver::Raw(raw)) => {
            if raw.offset > 0 {
                all.insert("offset".to_owned(), Value::from(raw.offset));
            }
            if let Some(size) = raw.size {
                all.insert("size".to_owned(), Value::from(size));
            }
        }
        Some(BlockDriver::Throttle(throttle)) => {
            let group = Value::from(throttle.throttle_group.as_str());
            all.insert("throttle-group".to_owned(), group);
        }
        Some(BlockDriver::Blkdebug(blkdebug)) => all.extend(of_blkdebug(blkdebug)),
        Some(BlockDriver::Qcow2(_) | BlockDriver::File(_) | BlockDriver::HostDevice(_)) | None => {}
    }
    if children.is_empty()
        && let Some(file) = node.filename()
    {
        all.insert("filename".to_owned(), Value::from(file));
    }
    for (role, child) in children {
        if role != ChildRole::Backing || has_another_backing {
            let key = child_name(node.driver(), role).to_owned();
            all.insert(key, child.options);
        }
    }
    if has_another_backing {
        all.entry("backing").or_insert(Value::Null);
    }
    Value::Object(all)
}

/// What a node below is to the one above.
pub fn child_name(driver: &str, role: ChildRole) -> &'static str {
    match role {
        ChildRole::Filtered if driver == "blkdebug" => "image",
        ChildRole::Filtered | ChildRole::File => "file",
        ChildRole::Data => "data-file",
        ChildRole::Backing => "backing",
    }
}

/// Whether an image stands on something else than its header says.
fn has_another_backing(node: &dyn Node, children: &Children) -> bool {
    let Some(image) = downcast::<Qcow2Node>(node) else {
        return false;
    };
    let own = node.filename().unwrap_or_default();
    let header = image.header();
    let said = header.backing.as_ref();
    let said = said.map(|backing| full_name(Path::new(&own), &backing.name));
    let is = children
        .iter()
        .find(|(role, _)| *role == ChildRole::Backing);
    match (said, is) {
        (None, None) => false,
        (Some(said), Some((_, is))) => !is.is_called(&said),
        _ => true,
    }
}

/// What differs from what a null disk has when nothing is said.
fn own_options(null: &NullOptions) -> Map<String, Value> {
    let default = NullOptions::default();
    let mut all = Map::new();
    if null.size != default.size {
        all.insert("size".to_owned(), Value::from(null.size));
    }
    if null.latency_ns != default.latency_ns {
        all.insert("latency-ns".to_owned(), Value::from(null.latency_ns));
    }
    if null.read_zeroes != default.read_zeroes {
        all.insert("read-zeroes".to_owned(), Value::from(null.read_zeroes));
    }
    all
}

fn of_blkdebug(blkdebug: &BlkdebugOptions) -> Map<String, Value> {
    let mut all = Map::new();
    if let Some(config) = &blkdebug.config {
        let config = config.display().to_string();
        all.insert("config".to_owned(), Value::from(config));
    }
    if blkdebug.align > 0 {
        all.insert("align".to_owned(), Value::from(blkdebug.align));
    }
    let mut put = |place: String, rule: Value| {
        let members = rule.as_object().into_iter().flatten();
        let said = members.filter(|(_, value)| !value.is_null());
        all.extend(said.map(|(key, value)| (format!("{place}.{key}"), value.clone())));
    };
    for (number, rule) in blkdebug.rules.errors.iter().enumerate() {
        put(format!("inject-error.{number}"), of_error(rule));
    }
    for (number, rule) in blkdebug.rules.changes.iter().enumerate() {
        put(format!("set-state.{number}"), of_change(rule));
    }
    all
}

/// `null` is what was not said, or need not have been.
fn of_error(rule: &InjectErrorOptions) -> Value {
    json!({
        "event": rule.event,
        "state": (rule.state != 0).then_some(rule.state),
        "iotype": rule.iotype.map(BlkdebugIoType::word),
        "errno": (rule.errno != 5).then_some(rule.errno),
        "delay-ns": (rule.delay_ns != 0).then_some(rule.delay_ns),
        "sector": rule.sector,
        "once": rule.once.then_some(true),
    })
}

fn of_change(rule: &SetStateOptions) -> Value {
    json!({
        "event": rule.event,
        "state": (rule.state != 0).then_some(rule.state),
        "new_state": rule.new_state,
    })
}
