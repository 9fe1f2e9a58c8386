//! An open image closed for a moment and opened again: with other options, on other files, or because something is done to
//! its file meanwhile that an open image cannot bear. Whoever asks has drained all who use it, and puts the new node in the
//! place of the old one. An image that nothing was done to must never be left closed because the new one could not be had.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use diskfuse_block::{Node, Result};

use super::config::{Children, Qcow2Config};
use super::{OpenImage, Qcow2Node};
use crate::bitmaps::Inheritance;

/// An image opened anew, and the node that was closed for it. Until it is [kept](Self::keep) the old one can go on: it does when
/// this is dropped, so drop it before anybody is let go on; nobody may use the new one then.
#[must_use = "dropping it opens the old node again"]
pub struct Anew {
    new: Arc<Qcow2Node>,
    /// Not if it was closed already, as then its file may have been changed meanwhile.
    old: Option<Arc<OpenImage>>,
}

impl Anew {
    /// The new node. Nobody may write it before it is kept.
    pub fn node(&self) -> Arc<Qcow2Node> {
        Arc::clone(&self.new)
    }

    /// The new node is in the place of the old one, which stays closed.
    pub fn keep(mut self) {
        self.old = None;
    }
}

impl Drop for Anew {
    fn drop(&mut self) {
        if let Some(old) = &self.old {
            old.go_on();
        }
    }
}

impl OpenImage {
    /// Takes back that it was closed; its file must be as it was left.
    fn go_on(&self) {
        self.meta.go_on();
        self.open_for_writing.store(true, Ordering::SeqCst);
    }
}

impl Qcow2Node {
    /// Closes the image and opens it anew on `children` with `config`. Nothing may be in flight.
    ///
    /// # Errors
    /// What was written cannot be brought to stable storage, or one of [`Qcow2Node::open`]: then this node goes on as before.
    pub async fn open_anew(&self, config: &Qcow2Config, children: Children) -> Result<Anew> {
        let goes_on = self.is_open_for_writing().then(|| Arc::clone(&self.image));
        let opened = match self.shut().await {
            Ok(()) => Box::pin(Self::open_after(self.leave_bitmaps(), children, config)).await,
            Err(error) => Err(error),
        };
        match opened {
            Ok(new) => Ok(Anew { new, old: goes_on }),
            Err(error) => {
                if let Some(old) = goes_on {
                    old.go_on();
                }
                Err(error)
            }
        }
    }

    /// Closes the image, does `work` on the image file, and opens it anew as it was. What became of the work comes first, the new
    /// node second; the node is opened also if the work failed. After an error of the second, the image is as a clean shutdown and
    /// the work leave it, and this node reads what it had before and serves no writes any more: what it has in memory may not be
    /// what the file has. [`Qcow2Node::open_anew`] opens it when the trouble is over. Nothing may be in flight.
    ///
    /// # Errors
    /// What was written cannot be brought to stable storage: then nothing was done, and this node goes on as before.
    pub async fn while_closed<T>(
        &self,
        work: impl AsyncFnOnce(&dyn Node) -> Result<T>,
    ) -> Result<(Result<T>, Result<Arc<Self>>)> {
        let goes_on = self.is_open_for_writing();
        if let Err(error) = self.shut().await {
            if goes_on {
                self.go_on();
            }
            return Err(error);
        }
        let done = work(&*self.file).await;
        let left = self.leave_bitmaps();
        let opened = Box::pin(Self::open_after(left, self.children(), self.config())).await;
        Ok((done, opened))
    }

    /// For the next one to open the image; if they were not loaded, it loads them.
    fn leave_bitmaps(&self) -> Option<Inheritance> {
        let are_loaded = self.config.loads_bitmaps(self.read_only);
        are_loaded.then(|| self.persistent.leave())
    }

    fn is_open_for_writing(&self) -> bool {
        self.open_for_writing.load(Ordering::SeqCst)
    }

    async fn shut(&self) -> Result<()> {
        if !self.read_only {
            self.flush().await?;
        }
        self.close().await
    }
}
