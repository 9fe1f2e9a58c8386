//! Merging an overlay into the image below it. The overlay gives nothing up before everything of it is on stable storage
//! below.

use std::path::Path;
use std::sync::Arc;

use diskfuse_block::{Error, Kind, Resize, Result};
use diskfuse_qcow2::node::{Qcow2Config, Qcow2Node};

use crate::copy::{Copy, Plan, Scope};
use crate::format::Format;
use crate::name;
use crate::open::OpenOptions;
use crate::session::Session;

/// A commit under way.
pub struct Commit {
    /// To be [worked on](Copy::work) until it is done.
    pub copy: Arc<Copy>,
    overlay: Session,
    /// The overlay's own.
    node: Arc<Qcow2Node>,
    base: Session,
}

impl Commit {
    /// Opens the overlay `image` and its backing file, both for writing; the backing file grows if it is the smaller one.
    /// Runs on a ring.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the image has no backing file; those of opening the images.
    pub async fn start(image: &Path, format: Option<Format>) -> Result<Self> {
        let qcow2 = Qcow2Config {
            discard: true,
            ..Qcow2Config::default()
        };
        let options = OpenOptions {
            format,
            writable: true,
            // What is below is only written to.
            backing: false,
            qcow2: Qcow2Config {
                // What it holds is given back to the host.
                pass_discard_other: true,
                ..qcow2.clone()
            },
            ..OpenOptions::default()
        };
        let overlay = Session::open(image, &options, "commit").await?;
        let shown = image.display();
        let node = overlay.opened.qcow2.clone();
        let backing = node.as_ref().and_then(|node| node.header().backing);
        let (Some(node), Some(backing)) = (node, backing) else {
            return Err(Error::new(
                Kind::Invalid,
                format!("'{shown}' has no backing file to commit it to"),
            ));
        };
        let filename = name::parse_argument(image)?.filename;
        let named = name::parse_beside(&filename, &backing.name)?;
        let told = backing.format.as_deref().map(Format::parse).transpose()?;
        let said = told.or(named.format);
        let options = OpenOptions {
            format: said,
            writable: true,
            qcow2,
            ..OpenOptions::default()
        };
        let base = Session::open_named(named, &options, "commit")
            .await
            .map_err(|error| {
                let message = format!("backing file '{}' of '{shown}': {error}", backing.name);
                Error::new(error.kind(), message)
            })?;
        if said.is_none() && base.format() == Format::Raw {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "backing file '{0}' of '{shown}' looks raw, and the header does not say so; if it is raw, say so once: \
                     diskfuse rebase -u -b '{0}' -F raw '{shown}'",
                    backing.name
                ),
            ));
        }
        if base.node().size() < overlay.node().size() {
            let size = overlay.node().size();
            base.node().resize(size, Resize::AtLeast, false).await?;
        }
        let copy = Copy::new(Plan {
            source: Arc::clone(overlay.node()),
            scope: Scope::Layer(Arc::clone(&node)),
            target: Arc::clone(base.node()),
            target_is_zero: false,
            sparse: Some(2 << 20),
            alignment: 512,
        })?;
        Ok(Self {
            copy,
            overlay,
            node,
            base,
        })
    }

    /// When all is copied: brings it to stable storage, and empties the overlay unless it is to be `kept`.
    pub async fn finish(self, kept: bool) -> Result<()> {
        self.base.close().await?;
        if !kept {
            self.node.make_empty().await?;
        }
        self.overlay.close().await
    }
}
