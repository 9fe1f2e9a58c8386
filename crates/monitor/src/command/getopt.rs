//! Splits a command line into options and their arguments, by the rules of `getopt_long` (GNU C library manual,
//! section 25.3.4). Does not look into arguments.

use std::ffi::OsString;

use crate::error::Error;
use crate::suggest;

/// An option that the program knows by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Blockdev,
    Chardev,
    Daemonize,
    EventLoop,
    Export,
    Help,
    Log,
    Monitor,
    Metrics,
    NbdServer,
    Object,
    PidFile,
    Sandbox,
    Trace,
    Version,
}

/// How an option is written.
struct Spelling {
    long: &'static str,
    name: Name,
    takes_argument: bool,
}

const fn spelling(long: &'static str, name: Name, takes_argument: bool) -> Spelling {
    Spelling {
        long,
        name,
        takes_argument,
    }
}

/// The options of `qemu-storage-daemon`.
const QEMU: &[Spelling] = &[
    spelling("blockdev", Name::Blockdev, true),
    spelling("chardev", Name::Chardev, true),
    spelling("daemonize", Name::Daemonize, false),
    spelling("export", Name::Export, true),
    spelling("help", Name::Help, false),
    spelling("monitor", Name::Monitor, true),
    spelling("nbd-server", Name::NbdServer, true),
    spelling("object", Name::Object, true),
    spelling("pidfile", Name::PidFile, true),
    spelling("trace", Name::Trace, true),
    spelling("version", Name::Version, false),
];

/// The options that only this program has. They never make an abbreviation ambiguous that QEMU understands.
const OURS: &[Spelling] = &[
    spelling("event-loop", Name::EventLoop, true),
    spelling("log", Name::Log, true),
    spelling("metrics", Name::Metrics, true),
    spelling("sandbox", Name::Sandbox, true),
];

/// An option as it stands on the command line.
pub(super) struct Occurrence {
    pub(super) name: Name,
    /// Its argument; empty for an option that takes none.
    pub(super) argument: String,
    /// The words as typed.
    pub(super) words: String,
}

/// Reads one option after the other.
pub(super) struct Scanner<I> {
    arguments: I,
    /// How many arguments have been read.
    position: usize,
}

impl<I: Iterator<Item = OsString>> Scanner<I> {
    pub(super) fn new(arguments: I) -> Self {
        Self {
            arguments,
            position: 0,
        }
    }

    /// The next option; `None` at the end.
    pub(super) fn option(&mut self) -> Result<Option<Occurrence>, Error> {
        let Some(word) = self.word()? else {
            return Ok(None);
        };
        if word == "--" {
            // QEMU ignores what follows. A word that does nothing is a mistake worth knowing.
            return match self.word()? {
                Some(word) => Err(Error::UnexpectedArgument { word }),
                None => Ok(None),
            };
        }
        if let Some(long) = word.strip_prefix("--") {
            return self.long(&word, long).map(Some);
        }
        match word
            .strip_prefix('-')
            .and_then(|letters| letters.chars().next())
        {
            Some(letter) => self.short(&word, letter).map(Some),
            None => Err(Error::UnexpectedArgument { word }),
        }
    }

    /// `--NAME`, `--NAME=ARGUMENT` or `--NAME ARGUMENT`.
    fn long(&mut self, word: &str, long: &str) -> Result<Occurrence, Error> {
        let (long, attached) = match long.split_once('=') {
            Some((long, attached)) => (long, Some(attached)),
            None => (long, None),
        };
        let Spelling {
            long,
            name,
            takes_argument,
        } = find(long)?;
        let option = || format!("--{long}");
        match (*takes_argument, attached) {
            (false, Some(_)) => Err(Error::TakesNoArgument { option: option() }),
            (true, None) => self.detached(*name, word, option()),
            (_, attached) => {
                let argument = attached.unwrap_or_default().to_owned();
                Ok(Occurrence {
                    name: *name,
                    argument,
                    words: word.to_owned(),
                })
            }
        }
    }

    /// `-h`, `-V`, and `-T` with its argument attached or not. More letters may follow `-h` and `-V`, which come too late
    /// to matter: the program ends there.
    fn short(&mut self, word: &str, letter: char) -> Result<Occurrence, Error> {
        let occurrence = |name, argument: &str| Occurrence {
            name,
            argument: argument.to_owned(),
            words: word.to_owned(),
        };
        match letter {
            'h' => Ok(occurrence(Name::Help, "")),
            'V' => Ok(occurrence(Name::Version, "")),
            'T' if word == "-T" => self.detached(Name::Trace, word, word.to_owned()),
            'T' => Ok(occurrence(
                Name::Trace,
                word.strip_prefix("-T").unwrap_or_default(),
            )),
            _ => {
                let long = word
                    .trim_start_matches('-')
                    .split('=')
                    .next()
                    .unwrap_or_default();
                let nearest = nearest(long).filter(|_| long.len() > 1);
                Err(Error::UnknownLetter { letter, nearest })
            }
        }
    }

    /// An option whose argument is the next word.
    fn detached(&mut self, name: Name, word: &str, option: String) -> Result<Occurrence, Error> {
        let argument = self.word()?.ok_or(Error::NeedsArgument { option })?;
        let words = format!("{word} {argument}");
        Ok(Occurrence {
            name,
            argument,
            words,
        })
    }

    fn word(&mut self) -> Result<Option<String>, Error> {
        let Some(word) = self.arguments.next() else {
            return Ok(None);
        };
        self.position += 1;
        word.into_string().map(Some).map_err(|word| Error::NotUtf8 {
            position: self.position,
            shown: word.as_encoded_bytes().escape_ascii().to_string(),
        })
    }
}

/// The option that `long` stands for: its name, or the beginning of no other one's.
fn find(long: &str) -> Result<&'static Spelling, Error> {
    if let Some(exact) = QEMU
        .iter()
        .chain(OURS)
        .find(|spelling| spelling.long == long)
    {
        return Ok(exact);
    }
    let option = format!("--{long}");
    for options in [QEMU, OURS] {
        let fitting: Vec<&Spelling> = options
            .iter()
            .filter(|spelling| spelling.long.starts_with(long))
            .collect();
        match fitting.as_slice() {
            [] => (),
            [only] => return Ok(only),
            several => {
                let candidates = several
                    .iter()
                    .map(|spelling| format!("'--{}'", spelling.long))
                    .collect();
                return Err(Error::AmbiguousOption { option, candidates });
            }
        }
    }
    Err(Error::UnknownOption {
        option,
        nearest: nearest(long),
    })
}

/// The option that looks most like `long`, with its dashes.
fn nearest(long: &str) -> Option<String> {
    let names = QEMU.iter().chain(OURS).map(|spelling| spelling.long);
    suggest::nearest(long, names).map(|name| format!("--{name}"))
}
