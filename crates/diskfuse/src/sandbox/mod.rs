//! Closing the sandbox: when everything is set up, the daemon hands what is left to do at its end to a helper and gives up the
//! rest. It must never say that a daemon is ready which holds more than it needs, nor let an end go wrong for want of a right.

mod deed;
mod helper;

pub use deed::{Deed, Leftover, Removal};
pub use diskfuse_sandbox::Extent;
pub use helper::{Helper, Told, is_meant, main};

use crate::daemon::Daemon;
use crate::error::{Error, Result};

/// Closes it around a daemon all of whose exports there are: a helper, whom the value stands for, takes their mounts away at the
/// end, and carries out `removals`.
pub fn seal<'r>(
    daemon: &mut Daemon,
    removals: impl Iterator<Item = &'r mut Removal>,
) -> Result<Told> {
    let helper = Helper::start()?;
    daemon.delegate(&helper)?;
    for removal in removals {
        helper.take_over(removal)?;
    }
    close(Extent::Sealed)?;
    Ok(helper.told())
}

/// Closes it. Call it on the main thread, when everything is set up and before anybody hears of that.
pub fn close(extent: Extent) -> Result<()> {
    let lacking = diskfuse_sandbox::enter(extent).map_err(|error| {
        Error::refused(format!(
            "Could not close the sandbox: {error} (--sandbox off does without)"
        ))
    })?;
    for lack in lacking {
        tracing::info!("sandbox: {lack}");
    }
    tracing::debug!(?extent, "the sandbox is closed");
    Ok(())
}
