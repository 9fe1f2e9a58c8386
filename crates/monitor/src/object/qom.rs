//! Properties of objects, as `qom-list`, `qom-get` and `qom-set` know them. Changes descriptions only: whoever has the
//! object itself makes it follow.

use serde_json::{Map, Value};

use super::{IothreadOptions, ObjectOptions};
use crate::error::Error;
use crate::fields::Fields;

/// One property of an object.
#[derive(Debug, Clone, PartialEq)]
pub struct Property {
    /// Its name.
    pub name: &'static str,
    /// Its type, as QEMU's object model calls it.
    pub kind: &'static str,
    /// What it is now.
    pub value: Value,
}

impl Property {
    pub(super) fn text(name: &'static str, value: &str) -> Self {
        Self {
            name,
            kind: "string",
            value: value.into(),
        }
    }

    pub(super) fn integer((name, value): (&&'static str, u64)) -> Self {
        Self {
            name,
            kind: "int",
            value: value.into(),
        }
    }
}

impl ObjectOptions {
    /// The object's type, as it is called in `qom-type`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Iothread(_) => "iothread",
            Self::ThrottleGroup(_) => "throttle-group",
            Self::Secret(_) => "secret",
        }
    }

    /// The object's name.
    pub fn id(&self) -> &str {
        match self {
            Self::Iothread(iothread) => &iothread.id,
            Self::ThrottleGroup(group) => &group.id,
            Self::Secret(secret) => &secret.id,
        }
    }

    /// All properties, `type` first.
    pub fn properties(&self) -> Vec<Property> {
        let mut all = vec![Property::text("type", self.type_name())];
        all.extend(match self {
            Self::Iothread(iothread) => iothread.properties(),
            Self::ThrottleGroup(group) => group.properties(),
            Self::Secret(secret) => secret.properties(),
        });
        all
    }

    /// The property of this name.
    ///
    /// # Errors
    /// There is none; in QEMU's words.
    pub fn property(&self, name: &str) -> Result<Property, Error> {
        let mut all = self.properties().into_iter();
        all.find(|property| property.name == name)
            .ok_or_else(|| Error::NoProperty {
                kind: self.type_name(),
                name: name.to_owned(),
            })
    }

    /// Changes a property. On an error everything is as it was.
    ///
    /// # Errors
    /// There is no such property, it cannot be changed, or the value cannot be; in QEMU's words.
    pub fn set(&mut self, name: &str, value: &Value) -> Result<(), Error> {
        let kind = self.type_name();
        self.property(name)?;
        match self {
            Self::Iothread(iothread) if name != "type" => iothread.set(name, value),
            Self::ThrottleGroup(group) if name != "type" => group.set(name, value),
            _ => Err(Error::FixedProperty {
                kind,
                name: name.to_owned(),
            }),
        }
    }
}

impl IothreadOptions {
    fn properties(&self) -> Vec<Property> {
        let all = [
            (&"poll-max-ns", self.poll_max_ns),
            (&"poll-grow", self.poll_grow),
            (&"poll-shrink", self.poll_shrink),
            (&"aio-max-batch", self.aio_max_batch),
        ];
        all.into_iter().map(Property::integer).collect()
    }

    fn set(&mut self, name: &str, value: &Value) -> Result<(), Error> {
        let members = single(name, value);
        self.read_properties(&mut Fields::of_json(&members))
    }
}

/// A group of this one member.
pub(super) fn single(name: &str, value: &Value) -> Map<String, Value> {
    Map::from_iter([(name.to_owned(), value.clone())])
}
