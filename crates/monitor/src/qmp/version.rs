//! Which version of QEMU this claims to be.

use crate::commands::{VersionInfo, VersionTriple};

/// What the greeting and `query-version` tell.
///
/// Clients that compare the version decide by it what they may ask for. 10.0.0 is the oldest version whose interface this
/// was compared with: whatever exists since then may be asked for, and nobody looks for what came later. What goes
/// beyond it is found in the schema.
pub fn version_info() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple {
            micro: 0,
            minor: 0,
            major: 10,
        },
        package: concat!("diskfuse ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}
