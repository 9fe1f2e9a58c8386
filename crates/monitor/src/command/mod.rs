//! The command line of `qemu-storage-daemon`: options in the order in which they take effect. Does none of what they say.

mod getopt;
mod help;

use std::ffi::OsString;
use std::path::PathBuf;

use crate::blockdev::BlockdevOptions;
use crate::error::Error;
use crate::export::ExportOptions;
use crate::object::{self, ObjectOptions};
use crate::suggest;
use getopt::{Name, Occurrence, Scanner};

/// One option of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Directive {
    /// `--blockdev`: make a node.
    Blockdev(BlockdevOptions),
    /// `--object`: make an object.
    Object(ObjectOptions),
    /// `--export`: show a node.
    Export(ExportOptions),
    /// `--pidfile`: write the process id to this file once all exports are up, and remove it at the end. The last one
    /// counts, wherever it stands.
    PidFile(PathBuf),
    /// `--daemonize`: go to the background once all exports are up. Counts wherever it stands.
    Daemonize,
    /// Print this help and exit with 0. Always the only directive.
    Help(HelpTopic),
    /// `--version`: print the version and exit with 0. Always the only directive.
    Version,
    /// `--log`, not known to QEMU: which messages to show: a level, or a filter of `tracing`, as written and not yet
    /// checked. The last one counts, wherever it stands.
    Log(String),
    /// `--event-loop`, not known to QEMU: what every event loop stands on. The last one counts, wherever it stands.
    EventLoop(EventLoop),
}

/// What event loops stand on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EventLoop {
    /// io_uring where the kernel allows it, else epoll.
    #[default]
    Auto,
    /// io_uring, or fail.
    IoUring,
    /// epoll and worker threads.
    Epoll,
}

/// What a user wants explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HelpTopic {
    /// `--help`: the program.
    Program,
    /// `--object help`: which objects there are.
    Objects,
    /// `--object iothread,help`: the properties of an iothread.
    Iothread,
    /// `--object throttle-group,help`: the properties of a throttle group.
    ThrottleGroup,
    /// `--object secret,help`: the properties of a secret.
    Secret,
}

impl EventLoop {
    const WORDS: &[(&str, Self)] = &[
        ("auto", Self::Auto),
        ("io_uring", Self::IoUring),
        ("epoll", Self::Epoll),
    ];
}

/// Reads the command line; `arguments` are those behind the program's name.
///
/// The directives come in the order of the command line, in which they are to be carried out, except where
/// [`Directive`] says that one counts wherever it stands. Help and version win over everything behind them and over
/// mistakes inside arguments in front of them, as in QEMU.
///
/// # Errors
/// The first mistake. Mistakes in how options are written come before mistakes inside their arguments.
pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Vec<Directive>, Error> {
    let mut scanner = Scanner::new(arguments);
    let mut options = Vec::new();
    while let Some(option) = scanner.option()? {
        match option.name {
            Name::Help => return Ok(vec![Directive::Help(HelpTopic::Program)]),
            Name::Version => return Ok(vec![Directive::Version]),
            _ => options.push(option),
        }
    }
    let mut directives = Vec::with_capacity(options.len());
    for option in options {
        let directive = interpret(&option).map_err(|error| match error {
            Error::OptionNotBuilt { .. } => error,
            error => Error::At {
                words: option.words,
                error: Box::new(error),
            },
        })?;
        if matches!(directive, Directive::Help(_)) {
            return Ok(vec![directive]);
        }
        directives.push(directive);
    }
    Ok(directives)
}

fn interpret(option: &Occurrence) -> Result<Directive, Error> {
    let argument = option.argument.as_str();
    match option.name {
        Name::Blockdev => BlockdevOptions::parse(argument).map(Directive::Blockdev),
        Name::Export => ExportOptions::parse(argument).map(Directive::Export),
        Name::Object => Ok(match object::Request::parse(argument)? {
            object::Request::Object(object) => Directive::Object(object),
            object::Request::Help(topic) => Directive::Help(topic),
        }),
        Name::PidFile => Ok(Directive::PidFile(PathBuf::from(argument))),
        Name::Daemonize => Ok(Directive::Daemonize),
        Name::Help => Ok(Directive::Help(HelpTopic::Program)),
        Name::Version => Ok(Directive::Version),
        Name::Log => Ok(Directive::Log(argument.to_owned())),
        Name::EventLoop => read_event_loop(argument).map(Directive::EventLoop),
        Name::Chardev => Err(Error::OptionNotBuilt {
            option: "--chardev",
        }),
        Name::Monitor => Err(Error::OptionNotBuilt {
            option: "--monitor",
        }),
        Name::NbdServer => Err(Error::OptionNotBuilt {
            option: "--nbd-server",
        }),
        Name::Trace => Err(Error::OptionNotBuilt { option: "--trace" }),
    }
}

fn read_event_loop(word: &str) -> Result<EventLoop, Error> {
    let known = EventLoop::WORDS.iter().find(|(known, _)| *known == word);
    known
        .map(|(_, event_loop)| *event_loop)
        .ok_or_else(|| Error::BadValue {
            name: "event-loop".to_owned(),
            value: word.to_owned(),
            nearest: suggest::nearest(word, EventLoop::WORDS.iter().map(|(known, _)| *known)),
        })
}

#[cfg(test)]
mod tests;
