//! A job's place at one of its nodes: a user of the graph like any other. Whoever drains the node stops the whole job between
//! two pieces. A job that drains a node of its own must not hold a pass while it waits for that.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use diskfuse_block::graph::{Attachment, DrainHook, Drained, User};
use diskfuse_block::{Error, Graph, Kind, LetGo, LocalFuture, Node, Permissions, Result};
use diskfuse_ring::sleep;
use parking_lot::Mutex;

use crate::job::{Job, Pass};

/// How long a job that is not alone in draining its node waits before it tries again.
const AGAIN: Duration = Duration::from_millis(5);

/// What a job does with a node, and what it lets others do.
#[derive(Clone, Copy)]
pub(crate) struct Rights {
    pub(crate) perm: Permissions,
    pub(crate) shared: Permissions,
}

pub(crate) struct Seat {
    graph: Graph,
    name: String,
    hook: Arc<Hook>,
    attachment: Mutex<Option<Attachment>>,
}

struct Hook {
    graph: Graph,
    job: Arc<Job>,
    node: Mutex<Arc<dyn Node>>,
    /// Drains that asked it to stop since it went on.
    asked: AtomicUsize,
    /// A node that is drained along with this one: its users write here as well, through the job's wrap.
    along: OnceLock<String>,
    drained: Mutex<Vec<Drained>>,
    /// While it is drained, none of the job's nodes holds requests back.
    let_go: Mutex<Vec<LetGo>>,
}

impl DrainHook for Hook {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        if self.asked.fetch_add(1, Ordering::SeqCst) == 0 {
            self.job.drain(true);
        }
        // What is in flight may be on its way to another of its nodes, which whoever drains this one knows nothing of.
        let let_go = self.graph.let_go(&self.job.places());
        self.let_go.lock().extend(let_go);
        Box::pin(async {
            self.job.quiet().await;
            let Some(name) = self.along.get() else {
                return;
            };
            match self.graph.drain_along(name, self).await {
                Ok(drained) => self.drained.lock().push(drained),
                Err(error) => tracing::error!(node = name, %error, "cannot be drained"),
            }
        })
    }

    fn resume(&self) {
        let along = std::mem::take(&mut *self.drained.lock());
        drop(along);
        let let_go = std::mem::take(&mut *self.let_go.lock());
        drop(let_go);
        if self.asked.swap(0, Ordering::SeqCst) > 0 {
            self.job.drain(false);
        }
    }

    fn switch(&self, node: Arc<dyn Node>) {
        *self.node.lock() = node;
    }
}

impl Seat {
    /// The job becomes a user of the node. If the node's users are to stand still whenever this one is drained, `along` names
    /// another node whose users write to this one.
    pub(crate) fn take(
        graph: &Graph,
        job: &Arc<Job>,
        name: &str,
        rights: Rights,
        along: Option<&str>,
    ) -> Result<Self> {
        let hook = Arc::new(Hook {
            graph: graph.clone(),
            job: Arc::clone(job),
            node: Mutex::new(graph.get(name)?),
            asked: AtomicUsize::new(0),
            along: OnceLock::new(),
            drained: Mutex::default(),
            let_go: Mutex::default(),
        });
        let weak: Weak<dyn DrainHook> = Arc::downgrade(&hook) as Weak<dyn DrainHook>;
        let user = User {
            name: format!("block job '{}'", job.id()),
            perm: rights.perm,
            shared: rights.shared,
            drain: Some(weak),
            follows: false,
        };
        let attachment = graph.attach(name, user)?;
        if let Some(along) = along {
            attachment.copies(along)?;
            // Nobody else has set it.
            let _ = hook.along.set(along.to_owned());
        }
        job.takes_place(name);
        {
            // A switch that comes from now on waits for the lock, and one that came before shows in the graph.
            let mut node = hook.node.lock();
            *node = graph.get(name)?;
        }
        Ok(Self {
            graph: graph.clone(),
            name: name.to_owned(),
            hook,
            attachment: Mutex::new(Some(attachment)),
        })
    }

    /// The node, as its users see it now.
    pub(crate) fn node(&self) -> Arc<dyn Node> {
        Arc::clone(&self.hook.node.lock())
    }

    /// The node's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// From now on the job does this with the node.
    pub(crate) fn use_for(&self, perm: Permissions) -> Result<()> {
        let attachment = self.attachment.lock();
        attachment.as_ref().map_or(Ok(()), |at| at.use_for(perm))
    }

    /// From now on nobody but the job and these nodes, which stand on the node, may read it.
    pub(crate) fn show_only_to(&self, readers: &[String]) -> Result<()> {
        let attachment = self.attachment.lock();
        let shown = attachment.as_ref().map(|at| at.show_only_to(readers));
        shown.unwrap_or(Ok(()))
    }

    /// The job is no user of it any more; nothing of its own must be in flight.
    pub(crate) fn leave(&self) {
        let attachment = self.attachment.lock().take();
        drop(attachment);
    }

    /// Drains `lowest`, which is the node or one that is below it, and gets the right to do I/O all the same. Nobody else who
    /// drains any of the job's nodes can be between having drained and letting go then, and whoever comes waits. The job must
    /// hold no pass. [`Kind::Busy`] if another node of the job has been put on the lowest meanwhile.
    pub(crate) async fn hold_still<'j>(
        &self,
        job: &'j Job,
        lowest: &str,
    ) -> Result<(Pass<'j>, Drained)> {
        loop {
            self.check_apart(job, lowest)?;
            let drained = self.graph.drain(lowest).await?;
            // From here on others wait for this pass.
            let pass = job.force_pass();
            if self.hook.asked.load(Ordering::SeqCst) <= 1 && job.drained_places() <= 1 {
                return Ok((pass, drained));
            }
            drop(pass);
            drop(drained);
            sleep(AGAIN).await;
        }
    }

    /// The drain would stop the job at more than one of its nodes, and the pass could never be got.
    fn check_apart(&self, job: &Job, lowest: &str) -> Result<()> {
        for place in job.places() {
            if place != self.name && self.graph.stands_on(&place, lowest)? {
                let message = format!(
                    "Node '{place}' stands on node '{lowest}', so block job '{}' cannot end",
                    job.id()
                );
                return Err(Error::new(Kind::Busy, message));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
