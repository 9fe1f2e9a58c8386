//! A client of the monitor, as hosts have it: commands in, answers and events out. It never waits without a limit.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::wait_until;

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(20);

/// A connection that has negotiated its capabilities.
pub struct Qmp {
    lines: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects as soon as somebody listens.
    #[track_caller]
    pub fn connect(socket: &Path) -> Self {
        let mut stream = None;
        wait_until("the monitor listens", LIMIT, || {
            stream = UnixStream::connect(socket).ok();
            stream.is_some()
        });
        let stream = stream.expect("it is there");
        stream.set_read_timeout(Some(LIMIT)).expect("a socket");
        let mut qmp = Self {
            lines: BufReader::new(stream),
            events: VecDeque::new(),
        };
        let greeting = qmp.receive();
        assert!(greeting.get("QMP").is_some(), "{greeting}");
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        let got = self.lines.read_line(&mut line);
        assert!(got.is_ok_and(|n| n > 0), "the monitor said nothing: {line}");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    /// Gives a command, and does not wait for its answer.
    pub fn send(&mut self, command: &str, arguments: &Value) {
        let line = json!({"execute": command, "arguments": arguments}).to_string() + "\n";
        let sent = self.lines.get_mut().write_all(line.as_bytes());
        sent.expect("a monitor that reads");
    }

    /// The next answer: what it returns, or its error.
    pub fn answer(&mut self) -> Result<Value, Value> {
        loop {
            let mut got = self.receive();
            if got.get("event").is_some() {
                self.events.push_back(got);
            } else if let Some(error) = got.get_mut("error") {
                return Err(error.take());
            } else {
                return Ok(got["return"].take());
            }
        }
    }

    /// Carries out a command that must succeed.
    #[track_caller]
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        self.send(command, &arguments);
        let answer = self.answer();
        answer.unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
    }

    /// Carries out a command that must fail, and returns the error's words.
    #[track_caller]
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        self.send(command, &arguments);
        match self.answer() {
            Ok(got) => panic!("{command} {arguments} succeeded: {got}"),
            Err(error) => error["desc"].as_str().unwrap_or_default().to_owned(),
        }
    }

    /// The next event of this name that `wanted` says yes to; others are thrown away.
    #[track_caller]
    pub fn event(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive(),
            };
            if event["event"] == name && wanted(&event["data"]) {
                return event;
            }
            assert!(began.elapsed() < LIMIT, "no {name}; last was {event}");
        }
    }

    /// Waits until a job has this status.
    #[track_caller]
    pub fn job_is(&mut self, id: &str, status: &str) {
        self.event("JOB_STATUS_CHANGE", |data| {
            data["id"] == id && data["status"] == status
        });
    }

    /// The status of a job, if it is there.
    pub fn job(&mut self, id: &str) -> Option<Value> {
        let jobs = self.run("query-jobs", json!({}));
        let jobs = jobs.as_array().expect("a list").iter();
        jobs.clone().find(|job| job["id"] == id).cloned()
    }
}
