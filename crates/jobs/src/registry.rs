//! All jobs of a process, and the thread that they share. Ids are unique among those that were not dismissed. It must be
//! [quit](Jobs::quit) before it is dropped, or what is under way ends as in a crash.

use std::sync::Arc;

use diskfuse_block::graph::{Change, Drained};
use diskfuse_block::{Error, Graph, Kind, Result};
use diskfuse_ring::{Config, IoThread, spawn};
use parking_lot::Mutex;

use crate::drive::{Driver, drive};
use crate::event::{JobEvent, Outbox};
use crate::job::{Job, JobConfig};
use crate::status::{JobType, Status};

/// The most jobs at a time: each holds some megabytes.
const MOST: usize = 256;

/// See the head of this file. May be used from any thread.
pub struct Jobs {
    roll: Arc<Roll>,
    /// Made for the first job.
    thread: Mutex<Option<IoThread>>,
    outbox: Arc<Outbox>,
}

#[derive(Default)]
struct Roll(Mutex<Vec<Entry>>);

struct Entry {
    job: Arc<Job>,
    /// The nodes that it works on.
    nodes: Vec<String>,
}

impl Jobs {
    /// No jobs so far; `listener` hears of what happens to those that come, in order, on any thread. It must not block; it
    /// may call everything of this crate that does not.
    pub fn new(listener: impl Fn(JobEvent) + Send + Sync + 'static) -> Self {
        Self {
            roll: Arc::default(),
            thread: Mutex::default(),
            outbox: Arc::new(Outbox::new(Box::new(listener))),
        }
    }

    /// Those that were not dismissed, in the order in which they came.
    pub fn list(&self) -> Vec<Arc<Job>> {
        let entries = self.roll.0.lock();
        let jobs = entries.iter().map(|entry| &entry.job);
        let seen = jobs.filter(|job| !matches!(job.status(), Status::Undefined | Status::Null));
        seen.cloned().collect()
    }

    /// The job of this id, for the commands of all jobs: else `Job not found`.
    pub fn find(&self, id: &str) -> Result<Arc<Job>> {
        let found = self.list().into_iter().find(|job| job.id() == id);
        found.ok_or_else(|| Error::new(Kind::NotFound, "Job not found"))
    }

    /// The job of this id, for the commands of block jobs: else `Block job 'x' not found`, which is of class
    /// `DeviceNotActive`.
    pub fn find_block_job(&self, id: &str) -> Result<Arc<Job>> {
        let found = self.find(id).ok().filter(|job| job.kind().is_block_job());
        found.ok_or_else(|| Error::new(Kind::NotFound, format!("Block job '{id}' not found")))
    }

    /// The kind of job that works on a node, if one does that has begun: such a node can be neither removed nor resized.
    pub fn job_on(&self, node: &str) -> Option<JobType> {
        let entries = self.roll.0.lock();
        let on = |entry: &&Entry| entry.nodes.iter().any(|name| name == node);
        let works = |status: Status| status != Status::Undefined && !status.is_over();
        let mut live = entries.iter().filter(|e| works(e.job.status()));
        live.find(on).map(|entry| entry.job.kind())
    }

    /// Takes an id for a job that is about to work on these nodes, of which the first is what a backup copies.
    pub(crate) fn admit(
        &self,
        kind: JobType,
        config: JobConfig,
        nodes: Vec<String>,
    ) -> Result<Admission> {
        check_id(&config.id)?;
        let mut entries = self.roll.0.lock();
        let mut known = entries.iter().filter(|e| e.job.status() != Status::Null);
        if known.any(|entry| entry.job.id() == config.id) {
            let message = format!("Job ID '{}' already in use", config.id);
            return Err(Error::new(Kind::Exists, message));
        }
        if entries.len() >= MOST {
            let message = format!("there are {MOST} jobs already: dismiss some");
            return Err(Error::new(Kind::Busy, message));
        }
        let live = entries.iter().filter(|e| !e.job.status().is_over());
        for other in live {
            // Backups of one disk do not get in each other's way; what one writes no other reads or writes.
            let both = kind == JobType::Backup && other.job.kind() == JobType::Backup;
            let of_one = |name: &String| {
                both && nodes.first() == Some(name) && other.nodes.first() == Some(name)
            };
            let mut shared = nodes.iter().filter(|name| other.nodes.contains(name));
            if let Some(node) = shared.find(|name| !of_one(name)) {
                let by = other.job.kind();
                let message =
                    format!("Node '{node}' is busy: block device is in use by block job: {by}");
                return Err(Error::new(Kind::Busy, message));
            }
        }
        let job = Job::new(kind, config, Arc::clone(&self.outbox));
        entries.push(Entry {
            job: Arc::clone(&job),
            nodes,
        });
        Ok(Admission {
            job,
            roll: Arc::clone(&self.roll),
            launched: false,
        })
    }

    fn launch(&self, mut admission: Admission, driver: Box<dyn Driver>) -> Result<Arc<Job>> {
        let mut thread = self.thread.lock();
        let thread = match &mut *thread {
            Some(thread) => thread,
            none => {
                let spawned = IoThread::spawn("jobs", Config::default());
                none.insert(spawned.map_err(|e| Error::new(Kind::Ended, e.to_string()))?)
            }
        };
        let (job, roll) = (Arc::clone(&admission.job), Arc::clone(&admission.roll));
        let completes = driver.completes();
        let body = move || {
            drop(spawn(async move {
                drive(&job, driver).await;
                roll.forget(&job);
            }));
        };
        // Before it can run: its events come in order.
        admission.job.begins(completes);
        admission.launched = true;
        let posted = thread.mailbox().post(body);
        posted.map_err(|e| Error::new(Kind::Ended, e.to_string()))?;
        Ok(Arc::clone(&admission.job))
    }

    /// Cancels all jobs and waits until each of them has put things in order and is dismissed. Nothing must be started meanwhile. Runs on a
    /// ring, not on that of the jobs.
    pub async fn quit(&self) {
        let jobs = self.list();
        for job in &jobs {
            // Whatever cannot be cancelled any more ends by itself.
            let _ = job.cancel(true);
        }
        for job in &jobs {
            job.ends().await;
        }
    }
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Jobs").field(&self.list()).finish()
    }
}

impl Roll {
    fn forget(&self, job: &Arc<Job>) {
        self.0.lock().retain(|entry| !Arc::ptr_eq(&entry.job, job));
    }
}

/// The id of a job that has not begun; dropping it gives the id back.
pub(crate) struct Admission {
    pub(crate) job: Arc<Job>,
    roll: Arc<Roll>,
    launched: bool,
}

impl Drop for Admission {
    fn drop(&mut self) {
        if !self.launched {
            self.job.transaction.leave(&self.job);
            self.roll.forget(&self.job);
        }
    }
}

/// Letters, digits, `-`, `.` and `_`, a letter first.
fn check_id(id: &str) -> Result<()> {
    let mut chars = id.chars();
    let first = chars.next().is_some_and(|c| c.is_ascii_alphabetic());
    if first && chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)) {
        return Ok(());
    }
    let message = format!("Invalid job ID '{id}'");
    Err(Error::new(Kind::Invalid, message))
}

/// A job that can begin: its id is taken and it has the right to use its nodes. Dropping it gives everything back.
///
/// To begin several at the same moment (a transaction): [drain](Graph::drain) the [nodes](Start::nodes) of all, make all
/// of their [changes](Start::changes) in one [`Graph::change`], [launch](Start::launch) each (or drop all), and let the nodes
/// go on.
#[must_use = "dropping it gives the job up"]
pub struct Start {
    pub(crate) graph: Graph,
    pub(crate) admission: Admission,
    pub(crate) driver: Box<dyn Driver>,
    pub(crate) nodes: Vec<String>,
    pub(crate) changes: Vec<Change>,
    pub(crate) undo: Undo,
}

/// What takes the changes of a job back that did not begin.
pub(crate) struct Undo {
    graph: Graph,
    changes: Vec<Change>,
    /// They may have been made.
    armed: bool,
}

impl Undo {
    pub(crate) fn new(graph: &Graph, changes: Vec<Change>) -> Self {
        Self {
            graph: graph.clone(),
            changes,
            armed: false,
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if self.armed
            && let Err(error) = self.graph.change(&self.changes)
        {
            tracing::error!(%error, "a job that did not begin is still in the way");
        }
    }
}

impl Start {
    /// The nodes that must be drained when it begins.
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }

    /// What must be changed, to be taken once, while the nodes are drained.
    pub fn changes(&mut self) -> Vec<Change> {
        self.undo.armed = true;
        std::mem::take(&mut self.changes)
    }

    /// Lets everybody know that the job is there, before it begins: for several that begin together.
    pub fn announce(&self) {
        self.admission.job.begins(self.driver.completes());
    }

    /// Gives the job up as one that everybody has known of: its events say so.
    pub fn give_up(self) {
        self.announce();
        self.admission.job.gives_up();
    }

    /// Begins, with the changes made and the nodes still drained.
    ///
    /// # Errors
    /// If the job cannot begin; the changes are taken back then, as they are when this is dropped.
    pub fn launch(mut self, jobs: &Jobs) -> Result<Arc<Job>> {
        self.driver.begin()?;
        let job = jobs.launch(self.admission, self.driver)?;
        self.undo.armed = false;
        Ok(job)
    }

    /// Drains, changes and launches. Runs on a ring.
    pub async fn begin(mut self, jobs: &Jobs) -> Result<Arc<Job>> {
        let mut drained: Vec<Drained> = Vec::new();
        for node in &self.nodes {
            drained.push(self.graph.drain(node).await?);
        }
        let changes = self.changes();
        if !changes.is_empty() {
            self.graph.change(&changes)?;
        }
        self.launch(jobs)
    }
}

impl std::fmt::Debug for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Start").field(&self.admission.job).finish()
    }
}
