//! `docs/QSD-COMPAT.md`: what of `qemu-storage-daemon` is here, made from the tables that the monitor itself reads and from a
//! list of what QEMU's daemon has. It must never say of anything that it is the same when the code does not read it.
//!
//! `DISKFUSE_WRITE_DOCS=1 cargo test -p diskfuse-monitor --test compat` writes the page. With `DISKFUSE_QSD_SCHEMA=FILE`, an
//! answer of QEMU's to `query-qmp-schema`, it makes the list anew first.

#![allow(clippy::unwrap_used, reason = "a test says that it failed by a panic")]

#[path = "compat/command_line.rs"]
mod command_line;
#[path = "compat/flat.rs"]
mod flat;
#[path = "compat/notes.rs"]
mod notes;
#[path = "compat/page.rs"]
mod page;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use diskfuse_monitor::commands::{Kind, schema::schema};
use flat::Places;
use serde_json::Value;

const LIST: &str = "tests/compat/qsd-11.1.txt";
const PAGE: &str = "../../docs/QSD-COMPAT.md";

/// What stands above the list.
const ABOUT: &str = "\
# What qemu-storage-daemon 11.1.3 has: commands and events with their members and types, as its query-qmp-schema tells
# them, a line each; `a(b).c` is the member c that a has if b is chosen. Members of choices that are not here are left
# out. compat.rs writes it.
";

fn ours() -> Places {
    flat::places(schema().iter().map(Kind::to_value).collect())
}

fn read_list() -> Places {
    let text = std::fs::read_to_string(LIST).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let split = lines.map(|line| line.split_once(' ').unwrap_or((line, "")));
    split
        .map(|(place, kind)| (place.to_owned(), kind.to_owned()))
        .collect()
}

/// Makes the list anew from an answer of QEMU's.
fn make_list(answer: &Path, ours: &Places) {
    let text = std::fs::read_to_string(answer).unwrap();
    let mut answer: Value = serde_json::from_str(&text).unwrap();
    let entries = match answer.get_mut("return") {
        Some(entries) => entries.take(),
        None => answer,
    };
    let theirs = flat::places(entries.as_array().unwrap().clone());
    let lines = theirs
        .iter()
        .filter(|(place, _)| {
            let choice = place.rfind(").").map(|end| &place[..=end]);
            choice.is_none_or(|choice| ours.contains_key(choice))
        })
        .map(|(place, kind)| format!("{place} {kind}").trim_end().to_owned() + "\n");
    std::fs::write(LIST, ABOUT.to_owned() + &lines.collect::<String>()).unwrap();
}

#[test]
fn the_page_says_what_there_is() {
    let ours = ours();
    if let Some(answer) = std::env::var_os("DISKFUSE_QSD_SCHEMA") {
        make_list(Path::new(&answer), &ours);
    }
    let page = page::page(&ours, &read_list(), &command_line::rows());
    if std::env::var_os("DISKFUSE_WRITE_DOCS").is_some() {
        std::fs::write(PAGE, page).unwrap();
        return;
    }
    let there = std::fs::read_to_string(PAGE).unwrap_or_default();
    let differs = there
        .lines()
        .zip(page.lines())
        .find(|(is, ought)| is != ought);
    assert!(
        there == page,
        "docs/QSD-COMPAT.md is not what the code says; write it anew with\n  \
         DISKFUSE_WRITE_DOCS=1 cargo test -p diskfuse-monitor --test compat\nfirst difference: {differs:?}"
    );
}

/// A note about nothing is one that somebody forgot to take away.
#[test]
fn every_note_is_about_something() {
    let (ours, theirs) = (ours(), read_list());
    let mut seen = BTreeSet::new();
    for (place, note) in notes::NOTES {
        let known = ours.contains_key(*place) || theirs.contains_key(*place);
        assert!(known, "nobody has {place}, of which is said: {note}");
        assert!(seen.insert(place), "{place} has two notes");
    }
    let rows: BTreeMap<_, _> = command_line::rows().into_iter().collect();
    for (place, note) in command_line::NOTES {
        assert!(
            rows.contains_key(*place),
            "nobody has {place}, of which is said: {note}"
        );
    }
}

/// Where both have something, a client may send the one what it sends the other.
#[test]
fn what_both_have_is_of_one_type() {
    let (ours, theirs) = (ours(), read_list());
    let mut wrong = Vec::new();
    for (place, kind) in &ours {
        let Some(other) = theirs.get(place) else {
            continue;
        };
        let noted = notes::NOTES.iter().any(|(noted, _)| noted == place);
        let fits = match (flat::words(kind), flat::words(other)) {
            (Some(words), Some(others)) => words.is_subset(&others),
            _ => kind == other,
        };
        if !fits && !noted {
            wrong.push(format!("{place}: {kind} is {other} there"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
