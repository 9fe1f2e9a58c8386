//! Commands about objects: `object-add`, `object-del`, `qom-*`, `query-iothreads`.

use diskfuse_monitor::commands::{
    BlockSetIoThrottle, IothreadInfo, ObjectPropertyInfo, QomGet, QomList, QomSet,
};
use serde_json::{Map, Value};

use super::Commands;
use crate::error::{Error, Result};
use crate::qsd::objects::Objects;

/// The place of all objects.
const OBJECTS: &str = "/objects";

/// The id that a path of an object names: `/objects/ID`, or the end of that.
fn id_of(path: &str) -> &str {
    let below = |start| path.strip_prefix(start);
    below("/objects/").or(below("objects/")).unwrap_or(path)
}

/// Whether a path names all objects, or what they are in.
fn is_container(path: &str) -> bool {
    ["/", OBJECTS, "objects"].contains(&path)
}

fn no_device(path: &str) -> Error {
    Error::Refused(format!("Device '{path}' not found"))
}

/// `qom-list`.
pub fn list(objects: &Objects, what: &QomList) -> Result<Vec<ObjectPropertyInfo>> {
    let property = |name: &str, kind: String| ObjectPropertyInfo {
        name: name.to_owned(),
        kind,
    };
    let mut all = vec![property("type", "string".to_owned())];
    match what.path.as_str() {
        "/" => all.push(property("objects", "child<container>".to_owned())),
        OBJECTS | "objects" => {
            let objects = objects.list();
            let child = |(id, kind): &(String, &str)| property(id, format!("child<{kind}>"));
            all.extend(objects.iter().map(child));
        }
        "" => return Err(Error::refused("Path '' is ambiguous")),
        path => {
            let properties = objects.properties(id_of(path));
            let properties = properties.ok_or_else(|| no_device(path))?;
            // Told already.
            let own = properties.iter().filter(|own| own.name != "type");
            all.extend(own.map(|own| property(own.name, own.kind.to_owned())));
        }
    }
    Ok(all)
}

/// `qom-get`.
pub fn get(objects: &Objects, what: &QomGet) -> Result<Value> {
    let id = id_of(&what.path);
    if what.property == "type" {
        if is_container(&what.path) {
            return Ok(Value::from("container"));
        }
        let all = objects.list();
        let found = all.iter().find(|(there, _)| there == id);
        let (_, kind) = found.ok_or_else(|| no_device(&what.path))?;
        return Ok(Value::from(*kind));
    }
    let property = objects.property(id, &what.property);
    Ok(property.ok_or_else(|| no_device(&what.path))??.value)
}

/// `qom-set`.
pub fn set(objects: &Objects, what: &QomSet) -> Result<()> {
    let set = objects.set(id_of(&what.path), &what.property, &what.value);
    set.ok_or_else(|| no_device(&what.path))?
}

/// `query-iothreads`.
pub fn iothreads(objects: &Objects) -> Vec<IothreadInfo> {
    let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    let all = objects.iothreads().into_iter();
    all.map(|(options, thread)| IothreadInfo {
        id: options.id,
        thread_id: i64::from(thread),
        poll_max_ns: signed(options.poll_max_ns),
        poll_grow: signed(options.poll_grow),
        poll_shrink: signed(options.poll_shrink),
        aio_max_batch: signed(options.aio_max_batch),
    })
    .collect()
}

/// `block_set_io_throttle`: the limits of the named group, which all of its nodes share.
pub fn throttle(host: &Commands, what: &BlockSetIoThrottle) -> Result<()> {
    let Some(group) = &what.group else {
        return Err(Error::refused(
            "Parameter 'group' is missing: limits are those of a throttle group",
        ));
    };
    host.objects.throttle_group(group)?;
    let mut limits = Map::new();
    let mut put = |name: &str, value: Option<i64>| {
        // What is not said is not limited.
        limits.insert(name.to_owned(), Value::from(value.unwrap_or(0)));
    };
    put("bps-total", Some(what.bps));
    put("bps-read", Some(what.bps_rd));
    put("bps-write", Some(what.bps_wr));
    put("iops-total", Some(what.iops));
    put("iops-read", Some(what.iops_rd));
    put("iops-write", Some(what.iops_wr));
    put("bps-total-max", what.bps_max);
    put("bps-read-max", what.bps_rd_max);
    put("bps-write-max", what.bps_wr_max);
    put("iops-total-max", what.iops_max);
    put("iops-read-max", what.iops_rd_max);
    put("iops-write-max", what.iops_wr_max);
    put("iops-size", what.iops_size);
    let lengths = [
        ("bps-total-max-length", what.bps_max_length),
        ("bps-read-max-length", what.bps_rd_max_length),
        ("bps-write-max-length", what.bps_wr_max_length),
        ("iops-total-max-length", what.iops_max_length),
        ("iops-read-max-length", what.iops_rd_max_length),
        ("iops-write-max-length", what.iops_wr_max_length),
    ];
    for (name, length) in lengths {
        limits.insert(name.to_owned(), Value::from(length.unwrap_or(1)));
    }
    set(
        &host.objects,
        &QomSet {
            path: format!("{OBJECTS}/{group}"),
            property: "limits".to_owned(),
            value: Value::Object(limits),
        },
    )
}
