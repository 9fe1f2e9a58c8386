//! Reads typed parameters from a tree of either syntax, and finds what nobody asked for. Knows no option by name.
//!
//! In key=value text every scalar is a string and is understood by what is expected of it; in JSON each value has to be
//! of its type already. This is the only place that knows the difference.

use serde_json::{Map, Value};

use crate::error::Error;
use crate::{ident, json, keyval, number, suggest};

/// A choice that a user may leave to the program.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnOffAuto {
    /// The program decides.
    #[default]
    Auto,
    /// Yes, or fail.
    On,
    /// No.
    Off,
}

impl OnOffAuto {
    pub(crate) const WORDS: &[(&str, Self)] =
        &[("auto", Self::Auto), ("on", Self::On), ("off", Self::Off)];
}

/// An argument that has been taken apart, not yet understood.
#[derive(Debug)]
pub(crate) struct Tree {
    members: Map<String, Value>,
    syntax: Syntax,
    /// Whether help was asked for instead.
    pub(crate) help: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Syntax {
    KeyValue,
    Json,
}

impl Tree {
    /// Takes an argument apart: JSON when it begins with `{`, else key=value text with the implied key.
    pub(crate) fn read(argument: &str, implied: &str) -> Result<Self, Error> {
        if !argument.starts_with('{') {
            let keyval::KeyVal { members, help } = keyval::parse(argument, Some(implied))?;
            return Ok(Self {
                members,
                syntax: Syntax::KeyValue,
                help,
            });
        }
        match json::parse(argument)? {
            Value::Object(members) => Ok(Self {
                members,
                syntax: Syntax::Json,
                help: false,
            }),
            _ => Err(Error::JsonTrailing),
        }
    }

    /// Members that came as JSON inside something larger: the arguments of a command, an element of a file.
    pub(crate) fn of_json(members: Map<String, Value>) -> Self {
        Self {
            members,
            syntax: Syntax::Json,
            help: false,
        }
    }

    /// Parameters that stand in some other place, as texts.
    pub(crate) fn of_texts(members: Map<String, Value>) -> Self {
        Self {
            members,
            syntax: Syntax::KeyValue,
            help: false,
        }
    }

    /// The parameters, unless help was asked for.
    pub(crate) fn fields(&self) -> Result<Fields<'_>, Error> {
        if self.help {
            Err(Error::NoHelp)
        } else {
            Ok(self.fields_despite_help())
        }
    }

    /// The parameters, for an option that gives help.
    pub(crate) fn fields_despite_help(&self) -> Fields<'_> {
        Fields {
            path: String::new(),
            members: &self.members,
            syntax: self.syntax,
            asked: Vec::new(),
        }
    }
}

/// The members of one group. Ask for each one that may be there, then call [`Fields::finish`].
#[derive(Debug)]
pub(crate) struct Fields<'t> {
    /// What stands in front of the members' names: empty, or a dotted path with a dot at the end.
    path: String,
    members: &'t Map<String, Value>,
    syntax: Syntax,
    asked: Vec<&'static str>,
}

/// A member that may be a name or a group, for callers that take either.
pub(crate) enum NameOrGroup<'t> {
    Name(&'t str),
    Group(Fields<'t>),
}

/// The error for a word that is not one of `accepted`. Names the member without its path, as QEMU does.
pub(crate) fn bad_value<'c>(
    name: &str,
    value: &str,
    accepted: impl Iterator<Item = &'c str>,
) -> Error {
    let nearest = suggest::nearest(value, accepted);
    Error::BadValue {
        name: name.to_owned(),
        value: value.to_owned(),
        nearest,
    }
}

/// One value and its place in the tree, for members whose type is told by who asks ([`Fields::item`]).
#[derive(Debug, Clone)]
pub(crate) struct Item<'t> {
    /// The full path, with `[N]` for elements of lists.
    pub(crate) name: String,
    pub(crate) value: &'t Value,
    syntax: Syntax,
}

impl<'t> Item<'t> {
    pub(crate) fn text(&self) -> Result<&'t str, Error> {
        self.value.as_str().ok_or_else(|| self.wrong_type("string"))
    }

    pub(crate) fn boolean(&self) -> Result<bool, Error> {
        self.value
            .as_bool()
            .ok_or_else(|| self.wrong_type("boolean"))
    }

    pub(crate) fn integer(&self) -> Result<i64, Error> {
        self.value
            .as_i64()
            .ok_or_else(|| self.wrong_type("integer"))
    }

    /// A whole number of 64 bits without a sign. A negative one stands for the number of the same bits, as with QEMU.
    pub(crate) fn unsigned(&self) -> Result<u64, Error> {
        let number = self.value.as_u64();
        let number = number.or_else(|| self.value.as_i64().map(i64::cast_unsigned));
        number.ok_or_else(|| self.expects("uint64"))
    }

    /// A whole number of 32 bits without a sign.
    pub(crate) fn short(&self) -> Result<u32, Error> {
        let number = self.unsigned()?;
        u32::try_from(number).map_err(|_| self.expects("uint32_t"))
    }

    fn expects(&self, expected: &str) -> Error {
        Error::Expects {
            name: self.name.clone(),
            expected: expected.to_owned(),
        }
    }

    pub(crate) fn list(&self) -> Result<impl Iterator<Item = Item<'t>>, Error> {
        let list = self
            .value
            .as_array()
            .ok_or_else(|| self.wrong_type("array"))?;
        let (name, syntax) = (self.name.clone(), self.syntax);
        Ok(list.iter().enumerate().map(move |(index, value)| Item {
            name: format!("{name}[{index}]"),
            value,
            syntax,
        }))
    }

    pub(crate) fn group(&self) -> Result<Fields<'t>, Error> {
        let members = self
            .value
            .as_object()
            .ok_or_else(|| self.wrong_type("object"))?;
        Ok(Fields {
            path: format!("{}.", self.name),
            members,
            syntax: self.syntax,
            asked: Vec::new(),
        })
    }

    pub(crate) fn wrong_type(&self, expected: &'static str) -> Error {
        Error::WrongType {
            name: self.name.clone(),
            expected,
        }
    }
}

impl<'t> Fields<'t> {
    /// A member whatever its type, for commands, which come as JSON only.
    pub(crate) fn item(&mut self, name: &'static str) -> Option<Item<'t>> {
        let value = self.ask(name)?;
        Some(Item {
            name: self.full_name(name),
            value,
            syntax: self.syntax,
        })
    }

    /// The members of a JSON object.
    pub(crate) fn of_json(members: &'t Map<String, Value>) -> Self {
        Self {
            path: String::new(),
            members,
            syntax: Syntax::Json,
            asked: Vec::new(),
        }
    }

    /// A member's full dotted path.
    pub(crate) fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    /// `found`, or the error that it is missing.
    pub(crate) fn require<T>(&self, name: &str, found: Option<T>) -> Result<T, Error> {
        found.ok_or_else(|| Error::Missing {
            name: self.full_name(name),
        })
    }

    /// A text.
    pub(crate) fn text(&mut self, name: &'static str) -> Result<Option<&'t str>, Error> {
        let Some(value) = self.ask(name) else {
            return Ok(None);
        };
        self.as_text(value, || self.full_name(name)).map(Some)
    }

    /// A text, or in JSON also a whole number, as its text: for ports and descriptors.
    pub(crate) fn text_or_integer(&mut self, name: &'static str) -> Result<Option<String>, Error> {
        match self.ask(name) {
            Some(Value::Number(number)) => Ok(Some(number.to_string())),
            Some(value) => self
                .as_text(value, || self.full_name(name))
                .map(|text| Some(text.to_owned())),
            None => Ok(None),
        }
    }

    /// A name by QEMU's rule for identifiers.
    pub(crate) fn identifier(&mut self, name: &'static str) -> Result<Option<&'t str>, Error> {
        match self.text(name)? {
            Some(id) if !ident::well_formed(id) => Err(Error::Expects {
                name: self.full_name(name),
                expected: "an identifier (a letter, then letters, digits, '-', '.' and '_')"
                    .to_owned(),
            }),
            id => Ok(id),
        }
    }

    /// One of several words, as what it stands for.
    pub(crate) fn word<T: Copy>(
        &mut self,
        name: &'static str,
        words: &[(&str, T)],
    ) -> Result<Option<T>, Error> {
        let Some(text) = self.text(name)? else {
            return Ok(None);
        };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => Err(bad_value(name, text, words.iter().map(|(word, _)| *word))),
        }
    }

    /// Yes or no. As text `on`, `yes`, `true`, `y` and `off`, `no`, `false`, `n`.
    pub(crate) fn boolean(&mut self, name: &'static str) -> Result<Option<bool>, Error> {
        let Some(value) = self.ask(name) else {
            return Ok(None);
        };
        if self.syntax == Syntax::Json {
            return value
                .as_bool()
                .map(Some)
                .ok_or_else(|| self.wrong_type(name, "boolean"));
        }
        match self.as_text(value, || self.full_name(name))? {
            "on" | "yes" | "true" | "y" => Ok(Some(true)),
            "off" | "no" | "false" | "n" => Ok(Some(false)),
            _ => Err(self.expects(name, "'on' or 'off'")),
        }
    }

    /// A whole number of 64 bits with a sign.
    pub(crate) fn integer(&mut self, name: &'static str) -> Result<Option<i64>, Error> {
        self.integer_or(name, "integer", |_| None)
    }

    /// A number of bytes, up to `i64::MAX`. As text it may have a suffix `k`, `M`, `G`, `T`, `P` or `E`, which QEMU does
    /// not take here.
    pub(crate) fn bytes(&mut self, name: &'static str) -> Result<Option<u64>, Error> {
        let expected = "integer (of bytes, or with a suffix k, M, G, T, P or E)";
        let Some(value) = self.integer_or(name, expected, number::with_suffix)? else {
            return Ok(None);
        };
        let bytes = u64::try_from(value);
        bytes.map(Some).map_err(|_| Error::OutOfRange {
            name: name.to_owned(),
            value,
        })
    }

    /// A whole number; text that is not one gets a second chance with `otherwise`.
    fn integer_or(
        &mut self,
        name: &'static str,
        expected: &str,
        otherwise: fn(&str) -> Option<i64>,
    ) -> Result<Option<i64>, Error> {
        let Some(value) = self.ask(name) else {
            return Ok(None);
        };
        if self.syntax == Syntax::Json {
            return value
                .as_i64()
                .map(Some)
                .ok_or_else(|| self.wrong_type(name, "integer"));
        }
        let text = self.as_text(value, || self.full_name(name))?;
        let number = number::integer(text).or_else(|| otherwise(text));
        number.map(Some).ok_or_else(|| self.expects(name, expected))
    }

    /// A group of members.
    pub(crate) fn group(&mut self, name: &'static str) -> Result<Option<Fields<'t>>, Error> {
        match self.ask(name) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(self.inner(name, members))),
            Some(_) => Err(self.wrong_type(name, "object")),
        }
    }

    /// The groups of a list; none if it is not there.
    pub(crate) fn groups(&mut self, name: &'static str) -> Result<Vec<Fields<'t>>, Error> {
        let list = match self.ask(name) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list,
            Some(_) => return Err(self.wrong_type(name, "array")),
        };
        let elements = list.iter().enumerate().map(|(index, value)| {
            let name = self.element_name(name, index);
            match value {
                Value::Object(members) => Ok(self.inner(&name, members)),
                _ => Err(self.wrong_type(&name, "object")),
            }
        });
        elements.collect()
    }

    /// Whether the member is there and says that there is nothing, as only JSON can; it counts as asked for.
    pub(crate) fn is_null(&mut self, name: &'static str) -> bool {
        matches!(self.ask(name), Some(Value::Null))
    }

    /// A name, or a group in its place; `expected` is what QEMU calls the two together.
    pub(crate) fn name_or_group(
        &mut self,
        name: &'static str,
        expected: &'static str,
    ) -> Result<Option<NameOrGroup<'t>>, Error> {
        match self.ask(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(NameOrGroup::Name(text))),
            Some(Value::Object(members)) => Ok(Some(NameOrGroup::Group(self.inner(name, members)))),
            Some(_) => Err(self.wrong_type(name, expected)),
        }
    }

    /// A name, or a list of names in its place: `Ok` for the list, `Err` for the one name. `expected` is what QEMU calls
    /// the two together.
    pub(crate) fn name_or_list(
        &mut self,
        name: &'static str,
        expected: &'static str,
    ) -> Result<Option<Result<Vec<String>, String>>, Error> {
        match self.ask(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(Err(text.clone()))),
            Some(Value::Array(list)) => {
                let texts = list.iter().enumerate().map(|(index, value)| {
                    let full_name = || self.full_name(&self.element_name(name, index));
                    self.as_text(value, full_name).map(str::to_owned)
                });
                texts.collect::<Result<_, _>>().map(|texts| Some(Ok(texts)))
            }
            Some(_) => Err(self.wrong_type(name, expected)),
        }
    }

    /// Refuses parameters that QEMU has here and this version has not.
    pub(crate) fn not_built(&mut self, names: &[&str]) -> Result<(), Error> {
        match names.iter().find(|name| self.members.contains_key(**name)) {
            Some(name) => Err(Error::NotBuilt {
                what: format!("parameter '{}'", self.full_name(name)),
            }),
            None => Ok(()),
        }
    }

    /// Refuses members that nobody asked for.
    pub(crate) fn finish(self) -> Result<(), Error> {
        match self
            .members
            .keys()
            .find(|name| !self.asked.contains(&name.as_str()))
        {
            Some(name) => Err(Error::Unexpected {
                name: self.full_name(name),
                nearest: suggest::nearest(name, self.asked.iter().copied()),
            }),
            None => Ok(()),
        }
    }

    /// The error for a value that says something else than is expected.
    pub(crate) fn expects(&self, name: &str, expected: &str) -> Error {
        Error::Expects {
            name: self.full_name(name),
            expected: expected.to_owned(),
        }
    }

    fn wrong_type(&self, name: &str, expected: &'static str) -> Error {
        Error::WrongType {
            name: self.full_name(name),
            expected,
        }
    }

    /// What an element of a list is called.
    fn element_name(&self, list: &str, index: usize) -> String {
        match self.syntax {
            Syntax::KeyValue => format!("{list}.{index}"),
            Syntax::Json => format!("{list}[{index}]"),
        }
    }

    fn ask(&mut self, name: &'static str) -> Option<&'t Value> {
        #[cfg(test)]
        record(self.full_name(name));
        self.asked.push(name);
        self.members.get(name)
    }

    fn inner(&self, name: &str, members: &'t Map<String, Value>) -> Fields<'t> {
        Fields {
            path: format!("{}{name}.", self.path),
            members,
            syntax: self.syntax,
            asked: Vec::new(),
        }
    }

    fn as_text(&self, value: &'t Value, full_name: impl Fn() -> String) -> Result<&'t str, Error> {
        match (value, self.syntax) {
            (Value::String(text), _) => Ok(text),
            (_, Syntax::KeyValue) => Err(Error::UnexpectedGroup { name: full_name() }),
            (_, Syntax::Json) => Err(Error::WrongType {
                name: full_name(),
                expected: "string",
            }),
        }
    }
}

#[cfg(test)]
thread_local! {
    /// The full names of the members that have been asked for, while [`recorded`] runs.
    static ASKED: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
}

#[cfg(test)]
fn record(name: String) {
    ASKED.with_borrow_mut(|asked| asked.push(name));
}

/// What `read` gives, and the members that it asked for: how tests find out what a reader knows.
#[cfg(test)]
pub(crate) fn recorded<T>(read: impl FnOnce() -> T) -> (T, Vec<String>) {
    ASKED.with_borrow_mut(Vec::clear);
    let outcome = read();
    (outcome, ASKED.take())
}
