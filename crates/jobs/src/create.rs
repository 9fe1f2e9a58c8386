//! `blockdev-create` and whatever else is one piece of work that somebody waits for: a job around a future. It reports no
//! progress but "not yet" and "done".

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

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
            let Some(work) = work else { return Ok(()) };
            match unless_cancelled(job, work()).await {
                Ok(false) => Ok(()),
                outcome => {
                    // Also if it has failed, as with QEMU.
                    job.progress(|done, _| *done = 1);
                    outcome.map(drop)
                }
            }
        })
    }

    fn finish<'a>(&'a self, _job: &'a Arc<Job>, _succeeded: bool) -> LocalFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// Whether the work was done; else the job was cancelled, and the work is dropped where it stands.
async fn unless_cancelled(job: &Job, mut work: LocalFuture<'_, Result<()>>) -> Result<bool> {
    let mut cancelled = pin!(job.until(|| job.is_cancelled().then_some(())));
    poll_fn(|cx| match work.as_mut().poll(cx) {
        Poll::Ready(result) => Poll::Ready(result.map(|()| true)),
        Poll::Pending => cancelled.as_mut().poll(cx).map(|()| Ok(false)),
    })
    .await
}

/// Starts a job of type [`JobType::Create`] or [`JobType::Amend`] that runs the future which `make` returns, on the thread of
/// jobs. When the job is cancelled the future is dropped where it waits, so it must bear that; a file that it was making may be
/// there in part then. QEMU dismisses such jobs only when it
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
