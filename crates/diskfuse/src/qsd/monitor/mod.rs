//! The monitor's threads and sockets: from bytes of clients to commands, and back. Carries out only what concerns the
//! conversation itself; everything else is handed over, one command of each client at a time.
//!
//! Each monitor has a thread that waits for its client and reads what it says. Nobody who sends an answer or an event ever
//! waits for a client.

mod chardev;
mod fds;
mod output;
mod session;
pub mod socket;
mod stream;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime};

use diskfuse_monitor::commands::ChardevInfo;
use diskfuse_monitor::qmp::to_text;
use diskfuse_monitor::{ChardevBackend, ChardevOptions, Command, Event, MonitorOptions};
use parking_lot::{Condvar, Mutex};

pub use fds::FdSets;
pub use session::{ReplyHandle, Turn};

use crate::error::{Error, Result};
use chardev::Chardev;
use session::{NamedFds, Session};
use socket::MadePath;
use stream::Stream;

/// The stack of a monitor's thread. Messages are read with a stack of their own; only writing them, and dropping them,
/// goes as deep as they are nested.
const STACK: usize = 1 << 20;

/// Which monitor a command came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MonitorId(u32);

/// A command that somebody has to carry out.
pub struct Request {
    /// What is to be done.
    pub command: Command,
    /// Who waits for the answer.
    pub reply: ReplyHandle,
    /// Where it came from.
    #[expect(dead_code, reason = "for commands that concern one monitor")]
    pub monitor: MonitorId,
}

impl Request {
    /// Whether it is the command to end.
    pub fn is_quit(&self) -> bool {
        self.command == Command::Quit
    }
}

/// What a monitor wants of whoever carries commands out.
pub enum Errand {
    /// A command.
    Request(Box<Request>),
    /// That a client's conversation goes on, behind what others want.
    Turn(Turn),
}

/// Where errands go. Called from the monitors' threads and from whoever answers a command; must not block.
type Sink = dyn Fn(Errand) + Send + Sync;

/// All monitors of the process. Clones are the same ones.
#[derive(Clone)]
pub struct Monitors {
    inner: Arc<Inner>,
}

struct Inner {
    sink: Box<Sink>,
    sessions: Mutex<Vec<(Arc<Session>, Arc<Stream>)>>,
    chardevs: Mutex<BTreeMap<String, Entry>>,
    fdsets: FdSets,
    next: AtomicU32,
    /// Clients are answered.
    begun: Mutex<bool>,
    /// That, or `closing`, has changed.
    changed: Condvar,
    /// No client is served any more.
    closing: AtomicBool,
}

/// A chardev, as long as no monitor has it, and what is known of it afterwards.
struct Entry {
    chardev: Option<Chardev>,
    filename: String,
    #[expect(dead_code, reason = "removed with the chardev")]
    made: Option<MadePath>,
}

impl Monitors {
    /// None yet. `sink` gets each command that is not about a conversation itself; it must not block.
    pub fn new(sink: impl Fn(Errand) + Send + Sync + 'static) -> Self {
        Self {
            inner: Arc::new(Inner {
                sink: Box::new(sink),
                sessions: Mutex::default(),
                chardevs: Mutex::default(),
                fdsets: FdSets::default(),
                next: AtomicU32::new(0),
                begun: Mutex::new(false),
                changed: Condvar::new(),
                closing: AtomicBool::new(false),
            }),
        }
    }

    /// Opens a chardev. With `wait=on` this waits for the first client, or until `interrupted` says that nobody wants it
    /// any more.
    pub fn add_chardev(
        &self,
        options: &ChardevOptions,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<()> {
        self.inner.check_new(options)?;
        // Without the lock: it may wait for a client.
        let (chardev, made) = Chardev::open(options, interrupted)?;
        let entry = Entry {
            filename: chardev.filename().to_owned(),
            made,
            chardev: Some(chardev),
        };
        let mut chardevs = self.inner.chardevs.lock();
        chardevs.insert(options.id.clone(), entry);
        Ok(())
    }

    /// Whether there is a chardev, and so somebody who may name files and sockets.
    pub fn are_there(&self) -> bool {
        !self.inner.chardevs.lock().is_empty()
    }

    /// Serves the clients of a chardev: they are greeted from now on, and answered when [`Monitors::begin`] says so.
    pub fn add_monitor(&self, options: &MonitorOptions) -> Result<()> {
        let name = &options.chardev;
        let chardev = {
            let mut chardevs = self.inner.chardevs.lock();
            let entry = chardevs
                .get_mut(name)
                .ok_or_else(|| Error::refused(format!("chardev \"{name}\" not found")))?;
            entry
                .chardev
                .take()
                .ok_or_else(|| Error::refused(format!("chardev '{name}' is already in use")))?
        };
        let monitor = MonitorId(self.inner.next.fetch_add(1, Ordering::Relaxed));
        let inner = Arc::clone(&self.inner);
        let pretty = options.pretty;
        std::thread::Builder::new()
            .name(format!("monitor{}", monitor.0))
            .stack_size(STACK)
            .spawn(move || inner.serve(chardev, monitor, pretty))
            .map_err(Error::system("Could not start a monitor"))?;
        Ok(())
    }

    /// Everything that was asked for at the start is there: clients get answers. One that takes the first answer for "all is up"
    /// would else find the plain file where an export is about to be mounted, and write to that.
    pub fn begin(&self) {
        *self.inner.begun.lock() = true;
        self.inner.changed.notify_all();
    }

    /// Tells all clients of an event. Never waits for them.
    pub fn emit(&self, event: impl Into<Event>) {
        let message = event.into().message(SystemTime::now());
        let (compact, pretty) = (to_text(&message, false), to_text(&message, true));
        let sessions: Vec<Arc<Session>> = {
            let sessions = self.inner.sessions.lock();
            sessions
                .iter()
                .map(|(session, _)| Arc::clone(session))
                .collect()
        };
        for session in sessions {
            session.tell(&compact, &pretty);
        }
    }

    /// The descriptors that clients have put into sets.
    pub fn fdsets(&self) -> &FdSets {
        &self.inner.fdsets
    }

    /// From now on no command is taken; those that wait are answered by being dropped.
    pub fn hang_up(&self) {
        self.inner.close();
    }

    /// The end: writes to each client what is waiting for it, for `limit` at most altogether, hangs up, and removes the
    /// sockets that were made. No client is served any more.
    pub fn flush_and_close(&self, limit: Duration) {
        self.inner.close();
        let deadline = Instant::now() + limit;
        let sessions = std::mem::take(&mut *self.inner.sessions.lock());
        for (session, stream) in sessions {
            let left = deadline.saturating_duration_since(Instant::now());
            session.output().flush(left);
            session.output().close();
            stream.shut_down();
        }
        let chardevs = std::mem::take(&mut *self.inner.chardevs.lock());
        drop(chardevs);
    }
}

impl Inner {
    fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        // Whoever has looked at `closing` waits by now, or has not taken the lock yet.
        drop(self.begun.lock());
        self.changed.notify_all();
    }

    /// Waits until clients are to be answered, or no more.
    fn await_begin(&self) {
        let mut begun = self.begun.lock();
        while !*begun && !self.closing.load(Ordering::SeqCst) {
            self.changed.wait(&mut begun);
        }
    }

    fn check_new(&self, options: &ChardevOptions) -> Result<()> {
        let id = &options.id;
        let chardevs = self.chardevs.lock();
        if chardevs.contains_key(id) {
            return Err(Error::Refused(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        let is_stdio = |entry: &Entry| entry.filename == "stdio";
        if options.backend == ChardevBackend::Stdio && chardevs.values().any(is_stdio) {
            let message = "cannot use stdio by multiple character devices";
            return Err(Error::refused(message));
        }
        Ok(())
    }

    /// A monitor's thread: one client after the other.
    fn serve(self: Arc<Self>, mut chardev: Chardev, monitor: MonitorId, pretty: bool) {
        diskfuse_ring::take_short_slices();
        let named = Arc::new(NamedFds::default());
        while let Some(stream) = chardev.next_stream(&self.closing) {
            let stream = Arc::new(stream);
            let (inner, fds) = (Arc::clone(&self), Arc::clone(&named));
            let Some(session) = Session::new(monitor, pretty, &stream, inner, fds) else {
                return;
            };
            {
                let mut sessions = self.sessions.lock();
                if self.closing.load(Ordering::SeqCst) {
                    return;
                }
                sessions.push((Arc::clone(&session), Arc::clone(&stream)));
            }
            session.run(&stream);
            let mut sessions = self.sessions.lock();
            sessions.retain(|(other, _)| !Arc::ptr_eq(other, &session));
            if sessions.is_empty() {
                self.fdsets.clear();
            }
            drop(sessions);
            stream.shut_down();
        }
    }

    /// `query-chardev`
    fn list_chardevs(&self) -> Vec<ChardevInfo> {
        let chardevs = self.chardevs.lock();
        let info = |(id, entry): (&String, &Entry)| ChardevInfo {
            label: id.clone(),
            filename: entry.filename.clone(),
            frontend_open: entry.chardev.is_none(),
        };
        chardevs.iter().map(info).collect()
    }
}
