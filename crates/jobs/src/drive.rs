//! A job's life on the thread of jobs: its work, then the decision of its transaction, then putting things in order. Whatever
//! happens, it ends concluded.

use std::sync::Arc;

use diskfuse_block::{LocalFuture, Result};

use crate::job::Job;
use crate::status::Status;

/// What a kind of job does. All of it happens on the thread of jobs.
pub(crate) trait Driver: Send {
    /// Begins to be in the way of its node, while that is drained.
    fn begin(&self) -> Result<()> {
        Ok(())
    }

    /// The work. Looks now and then whether it is cancelled ([`Job::pass`] says so), and gives up then.
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>>;

    /// Makes the result the truth.
    fn prepare<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>> {
        let _ = job;
        Box::pin(std::future::ready(Ok(())))
    }

    /// Puts everything in order, after a success or not.
    fn finish<'a>(&'a self, job: &'a Arc<Job>, succeeded: bool) -> LocalFuture<'a, ()>;

    /// Whether it becomes ready and ends only when it is told to.
    fn completes(&self) -> bool {
        false
    }
}

/// From the beginning to the end; then it can be forgotten.
pub(crate) async fn drive(job: &Arc<Job>, driver: Box<dyn Driver>) {
    let succeeded = work(job, &*driver).await;
    if !succeeded {
        job.aborts();
    }
    driver.finish(job, succeeded).await;
    // What it held of its nodes is given back before anybody hears of the end.
    drop(driver);
    job.conclude(succeeded);
    job.dismissed().await;
}

async fn work(job: &Arc<Job>, driver: &dyn Driver) -> bool {
    if job.is_cancelled() {
        job.transaction.fail(job);
        return false;
    }
    job.runs();
    if let Err(error) = driver.run(job).await {
        return failed(job, &error);
    }
    if !job.waits().await {
        job.transaction.fail(job);
        return false;
    }
    if !job.transaction.all_ran().await {
        return false;
    }
    job.go(Status::Pending);
    if !job.transaction.wanted().await {
        return false;
    }
    if let Err(error) = driver.prepare(job).await {
        return failed(job, &error);
    }
    job.transaction.all_prepared().await
}

fn failed(job: &Arc<Job>, error: &diskfuse_block::Error) -> bool {
    job.fail(error);
    job.transaction.fail(job);
    false
}

/// Runs futures at the same time until all are done; the first error counts.
pub(crate) async fn crew(futures: Vec<LocalFuture<'_, Result<()>>>) -> Result<()> {
    let mut running = futures;
    let mut outcome = Ok(());
    std::future::poll_fn(move |cx| {
        running.retain_mut(|future| match future.as_mut().poll(cx) {
            std::task::Poll::Ready(result) => {
                if outcome.is_ok() {
                    outcome = result;
                }
                false
            }
            std::task::Poll::Pending => true,
        });
        match running.is_empty() {
            true => std::task::Poll::Ready(std::mem::replace(&mut outcome, Ok(()))),
            false => std::task::Poll::Pending,
        }
    })
    .await
}
