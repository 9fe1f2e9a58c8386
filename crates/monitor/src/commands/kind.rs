//! What values of commands can be: how each kind is read from JSON, written to it, and described by the schema. The
//! macros [`record!`] and [`words!`] declare a type once and get all three from it, so that they cannot disagree.
//!
//! Knows no command by name.

use serde_json::{Map, Value};

use super::shape::Shape;
use crate::error::Error;
use crate::fields::{Fields, Item};

/// A value that a command takes, gives back, or an event carries.
pub trait Kind: Sized {
    /// What the schema says of it.
    fn shape() -> Shape;

    /// Its JSON.
    fn to_value(&self) -> Value;
}

/// A [`Kind`] that can be read.
pub(crate) trait Readable: Kind {
    fn from_item(item: &Item<'_>) -> Result<Self, Error>;
}

/// A member of a record: a kind, or `Option` of one for a member that may be missing.
pub(crate) trait Member: Sized {
    const OPTIONAL: bool;

    fn member_shape() -> Shape;
    fn write(&self, name: &str, to: &mut Map<String, Value>);
}

/// A [`Member`] that can be read.
pub(crate) trait ReadableMember: Member {
    fn read(fields: &mut Fields<'_>, name: &'static str) -> Result<Self, Error>;
}

/// A record that can be read from among other members.
pub(crate) trait Members: Sized {
    /// Reads its members; the caller calls [`Fields::finish`].
    fn read(fields: &mut Fields<'_>) -> Result<Self, Error>;
}

/// All arguments of a command.
pub(crate) trait Arguments: Sized {
    fn arguments_shape() -> Shape;

    /// Reads them, and refuses any other.
    fn read_all(fields: Fields<'_>) -> Result<Self, Error>;
}

impl<T: Kind> Member for T {
    const OPTIONAL: bool = false;

    fn member_shape() -> Shape {
        T::shape()
    }

    fn write(&self, name: &str, to: &mut Map<String, Value>) {
        to.insert(name.to_owned(), self.to_value());
    }
}

impl<T: Readable> ReadableMember for T {
    fn read(fields: &mut Fields<'_>, name: &'static str) -> Result<Self, Error> {
        let item = fields.item(name);
        T::from_item(&fields.require(name, item)?)
    }
}

impl<T: Kind> Member for Option<T> {
    const OPTIONAL: bool = true;

    fn member_shape() -> Shape {
        T::shape()
    }

    fn write(&self, name: &str, to: &mut Map<String, Value>) {
        if let Some(value) = self {
            to.insert(name.to_owned(), value.to_value());
        }
    }
}

impl<T: Readable> ReadableMember for Option<T> {
    fn read(fields: &mut Fields<'_>, name: &'static str) -> Result<Self, Error> {
        fields
            .item(name)
            .map(|item| T::from_item(&item))
            .transpose()
    }
}

impl Kind for String {
    fn shape() -> Shape {
        Shape::Builtin("str")
    }

    fn to_value(&self) -> Value {
        Value::String(self.clone())
    }
}

impl Readable for String {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        item.text().map(str::to_owned)
    }
}

impl Kind for bool {
    fn shape() -> Shape {
        Shape::Builtin("bool")
    }

    fn to_value(&self) -> Value {
        Value::Bool(*self)
    }
}

impl Readable for bool {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        item.boolean()
    }
}

impl Kind for i64 {
    fn shape() -> Shape {
        Shape::Builtin("int")
    }

    fn to_value(&self) -> Value {
        Value::from(*self)
    }
}

impl Readable for i64 {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        item.integer()
    }
}

impl Kind for u64 {
    fn shape() -> Shape {
        Shape::Builtin("int")
    }

    fn to_value(&self) -> Value {
        Value::from(*self)
    }
}

impl Readable for u64 {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        item.unsigned()
    }
}

impl Kind for u32 {
    fn shape() -> Shape {
        Shape::Builtin("int")
    }

    fn to_value(&self) -> Value {
        Value::from(*self)
    }
}

impl Readable for u32 {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        item.short()
    }
}

/// Any value.
impl Kind for Value {
    fn shape() -> Shape {
        Shape::Builtin("any")
    }

    fn to_value(&self) -> Value {
        self.clone()
    }
}

impl Readable for Value {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        Ok(item.value.clone())
    }
}

impl<T: Kind> Kind for Vec<T> {
    fn shape() -> Shape {
        Shape::Array(Box::new(T::shape()))
    }

    fn to_value(&self) -> Value {
        Value::Array(self.iter().map(Kind::to_value).collect())
    }
}

impl<T: Readable> Readable for Vec<T> {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        item.list()?.map(|element| T::from_item(&element)).collect()
    }
}

impl<T: Kind> Kind for Box<T> {
    fn shape() -> Shape {
        T::shape()
    }

    fn to_value(&self) -> Value {
        T::to_value(self)
    }
}

impl<T: Readable> Readable for Box<T> {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        T::from_item(item).map(Box::new)
    }
}

impl<T: Arguments> Arguments for Box<T> {
    fn arguments_shape() -> Shape {
        T::arguments_shape()
    }

    fn read_all(fields: Fields<'_>) -> Result<Self, Error> {
        T::read_all(fields).map(Box::new)
    }
}

/// Nothing: what most commands give back, and what many take.
impl Kind for () {
    fn shape() -> Shape {
        Shape::Named("empty", || super::shape::Definition::object(Vec::new()))
    }

    fn to_value(&self) -> Value {
        Value::Object(Map::new())
    }
}

impl Arguments for () {
    fn arguments_shape() -> Shape {
        <()>::shape()
    }

    fn read_all(fields: Fields<'_>) -> Result<Self, Error> {
        fields.finish()
    }
}

/// Declares a struct whose members are those of a JSON object, in this order. `args struct` can be read as well.
macro_rules! record {
    ($(#[$meta:meta])* struct $name:ident { $($(#[$about:meta])* $key:literal $field:ident: $kind:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name { $($(#[$about])* pub $field: $kind,)* }

        impl $crate::commands::kind::Kind for $name {
            fn shape() -> $crate::commands::shape::Shape {
                $crate::commands::shape::Shape::Named(stringify!($name), || {
                    $crate::commands::shape::Definition::object(vec![
                        $($crate::commands::shape::MemberShape {
                            name: $key,
                            optional: <$kind as $crate::commands::kind::Member>::OPTIONAL,
                            shape: <$kind as $crate::commands::kind::Member>::member_shape(),
                        },)*
                    ])
                })
            }

            #[allow(unused_mut, reason = "some have no members")]
            fn to_value(&self) -> ::serde_json::Value {
                let mut members = ::serde_json::Map::new();
                $($crate::commands::kind::Member::write(&self.$field, $key, &mut members);)*
                ::serde_json::Value::Object(members)
            }
        }
    };
    ($(#[$meta:meta])* args struct $name:ident { $($(#[$about:meta])* $key:literal $field:ident: $kind:ty,)* }) => {
        record! { $(#[$meta])* struct $name { $($(#[$about])* $key $field: $kind,)* } }

        impl $crate::commands::kind::Arguments for $name {
            fn arguments_shape() -> $crate::commands::shape::Shape {
                <Self as $crate::commands::kind::Kind>::shape()
            }

            fn read_all(mut fields: $crate::fields::Fields<'_>) -> Result<Self, $crate::Error> {
                let read = $crate::commands::kind::Members::read(&mut fields)?;
                fields.finish()?;
                Ok(read)
            }
        }

        impl $crate::commands::kind::Members for $name {
            #[allow(unused_variables, reason = "some have no members")]
            fn read(fields: &mut $crate::fields::Fields<'_>) -> Result<Self, $crate::Error> {
                Ok(Self {
                    $($field: $crate::commands::kind::ReadableMember::read(fields, $key)?,)*
                })
            }
        }

        impl $crate::commands::kind::Readable for $name {
            fn from_item(item: &$crate::fields::Item<'_>) -> Result<Self, $crate::Error> {
                <Self as $crate::commands::kind::Arguments>::read_all(item.group()?)
            }
        }
    };
}

/// Declares an enum of words.
macro_rules! words {
    ($(#[$meta:meta])* enum $name:ident { $($(#[$about:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$about])* $variant,)* }

        impl $name {
            /// All of them, with the word of each.
            pub const WORDS: &[(&str, Self)] = &[$(($word, Self::$variant),)*];

            /// The word.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl $crate::commands::kind::Kind for $name {
            fn shape() -> $crate::commands::shape::Shape {
                $crate::commands::shape::Shape::Named(stringify!($name), || {
                    $crate::commands::shape::Definition::Enum(vec![$($word,)*])
                })
            }

            fn to_value(&self) -> ::serde_json::Value {
                ::serde_json::Value::from(self.word())
            }
        }

        impl $crate::commands::kind::Readable for $name {
            fn from_item(item: &$crate::fields::Item<'_>) -> Result<Self, $crate::Error> {
                let text = item.text()?;
                let known = Self::WORDS.iter().find(|(word, _)| *word == text);
                known.map(|(_, meaning)| *meaning).ok_or_else(|| {
                    // Named without its path, as QEMU does.
                    let name = item.name.rsplit('.').next().unwrap_or_default();
                    $crate::fields::bad_value(name, text, Self::WORDS.iter().map(|(word, _)| *word))
                })
            }
        }
    };
}

pub(crate) use {record, words};
