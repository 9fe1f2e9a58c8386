//! What the schema says of `blockdev-add`: the drivers that are served, and the members of each. A test reads every
//! driver with all of them, and notices members that are read and not told here.

use super::BlockdevOptions;
use crate::commands::shape::{BOOL, Definition, INT, MemberShape, NULL, STR, Shape};

/// `BlockdevOptions`.
pub(crate) fn shape() -> Shape {
    Shape::Named("BlockdevOptions", || Definition::Object {
        members: common(),
        variants: Some(("driver", variants())),
    })
}

fn common() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required(
            "driver",
            Shape::Named("BlockdevDriver", || {
                Definition::Enum(BlockdevOptions::driver_names().collect())
            }),
        ),
        M::optional("node-name", STR),
        M::optional(
            "discard",
            Shape::Named("BlockdevDiscardOptions", || {
                Definition::Enum(vec!["ignore", "unmap"])
            }),
        ),
        M::optional(
            "cache",
            Shape::Named("BlockdevCacheOptions", || {
                Definition::object(vec![
                    M::optional("direct", BOOL),
                    M::optional("no-flush", BOOL),
                ])
            }),
        ),
        M::optional("read-only", BOOL),
        M::optional("auto-read-only", BOOL),
        M::optional("force-share", BOOL),
        M::optional(
            "detect-zeroes",
            Shape::Named("BlockdevDetectZeroesOptions", || {
                Definition::Enum(vec!["off", "on", "unmap"])
            }),
        ),
    ]
}

fn variants() -> Vec<(&'static str, Shape)> {
    BlockdevOptions::driver_names()
        .filter_map(|name| Some((name, of_driver(name)?)))
        .collect()
}

/// What only this driver has; `None` if nothing is known of it here.
fn of_driver(name: &str) -> Option<Shape> {
    let object: fn() -> Definition = match name {
        "file" | "host_device" => || Definition::object(file()),
        "null-co" | "null-aio" => || Definition::object(null()),
        "raw" => || Definition::object(raw()),
        "qcow2" => || Definition::object(qcow2()),
        "throttle" => || Definition::object(throttle()),
        "blkdebug" => || Definition::object(blkdebug()),
        _ => return None,
    };
    let name = match name {
        "file" | "host_device" => "BlockdevOptionsFile",
        "null-co" | "null-aio" => "BlockdevOptionsNull",
        "raw" => "BlockdevOptionsRaw",
        "qcow2" => "BlockdevOptionsQcow2",
        "throttle" => "BlockdevOptionsThrottle",
        _ => "BlockdevOptionsBlkdebug",
    };
    Some(Shape::Named(name, object))
}

/// `BlockdevRef`: a node, or its name.
fn node() -> Shape {
    Shape::Named("BlockdevRef", || Definition::Alternate(vec![shape(), STR]))
}

fn file() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required("filename", STR),
        M::optional(
            "locking",
            Shape::Named("OnOffAuto", || Definition::Enum(vec!["auto", "on", "off"])),
        ),
        M::optional(
            "aio",
            Shape::Named("BlockdevAioOptions", || {
                Definition::Enum(vec!["threads", "native", "io_uring"])
            }),
        ),
        M::optional("drop-cache", BOOL),
    ]
}

fn null() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::optional("size", INT),
        M::optional("latency-ns", INT),
        M::optional("read-zeroes", BOOL),
    ]
}

fn raw() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required("file", node()),
        M::optional("offset", INT),
        M::optional("size", INT),
    ]
}

fn qcow2() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required("file", node()),
        M::optional(
            "backing",
            Shape::Named("BlockdevRefOrNull", || {
                Definition::Alternate(vec![shape(), STR, NULL])
            }),
        ),
        M::optional("lazy-refcounts", BOOL),
        M::optional("pass-discard-request", BOOL),
        M::optional("pass-discard-snapshot", BOOL),
        M::optional("pass-discard-other", BOOL),
        M::optional("discard-no-unref", BOOL),
        M::optional(
            "overlap-check",
            Shape::Named("Qcow2OverlapChecks", || {
                Definition::Alternate(vec![
                    Shape::Named("Qcow2OverlapCheckFlags", || {
                        Definition::object(overlap_flags())
                    }),
                    overlap_mode(),
                ])
            }),
        ),
        M::optional("cache-size", INT),
        M::optional("l2-cache-size", INT),
        M::optional("l2-cache-entry-size", INT),
        M::optional("refcount-cache-size", INT),
        M::optional("cache-clean-interval", INT),
        M::optional("data-file", node()),
    ]
}

fn overlap_mode() -> Shape {
    Shape::Named("Qcow2OverlapCheckMode", || {
        Definition::Enum(vec!["none", "constant", "cached", "all"])
    })
}

fn overlap_flags() -> Vec<MemberShape> {
    let kinds = super::Metadata::ALL
        .into_iter()
        .map(|kind| MemberShape::optional(kind.name(), BOOL));
    std::iter::once(MemberShape::optional("template", overlap_mode()))
        .chain(kinds)
        .collect()
}

fn throttle() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required("throttle-group", STR),
        M::required("file", node()),
    ]
}

fn blkdebug() -> Vec<MemberShape> {
    use MemberShape as M;
    vec![
        M::required("image", node()),
        M::optional(
            "inject-error",
            Shape::Array(Box::new(Shape::Named("BlkdebugInjectErrorOptions", || {
                Definition::object(vec![
                    M::required("event", event()),
                    M::optional("state", INT),
                    M::optional("iotype", io_type()),
                    M::optional("errno", INT),
                    M::optional("delay-ns", INT),
                    M::optional("sector", INT),
                    M::optional("once", BOOL),
                    M::optional("immediately", BOOL),
                ])
            }))),
        ),
        M::optional(
            "set-state",
            Shape::Array(Box::new(Shape::Named("BlkdebugSetStateOptions", || {
                Definition::object(vec![
                    M::required("event", event()),
                    M::optional("state", INT),
                    M::required("new_state", INT),
                ])
            }))),
        ),
        M::optional("config", STR),
        M::optional("align", INT),
        M::optional("max-transfer", INT),
        M::optional("opt-write-zero", INT),
        M::optional("max-write-zero", INT),
        M::optional("opt-discard", INT),
        M::optional("max-discard", INT),
    ]
}

fn event() -> Shape {
    Shape::Named("BlkdebugEvent", || {
        Definition::Enum(super::blkdebug::EVENTS.to_vec())
    })
}

fn io_type() -> Shape {
    Shape::Named("BlkdebugIOType", || {
        let words = super::blkdebug::BlkdebugIoType::WORDS.iter();
        Definition::Enum(words.map(|(word, _)| *word).collect())
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Map, Value, json};

    use super::*;
    use crate::fields::recorded;

    /// A value of this type that a reader takes.
    pub(crate) fn example(name: &str, shape: &Shape) -> Value {
        match shape {
            Shape::Builtin("int") => json!(512),
            Shape::Builtin("bool") => json!(false),
            Shape::Builtin("null") => Value::Null,
            Shape::Builtin(_) => json!(format!("n{}", name.len())),
            Shape::Array(element) => json!([example(name, element)]),
            Shape::Named(_, define) => match define() {
                Definition::Enum(words) => json!(words[0]),
                Definition::Alternate(_) => json!("none"),
                Definition::Object { members, .. } => Value::Object(all(&members)),
            },
        }
    }

    /// All members with a value each.
    pub(crate) fn all(members: &[MemberShape]) -> Map<String, Value> {
        let member = |member: &MemberShape| {
            let value = example(member.name, &member.shape);
            (member.name.to_owned(), value)
        };
        members.iter().map(member).collect()
    }

    #[test]
    fn every_driver_is_told_with_exactly_the_members_that_it_reads() {
        for driver in BlockdevOptions::driver_names() {
            let Some(Shape::Named(_, define)) = of_driver(driver) else {
                panic!("the schema does not tell of driver '{driver}'")
            };
            let Definition::Object { members, .. } = define() else {
                panic!("{driver}: not an object")
            };
            let mut arguments = all(&common());
            arguments.extend(all(&members));
            arguments.insert("driver".to_owned(), json!(driver));
            // What cannot be given together.
            arguments.remove("cache-size");
            let (outcome, asked) = recorded(|| BlockdevOptions::from_json(arguments));
            assert!(outcome.is_ok(), "{driver}: {outcome:?}");
            let told = common().into_iter().chain(members);
            let told: BTreeSet<String> = told.map(|member| member.name.to_owned()).collect();
            let asked = asked.into_iter().filter(|name| !name.contains(['.', '[']));
            // Encryption is read to be refused.
            let asked: BTreeSet<String> = asked.filter(|name| name != "encrypt").collect();
            assert_eq!(asked, told, "{driver}");
        }
    }
}
