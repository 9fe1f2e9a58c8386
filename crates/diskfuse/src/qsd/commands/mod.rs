//! The commands of the monitor, carried out on the main thread, one after the other, whichever monitor they came from.

pub mod bitmaps;
mod create;
mod events;
mod exports;
mod jobs;
mod last_events;
mod nodes;
mod objects;
mod snapshot_sync;
pub mod thresholds;
mod transaction;

use std::sync::Arc;
use std::time::{Duration, Instant};

use diskfuse_block::Kind as ErrorKind;
use diskfuse_jobs::{JobEvent, Jobs};
use diskfuse_monitor::commands::Kind;
use diskfuse_monitor::qmp::event::BlockExportDeleted;
use diskfuse_monitor::{Command, ErrorClass, QmpError};
use diskfuse_ring::{Config, Ring};
use serde_json::{Value, json};

use super::live::writable::Opened;
use super::monitor::{Monitors, ReplyHandle, Request};
use super::nodes::{Nodes, PATIENCE};
use super::objects::Objects;
use super::query;
use crate::daemon::{Attendant, Daemon, Over};
use crate::error::{Error, Result};
use bitmaps::Bitmaps;
use jobs::Ask;
use last_events::LastEvents;
use thresholds::Thresholds;

/// How long clients may take to read the last words.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// How long a command about a node that is drained waits before it is tried again.
const AGAIN: Duration = Duration::from_millis(1);

/// How long `block-export-del` waits for the end of the export before it is answered. Without requests in flight that takes
/// milliseconds, and callers take the answer for it, as the event comes before it in QEMU.
const REMOVAL: Duration = Duration::from_millis(500);

/// What the storage daemon has beside its exports.
pub struct Commands {
    /// What makes nodes.
    pub nodes: Nodes,
    /// Objects, by their ids.
    pub objects: Objects,
    /// Whom to tell of what happens.
    pub monitors: Monitors,
    jobs: Arc<Jobs>,
    bitmaps: Bitmaps,
    thresholds: Thresholds,
    /// Opened for writing for a job.
    opened: Vec<Opened>,
    /// Commands that are tried again, in the order in which they came.
    postponed: Vec<Postponed>,
    /// Removals of exports that are not gone yet.
    removals: Vec<Removal>,
    /// What is said of jobs.
    last_events: Arc<LastEvents>,
    /// Who wants to know when all is over.
    leaving: Vec<ReplyHandle>,
}

/// A command about a node that a job drains, which nobody can become a user of meanwhile. Jobs do so for moments.
struct Postponed {
    request: Request,
    /// When it is tried again,
    next: Instant,
    /// and when it is refused.
    until: Instant,
}

/// A `block-export-del` that is answered when the export is gone, or when that takes long.
struct Removal {
    id: String,
    reply: ReplyHandle,
    until: Instant,
}

impl Attendant for Commands {
    fn carry_out(&mut self, daemon: &mut Daemon, request: Request) {
        if request.is_quit() {
            // Answered when everything has ended.
            self.leaving.push(request.reply);
            daemon.end(self);
            return;
        }
        let now = Instant::now();
        let first = Postponed {
            request,
            next: now,
            until: now + PATIENCE,
        };
        self.attempt(daemon, first);
    }

    fn due(&self) -> Option<Instant> {
        let removals = self.removals.iter().map(|removal| removal.until);
        let postponed = self.postponed.iter().map(|postponed| postponed.next);
        postponed.chain(removals).min()
    }

    fn again(&mut self, daemon: &mut Daemon) {
        for postponed in std::mem::take(&mut self.postponed) {
            self.attempt(daemon, postponed);
        }
        let now = Instant::now();
        self.answer_removals(|removal| removal.until <= now);
    }

    fn export_gone(&mut self, id: &str) {
        self.monitors.emit(BlockExportDeleted { id: id.to_owned() });
        self.answer_removals(|removal| removal.id == id);
    }

    fn exports_gone(&mut self) {
        self.answer_removals(|_| true);
        self.last_events.exports_are_gone();
    }

    fn look_after(&mut self) {
        jobs::close_opened(self);
    }

    fn hang_up(&mut self) {
        self.monitors.hang_up();
    }

    fn ending(&mut self, over: Over) {
        // Nothing begins any more; dropping them tells their clients so.
        self.postponed.clear();
        self.last_events.begin(&self.jobs);
        let jobs = Arc::clone(&self.jobs);
        let quit = move || {
            let quitted = Ring::new(&Config::default()).map(|ring| ring.block_on(jobs.quit()));
            if let Err(error) = quitted {
                tracing::error!("jobs could not be ended in order: {error}");
            }
            drop(over);
        };
        let thread = std::thread::Builder::new().name("jobs end".to_owned());
        if let Err(error) = thread.spawn(quit) {
            tracing::error!("jobs could not be ended in order: {error}");
        }
    }
}

impl Commands {
    /// Nothing but what the command line will add.
    ///
    /// `look_after` has [`Attendant::look_after`] called on the main thread; it is called from any, and must not wait.
    pub fn new(
        nodes: Nodes,
        objects: Objects,
        monitors: Monitors,
        look_after: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let last_events = Arc::new(LastEvents::new(monitors.clone()));
        let to = Arc::clone(&last_events);
        let listener = move |event: JobEvent| {
            // First, so that it is done before a command of those who hear of the end.
            if events::is_end(&event) {
                look_after();
            }
            to.pass(event);
        };
        Self {
            nodes,
            objects,
            jobs: Arc::new(Jobs::new(listener)),
            monitors,
            bitmaps: Bitmaps::default(),
            thresholds: Thresholds::default(),
            opened: Vec::new(),
            postponed: Vec::new(),
            removals: Vec::new(),
            last_events,
            leaving: Vec::new(),
        }
    }

    /// Everything is over: those who wait for that are told how it went.
    pub fn say_goodbye(&mut self, outcome: &Result<()>) {
        self.last_events.let_all_go();
        for reply in self.leaving.drain(..) {
            reply.send(match outcome {
                Ok(()) => Ok(json!({})),
                Err(error) => Err(in_qmp(error)),
            });
        }
    }

    fn attempt(&mut self, daemon: &mut Daemon, mut postponed: Postponed) {
        let command = &postponed.request.command;
        let outcome = self.run(daemon, command);
        if let Err(error) = &outcome {
            // One that fails leaves everything as it was.
            let now = Instant::now();
            if error.is_drained() && now < postponed.until {
                postponed.next = now + AGAIN;
                self.postponed.push(postponed);
                return;
            }
            tracing::debug!(command = command.name(), %error, "refused");
        }
        let Request { command, reply, .. } = postponed.request;
        if let (Command::BlockExportDel(what), Ok(_)) = (command, &outcome) {
            self.removals.push(Removal {
                id: what.id,
                reply,
                until: Instant::now() + REMOVAL,
            });
            return;
        }
        reply.send(outcome.map_err(|error| in_qmp(&error)));
    }

    fn answer_removals(&mut self, which: impl Fn(&Removal) -> bool) {
        let answered: Vec<_> = self
            .removals
            .extract_if(.., |removal| which(removal))
            .collect();
        for removal in answered {
            removal.reply.send(Ok(json!({})));
        }
    }

    fn run(&mut self, daemon: &mut Daemon, command: &Command) -> Result<Value> {
        match command {
            Command::ObjectAdd(what) => self.objects.add((**what).clone()).map(nothing),
            Command::ObjectDel(what) => self.objects.remove(&what.id).map(nothing),
            Command::QomList(what) => objects::list(&self.objects, what).map(list),
            Command::QomGet(what) => objects::get(&self.objects, what),
            Command::QomSet(what) => objects::set(&self.objects, what).map(nothing),
            Command::QueryIothreads => Ok(list(objects::iothreads(&self.objects))),
            Command::BlockExportAdd(what) => exports::add(self, daemon, what).map(nothing),
            Command::BlockExportDel(what) => exports::delete(daemon, what).map(nothing),
            Command::QueryBlockExports => Ok(list(exports::query(daemon))),
            Command::Transaction(what) => transaction::run(self, daemon, what).map(nothing),
            _ => self.of_nodes(daemon, command),
        }
    }

    fn of_nodes(&mut self, daemon: &mut Daemon, command: &Command) -> Result<Value> {
        match command {
            Command::BlockdevAdd(what) => nodes::add(self, what).map(nothing),
            Command::BlockdevDel(what) => nodes::delete(self, what).map(nothing),
            Command::BlockdevReopen(what) => nodes::reopen(self, daemon, what).map(nothing),
            Command::BlockdevCreate(what) => create::create(self, what).map(nothing),
            Command::BlockResize(what) => nodes::resize(self, daemon, what).map(nothing),
            Command::ChangeBackingFile(what) => nodes::change_backing_file(self, what).map(nothing),
            Command::BlockSetIoThrottle(what) => objects::throttle(self, what).map(nothing),
            Command::QueryNamedBlockNodes(what) => {
                let flat = what.flat.unwrap_or(false);
                query::named_block_nodes(&self.nodes, &self.bitmaps, &self.thresholds, flat)
                    .map(list)
            }
            Command::BlockSetWriteThreshold(what) => {
                self.thresholds.set(&self.nodes, what).map(nothing)
            }
            // Of devices, which there are none of.
            Command::QueryBlock => Ok(json!([])),
            Command::QueryBlockstats(what) => match what.query_nodes {
                Some(true) => query::blockstats(&self.nodes, &daemon.export_stats()).map(list),
                // Of devices, which there are none of.
                _ => Ok(json!([])),
            },
            Command::BlockdevSnapshot(what) => {
                nodes::snapshot(self, daemon, &what.node, &what.overlay).map(nothing)
            }
            Command::BlockdevSnapshotSync(what) => {
                snapshot_sync::run(self, daemon, what).map(nothing)
            }
            Command::BlockdevSnapshotInternalSync(what) => {
                nodes::snapshot_inside(self, &what.device, &what.name).map(nothing)
            }
            Command::BlockdevSnapshotDeleteInternalSync(what) => {
                nodes::delete_snapshot_inside(self, what)
            }
            _ => self.of_bitmaps(command),
        }
    }

    fn of_bitmaps(&mut self, command: &Command) -> Result<Value> {
        let Self { nodes, bitmaps, .. } = self;
        match command {
            Command::BlockDirtyBitmapAdd(what) => bitmaps.add(nodes, what).map(nothing),
            Command::BlockDirtyBitmapRemove(which) => {
                bitmaps.remove_for_good(nodes, which).map(nothing)
            }
            Command::BlockDirtyBitmapClear(which) => {
                bitmaps.clear(nodes, which).map(|_| nothing(()))
            }
            Command::BlockDirtyBitmapEnable(which) => {
                bitmaps.record(nodes, which, true).map(|_| nothing(()))
            }
            Command::BlockDirtyBitmapDisable(which) => {
                bitmaps.record(nodes, which, false).map(|_| nothing(()))
            }
            Command::BlockDirtyBitmapMerge(what) => bitmaps.merge(nodes, what).map(|_| nothing(())),
            _ => self.of_jobs(command),
        }
    }

    fn of_jobs(&mut self, command: &Command) -> Result<Value> {
        let any = |id: &str, ask: Ask| ask.of(&*self.jobs.find(id)?).map(nothing);
        let block = |id: &str, ask: Ask| ask.of(&*self.jobs.find_block_job(id)?).map(nothing);
        match command {
            Command::BlockStream(what) => jobs::stream(self, what).map(nothing),
            Command::BlockCommit(what) => jobs::commit(self, what).map(nothing),
            Command::BlockdevBackup(what) => jobs::start_backup(self, what).map(nothing),
            Command::BlockdevMirror(what) => jobs::mirror(self, what).map(nothing),
            Command::JobPause(what) => any(&what.id, Ask::Pause),
            Command::JobResume(what) => any(&what.id, Ask::Resume),
            Command::JobCancel(what) => any(&what.id, Ask::Cancel),
            Command::JobComplete(what) => any(&what.id, Ask::Complete),
            Command::JobDismiss(what) => any(&what.id, Ask::Dismiss),
            Command::JobFinalize(what) => any(&what.id, Ask::Finalize),
            Command::BlockJobDismiss(what) => block(&what.id, Ask::Dismiss),
            Command::BlockJobFinalize(what) => block(&what.id, Ask::Finalize),
            Command::QueryJobs => {
                // As with QEMU the youngest comes first.
                let jobs = self.jobs.list().into_iter().rev();
                Ok(list(jobs.map(|job| events::job_info(job.info()))))
            }
            Command::QueryBlockJobs => {
                let jobs = self
                    .jobs
                    .list()
                    .into_iter()
                    .rev()
                    .filter_map(|job| job.block_info());
                Ok(list(jobs.map(events::block_job_info)))
            }
            Command::BlockJobCancel(what) => jobs::cancel(self, what).map(nothing),
            Command::BlockJobPause(what) => block(&what.device, Ask::Pause),
            Command::BlockJobResume(what) => block(&what.device, Ask::Resume),
            Command::BlockJobComplete(what) => block(&what.device, Ask::Complete),
            Command::BlockJobSetSpeed(what) => jobs::set_speed(self, what).map(nothing),
            Command::BlockJobChange(what) => jobs::change(self, what).map(nothing),
            // Conversation, which the monitors carry on by themselves.
            other => Err(Error::Refused(format!(
                "The command {} has not been found",
                other.name()
            ))),
        }
    }
}

impl Drop for Commands {
    /// Clients hear of the end, and sockets are removed.
    fn drop(&mut self) {
        self.leaving.clear();
        self.monitors.flush_and_close(LAST_WORDS);
    }
}

fn nothing((): ()) -> Value {
    json!({})
}

fn list<T: Kind>(all: impl IntoIterator<Item = T>) -> Value {
    Value::Array(all.into_iter().map(|one| one.to_value()).collect())
}

/// An error as clients have it.
fn in_qmp(error: &Error) -> QmpError {
    let text = error.to_string();
    let class = match error {
        Error::Block(error)
            if error.kind() == ErrorKind::NotFound && text.starts_with("Block job") =>
        {
            ErrorClass::DeviceNotActive
        }
        Error::Refused(_) if text.starts_with("Device '") && text.ends_with("not found") => {
            ErrorClass::DeviceNotFound
        }
        _ => ErrorClass::GenericError,
    };
    QmpError::new(class, text)
}
