//! A small client of a monitor: one command, one answer. It does not look at events.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::error::{At, Error, Result};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A conversation over a unix socket.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    path: PathBuf,
}

impl Qmp {
    /// Connects to a monitor that listens already, and negotiates.
    pub fn connect(path: &Path) -> Result<Self> {
        let writer = UnixStream::connect(path).at("connect to", path)?;
        writer.set_read_timeout(Some(LIMIT)).at("set up", path)?;
        writer.set_write_timeout(Some(LIMIT)).at("set up", path)?;
        let reader = BufReader::new(writer.try_clone().at("set up", path)?);
        let mut qmp = Self {
            reader,
            writer,
            path: path.to_owned(),
        };
        qmp.message()?;
        qmp.run(&json!({"execute": "qmp_capabilities"}))?;
        Ok(qmp)
    }

    /// What a command returns.
    pub fn run(&mut self, command: &Value) -> Result<Value> {
        let line = format!("{command}\n");
        self.writer
            .write_all(line.as_bytes())
            .at("write to", &self.path)?;
        loop {
            let mut answer = self.message()?;
            if let Some(error) = answer.get("error") {
                return Err(Error::Usage(format!("{command}: {}", error["desc"])));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.reader
            .read_line(&mut line)
            .at("read from", &self.path)?;
        serde_json::from_str(&line)
            .map_err(|error| Error::Usage(format!("{}: {error}", self.path.display())))
    }
}
