//! `block-stream`: an overlay gets all that it shows of the images below it, down to a base, and then stands on that one, or
//! on none. The image names another file below it only when it needs the old one no more.

use std::sync::Arc;

use diskfuse_block::graph::{Change, ChildRole};
use diskfuse_block::{BackingName, Error, Graph, Kind, LocalFuture, Node, Permissions, Result};
use parking_lot::Mutex;

use crate::chain::{self, held_above};
use crate::copy::PIECE;
use crate::drive::Driver;
use crate::event::{ErrorAction, Operation};
use crate::job::{Job, JobConfig};
use crate::policy::OnError;
use crate::registry::{Jobs, Start, Undo};
use crate::seat::{Rights, Seat};
use crate::status::JobType;

/// Bytes that are looked at in one go.
const LOOK: u64 = 64 << 20;

/// Where a stream ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamBase {
    /// The image stands alone afterwards.
    None,
    /// It stands on this node (`base-node`, or `base` by its file name).
    Node(String),
    /// This is the last node whose data are copied (`bottom`).
    Bottom(String),
}

/// What `block-stream` is told.
#[derive(Clone, Debug)]
pub struct StreamConfig {
    /// What every job is told.
    pub job: JobConfig,
    /// The overlay (`device`).
    pub node: String,
    /// Where to end.
    pub base: StreamBase,
    /// What the image is to say of the file below it; that of the base if nothing is said.
    pub backing_file: Option<String>,
    /// About errors.
    pub on_error: OnError,
}

impl StreamConfig {
    /// Everything that the overlay shows.
    pub fn new(job: JobConfig, node: &str) -> Self {
        Self {
            job,
            node: node.to_owned(),
            base: StreamBase::None,
            backing_file: None,
            on_error: OnError::default(),
        }
    }
}

/// Gets a stream ready to begin.
///
/// # Errors
/// In the words of `block-stream`: if the id or a node is in use, the base is not below the node, or it cannot be written.
pub fn stream(jobs: &Jobs, graph: &Graph, config: StreamConfig) -> Result<Start> {
    let top = &chain::below_filters(graph, &config.node)?;
    let chain = chain::chain(graph, top)?;
    let base = base_of(graph, top, &chain, &config.base)?;
    let end = base.as_ref().map_or(chain.len(), |(at, _)| *at);
    let base = base.map(|(_, name)| name);
    let (within, rest) = chain.split_at(end);
    let nodes = within.iter().chain(rest.first()).cloned().collect();
    let admission = jobs.admit(JobType::Stream, config.job.clone(), nodes)?;
    let job = Arc::clone(&admission.job);
    let node = graph.get(top)?;
    if node.read_only() {
        let message = format!("Block node is read-only ('{top}', which is streamed to)");
        return Err(Error::new(Kind::ReadOnly, message));
    }
    // What it grew by would show zeroes only for as long as it stands on images that are shorter than the base.
    let changes_nothing = Rights {
        perm: Permissions::CONSISTENT_READ | Permissions::WRITE_UNCHANGED,
        shared: !Permissions::RESIZE,
    };
    let seat = Seat::take(graph, &job, top, changes_nothing, None)?;
    // What is read must stay what it is: a commit into it has to wait.
    let reads = Rights {
        perm: Permissions::CONSISTENT_READ,
        shared: Permissions::CONSISTENT_READ,
    };
    let below = chain.iter().skip(1).take(end.max(1) - 1).chain(&base);
    let below = below.map(|name| Seat::take(graph, &job, name, reads, None));
    let below = below.collect::<Result<Vec<_>>>()?;
    let driver = Stream {
        graph: graph.clone(),
        seat,
        below,
        layers: chain.get(1..end).unwrap_or_default().to_vec(),
        base,
        backing_file: config.backing_file,
        on_error: config.on_error,
        error: Mutex::default(),
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

/// The base's place in the chain and its name.
fn base_of(
    graph: &Graph,
    top: &str,
    chain: &[String],
    wanted: &StreamBase,
) -> Result<Option<(usize, String)>> {
    let place = |name: &str, from: usize| {
        graph.get(name)?;
        let at = chain.iter().position(|there| there == name);
        at.filter(|at| *at >= from).ok_or_else(|| {
            let message = format!("Node '{name}' is not a backing image of '{top}'");
            Error::new(Kind::Invalid, message)
        })
    };
    Ok(match wanted {
        StreamBase::None => None,
        StreamBase::Node(name) => Some((place(name, 1)?, name.clone())),
        StreamBase::Bottom(name) => {
            // The image itself holds what it holds: nothing is copied then.
            let next = place(name, 0)? + 1;
            chain.get(next).map(|name| (next, name.clone()))
        }
    })
}

struct Stream {
    graph: Graph,
    seat: Seat,
    below: Vec<Seat>,
    /// What is between the overlay and the base.
    layers: Vec<String>,
    base: Option<String>,
    backing_file: Option<String>,
    on_error: OnError,
    /// An error that was ignored: all that can be had is copied, and the job fails all the same.
    error: Mutex<Option<Error>>,
}

impl Stream {
    /// How far from `at` on, `len` bytes at most, there is something to copy, or is not.
    async fn look(&self, top: &dyn Node, at: u64, len: u64) -> Result<(u64, bool)> {
        let own = top.allocation(at, len).await?;
        let len = own.len.clamp(1, len);
        if own.allocated {
            return Ok((len, false));
        }
        let layers = chain::nodes(&self.graph, &self.layers)?;
        let held = held_above(&layers, at, len).await?;
        let len = held.len.clamp(1, len);
        if !held.allocated || self.base.is_some() {
            return Ok((len, held.allocated));
        }
        // With nothing below, what is not there reads as zeroes.
        let status = top.block_status(at, len).await?;
        Ok((status.len.clamp(1, len), !status.zero))
    }

    /// Copies what is to be copied of the next bytes; returns how far it got.
    async fn step(&self, job: &Arc<Job>, at: u64, size: u64) -> Result<u64> {
        let (len, copies) = {
            let Some(_pass) = job.pass(0).await else {
                return Ok(at);
            };
            // Not before: who drained it may have changed the node.
            let top = self.seat.node();
            self.look(&*top, at, LOOK.min(size - at)).await?
        };
        if !copies {
            return Ok(at + len);
        }
        let mut done = 0;
        while done < len {
            let piece = (len - done).min(job.piece(PIECE));
            let Some(_pass) = job.pass(piece).await else {
                break;
            };
            // Who drained it in between may have changed the node.
            self.seat.node().populate(at + done, piece).await?;
            done += piece;
        }
        Ok(at + done)
    }

    async fn run_now(&self, job: &Arc<Job>) -> Result<()> {
        let size = self.seat.node().size();
        if self.layers.is_empty() {
            return Ok(());
        }
        job.progress(|_, total| *total = size);
        let mut at = 0;
        while at < size && !job.is_cancelled() {
            match self.step(job, at, size).await {
                Ok(next) => at = next,
                Err(error) => match job.on_error(self.on_error, Operation::Read, &error) {
                    ErrorAction::Report => return Err(error),
                    ErrorAction::Stop => continue,
                    ErrorAction::Ignore => {
                        self.error.lock().get_or_insert(error);
                        at = (at + PIECE).min(size);
                    }
                },
            }
            job.progress(|done, _| *done = at);
        }
        self.error.lock().take().map_or(Ok(()), Err)
    }

    /// The overlay's own header, then the graph.
    async fn settle(&self, job: &Job) -> Result<()> {
        if self.layers.is_empty() {
            return Ok(());
        }
        let name = self.base.as_deref();
        {
            let _pass = job.settling_pass().await?;
            let named = backing_name(&self.graph, name, self.backing_file.as_deref())?;
            self.seat.node().change_backing(named).await?;
        }
        self.below.iter().for_each(Seat::leave);
        stand_on(&self.graph, self.seat.name(), name).await
    }
}

/// What a header says of a node as its backing file: `given`, or the node's own file.
pub(crate) fn backing_name(
    graph: &Graph,
    node: Option<&str>,
    given: Option<&str>,
) -> Result<Option<BackingName>> {
    let Some(node) = node.map(|name| graph.get(name)).transpose()? else {
        return Ok(None);
    };
    let Some(name) = given.map(str::to_owned).or_else(|| node.filename()) else {
        let driver = node.driver();
        let message = format!(
            "a node of driver '{driver}' has no file that an image could name: give backing-file"
        );
        return Err(Error::new(Kind::Invalid, message));
    };
    // A bare protocol node shows a raw image.
    let format = match node.driver() {
        "file" | "host_device" => "raw",
        format => format,
    };
    let format = Some(format.to_owned());
    Ok(Some(BackingName { name, format }))
}

/// Puts a node on another backing node, or on none, while nobody uses it, and closes what is not needed any more.
pub(crate) async fn stand_on(graph: &Graph, node: &str, base: Option<&str>) -> Result<()> {
    let orphans = {
        let _drained = graph.drain(node).await?;
        graph.change(&[Change::SetChild {
            parent: node.to_owned(),
            role: ChildRole::Backing,
            child: base.map(str::to_owned),
        }])?
    };
    for orphan in orphans {
        if let Err(error) = orphan.close().await {
            tracing::warn!(%error, "a node that nothing stands on any more was not closed well");
        }
    }
    Ok(())
}

impl Driver for Stream {
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
