//! Promises about every input: nothing panics, what is written is read back, both syntaxes say the same.

#![allow(clippy::unwrap_used, reason = "a test says that it failed by a panic")]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use diskfuse_monitor::{
    BlockdevOptions, Directive, ExportOptions, ObjectOptions, json, keyval, parse_command_line,
};
use proptest::prelude::*;
use serde_json::{Map, Value};

/// A tree as key=value text can say it: scalars are strings, no group and no list is empty.
fn tree() -> impl Strategy<Value = Map<String, Value>> {
    let scalar = prop_oneof!["[a-z,=. é\"'{\\\\]{0,8}", any::<String>()].prop_map(Value::String);
    let member = scalar.prop_recursive(4, 40, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..5).prop_map(Value::Array),
            prop::collection::btree_map(key(), inner, 1..5)
                .prop_map(|group| Value::Object(group.into_iter().collect())),
        ]
    });
    prop::collection::btree_map(key(), member, 0..6)
        .prop_map(|members| members.into_iter().collect())
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof!["[a-zA-Z][a-zA-Z0-9_-]{0,8}", "__[a-z.-]{1,6}_[a-z]{1,4}"]
}

/// Writes a tree as key=value text: every scalar with its full key.
fn write(members: &Map<String, Value>) -> String {
    let mut parameters = Vec::new();
    for (name, member) in members {
        write_member(name, member, &mut parameters);
    }
    parameters.join(",")
}

fn write_member(path: &str, member: &Value, parameters: &mut Vec<String>) {
    match member {
        Value::Object(group) => {
            group.iter().for_each(|(name, member)| {
                write_member(&format!("{path}.{name}"), member, parameters);
            });
        }
        Value::Array(list) => {
            let elements = list.iter().enumerate();
            elements.for_each(|(index, member)| {
                write_member(&format!("{path}.{index}"), member, parameters);
            });
        }
        Value::String(text) => parameters.push(format!("{path}={}", text.replace(',', ",,"))),
        other => unreachable!("{other} is no scalar of key=value text"),
    }
}

/// One parameter in both syntaxes.
#[derive(Debug, Clone)]
struct Parameter {
    text: String,
    json: Value,
}

fn parameter<T: Clone + std::fmt::Debug + Into<Value>>(
    text: &(impl ToString + ?Sized),
    json: T,
) -> Parameter {
    Parameter {
        text: text.to_string(),
        json: json.into(),
    }
}

fn boolean() -> impl Strategy<Value = Parameter> {
    (any::<bool>(), 0_usize..4).prop_map(|(on, spelling)| {
        let spellings = [["off", "no", "false", "n"], ["on", "yes", "true", "y"]];
        parameter(spellings[usize::from(on)][spelling], on)
    })
}

fn number() -> impl Strategy<Value = Parameter> {
    prop_oneof![any::<i64>(), -2..100_i64]
        .prop_flat_map(|number| {
            let spellings = [
                Some(number.to_string()),
                (number >= 0).then(|| format!("{number:#x}")),
            ];
            (
                Just(number),
                prop::sample::select(spellings.into_iter().flatten().collect::<Vec<_>>()),
            )
        })
        .prop_map(|(number, text)| parameter(&text, number))
}

fn word(words: &'static [&'static str]) -> impl Strategy<Value = Parameter> {
    prop::sample::select(words).prop_map(|word| parameter(word, word))
}

fn text() -> impl Strategy<Value = Parameter> {
    "[a-z0-9./,=' -]{0,12}".prop_map(|text| parameter(&text.replace(',', ",,"), text))
}

/// Members of a group, by their dotted names, each there or not.
type Group = Vec<(&'static str, Parameter)>;

fn group(members: Vec<(&'static str, BoxedStrategy<Parameter>)>) -> impl Strategy<Value = Group> {
    let each = members
        .into_iter()
        .map(|(name, strategy)| prop::option::of(strategy).prop_map(move |p| (name, p)));
    each.collect::<Vec<_>>().prop_map(|all| {
        all.into_iter()
            .filter_map(|(name, p)| Some((name, p?)))
            .collect()
    })
}

/// The group as an argument in key=value text and in JSON.
fn both(group: &Group) -> (String, String) {
    let text: Vec<String> = group
        .iter()
        .map(|(name, parameter)| format!("{name}={}", parameter.text))
        .collect();
    let mut tree = Map::new();
    for (name, parameter) in group {
        let mut parts: Vec<&str> = name.split('.').collect();
        let last = parts.pop().unwrap();
        let inner = parts.into_iter().fold(&mut tree, |members, part| {
            let member = members
                .entry(part)
                .or_insert_with(|| Value::Object(Map::new()));
            member.as_object_mut().unwrap()
        });
        inner.insert(last.to_owned(), parameter.json.clone());
    }
    (text.join(","), Value::Object(tree).to_string())
}

fn node() -> impl Strategy<Value = Group> {
    group(vec![
        (
            "driver",
            word(&[
                "null-co",
                "null-aio",
                "file",
                "host_device",
                "raw",
                "qcow2",
                "none",
            ])
            .boxed(),
        ),
        (
            "node-name",
            prop_oneof![3 => word(&["n", "disk-0"]).boxed(), 1 => text().boxed()].boxed(),
        ),
        ("read-only", boolean().boxed()),
        ("cache.direct", boolean().boxed()),
        ("cache.no-flush", boolean().boxed()),
        ("discard", word(&["ignore", "unmap", "on"]).boxed()),
        ("detect-zeroes", word(&["on", "off", "unmap"]).boxed()),
        ("size", number().boxed()),
        ("offset", number().boxed()),
        ("filename", text().boxed()),
        ("file.driver", word(&["null-co", "file"]).boxed()),
        ("file.filename", text().boxed()),
        ("file.size", number().boxed()),
        ("backing", word(&["", "b"]).boxed()),
        ("cache-size", number().boxed()),
        ("l2-cache-size", number().boxed()),
        ("cache-clean-interval", number().boxed()),
        ("overlap-check", word(&["none", "all", "some"]).boxed()),
        ("encrypt.format", word(&["aes", "no"]).boxed()),
    ])
}

/// What `qcow2` takes.
fn qcow2() -> Vec<(&'static str, BoxedStrategy<Parameter>)> {
    vec![
        ("backing", word(&["", "b"]).boxed()),
        ("data-file", word(&["d"]).boxed()),
        ("lazy-refcounts", boolean().boxed()),
        ("pass-discard-request", boolean().boxed()),
        ("pass-discard-snapshot", boolean().boxed()),
        ("pass-discard-other", boolean().boxed()),
        ("discard-no-unref", boolean().boxed()),
        (
            "overlap-check.template",
            word(&["none", "constant", "cached", "all"]).boxed(),
        ),
        ("overlap-check.active-l2", boolean().boxed()),
        (
            "cache-clean-interval",
            (0..1_000_i64)
                .prop_map(|number| parameter(&number, number))
                .boxed(),
        ),
    ]
}

/// Sizes that do not contradict each other.
fn caches() -> impl Strategy<Value = Group> {
    let size = || {
        (0..i64::MAX)
            .prop_map(|number| parameter(&number, number))
            .boxed()
    };
    prop_oneof![
        group(vec![("cache-size", size())]),
        group(vec![
            ("l2-cache-size", size()),
            ("refcount-cache-size", size()),
            ("l2-cache-entry-size", size()),
        ]),
    ]
}

/// As [`node`], but only what the driver takes, so that most are valid.
fn valid_node() -> impl Strategy<Value = Group> {
    let common = group(vec![
        ("read-only", boolean().boxed()),
        ("auto-read-only", boolean().boxed()),
        ("force-share", boolean().boxed()),
        ("cache.direct", boolean().boxed()),
        ("discard", word(&["ignore", "unmap"]).boxed()),
        ("detect-zeroes", word(&["on", "off"]).boxed()),
    ]);
    let bytes = || {
        (0..i64::MAX)
            .prop_map(|number| parameter(&number, number))
            .boxed()
    };
    let null = group(vec![
        ("size", bytes()),
        ("latency-ns", bytes()),
        ("read-zeroes", boolean().boxed()),
    ])
    .prop_map(|more| (parameter("null-co", "null-co"), more));
    let file = (
        text(),
        group(vec![(
            "aio",
            word(&["threads", "native", "io_uring"]).boxed(),
        )]),
    )
        .prop_map(|(name, more)| {
            let more = more.into_iter().chain([("filename", name)]).collect();
            (parameter("file", "file"), more)
        });
    let raw =
        (text(), group(vec![("size", bytes()), ("offset", bytes())])).prop_map(|(name, more)| {
            let below = [
                ("file.driver", parameter("file", "file")),
                ("file.filename", name),
            ];
            (
                parameter("raw", "raw"),
                more.into_iter().chain(below).collect(),
            )
        });
    let qcow2 = (text(), caches(), group(qcow2())).prop_map(|(name, caches, more)| {
        let below = [
            ("file.driver", parameter("file", "file")),
            ("file.filename", name),
        ];
        let more = more.into_iter().chain(caches).chain(below).collect();
        (parameter("qcow2", "qcow2"), more)
    });
    let own = prop_oneof![null, file, raw, qcow2];
    (common, own).prop_map(|(common, (driver, own)): (Group, (Parameter, Group))| {
        let start = [("driver", driver), ("node-name", parameter("n", "n"))];
        start.into_iter().chain(common).chain(own).collect()
    })
}

/// Text that is nearly an argument.
fn nearly() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "driver",
        "raw",
        "file",
        "null-co",
        "node-name",
        "size",
        "=",
        ",",
        ".",
        "0",
        "1",
        "{",
        "}",
        "[",
        "]",
        ":",
        "'",
        "\"",
        "\\",
        "\\u",
        "d83d",
        "true",
        "null",
        "1e9",
        "-",
        "iothread",
        "fuse",
        "help",
        "id",
        "é",
        " ",
        "threads",
        "__",
        "_",
    ]);
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in prop_oneof![any::<String>(), nearly(), nearly().prop_map(|t| format!("{{{t}"))]) {
        let messages = [
            keyval::parse(&text, None).err(),
            keyval::parse(&text, Some("driver")).err(),
            json::parse(&text).err(),
            BlockdevOptions::parse(&text).err(),
            ExportOptions::parse(&text).err(),
            ObjectOptions::parse(&text).err(),
        ];
        for error in messages.into_iter().flatten() {
            let message = error.to_string();
            prop_assert!(!message.is_empty() && !message.contains(char::is_control), "{message:?}");
        }
    }

    #[test]
    fn any_bytes_are_a_command_line_or_refused(words in prop::collection::vec(prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20),
        nearly().prop_map(String::into_bytes),
        prop::sample::select(vec!["--blockdev", "--export=", "--object", "--log", "-T", "-h", "--"])
            .prop_map(|word| word.as_bytes().to_vec()),
    ], 0..8)) {
        if let Err(error) = parse_command_line(words.into_iter().map(OsString::from_vec)) {
            prop_assert!(!error.to_string().contains(char::is_control));
        }
    }

    #[test]
    fn a_tree_written_as_key_value_text_is_read_back(tree in tree()) {
        let read = keyval::parse(&write(&tree), None);
        prop_assert_eq!(read, Ok(keyval::KeyVal { members: tree, help: false }));
    }

    #[test]
    fn a_tree_written_as_json_is_read_back(tree in tree()) {
        // A zero is refused on purpose.
        let text = Value::Object(tree.clone()).to_string();
        prop_assume!(!text.contains("\\u0000"));
        prop_assert_eq!(json::parse(&text), Ok(Value::Object(tree)));
    }

    #[test]
    fn numbers_written_as_json_are_read_back_exactly(number in prop_oneof![
        any::<i64>().prop_map(Value::from), any::<u64>().prop_map(Value::from), any::<f64>().prop_map(Value::from),
    ]) {
        prop_assert_eq!(json::parse(&number.to_string()), Ok(number));
    }

    #[test]
    fn both_syntaxes_accept_and_refuse_the_same(node in node()) {
        let (text, json) = both(&node);
        let (text, json) = (BlockdevOptions::parse(&text), BlockdevOptions::parse(&json));
        prop_assert_eq!(text, json);
    }

    #[test]
    fn valid_nodes_are_the_same_in_both_syntaxes(node in valid_node()) {
        let (text, json) = both(&node);
        let read = BlockdevOptions::parse(&text);
        prop_assert!(read.is_ok(), "{}: {:?}", text, read);
        prop_assert_eq!(&read, &BlockdevOptions::parse(&json), "{}", json);
        let words = ["--blockdev".to_owned(), json, format!("--blockdev={text}")];
        let line = parse_command_line(words.into_iter().map(OsString::from));
        let directive = Directive::Blockdev(read.unwrap());
        prop_assert_eq!(line, Ok(vec![directive.clone(), directive]));
    }
}
