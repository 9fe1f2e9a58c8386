//! A schema as a list of places: every command, event, and member, with its type. Knows no command by name.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

/// Each place and its type. A command or event has the type `command` or `event`; words are joined by `|` in braces; `?` behind a type
/// says that the member may be missing.
pub type Places = BTreeMap<String, String>;

/// All places of a schema, in the form of `query-qmp-schema`.
pub fn places(entries: Vec<Value>) -> Places {
    let named = entries.into_iter().map(|entry| {
        let name = entry["name"].as_str().unwrap().to_owned();
        (name, entry)
    });
    let mut flat = Flat {
        types: named.collect(),
        places: Places::new(),
    };
    let types = flat.types.clone();
    for (name, entry) in &types {
        let kind = entry["meta-type"].as_str().unwrap();
        if matches!(kind, "command" | "event") {
            flat.places.insert(name.clone(), kind.to_owned());
            let arguments = entry["arg-type"].as_str().unwrap();
            flat.members(name, arguments, &mut Vec::new());
        }
    }
    flat.places
}

/// The words of a type that is one of words.
pub fn words(kind: &str) -> Option<BTreeSet<&str>> {
    let inside = kind.trim_end_matches('?').strip_prefix('{')?;
    Some(inside.strip_suffix('}')?.split('|').collect())
}

struct Flat {
    types: BTreeMap<String, Value>,
    places: Places,
}

impl Flat {
    /// Notes the members of an object; `inside`: the types that this one is inside of, as types may contain themselves.
    fn members(&mut self, place: &str, name: &str, inside: &mut Vec<String>) {
        let object = self.types[name].clone();
        let empty = Vec::new();
        for member in object["members"].as_array().unwrap_or(&empty) {
            let below = format!("{place}.{}", member["name"].as_str().unwrap());
            let of = member["type"].as_str().unwrap();
            let optional = member.get("default").map_or("", |_| "?");
            let described = self.describe(of);
            self.places.insert(below.clone(), described + optional);
            self.enter(&below, of, inside);
        }
        for variant in object["variants"].as_array().unwrap_or(&empty) {
            let below = format!("{place}({})", variant["case"].as_str().unwrap());
            self.places.insert(below.clone(), "choice".to_owned());
            self.enter(&below, variant["type"].as_str().unwrap(), inside);
        }
    }

    fn enter(&mut self, place: &str, name: &str, inside: &mut Vec<String>) {
        let entry = self.types[name].clone();
        match entry["meta-type"].as_str().unwrap() {
            "array" => self.enter(
                &format!("{place}[]"),
                entry["element-type"].as_str().unwrap(),
                inside,
            ),
            "object" if !inside.iter().any(|outer| outer == name) && !self.is_node(name) => {
                inside.push(name.to_owned());
                self.members(place, name, inside);
                inside.pop();
            }
            "alternate" => {
                for member in entry["members"].as_array().unwrap() {
                    self.enter(place, member["type"].as_str().unwrap(), inside);
                }
            }
            _ => {}
        }
    }

    /// Whether these are the options of a node, which are told once, at `blockdev-add`.
    fn is_node(&self, name: &str) -> bool {
        self.types["blockdev-add"]["arg-type"] == name
    }

    fn describe(&self, name: &str) -> String {
        let entry = &self.types[name];
        match entry["meta-type"].as_str().unwrap() {
            "enum" => {
                let mut words: Vec<&str> = entry["values"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|word| word.as_str().unwrap())
                    .collect();
                words.sort_unstable();
                format!("{{{}}}", words.join("|"))
            }
            "array" => format!(
                "[{}]",
                self.describe(entry["element-type"].as_str().unwrap())
            ),
            "object" if self.is_node(name) => "node".to_owned(),
            "alternate" => {
                let members = entry["members"].as_array().unwrap().iter();
                let mut kinds: Vec<String> = members
                    .map(|member| self.describe(member["type"].as_str().unwrap()))
                    .collect();
                kinds.sort_unstable();
                kinds.join("/")
            }
            "builtin" => entry["name"].as_str().unwrap().to_owned(),
            other => other.to_owned(),
        }
    }
}
