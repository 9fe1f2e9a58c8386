//! What `--trace` says. QEMU's trace events do not exist here; their names say which part of the program is meant, and
//! that part's messages are shown instead.

use std::path::PathBuf;

use crate::error::Error;
use crate::fields::Tree;

/// The argument of `--trace`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceOptions {
    /// `enable`: the names of events; `*` and `?` stand for any letters. `-` in front switches them off.
    pub enable: Option<String>,
    /// `events`: a file with such names, one on each line.
    pub events: Option<PathBuf>,
    /// `file`: where messages go, instead of standard error.
    pub file: Option<PathBuf>,
}

/// What names of QEMU's events begin with, and who does that here: crates, as filters of messages name them.
const PARTS: &[(&str, &str)] = &[
    ("fuse", "diskfuse_fuse"),
    ("qcow2", "diskfuse_qcow2"),
    ("bdrv", "diskfuse_block"),
    ("blk", "diskfuse_block"),
    ("block", "diskfuse_block"),
    ("file", "diskfuse_block"),
    ("luring", "diskfuse_ring"),
    ("aio", "diskfuse_ring"),
    ("run_poll", "diskfuse_ring"),
    ("monitor", "diskfuse"),
    ("handle_qmp", "diskfuse"),
    ("qmp", "diskfuse"),
    ("job", "diskfuse"),
];

impl TraceOptions {
    /// Reads the argument of `--trace`.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn parse(argument: &str) -> Result<Self, Error> {
        let tree = Tree::read(argument, "enable")?;
        let mut fields = tree.fields()?;
        let enable = fields.text("enable")?.map(str::to_owned);
        let events = fields.text("events")?.map(PathBuf::from);
        let file = fields.text("file")?.map(PathBuf::from);
        fields.finish()?;
        Ok(Self {
            enable,
            events,
            file,
        })
    }
}

/// The parts of the program that events of this name happen in, as crates; none if it is the name of no event.
pub fn parts(pattern: &str) -> Vec<&'static str> {
    // What stands in front of the first wildcard is compared; that is all that QEMU's own names differ by.
    let literal = pattern.split(['*', '?']).next().unwrap_or_default();
    let open = literal.len() < pattern.len();
    let meant = |prefix: &str| literal.starts_with(prefix) || open && prefix.starts_with(literal);
    let mut parts = Vec::new();
    for (prefix, part) in PARTS {
        if meant(prefix) && !parts.contains(part) {
            parts.push(*part);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_events_mean_parts_of_the_program() {
        assert_eq!(parts("fuse_io_uring_start"), ["diskfuse_fuse"]);
        assert_eq!(parts("qcow2_*"), ["diskfuse_qcow2"]);
        assert_eq!(parts("b*"), ["diskfuse_block"]);
        assert_eq!(parts("*").len(), 5);
        assert_eq!(parts("foo"), [""; 0]);
        assert_eq!(parts("foo*"), [""; 0]);
        assert_eq!(parts("f"), [""; 0]);
    }

    #[test]
    fn the_argument_is_read() {
        let trace = TraceOptions::parse("fuse_*,file=/t").unwrap();
        assert_eq!(trace.enable.as_deref(), Some("fuse_*"));
        assert_eq!(trace.file, Some(PathBuf::from("/t")));
        assert!(TraceOptions::parse("events=/e").unwrap().enable.is_none());
        let error = TraceOptions::parse("x,foo=1").unwrap_err().to_string();
        assert_eq!(error, "Parameter 'foo' is unexpected");
    }
}
