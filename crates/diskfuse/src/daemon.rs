//! The running process: its exports, and what happens to them. The main thread has no event loop; it waits for one
//! thing after the other on one channel: a signal, an export that ended, a request over the control socket, a command of a
//! monitor. Exports are stopped by threads made for that, and jobs end beside them, so that one stuck disk keeps nothing else from
//! being unmounted, listed or ended; another thread closes the images at last. What it does wait for are commands of monitors:
//! for the requests of a drain with a time limit, for the metadata that a command reads or writes without one.

mod attendant;
mod entry;
mod leaving;
mod nodes;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

use diskfuse_block::Graph;
use diskfuse_fuse::{End, Export, Stats, Unmounter};
use diskfuse_ring::{IoThread, Mailbox};
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::control;
use crate::control::protocol::{Answer, Request};
use crate::control::server::{Handler, Server};
use crate::directory::Directory;
use crate::error::{Error, Result};
use crate::idle::Idle;
use crate::qsd::monitor;
use crate::sandbox::{Deed, Helper};
use crate::service::Manager;
use crate::watchdog::Watchdog;
pub use attendant::{Attendant, Nobody, Over};
use entry::Entry;
pub use entry::{NewExport, own_threads};
use nodes::close_nodes;
pub use nodes::names_from_above;

/// What the main thread waits for.
enum Event {
    /// Everything is to end.
    Signal(i32),
    /// An export ended; by itself, if nobody told it to.
    Ended(Key, End),
    /// A thread that was to stop an export has done so.
    Stopped(Key, std::result::Result<(), diskfuse_fuse::Error>),
    /// A thread that was to stop an export unless somebody uses the file has left it as it is.
    Busy(Key),
    /// Somebody asks over the control socket, and waits for the answer.
    Control(Request, Sender<Answer>),
    /// What belongs to more than the exports has ended.
    Over,
    /// What belongs to more than the exports wants to be looked after.
    LookAfter,
    /// A client of a monitor gives a command.
    Monitor(Box<monitor::Request>),
    /// A client of a monitor has had its turn, and has more to say.
    Turn(monitor::Turn),
    /// Commands that waited are due.
    Again,
}

/// An export's number in this process; never used twice.
type Key = u64;

/// When the process is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// With its last export.
    Exports,
    /// When it is told to.
    Signals,
}

/// The exports of this process. Dropping it stops those that are left.
pub struct Daemon {
    graph: Graph,
    lifetime: Lifetime,
    exports: BTreeMap<Key, Entry>,
    next: Key,
    /// Exports that are gone without anybody having been told yet, with their ids.
    gone: BTreeMap<Key, String>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    /// A signal has come, or the command to end: no way back.
    ending: bool,
    /// Something else than exports has still to end.
    lingering: bool,
    /// A signal has come, which the main thread may not have noticed yet.
    signalled: Arc<AtomicBool>,
    /// The nodes have been closed.
    closed: bool,
    /// Some export did not end as it should; the first error.
    failed: Option<Error>,
    manager: Manager,
    watchdog: Watchdog,
}

impl Daemon {
    /// From here on signals do not end the process, but wait until [`Daemon::run`] takes notice of them.
    pub fn new(lifetime: Lifetime) -> Result<Self> {
        raise_descriptor_limit();
        let (sender, events) = channel();
        let failed = "Could not set up signals";
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(Error::system(failed))?;
        let to = sender.clone();
        let signalled = Arc::new(AtomicBool::new(false));
        let noted = Arc::clone(&signalled);
        spawn("signals", move || {
            for signal in signals.forever() {
                noted.store(true, Ordering::Relaxed);
                if to.send(Event::Signal(signal)).is_err() {
                    break;
                }
            }
        })
        .map_err(Error::system(failed))?;
        Ok(Self {
            graph: Graph::new(),
            lifetime,
            exports: BTreeMap::new(),
            next: 0,
            gone: BTreeMap::new(),
            events,
            sender,
            ending: false,
            lingering: false,
            signalled,
            closed: false,
            failed: None,
            manager: Manager::from_environment(),
            watchdog: Watchdog::default(),
        })
    }

    /// Whether a signal has come that ends the process as soon as [`Daemon::run`] is called.
    pub fn signalled(&self) -> impl Fn() -> bool + use<> {
        let signalled = Arc::clone(&self.signalled);
        move || signalled.load(Ordering::Relaxed)
    }

    /// Where monitors put the commands that [`Daemon::run`] has carried out.
    pub fn command_sink(&self) -> impl Fn(monitor::Errand) + Send + Sync + use<> {
        let sender = parking_lot::Mutex::new(self.sender.clone());
        move |errand| {
            let event = match errand {
                monitor::Errand::Request(request) => Event::Monitor(request),
                monitor::Errand::Turn(turn) => Event::Turn(turn),
            };
            let sender = sender.lock().clone();
            // Fails when the main thread is past caring; the command is answered by being dropped.
            let _ = sender.send(event);
        }
    }

    /// Has [`Attendant::look_after`] called by [`Daemon::run`], after what has come before.
    pub fn errand(&self) -> impl Fn() + Send + Sync + use<> {
        let sender = parking_lot::Mutex::new(self.sender.clone());
        move || {
            // Fails when the main thread is past caring.
            let _ = sender.lock().send(Event::LookAfter);
        }
    }

    /// Begins to end everything, as a signal does.
    pub fn end(&mut self, attendant: &mut dyn Attendant) {
        if !std::mem::replace(&mut self.ending, true) {
            self.lingering = true;
            attendant.ending(Over(self.sender.clone()));
            self.tell_of_gone(attendant);
        }
        self.stop_all();
    }

    /// Begins to stop the export of this id. What is left to do is done when [`Attendant::export_gone`] is called.
    /// `None`: there is none. `Some(false)`: it is being stopped already.
    pub fn stop_export(&mut self, id: &str) -> Option<bool> {
        let mut all = self.exports.iter();
        let (&key, entry) = all.find(|(_, entry)| entry.export.id() == id)?;
        let begins = !entry.stopping;
        self.stop(key);
        Some(begins)
    }

    /// The exports, and whether each is being stopped.
    pub fn exports(&self) -> impl Iterator<Item = (&Export, bool)> {
        let all = self.exports.values();
        all.map(|entry| (&*entry.export, entry.stopping))
    }

    /// The node of each export, and what the export has done.
    pub fn export_stats(&self) -> Vec<(String, Stats)> {
        let all = self.exports();
        all.map(|(export, _)| (export.node_name(), export.stats()))
            .collect()
    }

    /// Nodes may have other sizes, and not by an export's doing.
    pub fn sizes_changed(&self) {
        for (export, _) in self.exports() {
            export.size_changed();
        }
    }

    /// The nodes.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// Whether an export of this id runs.
    pub fn has_export(&self, id: &str) -> bool {
        self.exports.values().any(|entry| entry.export.id() == id)
    }

    /// Starts an export; the file is usable when this returns. On an error nothing of it is left.
    pub fn start_export(&mut self, new: NewExport) -> Result<PathBuf> {
        // Before something is mounted, perhaps over the image itself.
        let disk = self.graph.get(&new.node)?;
        let image = new.image.or_else(|| disk.filename().map(PathBuf::from));
        let image = image.map(|path| path.canonicalize().unwrap_or(path));
        let format = match disk.driver() {
            "file" | "host_device" => "raw",
            driver => driver,
        };
        let threads = new.iothreads.iter().map(|thread| &**thread);
        let threads = threads.chain(&new.own_threads).map(IoThread::mailbox);
        let mailboxes: Vec<Mailbox> = threads.cloned().collect();
        let key = self.next;
        self.next += 1;
        let sender = self.sender.clone();
        let on_end = Box::new(move |end| {
            // Fails when the main thread is past caring.
            let _ = sender.send(Event::Ended(key, end));
        });
        let (options, graph) = (new.options, &self.graph);
        let export = match new.directory {
            None => Export::start(options, graph, &new.node, &mailboxes, on_end)?,
            Some(Directory { root, refresh }) => {
                Export::start_tree(options, graph, root, Some(refresh), &mailboxes, on_end)?
            }
        };
        let idle = new
            .idle_timeout
            .map(|limit| Idle::new(limit, Instant::now()));
        let mountpoint = export.mountpoint().to_owned();
        self.exports.insert(
            key,
            Entry {
                export,
                iothreads: new.iothreads,
                own_threads: new.own_threads,
                made: new.made,
                image,
                format: format.to_owned(),
                stopping: false,
                trying: false,
                idle,
                mailboxes,
                waiting: Vec::new(),
            },
        );
        Ok(mountpoint)
    }

    /// Begins to listen for `list` and `umount`. The requests are answered while [`Daemon::run`] runs. `None`, with a warning, if
    /// that cannot be: disks are shown all the same, as others may be able to bring that about (in `/tmp`).
    pub fn listen(&self) -> Option<Server> {
        let ask = self.asker();
        let handler: Arc<Handler> = Arc::new(move |request| ask(request).recv().ok());
        let server = Server::start(&control::folder(), handler);
        let warn = |error: &Error| {
            tracing::warn!(
                "{error}; `diskfuse list` and `diskfuse umount` will not find this daemon"
            );
        };
        server.inspect_err(warn).ok()
    }

    /// How other threads ask what a client of the control socket asks. The answer comes from [`Daemon::run`]; a channel without a
    /// sender means that the daemon is ending.
    pub fn asker(&self) -> impl Fn(Request) -> Receiver<Answer> + Send + Sync + use<> {
        let sender = parking_lot::Mutex::new(self.sender.clone());
        move |request| {
            let (reply, answer) = channel();
            let sender = sender.lock().clone();
            // Fails when the main thread is past caring, and then so does waiting for the answer.
            let _ = sender.send(Event::Control(request, reply));
            answer
        }
    }

    /// Has `helper` do at the end what is to be done about the exports that there are.
    pub fn delegate(&mut self, helper: &Helper) -> Result<()> {
        for entry in self.exports.values_mut() {
            entry.export.delegate_unmount(|path, id| {
                let path = path.into();
                let order = helper.tell(&Deed::Unmount { path, id })?;
                Ok::<_, Error>(Box::new(order) as Box<dyn Unmounter>)
            })?;
            if let Some(made) = &mut entry.made {
                helper.take_over(made.removal())?;
            }
        }
        Ok(())
    }

    /// Serves until the lifetime is over; then everything is drained, flushed, unmounted and closed. The error is the
    /// first thing that went wrong on the way out.
    pub fn run(&mut self, attendant: &mut dyn Attendant) -> Result<()> {
        // One that comes here only to be ended, because it could not be set up, was never ready.
        if !self.ending && !self.is_over() {
            self.manager.ready(&self.summary());
        }
        let mut beat = Instant::now();
        while !self.is_over() {
            match self.next_event(&mut beat, attendant.due()) {
                Some(event) => self.handle(event, attendant),
                // The daemon holds a sender itself.
                None => break,
            }
        }
        self.manager.stopping();
        // Whoever still asks learns that there is nobody any more.
        attendant.hang_up();
        while self.events.try_recv().is_ok() {}
        if !std::mem::replace(&mut self.closed, true)
            && let Err(error) = self.close()
        {
            self.fail(error);
        }
        // Nobody is to wait for an answer that nobody gives any more.
        self.events = channel().1;
        self.failed.take().map_or(Ok(()), Err)
    }

    /// Closes the nodes, which takes as long as their disks take. Whoever asks something meanwhile learns that this is the end.
    fn close(&self) -> Result<()> {
        let (graph, over) = (&self.graph, Over(self.sender.clone()));
        std::thread::scope(|scope| {
            let work = move || {
                let _over = over;
                close_nodes(graph)
            };
            let thread = std::thread::Builder::new().name("close".to_owned());
            match thread.spawn_scoped(scope, work) {
                Ok(closing) => {
                    while !matches!(self.events.recv(), Ok(Event::Over) | Err(_)) {}
                    let lost = |_| Err(Error::refused("Could not close all images"));
                    closing.join().unwrap_or_else(lost)
                }
                Err(error) => {
                    tracing::debug!(%error, "no thread to close the images in; doing it here");
                    close_nodes(graph)
                }
            }
        })
    }

    /// Waits for the next event; does meanwhile what is due from time to time, next at `beat`. Commands that wait
    /// are `due` at this moment.
    fn next_event(&mut self, beat: &mut Instant, due: Option<Instant>) -> Option<Event> {
        loop {
            let idle = self
                .exports
                .values()
                .filter_map(|entry| entry.idle.as_ref());
            let ticks = idle.map(Idle::tick).chain(self.manager.tick());
            let now = Instant::now();
            let beats = match ticks.min() {
                Some(tick) => {
                    if *beat <= now {
                        *beat = now + tick;
                        self.beat(now);
                    }
                    Some(beat.saturating_duration_since(now))
                }
                None => None,
            };
            let due = due.map(|due| due.saturating_duration_since(now));
            if due.is_some_and(|due| due.is_zero()) {
                return Some(Event::Again);
            }
            let Some(limit) = beats.into_iter().chain(due).min() else {
                return self.events.recv().ok();
            };
            match self.events.recv_timeout(limit) {
                Ok(event) => return Some(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn beat(&mut self, now: Instant) {
        if self.manager.tick().is_some() {
            let threads = self.exports.values().flat_map(|entry| &entry.mailboxes);
            if self.watchdog.beat(threads) {
                self.manager.alive();
            }
        }
        let over = |entry: &mut Entry| {
            let stats = entry.export.stats();
            let requests = stats.reads + stats.writes + stats.flushes;
            let idle = entry.idle.as_mut();
            idle.is_some_and(|idle| idle.is_over(requests, now)) && stats.in_flight == 0
        };
        let all = self.exports.iter_mut();
        let over: Vec<Key> = all
            .filter_map(|(&key, entry)| over(entry).then_some(key))
            .collect();
        for key in over {
            self.stop_unless_busy(key);
        }
    }

    /// What is shown, in a line for people.
    fn summary(&self) -> String {
        let mut exports = self.exports.values();
        match (exports.next(), exports.next()) {
            (Some(only), None) => {
                let image = only.image.as_deref().unwrap_or("a disk".as_ref());
                let mountpoint = only.export.mountpoint();
                format!("Showing {} as {}", image.display(), mountpoint.display())
            }
            _ => format!("Showing {} files", self.exports.len()),
        }
    }

    /// Notes what went wrong; the first of it ends up as the command's error.
    fn fail(&mut self, error: Error) {
        match self.failed {
            None => self.failed = Some(error),
            Some(_) => tracing::error!("{error}"),
        }
    }

    fn is_over(&self) -> bool {
        self.exports.is_empty()
            && !self.lingering
            && (self.ending || self.lifetime == Lifetime::Exports)
    }

    fn handle(&mut self, event: Event, attendant: &mut dyn Attendant) {
        match event {
            Event::Signal(signal) => {
                if !self.ending {
                    tracing::info!(signal, "ending");
                    self.manager.stopping();
                }
                self.end(attendant);
            }
            Event::Ended(key, end) => self.ended(key, end),
            Event::Busy(key) => self.busy(key),
            Event::Stopped(key, outcome) => {
                if let Some(id) = self.remove(key, outcome) {
                    self.gone.insert(key, id);
                }
                self.tell_of_gone(attendant);
            }
            Event::Over => self.lingering = false,
            // The end closes everything anyway.
            Event::LookAfter if self.ending => {}
            Event::LookAfter => attendant.look_after(),
            // Nothing begins any more; dropping it tells its client so.
            Event::Monitor(request) if self.ending && !request.is_quit() => drop(request),
            Event::Monitor(request) => attendant.carry_out(self, *request),
            Event::Turn(turn) => turn.take(),
            Event::Again => attendant.again(self),
            Event::Control(Request::List, reply) => {
                let exports = self.exports.values();
                let exports = exports.map(|entry| entry.status(&self.graph)).collect();
                let _ = reply.send(Answer::Exports { exports });
            }
            Event::Control(Request::Unmount { mountpoint, how }, reply) => {
                self.unmount(&mountpoint, how, reply);
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end(&mut Nobody);
        if let Err(error) = self.run(&mut Nobody) {
            tracing::error!("{error}");
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.stack_size(256 << 10).spawn(work).map(drop)
}

/// Every queue, image and event loop needs descriptors; the soft limit is there for programs that use select(2).
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
}
