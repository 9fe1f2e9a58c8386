//! The command line of `qemu-storage-daemon`, carried out: options in their order, messages in its words. It must stay
//! silent unless something is wrong, and leave nothing mounted when it fails.

mod children;
mod commands;
mod exports;
mod filters;
mod live;
pub mod monitor;
mod nodes;
mod objects;
mod pidfile;
mod qcow2;
mod query;
pub mod suggest;
mod trace;
mod trouble;

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use diskfuse_monitor::{
    ChardevBackend, Directive, EventLoop, FileOption, parse_command_line, read_file,
};
use diskfuse_ring::Choice;
use rustix::fs::Mode;

use crate::background::{self, Role};
use crate::control::server::Server;
use crate::daemon::{Daemon, Lifetime};
use crate::error::{Error, Plain, Result};
use crate::metrics::{Metrics, Served};
use crate::output;
use crate::sandbox::{self, Extent};
use commands::Commands;
use monitor::Monitors;
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
    metrics: Option<String>,
    event_loop: EventLoop,
    no_sandbox: bool,
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
        (true, Role::Daemon(readiness)) => {
            // As QEMU's: what a daemon makes is not for everybody.
            rustix::process::umask(Mode::RWXO | Mode::WGRP);
            Some(readiness)
        }
    };
    trace::start_logging(settings.log.as_deref(), &directives)?;
    // In this order, so that on an error the exports end before the threads that serve them.
    let mut commands: Commands;
    let metrics = settings
        .metrics
        .as_deref()
        .map(Metrics::listen)
        .transpose()?;
    let mut daemon = Daemon::new(Lifetime::Signals)?;
    let objects = Objects::new(settings.choice());
    let monitors = Monitors::new(daemon.command_sink());
    let nodes = Nodes::new(daemon.graph().clone(), objects.clone(), monitors.clone());
    commands = Commands::new(nodes, objects, monitors, daemon.errand());
    for (directive, words) in directives.into_iter().zip(split(words)) {
        carry_out(directive, &settings, &mut commands, &mut daemon)
            .map_err(|error| Error::Refused(format!("{}: {error}", Plain(&words))))?;
    }
    let mut control = daemon.listen();
    let mut metrics = metrics
        .map(|metrics| metrics.serve(daemon.asker()))
        .transpose()?;
    let mut pidfile = settings
        .pidfile
        .as_deref()
        .map(PidFile::write)
        .transpose()?;
    let removals = control.as_mut().map(Server::removal).into_iter();
    let removals = removals.chain(pidfile.as_mut().map(PidFile::removal));
    let removals = removals.chain(metrics.as_mut().and_then(Served::removal));
    let helper = match (settings.no_sandbox, commands.monitors.are_there()) {
        (true, _) => None,
        (false, true) => {
            // Who is not root mounts by fusermount3, a set-user-id program.
            let by_itself = rustix::process::geteuid().is_root();
            sandbox::close(if by_itself {
                Extent::Open
            } else {
                Extent::Helped
            })?;
            None
        }
        (false, false) => Some(sandbox::seal(&mut daemon, removals)?),
    };
    if let Some(readiness) = readiness {
        readiness.announce("")?;
    }
    if commands.monitors.are_there() {
        // This thread carries their commands out.
        diskfuse_ring::take_short_slices();
    }
    commands.monitors.begin();
    let outcome = daemon.run(&mut commands);
    drop((control, metrics, pidfile));
    if let Some(helper) = helper {
        helper.wait();
    }
    commands.say_goodbye(&outcome);
    outcome.map(|()| ExitCode::SUCCESS)
}

fn carry_out(
    directive: Directive,
    settings: &Settings,
    commands: &mut Commands,
    daemon: &mut Daemon,
) -> Result<()> {
    match directive {
        Directive::Blockdev(options) => commands.nodes.add(&options).map(drop),
        Directive::Object(options) => commands.objects.add(options),
        Directive::Export(options) => exports::add(daemon, commands, &options),
        Directive::File(option, path) => {
            let inside = read_arguments(option, &path)?;
            inside
                .into_iter()
                .try_for_each(|inside| carry_out(inside, settings, commands, daemon))
        }
        Directive::Chardev(options) => {
            if settings.daemonize && options.backend == ChardevBackend::Stdio {
                return Err(Error::refused("cannot use stdio with -daemonize"));
            }
            let interrupted = daemon.signalled();
            commands.monitors.add_chardev(&options, &interrupted)
        }
        Directive::Monitor(options) => commands.monitors.add_monitor(&options),
        Directive::PidFile(_)
        | Directive::Daemonize
        | Directive::Help(_)
        | Directive::Version
        | Directive::Trace(_)
        | Directive::Log(_)
        | Directive::EventLoop(_)
        | Directive::Metrics(_)
        | Directive::Sandbox(_) => Ok(()),
    }
}

/// The longest file of arguments, in bytes.
const LONGEST_FILE: u64 = 1 << 20;

/// What `@FILE` stands for.
fn read_arguments(option: FileOption, path: &Path) -> Result<Vec<Directive>> {
    let failed = || format!("Could not read '{}'", path.display());
    let mut text = String::new();
    let file = File::open(path).map_err(Error::system(failed()))?;
    let mut limited = file.take(LONGEST_FILE + 1);
    limited
        .read_to_string(&mut text)
        .map_err(Error::system(failed()))?;
    if text.len() as u64 > LONGEST_FILE {
        return Err(Error::refused(format!("{}: more than 1 MiB", failed())));
    }
    let wrong = |error| Error::Refused(format!("'{}': {error}", path.display()));
    read_file(option, &text).map_err(wrong)
}

impl Settings {
    fn find(directives: &[Directive]) -> Self {
        let mut settings = Self::default();
        for directive in directives {
            match directive {
                Directive::Daemonize => settings.daemonize = true,
                Directive::PidFile(path) => settings.pidfile = Some(path.clone()),
                Directive::Metrics(address) => settings.metrics = Some(address.clone()),
                Directive::Log(level) => settings.log = Some(level.clone()),
                Directive::EventLoop(event_loop) => settings.event_loop = *event_loop,
                Directive::Sandbox(on) => settings.no_sandbox = !on,
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
