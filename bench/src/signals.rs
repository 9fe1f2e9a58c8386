//! ^C and SIGTERM as a flag that every wait looks at, so that the way out is the ordinary one: guards run, daemons end,
//! nothing stays mounted.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{At, Error, Result};

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Turns SIGINT and SIGTERM into the flag. Called once, at the start of a task.
pub fn install() -> Result<()> {
    let flag = FLAG.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(flag))
            .at("handle signals of", Path::new("this process"))?;
    }
    Ok(())
}

/// `Err(Interrupted)` once a signal has arrived.
pub fn check() -> Result<()> {
    if FLAG.get().is_some_and(|flag| flag.load(Ordering::Relaxed)) {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}
