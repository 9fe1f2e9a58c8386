//! The one error of the crate: what is wrong with an argument, in the words that scripts know.
//!
//! It never says where an argument came from, except in [`Error::At`], which [`crate::command`] wraps around the rest.

use std::fmt;

/// Why an argument was refused.
///
/// `Display` gives the message without the program's name: a caller prints `NAME: ERROR` and exits with 1, NAME being
/// the word the program was called by. Fields named `name` hold a parameter's full dotted path (`file.driver`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An error in the argument of one option of the command line, with the words as the user typed them
    /// (`--blockdev foo=1`, or `--blockdev=foo=1`).
    #[error("{}: {error}", Plain(words))]
    At {
        /// The option and its argument as typed. Printed with control characters escaped, and cut when very long.
        words: String,
        /// What is wrong with it.
        error: Box<Error>,
    },

    /// A key that is not made of dotted names and indices.
    #[error("Invalid parameter '{}'", Plain(key))]
    InvalidKey {
        /// The whole key.
        key: String,
    },
    /// One dotted part of a key is longer than [`crate::keyval::MAX_FRAGMENT`] bytes.
    #[error("Parameter{} '{}' is too long", if *.whole { "" } else { " fragment" }, Plain(.fragment))]
    KeyTooLong {
        /// The part that is too long.
        fragment: String,
        /// Whether the part is the whole key.
        whole: bool,
    },
    /// A word without `=` where a parameter was expected.
    #[error("Expected '=' after parameter '{}'", Plain(key))]
    ExpectedEquals {
        /// The word.
        key: String,
    },
    /// `help` or `?` given to an option that has none of its own.
    #[error("Help is not available for this option (see --help)")]
    NoHelp,
    /// One name used as a value and as a group, or as a list and as a group.
    #[error("Parameters '{}.*' used inconsistently", Plain(prefix))]
    Inconsistent {
        /// The dotted path of the group.
        prefix: String,
    },
    /// A list with a hole.
    #[error("Parameter '{}' missing", Plain(name))]
    MissingElement {
        /// The dotted path of the first missing element.
        name: String,
    },
    /// Groups inside groups deeper than [`crate::keyval::MAX_DEPTH`], or nodes inside nodes deeper than
    /// [`crate::blockdev::MAX_NESTING`].
    #[error("{what} nested more than {limit} deep")]
    TooDeep {
        /// What is nested.
        what: &'static str,
        /// The greatest depth that is accepted.
        limit: usize,
    },
    /// More parameters than [`crate::keyval::MAX_PARAMETERS`].
    #[error("More than {limit} parameters in one argument")]
    TooMany {
        /// The greatest number that is accepted.
        limit: usize,
    },

    /// Text that is not JSON.
    #[error("JSON parse error, {} (at byte {offset})", Plain(problem))]
    JsonSyntax {
        /// What is wrong.
        problem: String,
        /// Where, in bytes from the start of the text.
        offset: usize,
    },
    /// A byte that no message of the monitor can have there.
    #[error("JSON parse error, stray '{shown}'")]
    JsonStray {
        /// The byte, so that a terminal can take it.
        shown: String,
    },
    /// A message of the monitor of more than [`crate::qmp::splitter::MAX_MESSAGE`] bytes.
    #[error("JSON token size limit exceeded")]
    MessageTooLong,
    /// JSON nested deeper than [`crate::json::MAX_DEPTH`].
    #[error("JSON nesting depth limit exceeded")]
    JsonDepth,
    /// Something behind the end of a JSON value.
    #[error("Expecting at most one JSON value")]
    JsonTrailing,

    /// A mandatory parameter is not there.
    #[error("Parameter '{name}' is missing")]
    Missing {
        /// The parameter.
        name: String,
    },
    /// A parameter that nothing here knows.
    #[error("Parameter '{}' is unexpected{}", Plain(name), DidYouMean(nearest))]
    Unexpected {
        /// The parameter.
        name: String,
        /// The valid parameter that looks most like it.
        nearest: Option<String>,
    },
    /// A group of dotted parameters where one value belongs.
    #[error("Parameters '{name}.*' are unexpected")]
    UnexpectedGroup {
        /// The group.
        name: String,
    },
    /// A word that is not one of the accepted ones.
    #[error(
        "Parameter '{name}' does not accept value '{}'{}",
        Plain(value),
        DidYouMean(nearest)
    )]
    BadValue {
        /// The parameter.
        name: String,
        /// The refused value.
        value: String,
        /// The accepted value that looks most like it.
        nearest: Option<String>,
    },
    /// Text that does not say what kind of value is needed: `'on' or 'off'`, `integer`, `an identifier`, …
    #[error("Parameter '{name}' expects {expected}")]
    Expects {
        /// The parameter.
        name: String,
        /// What belongs there.
        expected: String,
    },
    /// A JSON value of the wrong type.
    #[error("Invalid parameter type for '{name}', expected: {expected}")]
    WrongType {
        /// The parameter.
        name: String,
        /// The type that belongs there.
        expected: &'static str,
    },
    /// A number of bytes that is negative.
    #[error("Value '{value}' is out of range for parameter '{name}'")]
    OutOfRange {
        /// The parameter.
        name: String,
        /// The value as understood.
        value: i64,
    },
    /// A number outside the range of an iothread's property.
    #[error("{name} value must be in range [0, {}]", i64::MAX)]
    PropertyRange {
        /// The property.
        name: String,
    },
    /// A number that the parameter cannot take.
    #[error("{name} is invalid")]
    Invalid {
        /// The parameter.
        name: String,
    },
    /// Sizes or times of a cache that contradict each other or cannot be, as a whole sentence.
    #[error("{0}")]
    Caches(&'static str),
    /// Properties of an object, or rules, that contradict each other or cannot be, as a whole sentence.
    #[error("{0}")]
    Object(&'static str),
    /// The length of a burst that is negative or does not fit 32 bits.
    #[error("{name} value must be in the range [0, {}]", u32::MAX)]
    LengthRange {
        /// The property.
        name: &'static str,
    },
    /// A property that the object does not have.
    #[error("Property '{kind}.{}' not found", Plain(name))]
    NoProperty {
        /// The object's type.
        kind: &'static str,
        /// The property.
        name: String,
    },
    /// A property that cannot be changed.
    #[error("Property '{kind}.{}' is not writable", Plain(name))]
    FixedProperty {
        /// The object's type.
        kind: &'static str,
        /// The property.
        name: String,
    },
    /// A size that `blkdebug` cannot claim to have.
    #[error("Cannot meet constraints with {name} {value}")]
    Constraint {
        /// The parameter.
        name: &'static str,
        /// Its value in bytes.
        value: u64,
    },
    /// A mistake in a file of rules.
    #[error("line {line}: {error}")]
    ConfigLine {
        /// The line, counted from 1.
        line: usize,
        /// The mistake.
        error: Box<Error>,
    },
    /// Two parameters that contradict each other.
    #[error("Parameters '{first}' and '{second}' cannot be used together: {reason}")]
    Conflict {
        /// One of them.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// Why.
        reason: &'static str,
    },

    /// A node at the top without a name: nothing could ever refer to it.
    #[error("'node-name' must be specified for the root node")]
    NodeNameMissing,
    /// A node that is to be opened anew, without a name.
    #[error("node-name not specified")]
    NodeNameNotSpecified,
    /// A node name that is not an identifier.
    #[error("Invalid node-name: '{}'", Plain(name))]
    InvalidNodeName {
        /// The name.
        name: String,
    },
    /// A node name of more than [`crate::blockdev::MAX_NODE_NAME`] bytes.
    #[error("Node name too long")]
    NodeNameTooLong,
    /// `detect-zeroes=unmap` without `discard=unmap`.
    #[error(
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
    )]
    DetectZeroesNeedsDiscard,
    /// An export's id that is not an identifier.
    #[error("Invalid block export id")]
    InvalidExportId,
    /// An empty list of iothreads.
    #[error("The set of I/O threads must not be empty")]
    NoIothreads,
    /// A driver, type or parameter that `qemu-storage-daemon` has and this version does not.
    #[error("{what} is not built into this version yet")]
    NotBuilt {
        /// What, in words that start a message: `driver 'throttle'`, `parameter 'pr-manager'`.
        what: String,
    },

    /// `blockdev-create` with a driver that stands on what is there.
    #[error("Driver does not support blockdev-create")]
    DriverMakesNothing,
    /// A file of arguments that holds something else.
    #[error("expected a JSON object, or a list of them, as for the option itself")]
    FileHoldsNoObjects,
    /// More arguments in a file than [`crate::command::MAX_FILE_ARGUMENTS`].
    #[error("More than {limit} arguments in one file")]
    TooManyInFile {
        /// The greatest number that is accepted.
        limit: usize,
    },
    /// A mistake in a chardev, as a whole sentence.
    #[error("{}", Plain(.0))]
    Chardev(String),
    /// A monitor that is not one for programs.
    #[error("Only QMP is supported")]
    OnlyQmp,

    /// An option of `qemu-storage-daemon` that this version does not have.
    #[error("`{option}` is not built into this version yet")]
    OptionNotBuilt {
        /// The option.
        option: &'static str,
    },
    /// An option that does not exist.
    #[error("unrecognized option '{}'{}", Plain(option), DidYouMean(nearest))]
    UnknownOption {
        /// The option as typed, without an attached argument.
        option: String,
        /// The option that looks most like it.
        nearest: Option<String>,
    },
    /// An abbreviation that fits several options.
    #[error("option '{option}' is ambiguous; possibilities: {}", candidates.join(" "))]
    AmbiguousOption {
        /// The option as typed.
        option: String,
        /// What it could stand for.
        candidates: Vec<String>,
    },
    /// A letter behind a single dash that is not an option.
    #[error("invalid option -- '{}'{}", letter.escape_debug(), DidYouMean(nearest))]
    UnknownLetter {
        /// The letter.
        letter: char,
        /// The long option that was probably meant.
        nearest: Option<String>,
    },
    /// An option without the argument that it needs.
    #[error("option '{option}' requires an argument")]
    NeedsArgument {
        /// The option.
        option: String,
    },
    /// An argument attached to an option that takes none.
    #[error("option '{option}' doesn't allow an argument")]
    TakesNoArgument {
        /// The option.
        option: String,
    },
    /// A word that belongs to no option.
    #[error("{}: Unexpected argument", Plain(word))]
    UnexpectedArgument {
        /// The word.
        word: String,
    },
    /// An argument that is not text.
    #[error("argument {position} is not valid UTF-8: {}", Plain(shown))]
    NotUtf8 {
        /// Its place on the command line; the program's name is 0.
        position: usize,
        /// The argument, with what is not ASCII as `\xNN`.
        shown: String,
    },
}

/// Prints ` (did you mean 'X'?)`, or nothing.
struct DidYouMean<'a>(&'a Option<String>);

impl fmt::Display for DidYouMean<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(nearest) => write!(f, " (did you mean '{nearest}'?)"),
            None => Ok(()),
        }
    }
}

/// The most characters of a user's text that a message repeats.
const SHOWN: usize = 1000;

/// A user's text as a terminal can take it: control characters escaped, cut behind [`SHOWN`] characters.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, letter) in self.0.chars().enumerate() {
            if place == SHOWN {
                return f.write_str("…");
            }
            if letter.is_control() {
                write!(f, "{}", letter.escape_default())?;
            } else {
                write!(f, "{letter}")?;
            }
        }
        Ok(())
    }
}
