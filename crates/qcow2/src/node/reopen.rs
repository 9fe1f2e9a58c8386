//! An open image closed for a moment and opened again: with other options, on other files, or because something is done to
//! its file meanwhile that an open image cannot bear. Whoever asks has drained all who use it, and puts the new node in the
//! place of the old one.

use std::sync::Arc;

use diskfuse_block::{Node, Result};

use super::Qcow2Node;
use super::config::{Children, Qcow2Config};

impl Qcow2Node {
    /// Closes the image, does `work` on the image file, and opens it anew on `children` with `config`. What became of the
    /// work comes first, the new node second; the node is opened also if the work failed. This node serves no writes any
    /// more then: after an error of the second, the image is as a clean shutdown leaves it. Nothing may be in flight.
    ///
    /// # Errors
    /// What was written cannot be brought to stable storage: then nothing was closed, and the node goes on with what it has
    /// in memory.
    pub async fn while_closed<T>(
        &self,
        config: &Qcow2Config,
        children: Children,
        work: impl AsyncFnOnce(&dyn Node) -> Result<T>,
    ) -> Result<(Result<T>, Result<Arc<Self>>)> {
        if !self.read_only {
            self.flush().await?;
        }
        let done = match self.close().await {
            Ok(()) => work(&*self.file).await,
            Err(error) => Err(error),
        };
        Ok((done, Self::open(children, config).await))
    }
}
