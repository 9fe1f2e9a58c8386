//! Splits what a client sends into JSON values: they may stand on several lines, or several on one. Reads strings and
//! brackets only; what lies between them is for [`crate::json`] to understand.
//!
//! It keeps at most [`MAX_MESSAGE`] bytes, whatever comes.

use serde_json::Value;

use crate::error::Error;
use crate::json::{self, MAX_DEPTH};

/// The longest message, in bytes. QEMU takes 64 MiB; no command needs more than some KiB.
pub const MAX_MESSAGE: usize = 1 << 20;

/// A stream of messages.
#[derive(Debug, Default)]
pub struct Splitter {
    /// The message so far.
    message: Vec<u8>,
    depth: usize,
    state: State,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between values, or between the parts of one.
    #[default]
    Outside,
    /// Inside a string that began with this quote.
    String(u8),
    /// Behind a backslash in such a string.
    Escape(u8),
    /// Inside a word or a number.
    Word,
    /// Behind a mistake that hides where the next message begins: behind the next control character, or a byte that UTF-8 never
    /// has.
    Lost,
    /// Behind a bracket too many: more of them are the same mistake.
    Closed,
}

/// What a byte means.
enum Step {
    /// It is part of the message.
    Part,
    /// It is the last one of the message.
    Last,
    /// It stands behind the message and is yet to be looked at.
    Behind,
    /// It cannot be.
    Wrong(Error),
}

impl Splitter {
    /// Takes from `input` up to the end of the next message. `None`: all of it has been taken, and more is needed.
    ///
    /// An error stands for a message that cannot be understood; those behind it can.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Result<Value, Error>> {
        while let Some((&byte, rest)) = input.split_first() {
            if self.state == State::Lost {
                *input = rest;
                if begins_anew(byte) {
                    self.state = State::Outside;
                }
                continue;
            }
            if self.state == State::Closed {
                if matches!(byte, b'}' | b']') {
                    *input = rest;
                    continue;
                }
                self.state = State::Outside;
            }
            match self.step(byte) {
                Step::Part => {
                    *input = rest;
                    // Blanks between messages are none of them.
                    if !(self.message.is_empty() && byte.is_ascii_whitespace()) {
                        self.message.push(byte);
                    }
                    if self.message.len() > MAX_MESSAGE {
                        return Some(Err(self.lose(byte, Error::MessageTooLong)));
                    }
                }
                Step::Last => {
                    *input = rest;
                    self.message.push(byte);
                    return Some(self.complete());
                }
                Step::Behind => return Some(self.complete()),
                Step::Wrong(error) => {
                    *input = rest;
                    return Some(Err(self.lose(byte, error)));
                }
            }
        }
        None
    }

    /// Takes the end of the stream: a word at its end is complete then. Whatever else is unfinished is dropped.
    pub fn finish(&mut self) -> Option<Result<Value, Error>> {
        (self.state == State::Word && self.depth == 0).then(|| self.complete())
    }

    fn step(&mut self, byte: u8) -> Step {
        match self.state {
            State::String(_) | State::Escape(_) if begins_anew(byte) => {
                Step::Wrong(Self::stray(byte))
            }
            State::Escape(quote) => {
                self.state = State::String(quote);
                Step::Part
            }
            State::String(quote) if byte == quote => {
                self.state = State::Outside;
                self.last_if_alone()
            }
            State::String(quote) if byte == b'\\' => {
                self.state = State::Escape(quote);
                Step::Part
            }
            State::String(_) => Step::Part,
            State::Word if is_word(byte) => Step::Part,
            State::Word if self.depth == 0 => {
                self.state = State::Outside;
                Step::Behind
            }
            State::Word | State::Outside | State::Lost | State::Closed => self.begin(byte),
        }
    }

    /// A byte that is neither inside a string nor inside a word.
    fn begin(&mut self, byte: u8) -> Step {
        self.state = State::Outside;
        match byte {
            b'{' | b'[' if self.depth == MAX_DEPTH => Step::Wrong(Error::JsonDepth),
            b'{' | b'[' => {
                self.depth += 1;
                Step::Part
            }
            b'}' | b']' if self.depth == 0 => Step::Wrong(Error::JsonSyntax {
                problem: "expecting value".to_owned(),
                offset: 0,
            }),
            b'}' | b']' => {
                self.depth -= 1;
                self.last_if_alone()
            }
            b'"' | b'\'' => {
                self.state = State::String(byte);
                Step::Part
            }
            b' ' | b'\t' | b'\r' | b'\n' => Step::Part,
            b',' | b':' if self.depth > 0 => Step::Part,
            _ if is_word(byte) => {
                self.state = State::Word;
                Step::Part
            }
            _ => Step::Wrong(Self::stray(byte)),
        }
    }

    fn last_if_alone(&self) -> Step {
        if self.depth == 0 {
            Step::Last
        } else {
            Step::Part
        }
    }

    fn complete(&mut self) -> Result<Value, Error> {
        let message = std::mem::take(&mut self.message);
        *self = Self::default();
        let text = String::from_utf8(message).map_err(|_| Self::stray(0xff))?;
        json::parse(&text)
    }

    /// Forgets the message; `byte` was the last one of it.
    fn lose(&mut self, byte: u8, error: Error) -> Error {
        let alone = self.depth == 0 && self.state == State::Outside;
        *self = Self::default();
        self.state = match byte {
            // It hides nothing.
            b'}' | b']' if alone => State::Closed,
            byte if begins_anew(byte) => State::Outside,
            _ => State::Lost,
        };
        error
    }

    /// The error for a byte that no message can have there.
    fn stray(byte: u8) -> Error {
        let shown = match byte {
            0x80.. => "\\uFFFD".to_owned(),
            _ => byte.escape_ascii().to_string(),
        };
        Error::JsonStray { shown }
    }
}

/// Whether whatever came before is over: so clients that lost their place get a message understood (docs/interop/qmp-spec.rst, "QGA
/// Synchronization", and QEMU's monitors alike).
fn begins_anew(byte: u8) -> bool {
    matches!(byte, 0..=0x1f | 0xfe..)
}

/// Whether words and numbers have such bytes.
fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'+' | b'.' | b'_')
}

#[cfg(test)]
mod tests;
