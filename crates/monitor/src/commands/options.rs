//! Options of the command line as arguments of commands: `blockdev-add`, `block-export-add` and `object-add` take what
//! `--blockdev`, `--export` and `--object` take.

use serde_json::Value;

use super::kind::{Arguments, Kind, Readable};
use super::shape::Shape;
use crate::error::Error;
use crate::fields::{Fields, Item};
use crate::{BlockdevOptions, ExportOptions, ObjectOptions, blockdev, export, object};

impl Kind for BlockdevOptions {
    fn shape() -> Shape {
        blockdev::shape()
    }

    /// Nothing answers with options.
    fn to_value(&self) -> Value {
        Value::Null
    }
}

impl Readable for BlockdevOptions {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        Self::from_fields(item.group()?).map_err(|error| match error {
            // QEMU has other words for it in a list.
            Error::NodeNameMissing => Error::NodeNameNotSpecified,
            error => error,
        })
    }
}

impl Arguments for BlockdevOptions {
    fn arguments_shape() -> Shape {
        blockdev::shape()
    }

    fn read_all(fields: Fields<'_>) -> Result<Self, Error> {
        Self::from_fields(fields)
    }
}

impl Arguments for ExportOptions {
    fn arguments_shape() -> Shape {
        export::shape()
    }

    fn read_all(fields: Fields<'_>) -> Result<Self, Error> {
        Self::from_fields(fields)
    }
}

impl Arguments for ObjectOptions {
    fn arguments_shape() -> Shape {
        object::shape()
    }

    fn read_all(fields: Fields<'_>) -> Result<Self, Error> {
        Self::from_fields(fields)
    }
}
