//! A client of the monitor, which waits for nothing longer than its limit.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long an answer may take. A job that makes an image flushes it, which beside a heavy writer on the same disk takes long.
const LIMIT: Duration = Duration::from_secs(60);

/// A conversation over a unix socket.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// Events that came before answers.
    pub events: Vec<Value>,
}

impl Qmp {
    /// Connects as soon as somebody listens, and reads the greeting.
    #[track_caller]
    pub fn greeted(path: &Path) -> (Self, Value) {
        let mut client = Self::silent(path);
        let greeting = client.message();
        (client, greeting)
    }

    /// Connects as soon as somebody listens, and reads nothing.
    #[track_caller]
    pub fn silent(path: &Path) -> Self {
        let end = Instant::now() + LIMIT;
        let socket = loop {
            match UnixStream::connect(path) {
                Ok(socket) => break socket,
                Err(error) => assert!(Instant::now() < end, "nobody listens: {error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&socket, Some(LIMIT)).expect("a socket has time limits");
        }
        Self {
            reader: BufReader::new(socket.try_clone().expect("a descriptor")),
            writer: socket,
            events: Vec::new(),
        }
    }

    /// Connects and negotiates.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        let (mut client, _) = Self::greeted(path);
        assert_eq!(client.run("qmp_capabilities", json!({})), json!({}));
        client
    }

    /// The socket.
    pub fn socket(&self) -> &UnixStream {
        &self.writer
    }

    /// Sends bytes as they are.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.writer
            .write_all(bytes.as_ref())
            .expect("the other side reads");
    }

    /// The next line, parsed; `None` at the end of the conversation.
    #[track_caller]
    pub fn try_message(&mut self) -> Option<Value> {
        let mut line = String::new();
        let count = self.reader.read_line(&mut line);
        if count.expect("an answer in time") == 0 {
            return None;
        }
        Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")))
    }

    /// The next message.
    #[track_caller]
    pub fn message(&mut self) -> Value {
        self.try_message().expect("the conversation goes on")
    }

    /// The next message that is not an event; events are kept.
    #[track_caller]
    pub fn answer(&mut self) -> Value {
        loop {
            let message = self.message();
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    /// Gives a command and returns its whole answer.
    #[track_caller]
    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let mut request = json!({"execute": command});
        request["arguments"] = arguments;
        self.send(request.to_string() + "\n");
        self.answer()
    }

    /// Gives a command, and fails unless it succeeds.
    #[track_caller]
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let mut answer = self.ask(command, arguments);
        assert!(answer.get("return").is_some(), "{command}: {answer}");
        answer["return"].take()
    }

    /// The words of the error that a command fails with.
    #[track_caller]
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.ask(command, arguments);
        let words = answer["error"]["desc"].as_str();
        words
            .unwrap_or_else(|| panic!("{command}: {answer}"))
            .to_owned()
    }

    /// Waits for an event.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        if let Some(place) = self.events.iter().position(|event| event["event"] == name) {
            return self.events.remove(place);
        }
        loop {
            let message = self.message();
            if message["event"] == name {
                return message;
            }
            self.events.push(message);
        }
    }

    /// Waits for an event that is about this, and throws away those of this name that came before it.
    #[track_caller]
    pub fn event_of(&mut self, name: &str, about: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + LIMIT;
        loop {
            let event = self.event(name);
            if about(&event["data"]) {
                return event;
            }
            assert!(Instant::now() < end, "no such {name}; the last was {event}");
        }
    }

    /// Waits until a job has this status.
    #[track_caller]
    pub fn job_is(&mut self, id: &str, status: &str) {
        let about = |data: &Value| data["id"] == id && data["status"] == status;
        self.event_of("JOB_STATUS_CHANGE", about);
    }

    /// What is said of a job, if it is there.
    #[track_caller]
    pub fn job(&mut self, id: &str) -> Option<Value> {
        let jobs = self.run("query-jobs", json!({}));
        let mut jobs = jobs.as_array().expect("a list").iter();
        jobs.find(|job| job["id"] == id).cloned()
    }
}
