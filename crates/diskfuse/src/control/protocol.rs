//! What is said over a control socket: one request, one answer, a line of JSON each.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::counters::{CacheCounters, QueueCounters};

/// The longest request, in bytes.
pub const LONGEST_REQUEST: usize = 64 << 10;

/// The longest answer, in bytes: some ten thousand exports.
pub const LONGEST_ANSWER: usize = 16 << 20;

/// What is asked of a daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// All exports.
    List,
    /// Drain, flush and unmount the export there; answered when that is done.
    Unmount {
        /// Its absolute mountpoint.
        mountpoint: WirePath,
        /// What becomes of those who use it.
        #[serde(default)]
        how: Unmount,
    },
}

/// What becomes of those who use a file that is to be unmounted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unmount {
    /// Nothing: as long as there are any it is not unmounted, and the answer is [`Answer::Busy`].
    #[default]
    UnlessBusy,
    /// They go on; the name is taken away at once, and the export ends with the last of them. The answer comes before.
    Lazily,
    /// What they have asked for is done, and all that they ask for afterwards fails.
    Forcibly,
}

/// What a daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// To anything: the daemon has begun to end, and will not do it.
    Ending,
    /// To [`Request::List`].
    Exports {
        /// In the order in which they were started.
        exports: Vec<ExportStatus>,
    },
    /// To [`Request::Unmount`].
    Unmounted {
        /// It was the last one that the daemon was there for: the process ends.
        ends: bool,
    },
    /// Somebody uses the file: nothing has been done.
    Busy,
    /// It could not be done.
    Failed {
        /// Why.
        message: String,
    },
}

/// An export as it is just now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportStatus {
    /// The image, an absolute path; none for disks without one.
    pub image: Option<WirePath>,
    /// An absolute path.
    pub mountpoint: WirePath,
    /// The daemon, as itself knows its process id.
    pub pid: u32,
    /// The export's id.
    pub id: String,
    /// The node that it shows.
    pub node: String,
    /// The image's format, or the node's driver.
    pub format: String,
    /// Whether it can be written.
    pub writable: bool,
    /// It is being drained and will be gone soon.
    pub stopping: bool,
    /// How many queues, and threads, serve it.
    pub queues: usize,
    /// How requests come: `device` or `uring`.
    #[serde(default)]
    pub transport: String,
    /// Whether the kernel reads and writes the image itself; what follows does not tell of that.
    #[serde(default)]
    pub passthrough: bool,
    /// Requests in flight.
    pub in_flight: u64,
    /// READ requests answered.
    pub reads: u64,
    /// WRITE requests answered.
    pub writes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// FSYNC and FLUSH requests answered.
    pub flushes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// What each queue has counted; empty where the daemon is older than that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub per_queue: Vec<QueueCounters>,
    /// How the metadata cache does, if the image's format has one and the daemon says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_cache: Option<CacheCounters>,
}

/// A path in JSON: a string, or an array of its bytes where it is not UTF-8, so that nothing is lost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Spelling", into = "Spelling")]
pub struct WirePath(pub PathBuf);

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Spelling {
    Text(String),
    Bytes(Vec<u8>),
}

impl From<Spelling> for WirePath {
    fn from(spelling: Spelling) -> Self {
        Self(match spelling {
            Spelling::Text(text) => text.into(),
            Spelling::Bytes(bytes) => OsString::from_vec(bytes).into(),
        })
    }
}

impl From<WirePath> for Spelling {
    fn from(path: WirePath) -> Self {
        match path.0.to_str() {
            Some(text) => Self::Text(text.to_owned()),
            None => Self::Bytes(path.0.as_os_str().as_bytes().to_vec()),
        }
    }
}

impl From<&Path> for WirePath {
    fn from(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn requests_are_one_line_and_come_back_as_they_were() {
        for path in ["/a b", "/ü\n\"", "/"] {
            let request = Request::Unmount {
                mountpoint: Path::new(path).into(),
                how: Unmount::Lazily,
            };
            let line = serde_json::to_string(&request).unwrap();
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
        }
        let list = serde_json::from_str::<Request>(r#"{"command": "list"}"#).unwrap();
        assert_eq!(list, Request::List);
    }

    #[test]
    fn a_path_that_is_not_text_survives() {
        let path = WirePath(PathBuf::from(OsStr::from_bytes(b"/\xff\xfe/x")));
        let json = serde_json::to_string(&path).unwrap();
        assert_eq!(json, "[47,255,254,47,120]");
        assert_eq!(serde_json::from_str::<WirePath>(&json).unwrap(), path);
    }

    #[test]
    fn an_export_of_an_older_daemon_is_understood() {
        let older = r#"{"image": null, "mountpoint": "/m", "pid": 1, "id": "e", "node": "n", "format": "raw",
            "writable": true, "stopping": false, "queues": 1, "in_flight": 0, "reads": 4, "writes": 0,
            "read_bytes": 0, "written_bytes": 0, "flushes": 0, "errors": 0}"#;
        let status: ExportStatus = serde_json::from_str(older).unwrap();
        assert_eq!((status.per_queue.len(), status.metadata_cache), (0, None));
    }

    #[test]
    fn unknown_commands_are_errors() {
        for line in [
            "",
            "{}",
            "[]",
            r#"{"command":"stop"}"#,
            r#"{"command":"unmount"}"#,
            r#"{"command":"unmount","mountpoint":7}"#,
            r#"{"command":"unmount","mountpoint":"/m","how":"somehow"}"#,
        ] {
            assert!(serde_json::from_str::<Request>(line).is_err(), "{line}");
        }
    }
}
