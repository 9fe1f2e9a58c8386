//! Arguments of commands, right and wrong, and that the schema tells of exactly what there is.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::*;
use crate::qmp::event;

fn read(name: &str, arguments: Value) -> Result<Command, String> {
    let Value::Object(arguments) = arguments else {
        panic!("not an object")
    };
    let row = TABLE.iter().find(|row| row.name == name).unwrap();
    row.read(arguments).map_err(|error| error.to_string())
}

#[test]
fn names_come_once_and_are_those_of_the_commands() {
    let names: BTreeSet<&str> = TABLE.iter().map(|row| row.name).collect();
    assert_eq!(names.len(), TABLE.len());
    assert_eq!(read("quit", json!({})).unwrap().name(), "quit");
    let export = json!({"id": "e", "mode": "hard"});
    assert_eq!(
        read("block-export-del", export),
        Ok(Command::BlockExportDel(BlockExportDel {
            id: "e".to_owned(),
            mode: Some(RemoveMode::Hard)
        }))
    );
}

/// As told by `qemu-storage-daemon` 10.0.2, but for hints in parentheses and places that it calls `null`.
#[test]
fn mistakes_in_arguments_are_told_in_known_words() {
    let cases = [
        ("quit", json!({"a": 1}), "Parameter 'a' is unexpected"),
        ("block-export-del", json!({}), "Parameter 'id' is missing"),
        (
            "block-export-del",
            json!({"id": 1}),
            "Invalid parameter type for 'id', expected: string",
        ),
        (
            "block-export-del",
            json!({"id": "x", "mode": "foo"}),
            "Parameter 'mode' does not accept value 'foo'",
        ),
        (
            "block_resize",
            json!({"node-name": "q", "size": 1.5}),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            "blockdev-create",
            json!({"job-id": "j", "options": {"driver": "file", "filename": "x"}}),
            "Parameter 'options.size' is missing",
        ),
        (
            "blockdev-create",
            json!({"job-id": "j", "options": {"driver": "null-co"}}),
            "Driver does not support blockdev-create",
        ),
        (
            "transaction",
            json!({"actions": [{"type": "foo"}]}),
            "Parameter 'type' does not accept value 'foo'",
        ),
        (
            "transaction",
            json!({"actions": [{"type": "abort"}]}),
            "Parameter 'actions[0].data' is missing",
        ),
        (
            "transaction",
            json!({"actions": [{"type": "blockdev-snapshot", "data": {"node": 1}}]}),
            "Invalid parameter type for 'actions[0].data.node', expected: string",
        ),
        (
            "transaction",
            json!({"actions": 5}),
            "Invalid parameter type for 'actions', expected: array",
        ),
        (
            "transaction",
            json!({"actions": ["a"]}),
            "Invalid parameter type for 'actions[0]', expected: object",
        ),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "a", "target": "b", "bitmaps": [5]}),
            "Invalid parameter type for 'bitmaps[0]', expected: BlockDirtyBitmapOrStr",
        ),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "a", "target": "b", "bitmaps": [{"node": "x"}]}),
            "Parameter 'bitmaps[0].name' is missing",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co"}),
            "'node-name' must be specified for the root node",
        ),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "null-co", "node-name": "a", "x": 1}]}),
            "Parameter 'options[0].x' is unexpected",
        ),
    ];
    for (name, arguments, message) in cases {
        let error = read(name, arguments.clone()).unwrap_err();
        assert_eq!(error, message, "{name} {arguments}");
    }
}

#[test]
fn typed_arguments_arrive() {
    let arguments = json!({"actions": [
        {"type": "abort", "data": {}},
        {"type": "block-dirty-bitmap-merge", "data":
            {"node": "n", "target": "t", "bitmaps": ["a", {"node": "m", "name": "b"}]}},
    ], "properties": {"completion-mode": "grouped"}});
    let Ok(Command::Transaction(transaction)) = read("transaction", arguments.clone()) else {
        panic!("not read")
    };
    // Writing gives back what was read.
    assert_eq!(transaction.to_value(), arguments);
    let qcow2 = json!({"job-id": "j", "options": {"driver": "qcow2", "file": "f", "size": 1 << 20, "version": "v3"}});
    let Ok(Command::BlockdevCreate(create)) = read("blockdev-create", qcow2) else {
        panic!("not read")
    };
    assert!(matches!(create.options, CreateOptions::Qcow2(qcow2) if qcow2.size == 1 << 20));
}

/// The entries of the schema, by name.
fn entries() -> Map<String, Value> {
    let entries = schema::schema().into_iter();
    let named = entries.map(|entry| {
        (
            entry.0["name"].as_str().unwrap().to_owned(),
            entry.to_value(),
        )
    });
    let all: Vec<(String, Value)> = named.collect();
    let map: Map<String, Value> = all.iter().cloned().collect();
    assert_eq!(map.len(), all.len(), "names come once");
    map
}

#[test]
fn the_schema_tells_of_all_commands_and_events_and_of_no_others() {
    let entries = entries();
    let of_kind = |kind: &str| -> BTreeSet<String> {
        let found = entries.values().filter(|entry| entry["meta-type"] == kind);
        found
            .map(|entry| entry["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let commands: BTreeSet<String> = built().map(|row| row.name.to_owned()).collect();
    assert_eq!(of_kind("command"), commands);
    let events: BTreeSet<String> = event::ALL
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    assert_eq!(of_kind("event"), events);
    let oob = |entry: &Value| entry.get("allow-oob") == Some(&json!(true));
    for row in built() {
        assert_eq!(oob(&entries[row.name]), row.allow_oob, "{}", row.name);
    }
}

#[test]
fn every_type_that_the_schema_names_is_described_and_every_other_one_is_not() {
    fn names(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Array(list) => list.iter().for_each(|value| names(value, found)),
            Value::Object(members) => {
                for (key, value) in members {
                    match (key.as_str(), value) {
                        (
                            "arg-type" | "ret-type" | "element-type" | "type",
                            Value::String(name),
                        ) => {
                            found.insert(name.clone());
                        }
                        _ => names(value, found),
                    }
                }
            }
            _ => {}
        }
    }
    let entries = entries();
    let mut used = BTreeSet::new();
    entries.values().for_each(|entry| names(entry, &mut used));
    let described = entries.values().filter(|entry| {
        let kind = entry["meta-type"].as_str().unwrap();
        !matches!(kind, "command" | "event")
    });
    let described: BTreeSet<String> = described
        .map(|entry| entry["name"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(used, described);
}
