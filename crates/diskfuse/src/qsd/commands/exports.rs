//! Commands about exports.

use std::time::{Duration, Instant};

use diskfuse_fuse::Export;
use diskfuse_monitor::commands::{BlockExportDel, BlockExportInfo, ExportType, RemoveMode};

use super::Commands;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::qsd::exports;

/// How long the last requests of an export that nobody uses any more may take to be answered.
const SOON: Duration = Duration::from_millis(50);

/// `block-export-add`: the file is usable when this returns.
pub fn add(
    host: &Commands,
    daemon: &mut Daemon,
    what: &diskfuse_monitor::ExportOptions,
) -> Result<()> {
    exports::add(daemon, host, what)
}

/// `block-export-del`: the export is on its way out when this returns; an event tells when it is gone, and then the answer. Unless it is to go
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
    if what.mode != Some(RemoveMode::Hard) && !becomes_idle(export) {
        return Err(Error::Refused(format!(
            "export '{id}' still in use (mode=hard removes it all the same)"
        )));
    }
    daemon.stop_export(id);
    Ok(())
}

/// Whether it is or soon becomes free of requests: those that follow on a close(2) come after the caller has gone on.
fn becomes_idle(export: &Export) -> bool {
    let end = Instant::now() + SOON;
    while export.stats().in_flight > 0 {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(SOON / 50);
    }
    true
}

/// `query-block-exports`: as with QEMU the youngest comes first.
pub fn query(daemon: &Daemon) -> Vec<BlockExportInfo> {
    let all = daemon.exports().map(|(export, stopping)| BlockExportInfo {
        id: export.id().to_owned(),
        kind: ExportType::Fuse,
        node_name: export.node_name(),
        shutting_down: stopping,
    });
    let mut all: Vec<_> = all.collect();
    all.reverse();
    all
}
