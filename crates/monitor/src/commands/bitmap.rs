//! Arguments of the commands about dirty bitmaps (`qapi/block-core.json`).

use serde_json::Value;

use super::kind::{Kind, Readable, record};
use super::shape::{Definition, Shape};
use crate::error::Error;
use crate::fields::Item;

record! {
    /// `block-dirty-bitmap-remove`, `-clear`, `-enable`, `-disable` (`BlockDirtyBitmap`).
    args struct BlockDirtyBitmap {
        /// The node that has it.
        "node" node: String,
        /// The bitmap.
        "name" name: String,
    }
}

record! {
    /// `block-dirty-bitmap-add` (`BlockDirtyBitmapAdd`).
    args struct BlockDirtyBitmapAdd {
        /// The node that gets it.
        "node" node: String,
        /// The new bitmap.
        "name" name: String,
        /// Bytes that one bit stands for: a power of two, 512 at least; by default the cluster size of the image, between
        /// 4 KiB and 64 KiB.
        "granularity" granularity: Option<u32>,
        /// Whether it is kept in the image; by default not.
        "persistent" persistent: Option<bool>,
        /// Whether it does not record yet; by default it does.
        "disabled" disabled: Option<bool>,
    }
}

record! {
    /// `block-dirty-bitmap-merge` (`BlockDirtyBitmapMerge`).
    args struct BlockDirtyBitmapMerge {
        /// The node of the target.
        "node" node: String,
        /// The bitmap that gets the bits of all others.
        "target" target: String,
        /// The others.
        "bitmaps" bitmaps: Vec<BitmapRef>,
    }
}

/// A bitmap to merge (`BlockDirtyBitmapOrStr`).
#[derive(Debug, Clone, PartialEq)]
pub enum BitmapRef {
    /// One of the target's node.
    Name(String),
    /// One of another node.
    Elsewhere(BlockDirtyBitmap),
}

impl Kind for BitmapRef {
    fn shape() -> Shape {
        Shape::Named("BitmapRef", || {
            Definition::Alternate(vec![String::shape(), BlockDirtyBitmap::shape()])
        })
    }

    fn to_value(&self) -> Value {
        match self {
            Self::Name(name) => name.to_value(),
            Self::Elsewhere(bitmap) => bitmap.to_value(),
        }
    }
}

impl Readable for BitmapRef {
    fn from_item(item: &Item<'_>) -> Result<Self, Error> {
        match item.value {
            Value::String(name) => Ok(Self::Name(name.clone())),
            Value::Object(_) => BlockDirtyBitmap::from_item(item).map(Self::Elsewhere),
            _ => Err(item.wrong_type("BlockDirtyBitmapOrStr")),
        }
    }
}
