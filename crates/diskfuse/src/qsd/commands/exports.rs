//! Commands about exports.

use diskfuse_monitor::commands::{BlockExportDel, BlockExportInfo, ExportType};

use super::Host;
use crate::daemon::Daemon;
use crate::error::{Error, Result};
use crate::qsd::exports;

/// `block-export-add`: the file is usable when this returns.
pub fn add(host: &mut Host, daemon: &mut Daemon, what: &diskfuse_monitor::ExportOptions) -> Result<()> {
    exports::add(daemon, &mut host.objects, what)
}

/// `block-export-del`: the export is on its way out when this returns; an event tells when it is gone. In use by somebody
/// or not, there is no difference: the kernel answers who still has the file open.
pub fn delete(daemon: &mut Daemon, what: &BlockExportDel) -> Result<()> {
    match daemon.stop_export(&what.id) {
        Some(true) => Ok(()),
        Some(false) => Err(Error::Refused(format!(
            "Export '{}' is already shutting down",
            what.id
        ))),
        None => Err(Error::Refused(format!("Export '{}' is not found", what.id))),
    }
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
