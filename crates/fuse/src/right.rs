//! The export's right to use its node. Resizing is claimed only for as long as it takes, unless the export is growable, so that
//! others who cannot bear it (a backing chain, a job) are in nobody's way meanwhile.

use diskfuse_block::graph::Attachment;
use diskfuse_block::{LetGo, Permissions};
use parking_lot::Mutex;

/// See the module.
#[derive(Default)]
pub(crate) struct Right(Mutex<State>);

#[derive(Default)]
struct State {
    attachment: Option<Attachment>,
    /// Resizes under way.
    resizing: usize,
}

impl Right {
    /// Whether it is there.
    pub(crate) fn is_there(&self) -> bool {
        self.0.lock().attachment.is_some()
    }

    /// Whether it is there; then `count` notes somebody who uses it, before it can be taken back.
    pub(crate) fn use_if_there(&self, count: impl FnOnce()) -> bool {
        let state = self.0.lock();
        let is_there = state.attachment.is_some();
        if is_there {
            count();
        }
        is_there
    }

    /// Takes it back unless it is `used`, and says whether. Nobody begins to use it meanwhile.
    pub(crate) fn take_back_unless(&self, used: impl FnOnce() -> bool) -> bool {
        let attachment = {
            let mut state = self.0.lock();
            if used() {
                return false;
            }
            state.attachment.take()
        };
        drop(attachment);
        true
    }

    /// Puts another one in its place unless it is `used`, and says whether. Nobody begins to use it meanwhile. If `make` fails it stays.
    pub(crate) fn renew_unless<E>(
        &self,
        used: impl FnOnce() -> bool,
        make: impl FnOnce() -> Result<Attachment, E>,
    ) -> Result<bool, E> {
        let before = {
            let mut state = self.0.lock();
            if used() {
                return Ok(false);
            }
            let made = make()?;
            state.attachment.replace(made)
        };
        drop(before);
        Ok(true)
    }

    /// The export does not use the node any more.
    pub(crate) fn take_back(&self) {
        let attachment = self.0.lock().attachment.take();
        drop(attachment);
    }

    /// The node that it is for; empty if it is gone.
    pub(crate) fn node_name(&self) -> String {
        let state = self.0.lock();
        let attachment = state.attachment.as_ref();
        attachment.map_or_else(String::new, Attachment::node_name)
    }

    /// Nodes hold back no requests of this export until it is dropped: see [`Attachment::let_go`].
    pub(crate) fn let_go(&self) -> Vec<LetGo> {
        let state = self.0.lock();
        let attachment = state.attachment.as_ref();
        attachment.map_or_else(Vec::new, Attachment::let_go)
    }

    /// The right to resize, until it is dropped. [`Kind::Busy`](diskfuse_block::Kind::Busy) if somebody else cannot bear that. Takes
    /// the graph's lock.
    pub(crate) fn to_resize(&self) -> diskfuse_block::Result<Resizing<'_>> {
        let mut state = self.0.lock();
        if state.resizing == 0
            && let Some(attachment) = &state.attachment
        {
            attachment.use_for(Permissions::WRITER)?;
        }
        state.resizing += 1;
        Ok(Resizing(self))
    }
}

/// See [`Right::to_resize`].
pub(crate) struct Resizing<'r>(&'r Right);

impl Drop for Resizing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.0.lock();
        state.resizing -= 1;
        if state.resizing == 0
            && let Some(attachment) = &state.attachment
            && let Err(error) = attachment.use_for(Permissions::WRITER & !Permissions::RESIZE)
        {
            // Less than before meets no conflict.
            tracing::warn!(%error, "cannot give back the right to resize");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use diskfuse_block::Graph;
    use diskfuse_block::drivers::{NullConfig, open_null};
    use diskfuse_block::graph::User;

    use super::*;

    #[test]
    fn what_is_used_is_not_taken_back_and_what_is_gone_is_not_used() {
        let graph = Graph::new();
        let node = open_null(&NullConfig::default()).unwrap();
        graph.insert(Some("n"), node, &[]).unwrap();
        let user = User {
            name: "somebody".to_owned(),
            perm: Permissions::READER,
            shared: Permissions::ALL,
            drain: None,
            follows: true,
        };
        let right = Right::default();
        assert!(
            right
                .renew_unless(|| false, || graph.attach("n", user))
                .unwrap()
        );
        let users = Cell::new(0);
        let count = || users.set(users.get() + 1);
        assert!(right.use_if_there(count));
        assert!(!right.take_back_unless(|| users.get() > 0));
        let renewed = right.renew_unless::<()>(|| users.get() > 0, || panic!("it is used"));
        assert_eq!(renewed, Ok(false));
        assert_eq!(right.renew_unless(|| false, || Err("no")), Err("no"));
        assert_eq!(graph.users("n").unwrap().len(), 1);
        users.set(0);
        assert!(right.take_back_unless(|| users.get() > 0));
        assert!(graph.users("n").unwrap().is_empty());
        assert!(!right.use_if_there(count));
        assert_eq!(users.get(), 0);
    }
}
