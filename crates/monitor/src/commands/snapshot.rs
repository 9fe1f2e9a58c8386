//! Arguments of the commands about snapshots, and of transactions (`qapi/block-core.json`, `qapi/transaction.json`).

use serde_json::{Map, Value};

use super::bitmap::{BlockDirtyBitmap, BlockDirtyBitmapAdd, BlockDirtyBitmapMerge};
use super::job::BlockdevBackup;
use super::kind::{Kind, Readable, record, words};
use super::shape::{Definition, MemberShape, Shape};
use crate::error::Error;
use crate::fields::{self, Item};

record! {
    /// `blockdev-snapshot` (`BlockdevSnapshot`).
    args struct BlockdevSnapshot {
        /// The node that is kept as it is.
        "node" node: String,
        /// The node that takes its place; it has nothing below it yet.
        "overlay" overlay: String,
    }
}

words! {
    /// Where the image of `blockdev-snapshot-sync` comes from (`NewImageMode`).
    enum NewImageMode {
        /// It is there already.
        Existing = "existing",
        /// It is made, and names the image below by its absolute path.
        AbsolutePaths = "absolute-paths",
    }
}

record! {
    /// `blockdev-snapshot-sync` (`BlockdevSnapshotSync`).
    args struct BlockdevSnapshotSync {
        /// The node that is kept as it is.
        "device" device: Option<String>,
        /// The same, as it is called where there are devices.
        "node-name" node_name: Option<String>,
        /// The file of the image that takes its place.
        "snapshot-file" snapshot_file: String,
        /// The name of that image's node.
        "snapshot-node-name" snapshot_node_name: Option<String>,
        /// Its format; by default `qcow2`.
        "format" format: Option<String>,
        /// Where it comes from; by default it is made.
        "mode" mode: Option<NewImageMode>,
    }
}

record! {
    /// `blockdev-snapshot-internal-sync` (`BlockdevSnapshotInternal`).
    args struct BlockdevSnapshotInternal {
        /// The node.
        "device" device: String,
        /// The snapshot's name.
        "name" name: String,
    }
}

record! {
    /// `blockdev-snapshot-delete-internal-sync`.
    args struct BlockdevSnapshotDeleteInternal {
        /// The node.
        "device" device: String,
        /// The snapshot's id.
        "id" id: Option<String>,
        /// The snapshot's name; one of the two is needed.
        "name" name: Option<String>,
    }
}

words! {
    /// How the jobs of a transaction end (`ActionCompletionMode`).
    enum CompletionMode {
        /// Each as it will.
        Individual = "individual",
        /// All succeed or none does.
        Grouped = "grouped",
    }
}

record! {
    /// What holds for the whole transaction (`TransactionProperties`).
    args struct TransactionProperties {
        /// How its jobs end; by default each as it will.
        "completion-mode" completion_mode: Option<CompletionMode>,
    }
}

record! {
    /// `transaction`.
    args struct Transaction {
        /// What is done, all or nothing.
        "actions" actions: Vec<Action>,
        /// What holds for all of it.
        "properties" properties: Option<TransactionProperties>,
    }
}

/// Declares the actions of a transaction: a variant, its word, and what its `data` is.
macro_rules! actions {
    ($($(#[$about:meta])* $variant:ident($data:ty) = $word:literal,)*) => {
        /// One action of a transaction (`TransactionAction`).
        #[derive(Debug, Clone, PartialEq)]
        pub enum Action { $($(#[$about])* $variant($data),)* }

        const ACTIONS: &[&str] = &[$($word,)*];

        impl Action {
            /// Its `type`.
            pub fn word(&self) -> &'static str {
                match self { $(Self::$variant(_) => $word,)* }
            }
        }

        impl Kind for Action {
            fn shape() -> Shape {
                Shape::Named("Action", || Definition::Object {
                    members: vec![MemberShape {
                        name: "type",
                        optional: false,
                        shape: Shape::Named("ActionType", || Definition::Enum(ACTIONS.to_vec())),
                    }],
                    variants: Some(("type", vec![$(
                        ($word, Shape::Named(concat!("Action:", $word), || Definition::object(vec![MemberShape {
                            name: "data",
                            optional: false,
                            shape: <$data>::shape(),
                        }]))),
                    )*])),
                })
            }

            fn to_value(&self) -> Value {
                let (word, data) = match self { $(Self::$variant(data) => ($word, data.to_value()),)* };
                let mut members = Map::new();
                members.insert("type".to_owned(), Value::from(word));
                members.insert("data".to_owned(), data);
                Value::Object(members)
            }
        }

        impl Readable for Action {
            fn from_item(item: &Item<'_>) -> Result<Self, Error> {
                let mut fields = item.group()?;
                let word = fields.text("type")?;
                let action = match fields.require("type", word)? {
                    $($word => {
                        let data = fields.item("data");
                        Self::$variant(<$data>::from_item(&fields.require("data", data)?)?)
                    })*
                    word => return Err(fields::bad_value("type", word, ACTIONS.iter().copied())),
                };
                fields.finish()?;
                Ok(action)
            }
        }
    };
}

record! {
    /// Nothing: what the action `abort` takes.
    args struct Abort {}
}

actions! {
    /// Fails, so that everything is undone; for tests.
    Abort(Abort) = "abort",
    /// Makes a bitmap.
    BitmapAdd(BlockDirtyBitmapAdd) = "block-dirty-bitmap-add",
    /// Deletes a bitmap.
    BitmapRemove(BlockDirtyBitmap) = "block-dirty-bitmap-remove",
    /// Empties a bitmap.
    BitmapClear(BlockDirtyBitmap) = "block-dirty-bitmap-clear",
    /// Lets a bitmap record.
    BitmapEnable(BlockDirtyBitmap) = "block-dirty-bitmap-enable",
    /// Stops its recording.
    BitmapDisable(BlockDirtyBitmap) = "block-dirty-bitmap-disable",
    /// Adds bitmaps to another one.
    BitmapMerge(BlockDirtyBitmapMerge) = "block-dirty-bitmap-merge",
    /// Starts a backup.
    Backup(BlockdevBackup) = "blockdev-backup",
    /// Puts an overlay over a node.
    Snapshot(BlockdevSnapshot) = "blockdev-snapshot",
    /// Makes an overlay and puts it over a node.
    SnapshotSync(BlockdevSnapshotSync) = "blockdev-snapshot-sync",
    /// Makes an internal snapshot.
    InternalSnapshot(BlockdevSnapshotInternal) = "blockdev-snapshot-internal-sync",
}
