//! An image in the hands of one command: opened with its chain, held against others for as long as the command works,
//! and closed in order at the end.

use std::path::Path;
use std::sync::Arc;

use diskfuse_block::drivers::{FileConfig, FileNode};
use diskfuse_block::graph::{Attachment, User};
use diskfuse_block::{Graph, Locking, Node, Permissions, Result};

use crate::chain;
use crate::format::Format;
use crate::name::{self, Named};
use crate::open::{OpenOptions, Opened, open_named};

/// An open image. Its nodes are its own: nobody else sees them.
pub struct Session {
    /// What was opened.
    pub opened: Opened,
    // Dropped before the graph, which it belongs to.
    attachment: Option<Attachment>,
    graph: Graph,
}

impl Session {
    /// Opens an image for what `options` say and holds it: nobody may write it meanwhile. `what` is the command, for
    /// messages. Errors as those of [`open`](crate::open()), and [`Kind::Busy`](diskfuse_block::Kind::Busy) if another
    /// process writes it.
    pub async fn open(name: &Path, options: &OpenOptions, what: &str) -> Result<Self> {
        Self::open_named(name::parse_argument(name)?, options, what).await
    }

    /// The same for a name that was understood already.
    pub async fn open_named(named: Named, options: &OpenOptions, what: &str) -> Result<Self> {
        let graph = Graph::new();
        let opened = open_named(&graph, named, options).await?;
        let attachment = graph.attach(&opened.name, user(what, options.writable))?;
        Ok(Self {
            opened,
            attachment: Some(attachment),
            graph,
        })
    }

    /// The disk.
    pub fn node(&self) -> &Arc<dyn Node> {
        &self.opened.node
    }

    /// What the image is.
    pub fn format(&self) -> Format {
        self.opened.format
    }

    /// Puts everything in order and lets go of the image.
    pub async fn close(mut self) -> Result<()> {
        self.opened.node.close().await?;
        drop(self.attachment.take());
        // Closes the files.
        self.graph.remove(&self.opened.name)
    }
}

/// A file in the hands of one command, whatever is in it.
pub struct FileSession {
    file: Arc<FileNode>,
    #[expect(dead_code, reason = "kept for as long as the file is used")]
    attachment: Attachment,
}

impl FileSession {
    /// Opens the file or block device `path` and holds it: nobody may write it meanwhile.
    pub fn open(path: &Path, config: &FileConfig, what: &str) -> Result<Self> {
        let graph = Graph::new();
        let file = chain::open_host(path, config)?;
        let name = graph.insert(None, Arc::clone(&file) as _, &[])?;
        let attachment = graph.attach(&name, user(what, !config.read_only))?;
        Ok(Self { file, attachment })
    }

    /// The file.
    pub fn node(&self) -> &Arc<FileNode> {
        &self.file
    }
}

/// How the files of an image are opened that is only looked at. With `share`, others may write it meanwhile, and what is
/// seen may make no sense.
pub fn to_read(share: bool) -> FileConfig {
    FileConfig {
        read_only: true,
        locking: match share {
            true => Locking::Off,
            false => Locking::Auto,
        },
        ..FileConfig::default()
    }
}

/// Reads, and perhaps writes; nobody else may write.
fn user(what: &str, writable: bool) -> User {
    User {
        name: what.to_owned(),
        perm: match writable {
            true => Permissions::WRITER,
            false => Permissions::READER,
        },
        shared: Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
        drain: None,
        follows: true,
    }
}

/// Holds the files of a chain, so that nobody writes them meanwhile. The files are locked for as long as what is returned
/// lives.
pub(crate) fn hold_files(layers: &[chain::Layer]) -> Result<Vec<Attachment>> {
    let graph = Graph::new();
    let hold = |layer: &chain::Layer| {
        let name = graph.insert(None, Arc::clone(&layer.file) as _, &[])?;
        graph.attach(&name, user("reading", false))
    };
    layers.iter().map(hold).collect()
}
