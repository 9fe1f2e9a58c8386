//! One client's conversation: greeting, negotiation, then one command after the other. Commands about the conversation
//! itself are answered here; all others go to whoever carries them out, one at a time, and their answers come back by a
//! [`ReplyHandle`] from any thread. A client must never be able to make this keep more than a bounded amount.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use diskfuse_monitor::commands::{
    AddFd, ChardevBackendInfo, Command, CommandInfo, FdName, Kind as _, QmpCapabilities, Row,
    built, find, schema,
};
use diskfuse_monitor::qmp::{Request as QmpRequest, Splitter, reply, to_text, version_info};
use diskfuse_monitor::{ChardevBackend, ErrorClass, QmpError};
use parking_lot::{Condvar, Mutex};
use serde_json::Value;

use super::output::{Kind, Output};
use super::stream::Stream;
use super::{Errand, Inner, MonitorId, Request};

/// Requests that may wait for their turn; then no more are read. As many as in QEMU.
const MOST_REQUESTS: usize = 8;

/// Commands about the conversation that whoever has answered another one carries out before it goes on with what others want.
const AT_ONCE: usize = 1;

/// Bytes of answers and events that may wait for the client before no more requests are read.
const MOST_UNREAD: usize = 256 << 10;

/// How long a client that has hung up may take to read its last answers.
const PATIENCE: Duration = Duration::from_secs(30);

/// Descriptors by the names that `getfd` gave them; they belong to the monitor, whoever its client is.
pub type NamedFds = Mutex<BTreeMap<String, OwnedFd>>;

/// A conversation.
pub struct Session {
    monitor: MonitorId,
    pretty: bool,
    output: Output,
    inner: Arc<Inner>,
    named: Arc<NamedFds>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// `qmp_capabilities` has been given.
    negotiated: bool,
    /// `exec-oob` is allowed.
    oob: bool,
    /// Messages in the order in which they came.
    waiting: VecDeque<Result<Value, QmpError>>,
    /// One of them is being carried out.
    busy: bool,
    /// Descriptors that came along and that no command has taken yet.
    fds: VecDeque<OwnedFd>,
}

/// The duty to answer one command. Dropping it answers that it was not carried out.
#[must_use = "the client waits for it"]
pub struct ReplyHandle {
    session: Arc<Session>,
    /// What the client marked its request with.
    id: Option<Value>,
    answered: bool,
}

impl ReplyHandle {
    /// Answers. Never waits for the client. May carry on with the client's next command, as far as that needs nobody
    /// else.
    pub fn send(mut self, outcome: Result<Value, QmpError>) {
        self.answer(outcome);
    }

    fn answer(&mut self, outcome: Result<Value, QmpError>) {
        if !std::mem::replace(&mut self.answered, true) {
            self.session.answer(outcome, self.id.take());
            self.session.next_one(AT_ONCE);
        }
    }
}

impl Drop for ReplyHandle {
    fn drop(&mut self) {
        let message = "The process ended before the command was carried out";
        self.answer(Err(QmpError::generic(message)));
    }
}

/// A client's turn to have its next command carried out.
pub struct Turn(Arc<Session>);

impl Turn {
    /// Takes it. Waits for nobody.
    pub fn take(self) {
        self.0.next_one(AT_ONCE);
    }
}

/// What becomes of a command.
enum Outcome {
    /// Answered here.
    Done(Result<Value, QmpError>),
    /// For somebody else.
    For(Command),
}

impl Session {
    /// Of a client that has just come.
    pub fn new(
        monitor: MonitorId,
        pretty: bool,
        stream: &Stream,
        inner: Arc<Inner>,
        named: Arc<NamedFds>,
    ) -> Option<Arc<Self>> {
        let output = Output::new(Arc::clone(stream.output.as_ref()?), stream.socket);
        Some(Arc::new(Self {
            monitor,
            pretty,
            output,
            inner,
            named,
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// Talks to the client until it hangs up. What it has said until then is carried out and answered.
    pub fn run(self: &Arc<Self>, stream: &Stream) {
        self.send(Kind::Answer, &diskfuse_monitor::qmp::greeting());
        let mut splitter = Splitter::default();
        let mut buffer = vec![0; 16 << 10];
        loop {
            let mut fds = VecDeque::new();
            let count = match stream.receive(&mut buffer, &mut fds) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) => {
                    tracing::debug!(%error, "a client of the monitor is gone");
                    break;
                }
            };
            self.keep(fds);
            let mut input = buffer.get(..count).unwrap_or_default();
            while let Some(message) = splitter.next(&mut input) {
                self.take(message.map_err(QmpError::from));
            }
        }
        if let Some(message) = splitter.finish() {
            self.take(message.map_err(QmpError::from));
        }
        let mut state = self.state.lock();
        while state.busy || !state.waiting.is_empty() {
            self.changed.wait(&mut state);
        }
        drop(state);
        self.output.flush(PATIENCE);
        self.output.close();
    }

    /// Sends an event, if the client is ready for events.
    pub fn tell(&self, compact: &str, pretty: &str) {
        if self.state.lock().negotiated {
            let text = if self.pretty { pretty } else { compact };
            self.output.send(Kind::Event, text);
        }
    }

    /// What is on its way to the client.
    pub fn output(&self) -> &Output {
        &self.output
    }

    fn keep(&self, fds: VecDeque<OwnedFd>) {
        let mut state = self.state.lock();
        state.fds.extend(fds);
        let surplus = state.fds.len().saturating_sub(16);
        let closed: Vec<OwnedFd> = state.fds.drain(..surplus).collect();
        drop(state);
        drop(closed);
    }

    fn send(&self, kind: Kind, message: &Value) {
        self.output.send(kind, &to_text(message, self.pretty));
    }

    fn answer(&self, outcome: Result<Value, QmpError>, id: Option<Value>) {
        self.send(Kind::Answer, &reply::reply(outcome, id));
        self.state.lock().busy = false;
        self.changed.notify_all();
    }

    /// Takes a message from the client: now, if it is to overtake others, else in its turn.
    fn take(self: &Arc<Self>, message: Result<Value, QmpError>) {
        self.inner.await_begin();
        self.output.wait_below(MOST_UNREAD);
        let mut state = self.state.lock();
        if state.oob && is_oob(&message) {
            drop(state);
            self.overtake(message);
            return;
        }
        while state.waiting.len() >= MOST_REQUESTS {
            self.changed.wait(&mut state);
        }
        state.waiting.push_back(message);
        drop(state);
        // On the client's own thread it may take as long as it likes.
        self.next_one(usize::MAX);
    }

    /// Carries out a request that is to overtake others; only such go there as are answered at once.
    fn overtake(self: &Arc<Self>, message: Result<Value, QmpError>) {
        let (outcome, id) = self.understand(message, true);
        let outcome = match outcome {
            Ok(Outcome::Done(outcome)) => outcome,
            Ok(Outcome::For(command)) => {
                let name = command.name();
                Err(QmpError::generic(format!(
                    "The command {name} does not support OOB"
                )))
            }
            Err(error) => Err(error),
        };
        self.send(Kind::Answer, &reply::reply(outcome, id));
    }

    /// Carries out what waits, until something is for somebody else, or nothing waits, or `at_once` commands have been carried out:
    /// then it asks for another turn, so that a client who never stops cannot keep the thread for itself.
    fn next_one(self: &Arc<Self>, at_once: usize) {
        for _ in 0..at_once {
            let mut state = self.state.lock();
            if state.busy || self.inner.closing.load(Ordering::SeqCst) {
                return;
            }
            let Some(message) = state.waiting.pop_front() else {
                return;
            };
            state.busy = true;
            let oob = state.oob;
            drop(state);
            self.changed.notify_all();
            let (outcome, id) = self.understand(message, oob);
            let answer = match outcome {
                Ok(Outcome::Done(answer)) => answer,
                Err(error) => Err(error),
                Ok(Outcome::For(command)) => {
                    let reply = ReplyHandle {
                        session: Arc::clone(self),
                        id,
                        answered: false,
                    };
                    (self.inner.sink)(Errand::Request(Box::new(Request {
                        command,
                        reply,
                        monitor: self.monitor,
                    })));
                    return;
                }
            };
            self.answer(answer, id);
        }
        let state = self.state.lock();
        let goes_on = !state.busy && !state.waiting.is_empty();
        drop(state);
        if goes_on {
            (self.inner.sink)(Errand::Turn(Turn(Arc::clone(self))));
        }
    }

    /// Reads a message, and carries out what needs nobody else.
    fn understand(
        &self,
        message: Result<Value, QmpError>,
        oob: bool,
    ) -> (Result<Outcome, QmpError>, Option<Value>) {
        let message = match message {
            Ok(message) => message,
            Err(error) => return (Err(error), None),
        };
        match QmpRequest::read(message, oob) {
            Ok(mut request) => {
                let id = request.id.take();
                (self.start(request), id)
            }
            Err(refused) => (Err(refused.error), refused.id),
        }
    }

    fn start(&self, request: QmpRequest) -> Result<Outcome, QmpError> {
        let name = request.command;
        if !self.state.lock().negotiated && name != "qmp_capabilities" {
            let message = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(QmpError::new(ErrorClass::CommandNotFound, message));
        }
        let row = find(&name).ok_or_else(|| QmpError::no_command(&name))?;
        if request.oob && !row.allow_oob {
            let message = format!("The command {name} does not support OOB");
            return Err(QmpError::generic(message));
        }
        let command = row.read(request.arguments)?;
        if name == "qmp_capabilities" && self.state.lock().negotiated {
            let message = "Capabilities negotiation is already complete, command ignored";
            return Err(QmpError::new(ErrorClass::CommandNotFound, message));
        }
        self.carry_out(command)
    }

    fn carry_out(&self, command: Command) -> Result<Outcome, QmpError> {
        let value = match command {
            Command::QmpCapabilities(capabilities) => {
                self.negotiate(&capabilities);
                ().to_value()
            }
            Command::QueryVersion => version_info().to_value(),
            Command::QueryCommands => {
                let info = |row: &Row| CommandInfo {
                    name: row.name.to_owned(),
                };
                built().map(info).collect::<Vec<_>>().to_value()
            }
            Command::QueryQmpSchema => schema::schema().to_value(),
            Command::QueryChardevBackends => {
                let info = |name: &&str| ChardevBackendInfo {
                    name: (*name).to_owned(),
                };
                ChardevBackend::KINDS
                    .iter()
                    .map(info)
                    .collect::<Vec<_>>()
                    .to_value()
            }
            Command::QueryChardev => self.inner.list_chardevs().to_value(),
            Command::Getfd(name) => self.get_fd(name)?.to_value(),
            Command::Closefd(FdName { fdname }) => {
                let closed = self.named.lock().remove(&fdname);
                let missing = format!("File descriptor named '{fdname}' not found");
                drop(closed.ok_or_else(|| QmpError::generic(missing))?);
                ().to_value()
            }
            Command::AddFd(arguments) => self.add_fd(arguments)?,
            Command::RemoveFd(arguments) => self.inner.fdsets.remove(&arguments)?.to_value(),
            Command::QueryFdsets => self.inner.fdsets.list().to_value(),
            command => return Ok(Outcome::For(command)),
        };
        Ok(Outcome::Done(Ok(value)))
    }

    fn negotiate(&self, capabilities: &QmpCapabilities) {
        let mut state = self.state.lock();
        state.negotiated = true;
        state.oob = capabilities
            .enable
            .as_ref()
            .is_some_and(|list| !list.is_empty());
    }

    fn take_fd(&self) -> Result<OwnedFd, QmpError> {
        let fd = self.state.lock().fds.pop_front();
        fd.ok_or_else(|| QmpError::generic("No file descriptor supplied via SCM_RIGHTS"))
    }

    fn get_fd(&self, name: FdName) -> Result<(), QmpError> {
        let fd = self.take_fd()?;
        if name
            .fdname
            .starts_with(|first: char| first.is_ascii_digit())
        {
            let message = "Parameter 'fdname' expects a name not starting with a digit";
            return Err(QmpError::generic(message));
        }
        let replaced = self.named.lock().insert(name.fdname, fd);
        drop(replaced);
        Ok(())
    }

    fn add_fd(&self, arguments: AddFd) -> Result<Value, QmpError> {
        let fd = self.take_fd()?;
        let added = self.inner.fdsets.add(fd, arguments)?;
        Ok(added.to_value())
    }
}

/// Whether a message asks to overtake others.
fn is_oob(message: &Result<Value, QmpError>) -> bool {
    message
        .as_ref()
        .is_ok_and(|message| message.get("exec-oob").is_some())
}

#[cfg(test)]
mod tests;
