//! One export of the process: what it is to be, who serves it, and how it is described to those who ask.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use diskfuse_block::Graph;
use diskfuse_fuse::{Export, ExportOptions};
use diskfuse_ring::{Choice, Config, IoThread, Mailbox, Polling};

use super::nodes;
use crate::control::protocol::{Answer, ExportStatus, WirePath};
use crate::directory::Directory;
use crate::error::Result;
use crate::idle::Idle;
use crate::mountpoint::MadeFile;

/// An export to be started.
pub struct NewExport {
    /// For the FUSE side.
    pub options: ExportOptions,
    /// The node to show; it is in the graph.
    pub node: String,
    /// Show this instead, of which the node is the most important part.
    pub directory: Option<Directory>,
    /// What the image is called; the node's file if not given.
    pub image: Option<PathBuf>,
    /// Threads that others use as well and that serve it, a queue each. They are kept for as long as it is served.
    pub iothreads: Vec<Arc<IoThread>>,
    /// Threads that serve it and end with it, a queue each.
    pub own_threads: Vec<IoThread>,
    /// Its mountpoint, if that was made for it.
    pub made: Option<MadeFile>,
    /// It is taken away when nobody has used it for so long.
    pub idle_timeout: Option<Duration>,
}

/// An export that runs, or is being stopped. Fields are dropped in this order: what is served, who serves it, where.
pub(super) struct Entry {
    pub(super) export: Arc<Export>,
    #[expect(dead_code, reason = "kept for as long as the export is served")]
    pub(super) iothreads: Vec<Arc<IoThread>>,
    #[expect(dead_code, reason = "kept for as long as the export is served")]
    pub(super) own_threads: Vec<IoThread>,
    /// Kept for as long as something is mounted on it.
    pub(super) made: Option<MadeFile>,
    pub(super) image: Option<PathBuf>,
    pub(super) format: String,
    pub(super) stopping: bool,
    /// A thread tries to stop it, unless somebody uses the file.
    pub(super) trying: bool,
    pub(super) idle: Option<Idle>,
    /// The threads that serve it.
    pub(super) mailboxes: Vec<Mailbox>,
    /// Who waits for its end.
    pub(super) waiting: Vec<Sender<Answer>>,
}

impl Entry {
    /// As a client of the control socket is told of it.
    pub(super) fn status(&self, graph: &Graph) -> ExportStatus {
        let stats = self.export.stats();
        let node = self.export.node_name();
        let metadata_cache = nodes::cache_use(graph, &node);
        ExportStatus {
            image: self.image.as_deref().map(WirePath::from),
            mountpoint: self.export.mountpoint().into(),
            pid: std::process::id(),
            id: self.export.id().to_owned(),
            node,
            format: self.format.clone(),
            writable: self.export.writable(),
            stopping: self.stopping,
            queues: stats.queues,
            transport: if stats.uring { "uring" } else { "device" }.to_owned(),
            passthrough: stats.passthrough,
            in_flight: stats.in_flight,
            reads: stats.reads,
            writes: stats.writes,
            read_bytes: stats.read_bytes,
            written_bytes: stats.written_bytes,
            flushes: stats.flushes,
            errors: stats.errors,
            per_queue: self
                .export
                .queue_stats()
                .into_iter()
                .map(Into::into)
                .collect(),
            metadata_cache,
        }
    }
}

/// `count` threads with an event loop each, for one export alone.
pub fn own_threads(count: u8, choice: Choice) -> Result<Vec<IoThread>> {
    let config = Config {
        choice,
        polling: Polling::DEFAULT,
    };
    let threads = (0..count).map(|index| IoThread::spawn(&format!("queue{index}"), config));
    Ok(threads.collect::<std::result::Result<_, _>>()?)
}
