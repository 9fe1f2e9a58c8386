//! `query-qmp-schema`: every command and event with its types, in QEMU's format (`qapi/introspect.json`). Types have no
//! names but numbers, as in QEMU, so that nobody comes to depend on them.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::SchemaInfo;
use super::shape::{Definition, MemberShape, Shape};
use crate::qmp::event;

/// Everything there is: commands, events, and the types that they use. Made anew each time; callers keep it.
pub fn schema() -> Vec<SchemaInfo> {
    let mut types = Types::default();
    let mut entries = Vec::new();
    for row in super::built() {
        let mut entry = json!({
            "name": row.name,
            "meta-type": "command",
            "arg-type": types.name(&(row.arguments)()),
            "ret-type": types.name(&(row.answer)()),
        });
        if row.allow_oob
            && let Some(members) = entry.as_object_mut()
        {
            members.insert("allow-oob".to_owned(), Value::Bool(true));
        }
        entries.push(entry);
    }
    for (name, data) in event::ALL {
        let data = types.name(&data());
        entries.push(json!({"name": name, "meta-type": "event", "arg-type": data}));
    }
    entries.extend(types.describe());
    let members = entries.into_iter().filter_map(|entry| match entry {
        Value::Object(members) => Some(SchemaInfo(members)),
        _ => None,
    });
    members.collect()
}

/// The types that have been named, and those of them that are still to be described.
#[derive(Default)]
struct Types {
    numbers: BTreeMap<&'static str, usize>,
    waiting: Vec<(String, fn() -> Definition)>,
    /// Builtin types and lists: what they are is told by the name already.
    simple: BTreeMap<String, Value>,
}

impl Types {
    fn name(&mut self, shape: &Shape) -> String {
        match shape {
            Shape::Builtin(name) => {
                let entry =
                    json!({"name": name, "meta-type": "builtin", "json-type": json_type(name)});
                self.simple.insert((*name).to_owned(), entry);
                (*name).to_owned()
            }
            Shape::Array(element) => {
                let element = self.name(element);
                let name = format!("[{element}]");
                let entry = json!({"name": name, "meta-type": "array", "element-type": element});
                self.simple.insert(name.clone(), entry);
                name
            }
            Shape::Named(name, define) => {
                let next = self.numbers.len();
                let number = *self.numbers.entry(name).or_insert_with(|| {
                    self.waiting.push((next.to_string(), *define));
                    next
                });
                number.to_string()
            }
        }
    }

    /// Describes everything that has been named; describing one type may name others.
    fn describe(mut self) -> Vec<Value> {
        let mut entries = Vec::new();
        while let Some((name, define)) = self.waiting.pop() {
            let mut entry = Map::new();
            entry.insert("name".to_owned(), Value::from(name));
            self.define(define(), &mut entry);
            entries.push(Value::Object(entry));
        }
        entries.extend(self.simple.into_values());
        entries
    }

    fn define(&mut self, definition: Definition, entry: &mut Map<String, Value>) {
        let mut set = |key: &str, value| entry.insert(key.to_owned(), value);
        match definition {
            Definition::Enum(words) => {
                set("meta-type", Value::from("enum"));
                let members = words.iter().map(|word| json!({"name": word}));
                set("members", members.collect());
                set("values", Value::from(words));
            }
            Definition::Object { members, variants } => {
                set("meta-type", Value::from("object"));
                let members = members.iter().map(|member| self.member(member));
                set("members", members.collect());
                if let Some((tag, cases)) = variants {
                    set("tag", Value::from(tag));
                    let cases = cases.iter().map(|(case, shape)| {
                        let name = self.name(shape);
                        json!({"case": case, "type": name})
                    });
                    set("variants", cases.collect());
                }
            }
            Definition::Alternate(shapes) => {
                set("meta-type", Value::from("alternate"));
                let shapes = shapes.iter().map(|shape| json!({"type": self.name(shape)}));
                set("members", shapes.collect());
            }
        }
    }

    fn member(&mut self, member: &MemberShape) -> Value {
        let kind = self.name(&member.shape);
        if member.optional {
            json!({"name": member.name, "type": kind, "default": null})
        } else {
            json!({"name": member.name, "type": kind})
        }
    }
}

/// How a builtin type is written (`JSONType`).
fn json_type(builtin: &str) -> &'static str {
    match builtin {
        "str" => "string",
        "int" => "int",
        "bool" => "boolean",
        "null" => "null",
        _ => "value",
    }
}
