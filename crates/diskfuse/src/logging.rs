//! Where messages go, and which: set up once, at the start of a command that serves.

use std::fs::OpenOptions;
use std::io::IsTerminal;
use std::path::Path;

use tracing_subscriber::EnvFilter;

use crate::error::{Error, Result};

/// The environment's say about which messages to show, where the command line has none.
pub const VARIABLE: &str = "DISKFUSE_LOG";

const LEVELS: &[&str] = &["off", "error", "warn", "info", "debug", "trace"];

/// Begins to log: what `filter` says, else [`VARIABLE`], else warnings and errors; to `file`, else to stderr. Called
/// once, before any other thread is started.
pub fn start(filter: Option<&str>, file: Option<&Path>) -> Result<()> {
    let from_environment = std::env::var(VARIABLE).ok().filter(|text| !text.is_empty());
    let filter = read_filter(filter.or(from_environment.as_deref()).unwrap_or("warn"))?;
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false);
    match file {
        Some(path) => {
            let what = || format!("Could not open the log file '{}'", path.display());
            let file = OpenOptions::new().append(true).create(true).open(path);
            let file = file.map_err(Error::system(what()))?;
            subscriber.with_ansi(false).with_writer(file).init();
        }
        None => subscriber
            .with_ansi(std::io::stderr().is_terminal())
            .without_time()
            .with_writer(std::io::stderr)
            .init(),
    }
    Ok(())
}

/// A level, or a filter of the `tracing-subscriber` crate (`EnvFilter`). A lone word that is no level would be taken
/// for the name of a crate there and show next to nothing, so it is refused.
fn read_filter(text: &str) -> Result<EnvFilter> {
    let is_level = LEVELS.iter().any(|level| text.eq_ignore_ascii_case(level));
    let refused = || {
        let levels = LEVELS.join(", ");
        Error::refused(format!(
            "log level '{}' is not one of {levels}",
            text.escape_debug()
        ))
    };
    if !is_level && !text.contains('=') {
        return Err(refused());
    }
    EnvFilter::try_new(text).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use super::read_filter;

    #[test]
    fn levels_and_filters_are_understood_and_slips_are_not_taken_for_crates() {
        for good in ["off", "warn", "DEBUG", "warn,diskfuse_fuse=trace"] {
            assert!(read_filter(good).is_ok(), "{good}");
        }
        for bad in ["", "wran", "verbose", "a=b=c", "diskfuse_fuse=loud"] {
            assert!(read_filter(bad).is_err(), "{bad}");
        }
    }
}
