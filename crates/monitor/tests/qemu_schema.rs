//! Our schema against that of the `qemu-storage-daemon` that is installed: what we tell must be what its clients know.

#![allow(clippy::unwrap_used, reason = "a test says that it failed by a panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::{Command, Stdio};

use diskfuse_monitor::commands::{Kind, schema::schema};
use serde_json::Value;

/// What we have and QEMU's storage daemon has not: commands of QEMU itself, members of its later versions, and ours.
const OURS: &[&str] = &[
    "getfd",
    "closefd",
    "add-fd",
    "remove-fd",
    "query-fdsets",
    "query-iothreads",
    "block_set_io_throttle",
    // 10.1
    "blockdev-mirror.target-is-zero",
    "blockdev-backup.on-cbw-error",
    "transaction.actions.[].data.on-cbw-error",
    "BLOCK_IO_ERROR.qom-path",
    "query-named-block-nodes.[].children",
    "query-named-block-nodes.[].image.limits",
    // Several since 11.
    "block-export-add.iothread",
    // Ours.
    "block-export-add.threads",
    "block-export-add.max-background",
    "block-export-add.transport",
    "block-export-add.depth",
    "block-export-add.max-payload",
    "block-export-add.placement",
    "block-export-add.cpus",
    "block-export-add.passthrough",
    // QEMU 11 has it.
    "blockdev-add.inject-error.[].delay-ns",
    "blockdev-reopen.options.[].inject-error.[].delay-ns",
];

/// Places where one side has a type that says less.
const LOOSE: &[&str] = &[
    "query-qmp-schema.[]",
    "query-named-block-nodes.[].image.format-specific",
    "query-blockstats.[].stats.timed_stats.[]",
    // Only names, which is one of what QEMU takes.
    "blockdev-create.options.file",
    "blockdev-create.options.data-file",
    // A text that QEMU takes from a list.
    "blockdev-create.options.backing-fmt",
    "blockdev-add.inject-error.[].event",
    "blockdev-add.inject-error.[].iotype",
];

type Schema = BTreeMap<String, Value>;

fn by_name(entries: impl Iterator<Item = Value>) -> Schema {
    entries
        .map(|entry| (entry["name"].as_str().unwrap().to_owned(), entry))
        .collect()
}

fn theirs() -> Schema {
    // Ended if it does not end by itself.
    let mut daemon = Command::new("timeout")
        .args(["20", "qemu-storage-daemon"])
        .args(["--chardev", "stdio,id=c", "--monitor", "c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot run timeout(1): {error}; install coreutils"));
    let mut orders = daemon.stdin.take().unwrap();
    let query = b"{'execute':'qmp_capabilities'}{'execute':'query-qmp-schema','id':1}";
    orders.write_all(query).unwrap();
    let answers = daemon.stdout.take().unwrap();
    let mut messages = serde_json::Deserializer::from_reader(answers).into_iter::<Value>();
    let answer = messages
        .by_ref()
        .map_while(Result::ok)
        .find(|message| message["id"] == 1);
    // Only now: at `quit` QEMU drops what it has not yet written of an answer before.
    let _ = orders.write_all(b"{'execute':'quit'}");
    drop(orders);
    messages.for_each(drop);
    daemon.wait().unwrap();
    let Some(Value::Array(entries)) = answer.map(|mut answer| answer["return"].take()) else {
        panic!("no answer of qemu-storage-daemon; is it installed (qemu-utils)?")
    };
    by_name(entries.into_iter())
}

struct Comparison {
    ours: Schema,
    theirs: Schema,
    seen: BTreeSet<(String, String)>,
    wrong: Vec<String>,
}

impl Comparison {
    fn compare(&mut self, place: &str, ours: &str, theirs: &str) {
        if LOOSE.contains(&place)
            || OURS.contains(&place)
            || !self.seen.insert((ours.to_owned(), theirs.to_owned()))
        {
            return;
        }
        let (ours, theirs) = (self.ours[ours].clone(), self.theirs[theirs].clone());
        if ours["meta-type"] != theirs["meta-type"] {
            self.wrong.push(format!(
                "{place}: {} is {} there",
                ours["meta-type"], theirs["meta-type"]
            ));
            return;
        }
        match ours["meta-type"].as_str().unwrap() {
            "builtin" if ours["json-type"] != theirs["json-type"] => {
                self.wrong
                    .push(format!("{place}: {ours} is {theirs} there"));
            }
            "array" => self.compare(
                &format!("{place}.[]"),
                ours["element-type"].as_str().unwrap(),
                theirs["element-type"].as_str().unwrap(),
            ),
            "enum" => {
                let known = theirs["values"].as_array().unwrap();
                for word in ours["values"].as_array().unwrap() {
                    if !known.contains(word) {
                        self.wrong
                            .push(format!("{place}: {word} is not known there"));
                    }
                }
            }
            "object" => self.objects(place, &ours, &theirs),
            _ => {}
        }
    }

    fn objects(&mut self, place: &str, ours: &Value, theirs: &Value) {
        self.members(place, ours, theirs);
        let Some(variants) = ours.get("variants") else {
            return;
        };
        assert_eq!(ours["tag"], theirs["tag"], "{place}");
        for variant in variants.as_array().unwrap() {
            let cases = theirs["variants"].as_array().unwrap();
            match cases.iter().find(|case| case["case"] == variant["case"]) {
                Some(case) => {
                    let (ours, theirs) = (
                        variant["type"].as_str().unwrap(),
                        case["type"].as_str().unwrap(),
                    );
                    self.compare(place, ours, theirs);
                }
                None => self
                    .wrong
                    .push(format!("{place}: no case {} there", variant["case"])),
            }
        }
    }

    /// Every member of ours is known there, and what has to be there has to be here.
    fn members(&mut self, place: &str, ours: &Value, theirs: &Value) {
        let theirs = theirs["members"].as_array().unwrap();
        for member in ours["members"].as_array().unwrap() {
            let name = member["name"].as_str().unwrap();
            let place = format!("{place}.{name}");
            match theirs.iter().find(|other| other["name"] == name) {
                _ if OURS.contains(&place.as_str()) => {}
                None => self.wrong.push(format!("{place} is not known there")),
                Some(other) => {
                    if member.get("default").is_some() != other.get("default").is_some() {
                        self.wrong
                            .push(format!("{place} is optional on one side only"));
                    }
                    self.compare(
                        &place,
                        member["type"].as_str().unwrap(),
                        other["type"].as_str().unwrap(),
                    );
                }
            }
        }
        for other in theirs.iter().filter(|other| other.get("default").is_none()) {
            let mut ours = ours["members"].as_array().unwrap().iter();
            if ours.all(|member| member["name"] != other["name"]) {
                self.wrong
                    .push(format!("{place}: {} is missing here", other["name"]));
            }
        }
    }
}

#[test]
fn commands_and_events_are_told_as_qemu_tells_them() {
    let ours = by_name(schema().into_iter().map(|entry| entry.to_value()));
    let mut comparison = Comparison {
        ours: ours.clone(),
        theirs: theirs(),
        seen: BTreeSet::new(),
        wrong: Vec::new(),
    };
    let mut compared = 0;
    for (name, entry) in &ours {
        if !matches!(entry["meta-type"].as_str().unwrap(), "command" | "event")
            || OURS.contains(&name.as_str())
        {
            continue;
        }
        let Some(other) = comparison.theirs.get(name).cloned() else {
            comparison.wrong.push(format!("{name} is not known there"));
            continue;
        };
        compared += 1;
        comparison.seen.clear();
        for part in ["arg-type", "ret-type"] {
            if let (Some(ours), Some(theirs)) = (entry.get(part), other.get(part)) {
                comparison.compare(name, ours.as_str().unwrap(), theirs.as_str().unwrap());
            }
        }
    }
    assert!(compared > 10, "{compared}");
    assert!(comparison.wrong.is_empty(), "{:#?}", comparison.wrong);
}
