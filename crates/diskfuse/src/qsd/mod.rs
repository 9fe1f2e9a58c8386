//! The command line of `qemu-storage-daemon`, carried out: options in their order, messages in its words. It must stay
//! silent unless something is wrong, and leave nothing mounted when it fails.

mod children;
mod exports;
mod filters;
mod live;
mod nodes;
mod objects;
mod pidfile;
mod qcow2;
mod query;
mod suggest;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use diskfuse_monitor::{Directive, EventLoop, parse_command_line};
use diskfuse_ring::Choice;

use crate::background::{self, Role};
use crate::daemon::{Daemon, Lifetime};
use crate::error::{Error, Plain, Result};
use crate::{logging, output};
use nodes::Nodes;
use objects::Objects;
use pidfile::PidFile;

/// `--version`. Scripts look for the name of the program that they know; the version is ours.
const VERSION: &str = concat!(
    "qemu-storage-daemon compatible: diskfuse version ",
    env!("CARGO_PKG_VERSION"),
    "\n"
);

/// Runs the storage daemon. `name` is what it was called by, for messages; `arguments` are those behind it.
pub fn main(name: &str, arguments: Vec<OsString>) -> ExitCode {
    run(name, arguments).unwrap_or_else(|error| {
        output::complain(name, error);
        ExitCode::FAILURE
    })
}

/// Options that count wherever they stand; the last one of each.
#[derive(Default)]
struct Settings {
    daemonize: bool,
    pidfile: Option<PathBuf>,
    log: Option<String>,
    event_loop: EventLoop,
}

fn run(name: &str, arguments: Vec<OsString>) -> Result<ExitCode> {
    let words = arguments.clone();
    let directives = parse_command_line(arguments.into_iter())?;
    match directives.as_slice() {
        [Directive::Help(topic)] => {
            output::say(&topic.text(name))?;
            return Ok(ExitCode::SUCCESS);
        }
        [Directive::Version] => {
            output::say(VERSION)?;
            return Ok(ExitCode::SUCCESS);
        }
        _ => {}
    }
    let settings = Settings::find(&directives);
    let readiness = match (settings.daemonize, background::role()?) {
        (false, _) => None,
        (true, Role::Launcher) => return background::launch(),
        (true, Role::Daemon(readiness)) => Some(readiness),
    };
    logging::start(settings.log.as_deref(), None)?;
    // In this order, so that on an error the exports end before the threads that serve them.
    let objects = Objects::new(settings.choice());
    let mut daemon = Daemon::new(Lifetime::Signals)?;
    let nodes = Nodes::new(daemon.graph().clone(), objects.clone());
    for (directive, words) in directives.into_iter().zip(split(words)) {
        carry_out(directive, &nodes, &mut daemon, &objects)
            .map_err(|error| Error::Refused(format!("{}: {error}", Plain(&words))))?;
    }
    drop(nodes);
    let control = daemon.listen();
    if let Err(error) = &control {
        // Callers who know nothing of it do not miss it.
        tracing::warn!("{error}; `diskfuse list` and `diskfuse umount` will not find this daemon");
    }
    let pidfile = settings
        .pidfile
        .as_deref()
        .map(PidFile::write)
        .transpose()?;
    if let Some(readiness) = readiness {
        readiness.announce("")?;
    }
    let outcome = daemon.run();
    drop((control, pidfile));
    outcome.map(|()| ExitCode::SUCCESS)
}

fn carry_out(
    directive: Directive,
    nodes: &Nodes,
    daemon: &mut Daemon,
    objects: &Objects,
) -> Result<()> {
    match directive {
        Directive::Blockdev(options) => nodes.add(&options).map(drop),
        Directive::Object(options) => objects.add(options),
        Directive::Export(options) => exports::add(daemon, objects, &options),
        Directive::PidFile(_)
        | Directive::Daemonize
        | Directive::Help(_)
        | Directive::Version
        | Directive::Log(_)
        | Directive::EventLoop(_) => Ok(()),
        Directive::Chardev(_)
        | Directive::Monitor(_)
        | Directive::File(..)
        | Directive::Trace(_) => Ok(()),
    }
}

impl Settings {
    fn find(directives: &[Directive]) -> Self {
        let mut settings = Self::default();
        for directive in directives {
            match directive {
                Directive::Daemonize => settings.daemonize = true,
                Directive::PidFile(path) => settings.pidfile = Some(path.clone()),
                Directive::Log(level) => settings.log = Some(level.clone()),
                Directive::EventLoop(event_loop) => settings.event_loop = *event_loop,
                _ => {}
            }
        }
        settings
    }

    fn choice(&self) -> Choice {
        match self.event_loop {
            EventLoop::Auto => Choice::Auto,
            EventLoop::IoUring => Choice::Uring,
            EventLoop::Epoll => Choice::Epoll,
        }
    }
}

/// The words of each option as typed, for messages: one item per directive. The command line has been found to be
/// right already.
fn split(arguments: Vec<OsString>) -> impl Iterator<Item = String> {
    let mut rest = arguments.into_iter();
    std::iter::from_fn(move || {
        let word = rest.next()?;
        let text = word.to_string_lossy().into_owned();
        match parse_command_line(std::iter::once(word)) {
            Err(diskfuse_monitor::Error::NeedsArgument { .. }) => {
                let argument = rest.next().unwrap_or_default();
                Some(format!("{text} {}", argument.to_string_lossy()))
            }
            _ => Some(text),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_directive_keeps_the_words_that_it_was_typed_with() {
        let line = [
            "--blockdev",
            "null-co,node-name=a",
            "--daemonize",
            "--pidfile=/p",
            "--obj",
            "iothread,id=i",
        ];
        let words: Vec<OsString> = line.iter().map(OsString::from).collect();
        let directives = parse_command_line(words.clone().into_iter()).unwrap();
        let split: Vec<String> = split(words).collect();
        assert_eq!(
            split,
            [
                "--blockdev null-co,node-name=a",
                "--daemonize",
                "--pidfile=/p",
                "--obj iothread,id=i"
            ]
        );
        assert_eq!(split.len(), directives.len());
    }
}
