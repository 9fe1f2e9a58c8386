//! Merging an overlay into the image below it. The overlay gives nothing up before everything of it is on stable storage
//! below.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskfuse_block::{Error, Kind, Resize, Result};
use diskfuse_qcow2::format::Backing;
use diskfuse_qcow2::node::{Qcow2Config, Qcow2Node};

use crate::copy::{Copy, Plan, Scope};
use crate::format::Format;
use crate::name::{self, Named};
use crate::open::OpenOptions;
use crate::session::Session;

/// An overlay that is to be merged into its backing file, which nothing has been done to yet.
pub struct Overlay {
    path: PathBuf,
    session: Session,
    layer: Arc<Qcow2Node>,
    backing: Backing,
    base: Named,
    /// What the header says of the base's format.
    said: Option<Format>,
}

/// A commit under way.
pub struct Commit {
    /// To be [worked on](Copy::work) until it is done.
    pub copy: Arc<Copy>,
    overlay: Session,
    /// The overlay's own.
    node: Arc<Qcow2Node>,
    base: Session,
}

/// How both images are opened.
fn to_write() -> OpenOptions {
    OpenOptions {
        writable: true,
        qcow2: Qcow2Config {
            discard: true,
            // What an overlay held is given back to the host when it is emptied.
            pass_discard_other: true,
            ..Qcow2Config::default()
        },
        ..OpenOptions::default()
    }
}

impl Overlay {
    /// Opens the overlay `image` for writing, and holds it: nobody else has it until this or what comes of it is dropped. Runs
    /// on a ring.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if the image has no backing file; those of opening it.
    pub async fn open(image: &Path, format: Option<Format>) -> Result<Self> {
        let options = OpenOptions {
            format,
            // What is below is only written to.
            backing: false,
            ..to_write()
        };
        let session = Session::open(image, &options, "commit").await?;
        let shown = image.display();
        let layer = session.opened.qcow2.clone();
        let backing = layer.as_ref().and_then(|node| node.header().backing);
        let (Some(layer), Some(backing)) = (layer, backing) else {
            return Err(Error::new(
                Kind::Invalid,
                format!("'{shown}' has no backing file to commit it to"),
            ));
        };
        let path = name::parse_argument(image)?.filename;
        let base = name::parse_beside(&path, &backing.name)?;
        let told = backing.format.as_deref().map(Format::parse).transpose()?;
        let said = told.or(base.format);
        Ok(Self {
            path,
            session,
            layer,
            backing,
            base,
            said,
        })
    }

    /// The file of the overlay.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file that it stands on.
    pub fn base(&self) -> &Path {
        &self.base.filename
    }

    /// Opens the backing file for writing; it grows if it is the smaller one. Runs on a ring.
    ///
    /// # Errors
    /// Those of opening it; [`Kind::Invalid`] if its format is not known.
    pub async fn commit(self) -> Result<Commit> {
        let shown = self.path.display();
        let options = OpenOptions {
            format: self.said,
            ..to_write()
        };
        let base = Session::open_named(self.base, &options, "commit")
            .await
            .map_err(|error| {
                let message = format!("backing file '{}' of '{shown}': {error}", self.backing.name);
                Error::new(error.kind(), message)
            })?;
        if self.said.is_none() && base.format() == Format::Raw {
            return Err(Error::new(
                Kind::Invalid,
                format!(
                    "backing file '{0}' of '{shown}' looks raw, and the header does not say so; if it is raw, say so once: \
                     diskfuse rebase -u -b '{0}' -F raw '{shown}'",
                    self.backing.name
                ),
            ));
        }
        let overlay = self.session;
        if base.node().size() < overlay.node().size() {
            let size = overlay.node().size();
            base.node().resize(size, Resize::AtLeast, false).await?;
        }
        let copy = Copy::new(Plan {
            source: Arc::clone(overlay.node()),
            scope: Scope::Layer(Arc::clone(&self.layer)),
            target: Arc::clone(base.node()),
            target_is_zero: false,
            sparse: Some(2 << 20),
            alignment: 512,
        })?;
        Ok(Commit {
            copy,
            overlay,
            node: self.layer,
            base,
        })
    }
}

impl Commit {
    /// When all is copied: brings it to stable storage, and empties the overlay unless it is to be `kept`.
    pub async fn finish(self, kept: bool) -> Result<()> {
        self.base.close().await?;
        if !kept {
            self.node.make_empty().await?;
        }
        self.overlay.close().await
    }
}
