//! Commands about exports.

use diskfuse_monitor::commands::{BlockExportDel, BlockExportInfo, ExportType, Kind};
use diskfuse_monitor::{ExportOptions, QmpError};
use serde_json::Value;

use super::{Commands, Outcome, done};
use crate::daemon::Daemon;
use crate::qsd::exports;

/// `block-export-add`: the file is usable when it is answered.
pub fn add(commands: &mut Commands, daemon: &mut Daemon, options: &ExportOptions) -> Outcome {
    done(exports::add(daemon, &mut commands.iothreads, options))
}

/// `block-export-del`. Only begins; an event tells of the end. A FUSE export has no users that would make a safe removal
/// different: who has the file open sees it end either way.
pub fn del(daemon: &mut Daemon, arguments: &BlockExportDel) -> Outcome {
    let id = &arguments.id;
    let problem = match daemon.stop_export(id) {
        Some(true) => return Ok(().to_value()),
        Some(false) => format!("Export '{id}' is already shutting down"),
        None => format!("Export '{id}' is not found"),
    };
    Err(QmpError::generic(problem))
}

/// `query-block-exports`
pub fn list(daemon: &Daemon) -> Value {
    let info = |(id, node, shutting_down): (&str, &str, bool)| BlockExportInfo {
        id: id.to_owned(),
        kind: ExportType::Fuse,
        node_name: node.to_owned(),
        shutting_down,
    };
    daemon.exports().map(info).collect::<Vec<_>>().to_value()
}
