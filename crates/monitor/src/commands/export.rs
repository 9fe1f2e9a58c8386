//! Arguments and answers of the commands about exports (`qapi/block-export.json`).

use super::kind::{record, words};

words! {
    /// How an export is taken away (`BlockExportRemoveMode`).
    enum RemoveMode {
        /// Not while somebody uses it.
        Safe = "safe",
        /// Whoever uses it.
        Hard = "hard",
    }
}

record! {
    /// `block-export-del`.
    args struct BlockExportDel {
        /// The export.
        "id" id: String,
        /// How; by default safe.
        "mode" mode: Option<RemoveMode>,
    }
}

words! {
    /// The types of export that are built (`BlockExportType`).
    enum ExportType {
        /// A plain file.
        Fuse = "fuse",
    }
}

record! {
    /// One of what `query-block-exports` answers (`BlockExportInfo`).
    struct BlockExportInfo {
        /// The node that it shows.
        "node-name" node_name: String,
        /// Whether it is on its way out.
        "shutting-down" shutting_down: bool,
        /// Its type.
        "type" kind: ExportType,
        /// The export.
        "id" id: String,
    }
}
