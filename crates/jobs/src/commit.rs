//! `block-commit`: what images above a base hold is put into the base. If the uppermost of them is the one that is written, the
//! base takes its place when the job is completed, as with a mirror; else the image above them stands on the base
//! afterwards. Nothing that anybody above sees changes at any time.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use diskfuse_block::{Error, Graph, Kind, LocalFuture, Permissions, Resize, Result, Zeroes};

use crate::chain::{self, held_above};
use crate::copy::{Bounce, Copied, Failure, Holds, PIECE, WORKERS, copy};
use crate::drive::{Driver, crew};
use crate::event::ErrorAction;
use crate::job::{Job, JobConfig};
use crate::mirror::{self, MirrorConfig, Scope, What};
use crate::policy::OnError;
use crate::registry::{Jobs, Start, Undo};
use crate::seat::{Rights, Seat};
use crate::status::JobType;
use crate::stream::{backing_name, stand_on};

/// What `block-commit` is told.
#[derive(Clone, Debug)]
pub struct CommitConfig {
    /// What every job is told.
    pub job: JobConfig,
    /// The image that is in use (`device`).
    pub node: String,
    /// The uppermost image whose data go down (`top-node`); the image in use if none is said.
    pub top: Option<String>,
    /// The image that they go to (`base-node`); the lowest if none is said.
    pub base: Option<String>,
    /// What the image above is to say of the file below it; that of the base if nothing is said.
    pub backing_file: Option<String>,
    /// About errors.
    pub on_error: OnError,
}

impl CommitConfig {
    /// All of a chain into its lowest image.
    pub fn new(job: JobConfig, node: &str) -> Self {
        Self {
            job,
            node: node.to_owned(),
            top: None,
            base: None,
            backing_file: None,
            on_error: OnError::default(),
        }
    }
}

/// Writing to a base changes nothing for those above it.
const TO_BASE: Rights = Rights {
    perm: Permissions::CONSISTENT_READ.with(Permissions::WRITE_UNCHANGED),
    shared: Permissions::CONSISTENT_READ.with(Permissions::WRITE_UNCHANGED),
};

/// The image above the top shows the same afterwards as before; whoever drains it stops the job.
const OF_OVERLAY: Rights = Rights {
    perm: Permissions::CONSISTENT_READ.with(Permissions::WRITE_UNCHANGED),
    shared: Permissions::ALL,
};

/// Where a commit begins and ends.
struct Ends {
    /// From the image in use to the lowest.
    chain: Vec<String>,
    /// The place of the uppermost image whose data go down.
    top: usize,
    /// The place of the image that they go to, which is below that.
    base: usize,
}

impl Ends {
    fn find(graph: &Graph, config: &CommitConfig) -> Result<Self> {
        let chain = chain::chain(graph, &config.node)?;
        let place = |name: &str| {
            graph.get(name)?;
            let at = chain.iter().position(|there| there == name);
            let message = format!("'{name}' is not in this backing file chain");
            at.ok_or_else(|| Error::new(Kind::Invalid, message))
        };
        let top = config.top.as_deref().map_or(Ok(0), place)?;
        let base = config.base.as_deref().map_or(Ok(chain.len() - 1), place)?;
        if top < base {
            return Ok(Self { chain, top, base });
        }
        let message = match top == base {
            true => "cannot commit an image into itself".to_owned(),
            false => format!("'{}' is not in this backing file chain", chain[base]),
        };
        Err(Error::new(Kind::Invalid, message))
    }

    /// The base, and the image above the top if there is one, which is to name the base.
    fn written(&self) -> Vec<&String> {
        let above = self.top.checked_sub(1).and_then(|at| self.chain.get(at));
        self.chain.get(self.base).into_iter().chain(above).collect()
    }
}

/// The names of the nodes that must be open for writing when [`commit`] is called, the lower one first: the base, and the
/// image above the top, whose header is changed at last. Both are below others most of the time, and so open for reading
/// only; whoever opens them for writing may close them for that when the job is [over](Job::over), unless somebody writes them
/// then.
///
/// # Errors
/// Those of [`commit`] about the chain.
pub fn commit_writes(graph: &Graph, config: &CommitConfig) -> Result<Vec<String>> {
    let ends = Ends::find(graph, config)?;
    Ok(ends.written().into_iter().cloned().collect())
}

/// The name of the node that stands on the base, and hides what [`commit`] writes there until the job succeeds.
///
/// # Errors
/// Those of [`commit`] about the chain.
pub fn commit_hides(graph: &Graph, config: &CommitConfig) -> Result<String> {
    let Ends { chain, base, .. } = Ends::find(graph, config)?;
    // The top is above the base.
    Ok(chain[base - 1].clone())
}

/// Gets a commit ready to begin.
///
/// # Errors
/// In the words of `block-commit`: if the id or a node is in use, top or base is not in the chain, one of the
/// nodes of [`commit_writes`] cannot be written ([`Kind::ReadOnly`]), or somebody else sees one of the images that change.
pub fn commit(jobs: &Jobs, graph: &Graph, config: CommitConfig) -> Result<Start> {
    let ends = Ends::find(graph, &config)?;
    for name in ends.written() {
        check_writable(graph, name)?;
    }
    let Ends { chain, top, base } = ends;
    let active = top == 0;
    let seen_by_all = if active { 1 } else { top };
    check_unseen(graph, &chain, seen_by_all, base)?;
    match active {
        true => commit_active(jobs, graph, &chain[..=base], config),
        false => commit_below(jobs, graph, &chain[top - 1..=base], config),
    }
}

fn check_writable(graph: &Graph, name: &str) -> Result<()> {
    if !graph.get(name)?.read_only() {
        return Ok(());
    }
    let message = format!("Block node is read-only ('{name}', which the commit needs to write)");
    Err(Error::new(Kind::ReadOnly, message))
}

/// Refuses if somebody but the chain sees what the images from `first` to `base` show, which changes.
fn check_unseen(graph: &Graph, chain: &[String], first: usize, base: usize) -> Result<()> {
    for name in &chain[first..=base] {
        let user = graph.users(name)?.into_iter().next();
        let parents = graph.parents(name);
        let strangers = parents.into_iter().filter(|parent| {
            // A filter between two images of the chain is part of it.
            let below = chain::below_filters(graph, parent);
            !chain.iter().any(|there| {
                there == parent
                    || below.as_ref().is_ok_and(|below| below == there)
                    || chain::below_filters(graph, there).is_ok_and(|image| image == *parent)
            })
        });
        let stranger = strangers.map(|parent| format!("node '{parent}'")).next();
        if let Some(by) = user.or(stranger) {
            let message = format!("Node '{name}' is in use by {by}, who would see the commit");
            return Err(Error::new(Kind::Busy, message));
        }
    }
    Ok(())
}

fn commit_active(
    jobs: &Jobs,
    graph: &Graph,
    chain: &[String],
    config: CommitConfig,
) -> Result<Start> {
    let (layers, base) = chain.split_at(chain.len() - 1);
    let what = What {
        kind: JobType::Commit,
        scope: Scope::Layers(layers.to_vec()),
        nodes: chain.to_vec(),
        target: TO_BASE,
        hidden: true,
    };
    let mirror = MirrorConfig {
        on_source_error: config.on_error,
        on_target_error: config.on_error,
        ..MirrorConfig::new(config.job, &chain[0], &base[0])
    };
    mirror::start(jobs, graph, mirror, what)
}

/// `chain` begins with the image above the top.
fn commit_below(
    jobs: &Jobs,
    graph: &Graph,
    chain: &[String],
    config: CommitConfig,
) -> Result<Start> {
    let admission = jobs.admit(JobType::Commit, config.job.clone(), chain.to_vec())?;
    let job = Arc::clone(&admission.job);
    let (above, base) = chain.split_at(chain.len() - 1);
    // What is read must stay what it is.
    let reads = Rights {
        perm: Permissions::CONSISTENT_READ,
        shared: Permissions::CONSISTENT_READ,
    };
    let readers = chain::readers(graph, chain)?;
    let hidden = |name, rights| {
        let seat = Seat::take(graph, &job, name, rights, None)?;
        seat.show_only_to(&readers)?;
        Ok(seat)
    };
    let layers = above[1..].iter().map(|name| hidden(name, reads));
    let driver = Commit {
        graph: graph.clone(),
        overlay: Seat::take(graph, &job, &above[0], OF_OVERLAY, None)?,
        layers: layers.collect::<Result<Vec<_>>>()?,
        base: hidden(&base[0], TO_BASE)?,
        backing_file: config.backing_file,
        on_error: config.on_error,
    };
    Ok(Start {
        graph: graph.clone(),
        admission,
        driver: Box::new(driver),
        nodes: Vec::new(),
        changes: Vec::new(),
        undo: Undo::new(graph, Vec::new()),
    })
}

struct Commit {
    graph: Graph,
    /// At the image above the top, whose header is changed at last.
    overlay: Seat,
    /// From the top down to the one above the base.
    layers: Vec<Seat>,
    base: Seat,
    backing_file: Option<String>,
    on_error: OnError,
}

impl Commit {
    async fn run_now(&self, job: &Arc<Job>) -> Result<()> {
        let size = self.layers.first().map_or(0, |top| top.node().size());
        job.progress(|_, total| *total = size);
        {
            let Some(_pass) = job.pass(0).await else {
                return Ok(());
            };
            let base = self.base.node();
            if base.size() < size {
                base.resize(size, Resize::AtLeast, false).await?;
            }
        }
        let (cursor, stop) = (Cell::new(0), Cell::new(false));
        let workers = (0..WORKERS).map(|_| -> LocalFuture<'_, Result<()>> {
            Box::pin(self.work(job, size, &cursor, &stop))
        });
        crew(workers.collect()).await?;
        self.hide_tail(job, size).await
    }

    /// Past the end of the top the image above shows zeroes, however long it is or becomes, and the base may have something
    /// else there, which nobody above ever saw.
    async fn hide_tail(&self, job: &Arc<Job>, size: u64) -> Result<()> {
        let Some(_pass) = job.pass(0).await else {
            return Ok(());
        };
        let base = self.base.node();
        let end = base.size();
        match end > size {
            true => base.write_zeroes(size, end - size, Zeroes::MayUnmap).await,
            false => Ok(()),
        }
    }

    async fn work(
        &self,
        job: &Arc<Job>,
        size: u64,
        cursor: &Cell<u64>,
        stop: &Cell<bool>,
    ) -> Result<()> {
        let mut bounce = Bounce::default();
        while !stop.get() && cursor.get() < size {
            let at = cursor.get();
            let len = job.piece(PIECE).min(size - at);
            cursor.set(at + len);
            loop {
                let Some(_pass) = job.pass(len).await else {
                    return Ok(());
                };
                let Err(failure) = self.copy(at..at + len, &mut bounce).await else {
                    break;
                };
                let action = job.on_error(self.on_error, failure.operation, &failure.error);
                if action == ErrorAction::Report {
                    stop.set(true);
                    return Err(failure.error);
                }
                job.breathe().await;
            }
            job.progress(|done, _| *done += len);
        }
        Ok(())
    }

    async fn copy(&self, range: Range<u64>, bounce: &mut Bounce) -> Copied {
        let layers: Vec<_> = self.layers.iter().map(Seat::node).collect();
        let Some(top) = layers.first() else {
            return Ok(());
        };
        let base = self.base.node();
        let mut at = range.start;
        while at < range.end {
            let held = held_above(&layers, at, range.end - at).await;
            let held = held.map_err(Failure::read)?;
            let end = at + held.len;
            if held.allocated {
                copy(&**top, &*base, at..end, bounce, Holds::Anything).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// The base has everything, for good, before the image above says that it stands on it.
    async fn settle(&self, job: &Job) -> Result<()> {
        let name = self.base.name();
        {
            let _pass = job.settling_pass().await?;
            self.base.node().flush().await?;
            let given = self.backing_file.as_deref();
            let named = backing_name(&self.graph, Some(name), given)?;
            self.overlay.node().change_backing(named).await?;
        }
        self.layers.iter().for_each(Seat::leave);
        self.base.leave();
        stand_on(&self.graph, self.overlay.name(), Some(name)).await
    }
}

impl Driver for Commit {
    fn run<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.run_now(job))
    }

    fn prepare<'a>(&'a self, job: &'a Arc<Job>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.settle(job))
    }

    fn finish<'a>(&'a self, _job: &'a Arc<Job>, _succeeded: bool) -> LocalFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }
}
