//! `blockdev-create` and whatever else is one piece of work that somebody waits for: a job around a future. It reports no
//! progress but "not yet" and "done".

use std::future::Future;
use std::sync::Arc;

use diskfuse_block::{Graph, LocalFuture, Result};
use parking_lot::Mutex;

use crate::drive::Driver;
use crate::job::{Job, JobConfig};
use crate::registry::{Jobs, Start, Undo};
use crate::status::JobType;

type Work = Box<dyn FnOnce() -> LocalFuture<'static, Result<()>> + Send>;

struct Once(Mutex<Option<Work>>);

impl Driver for Once {
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            job.progress(|_, total| *total = 1);
            let work = self.0.lock().take();
            if let Some(work) = work {
                work().await?;
            }
            job.progress(|done, _| *done = 1);
            Ok(())
        })
    }

    fn finish<'a>(&'a self, _job: &'a Arc<Job>, _succeeded: bool) -> LocalFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Starts a job of type [`JobType::Create`] or [`JobType::Amend`] that runs the future which `make` returns, on the thread of
/// jobs. It cannot be cancelled half-way: what is asked meanwhile counts when it is done. QEMU dismisses such jobs only when it
/// is told to: set [`JobConfig::auto_dismiss`] so.
pub fn run<M, F>(jobs: &Jobs, kind: JobType, config: JobConfig, make: M) -> Result<Arc<Job>>
where
    M: FnOnce() -> F + Send + 'static,
    F: Future<Output = Result<()>> + 'static,
{
    let start = Start {
        graph: Graph::new(),
        admission: jobs.admit(kind, config, Vec::new())?,
        driver: Box::new(Once(Mutex::new(Some(Box::new(|| Box::pin(make())))))),
        nodes: Vec::new(),
        changes: Vec::new(),
        undo: Undo::new(&Graph::new(), Vec::new()),
    };
    start.launch(jobs)
}
