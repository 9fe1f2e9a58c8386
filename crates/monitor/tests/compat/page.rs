//! The page itself: what both have, row by row. Says nothing that is not in the lists or the notes.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::command_line::{self, Row};
use super::flat::{Places, words};
use super::notes::{GENERAL, NOTES};

/// The whole page.
pub fn page(ours: &Places, theirs: &Places, options: &[(&'static str, Row)]) -> String {
    let lists = Lists { ours, theirs };
    let mut page = String::from(GENERAL);
    page.push_str(&command_line(options));
    let sections = [
        ("Nodes: `--blockdev` and `blockdev-add`", "blockdev-add"),
        (
            "Exports: `--export` and `block-export-add`",
            "block-export-add",
        ),
        ("Objects: `--object` and `object-add`", "object-add"),
    ];
    for (title, command) in sections {
        let about = |subject: &str| is_about(subject, command);
        page.push_str(&lists.table(title, "Options", about));
    }
    let elsewhere = |subject: &str| {
        sections
            .iter()
            .any(|(_, command)| is_about(subject, command))
    };
    let is_event = |subject: &str| subject.starts_with(|first: char| first.is_ascii_uppercase());
    page.push_str(&lists.table("Commands", "Command", |subject| {
        !elsewhere(subject) && !is_event(subject)
    }));
    page.push_str(&lists.table("Events", "Event", is_event));
    page.push_str(&lists.only_here());
    page
}

fn is_about(subject: &str, command: &str) -> bool {
    let rest = subject.strip_prefix(command);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '(']))
}

fn command_line(options: &[(&'static str, Row)]) -> String {
    let mut text = heading("Command line", "Option");
    for (option, row) in options {
        let note = command_line::NOTES
            .iter()
            .find(|(about, _)| about == option);
        let mut differences = Vec::new();
        if !row.missing.is_empty() && row.built {
            differences.push(format!("not built: {}", code(&row.missing)));
        }
        differences.extend(note.map(|(_, note)| (*note).to_owned()));
        text.push_str(&line(option, row.built, &row.same, &differences));
    }
    text
}

fn heading(title: &str, first: &str) -> String {
    format!("\n## {title}\n\n| {first} | State | The same | Differences |\n|---|---|---|---|\n")
}

fn line(subject: &str, built: bool, same: &[String], differences: &[String]) -> String {
    let state = match (built, differences.is_empty()) {
        (false, _) => "not built",
        (true, true) => "same",
        (true, false) => "differs",
    };
    let same = if built { code(same) } else { String::new() };
    let differences = differences.join("; ");
    format!("| `{subject}` | {state} | {same} | {differences} |\n")
}

fn code(names: &[String]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

/// What a place belongs to: a command, an event, or one of the things that it may be about.
fn subject(place: &str) -> &str {
    match place.rfind(')') {
        Some(end) => &place[..=end],
        None => place.split('.').next().unwrap_or(place),
    }
}

fn note(place: &str) -> Option<&'static str> {
    let found = NOTES.iter().find(|(about, _)| *about == place);
    found.map(|(_, note)| *note)
}

struct Lists<'l> {
    ours: &'l Places,
    theirs: &'l Places,
}

impl Lists<'_> {
    fn table(&self, title: &str, first: &str, about: impl Fn(&str) -> bool) -> String {
        let mut text = heading(title, first);
        let subjects: BTreeSet<&str> = self.theirs.keys().map(|place| subject(place)).collect();
        for of in subjects.into_iter().filter(|of| about(of)) {
            let built = self.ours.contains_key(of);
            // What may be chosen there and is not here is told by the row of whoever chooses.
            if !built && of.ends_with(')') {
                continue;
            }
            let (same, differences) = self.row(of, built);
            text.push_str(&line(of, built, &same, &differences));
        }
        text
    }

    fn row(&self, of: &str, built: bool) -> (Vec<String>, Vec<String>) {
        let mut differences: Vec<String> = note(of).map(str::to_owned).into_iter().collect();
        if !built {
            return (Vec::new(), differences);
        }
        let (mut same, mut missing, mut more) = (Vec::new(), Vec::new(), Vec::new());
        let all: BTreeSet<&String> = self.ours.keys().chain(self.theirs.keys()).collect();
        for place in all {
            if self.is_choice_of(place, of) {
                if !self.ours.contains_key(place) {
                    let start = place.rfind('(').map_or(0, |start| start + 1);
                    missing.push(place[start..].trim_end_matches(')').to_owned());
                }
                continue;
            }
            if place == of || subject(place) != of {
                continue;
            }
            let name = place[of.len()..].trim_start_matches('.').to_owned();
            match (self.ours.get(place), self.theirs.get(place)) {
                (Some(ours), Some(theirs)) => match self.difference(place, ours, theirs) {
                    Some(difference) => differences.push(format!("`{name}`: {difference}")),
                    None => same.push(name),
                },
                (None, _) => missing.push(name),
                (Some(_), None) => more.push(match note(place) {
                    Some(note) => format!("`{name}` ({note})"),
                    None => format!("`{name}`"),
                }),
            }
        }
        if !missing.is_empty() {
            differences.push(format!("not built: {}", code(&missing)));
        }
        if !more.is_empty() {
            differences.push(format!("only here: {}", more.join(", ")));
        }
        (same, differences)
    }

    /// Whether `place` is something that may be chosen directly below `of`.
    fn is_choice_of(&self, place: &str, of: &str) -> bool {
        let kind = self.ours.get(place).or_else(|| self.theirs.get(place));
        let is_choice = kind.is_some_and(|kind| kind == "choice");
        let outer = place.rfind('(').map(|start| subject(&place[..start]));
        is_choice && outer == Some(of)
    }

    fn difference(&self, place: &str, ours: &str, theirs: &str) -> Option<String> {
        let mut all: Vec<String> = note(place).map(str::to_owned).into_iter().collect();
        if let (Some(here), Some(there)) = (words(ours), words(theirs)) {
            // Choices are told of elsewhere.
            let outer = &place[..place.rfind('.').unwrap_or(0)];
            let is_choice = |word: &str| self.theirs.contains_key(&format!("{outer}({word})"));
            let missing = there.difference(&here).filter(|word| !is_choice(word));
            let missing: Vec<String> = missing.map(|word| (*word).to_owned()).collect();
            if !missing.is_empty() {
                all.push(format!("not built: {}", code(&missing)));
            }
        }
        (!all.is_empty()).then(|| all.join("; "))
    }

    /// Commands and events that QEMU's daemon does not have.
    fn only_here(&self) -> String {
        let mut text = String::from("\n## Only here\n\n");
        let ours = self.ours.iter();
        for (place, kind) in ours.filter(|(place, _)| !self.theirs.contains_key(*place)) {
            if matches!(kind.as_str(), "command" | "event") {
                let about = note(place).map_or(String::new(), |note| format!(": {note}"));
                let _ = writeln!(text, "* `{place}`{about}");
            }
        }
        text.push_str(super::notes::ONLY_HERE);
        text
    }
}
