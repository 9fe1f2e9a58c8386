//! The command line of `qemu-storage-daemon`: options in the order in which they take effect. Does none of what they say.

mod getopt;
mod help;

use std::ffi::OsString;
use std::path::PathBuf;

use serde_json::Value;

use crate::blockdev::BlockdevOptions;
use crate::chardev::{self, ChardevOptions, MonitorOptions};
use crate::error::Error;
use crate::export::ExportOptions;
use crate::object::{self, ObjectOptions};
use crate::trace::TraceOptions;
use crate::{json, suggest};
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
    /// `--chardev`: open a stream of bytes.
    Chardev(ChardevOptions),
    /// `--monitor`: let clients of a chardev give commands.
    Monitor(MonitorOptions),
    /// `--blockdev @FILE`, `--object @FILE` or `--export @FILE`, not known to QEMU: what is written in the file, which
    /// [`read_file`] reads.
    File(FileOption, PathBuf),
    /// `--trace`: show more messages. Counts wherever it stands, with all others.
    Trace(TraceOptions),
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
    /// `--metrics`, not known to QEMU: where to show what is counted, as written and not yet checked. The last one counts,
    /// wherever it stands.
    Metrics(String),
    /// `--event-loop`, not known to QEMU: what every event loop stands on. The last one counts, wherever it stands.
    EventLoop(EventLoop),
    /// `--sandbox`, not known to QEMU: whether the process gives up what it does not need. The last one counts, wherever it
    /// stands.
    Sandbox(bool),
}

/// An option whose arguments may be in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileOption {
    /// `--blockdev`
    Blockdev,
    /// `--object`
    Object,
    /// `--export`
    Export,
}

/// The most arguments that one file may hold.
pub const MAX_FILE_ARGUMENTS: usize = 1024;

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
    /// `--chardev help`: which chardevs there are, and their parameters.
    Chardevs,
    /// `--trace help`: what may be traced.
    Trace,
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
    let in_file = |kind| match argument.strip_prefix('@') {
        Some(path) if !path.is_empty() => Some(Directive::File(kind, PathBuf::from(path))),
        _ => None,
    };
    let from_file = match option.name {
        Name::Blockdev => in_file(FileOption::Blockdev),
        Name::Object => in_file(FileOption::Object),
        Name::Export => in_file(FileOption::Export),
        _ => None,
    };
    if let Some(directive) = from_file {
        return Ok(directive);
    }
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
        Name::Metrics => Ok(Directive::Metrics(argument.to_owned())),
        Name::EventLoop => {
            read_word("event-loop", argument, EventLoop::WORDS).map(Directive::EventLoop)
        }
        Name::Sandbox => {
            let words = &[("on", true), ("off", false)];
            read_word("sandbox", argument, words).map(Directive::Sandbox)
        }
        Name::Chardev => Ok(match chardev::Request::parse(argument)? {
            chardev::Request::Chardev(options) => Directive::Chardev(options),
            chardev::Request::Help => Directive::Help(HelpTopic::Chardevs),
        }),
        Name::Monitor => MonitorOptions::parse(argument).map(Directive::Monitor),
        Name::NbdServer => Err(Error::OptionNotBuilt {
            option: "--nbd-server",
        }),
        Name::Trace if matches!(argument, "help" | "?") => Ok(Directive::Help(HelpTopic::Trace)),
        Name::Trace => TraceOptions::parse(argument).map(Directive::Trace),
    }
}

/// Reads the text of a file that an option named: an argument in JSON, or a list of them.
///
/// # Errors
/// The first mistake, in the words that the option itself has for it.
pub fn read_file(option: FileOption, text: &str) -> Result<Vec<Directive>, Error> {
    let arguments = match json::parse(text)? {
        Value::Array(arguments) => arguments,
        argument => vec![argument],
    };
    if arguments.len() > MAX_FILE_ARGUMENTS {
        return Err(Error::TooManyInFile {
            limit: MAX_FILE_ARGUMENTS,
        });
    }
    let read = |argument| {
        let Value::Object(members) = argument else {
            return Err(Error::FileHoldsNoObjects);
        };
        match option {
            FileOption::Blockdev => BlockdevOptions::from_json(members).map(Directive::Blockdev),
            FileOption::Object => ObjectOptions::from_json(members).map(Directive::Object),
            FileOption::Export => ExportOptions::from_json(members).map(Directive::Export),
        }
    };
    arguments.into_iter().map(read).collect()
}

/// What the one of `words` stands for that the argument of `--name` is.
fn read_word<T: Copy>(name: &str, word: &str, words: &[(&str, T)]) -> Result<T, Error> {
    let known = words.iter().find(|(known, _)| *known == word);
    known
        .map(|(_, value)| *value)
        .ok_or_else(|| Error::BadValue {
            name: name.to_owned(),
            value: word.to_owned(),
            nearest: suggest::nearest(word, words.iter().map(|(known, _)| *known)),
        })
}

#[cfg(test)]
mod tests;
