//! `--trace`: from names of QEMU's events to the messages that are shown.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use diskfuse_monitor::{Directive, trace};

use crate::error::{Error, Result};
use crate::logging;

/// The longest file of names, in bytes.
const LONGEST_FILE: u64 = 1 << 20;

/// Begins to log: what `filter` says, and what the command line wants traced. Called once.
pub fn start_logging(filter: Option<&str>, directives: &[Directive]) -> Result<()> {
    let mut parts: Vec<&str> = Vec::new();
    let mut unknown = Vec::new();
    let mut file = None;
    let mut traced = false;
    for directive in directives {
        let Directive::Trace(options) = directive else {
            continue;
        };
        traced = true;
        let mut names: Vec<String> = options.enable.clone().into_iter().collect();
        if let Some(events) = &options.events {
            names.extend(read_names(events)?);
        }
        file = options.file.as_deref().or(file);
        for name in names {
            let (pattern, on) = match name.strip_prefix('-') {
                Some(pattern) => (pattern, false),
                None => (name.as_str(), true),
            };
            let meant = trace::parts(pattern);
            // A pattern that nothing fits is no mistake.
            if meant.is_empty() && !pattern.contains(['*', '?']) {
                unknown.push(pattern.to_owned());
            }
            parts.retain(|part| !meant.contains(part));
            parts.extend(meant.iter().filter(|_| on));
        }
    }
    if traced {
        let levels = parts.iter().map(|part| format!(",{part}=trace"));
        let filter = filter.unwrap_or("warn").to_owned() + &levels.collect::<String>();
        logging::start(Some(&filter), file)?;
    } else {
        logging::start(filter, None)?;
    }
    for name in unknown {
        tracing::warn!("trace event '{}' does not exist", name.escape_debug());
    }
    Ok(())
}

/// Names, one on each line; lines that begin with `#` are comments.
fn read_names(path: &Path) -> Result<Vec<String>> {
    let failed = || format!("Could not read '{}'", path.display());
    let file = File::open(path).map_err(Error::system(failed()))?;
    let lines = BufReader::new(file.take(LONGEST_FILE)).lines();
    let mut names = Vec::new();
    for line in lines {
        let line = line.map_err(Error::system(failed()))?;
        let name = line.trim();
        if !name.is_empty() && !name.starts_with('#') {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}
