//! Commands of the monitor, carried out on the main thread, one after the other. A file for each family.

mod block;
mod exports;
mod objects;

use std::time::Duration;

use diskfuse_monitor::QmpError;
use diskfuse_monitor::commands::{Command, Kind};
use diskfuse_monitor::qmp::event::BlockExportDeleted;
use serde_json::Value;

use super::monitor::{Monitors, ReplyHandle, Request};
use super::nodes::Nodes;
use super::objects::Iothreads;
use crate::daemon::{Attendant, Daemon};
use crate::error::Error;

/// What a command answers.
type Outcome = Result<Value, QmpError>;

/// What commands are carried out with.
pub struct Commands {
    /// What makes nodes.
    pub nodes: Nodes,
    /// The iothreads.
    pub iothreads: Iothreads,
    /// Whom to tell of what happens.
    pub monitors: Monitors,
    /// Who waits for the end of the process.
    pub leaving: Vec<ReplyHandle>,
}

/// How long the process waits at its end for clients of monitors to read what they are told last.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Drop for Commands {
    /// Clients hear of the end, and sockets are removed.
    fn drop(&mut self) {
        self.leaving.clear();
        self.monitors.flush_and_close(LAST_WORDS);
    }
}

impl Attendant for Commands {
    fn carry_out(&mut self, daemon: &mut Daemon, request: Request) {
        let Request { command, reply, .. } = request;
        let outcome = match command {
            Command::Quit => {
                // Answered when everything has ended.
                self.leaving.push(reply);
                daemon.end();
                return;
            }
            Command::ObjectAdd(options) => objects::add(self, &options),
            Command::BlockdevAdd(options) => block::add(self, &options),
            Command::BlockExportAdd(options) => exports::add(self, daemon, &options),
            Command::BlockExportDel(arguments) => exports::del(daemon, &arguments),
            Command::QueryBlockExports => Ok(exports::list(daemon)),
            // Not in the table of what is built, so no client can give it.
            other => Err(QmpError::no_command(other.name())),
        };
        reply.send(outcome);
    }

    fn export_gone(&mut self, id: &str) {
        let id = id.to_owned();
        self.monitors.emit(BlockExportDeleted { id });
    }
}

/// What a command answers that gives nothing back.
fn done<T>(outcome: Result<T, Error>) -> Outcome {
    match outcome {
        Ok(_) => Ok(().to_value()),
        Err(error) => Err(QmpError::generic(error.to_string())),
    }
}
