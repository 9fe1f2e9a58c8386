//! Commands about exports.

use diskfuse_monitor::commands::{BlockExportDel, BlockExportInfo, ExportType, RemoveMode};

use super::Commands;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::qsd::exports;

/// `block-export-add`: the file is usable when this returns.
pub fn add(
    host: &Commands,
    daemon: &mut Daemon,
    what: &diskfuse_monitor::ExportOptions,
) -> Result<()> {
    exports::add(daemon, host, what)
}

/// `block-export-del`: the export is on its way out when this returns; an event tells when it is gone. Unless it is to go
/// hard, it stays while it has requests in flight.
pub fn delete(daemon: &mut Daemon, what: &BlockExportDel) -> Result<()> {
    let id = &what.id;
    let found = daemon.exports().find(|(export, _)| export.id() == id);
    let Some((export, stopping)) = found else {
        return Err(Error::Refused(format!("Export '{id}' is not found")));
    };
    if stopping {
        return Err(Error::Refused(format!(
            "Export '{id}' is already shutting down"
        )));
    }
    if what.mode != Some(RemoveMode::Hard) && export.stats().in_flight > 0 {
        return Err(Error::Refused(format!(
            "export '{id}' still in use (mode=hard removes it all the same)"
        )));
    }
    daemon.stop_export(id);
    Ok(())
}

/// `query-block-exports`.
pub fn query(daemon: &Daemon) -> Vec<BlockExportInfo> {
    let all = daemon.exports().map(|(export, stopping)| BlockExportInfo {
        id: export.id().to_owned(),
        kind: ExportType::Fuse,
        node_name: export.node_name(),
        shutting_down: stopping,
    });
    all.collect()
}
