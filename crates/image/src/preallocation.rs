//! How much of a new disk is allocated at once.

use diskfuse_block::{Error, Kind, Result};

use crate::format::Format;

/// What of new space is allocated before it is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The tables: every cluster has its place in the file, which may be a hole (qcow2 only).
    Metadata,
    /// The space as well, reserved by the host.
    Falloc,
    /// The space as well, by writing zeroes.
    Full,
}

impl Preallocation {
    /// As it is written in options. [`Kind::Invalid`] for any other word.
    pub fn parse(word: &str) -> Result<Self> {
        match word {
            "off" => Ok(Self::Off),
            "metadata" => Ok(Self::Metadata),
            "falloc" => Ok(Self::Falloc),
            "full" => Ok(Self::Full),
            _ => Err(Error::new(
                Kind::Invalid,
                format!("'{word}' is no preallocation: it is off, metadata, falloc or full"),
            )),
        }
    }

    /// What it means for a file without tables.
    pub(crate) fn of_space(self) -> Self {
        match self {
            Self::Metadata => Self::Off,
            other => other,
        }
    }

    /// [`Kind::Invalid`] if the format has no such preallocation.
    pub(crate) fn check(self, format: Format) -> Result<()> {
        match (self, format) {
            (Self::Metadata, Format::Raw) => Err(Error::new(
                Kind::Invalid,
                "a raw image has no metadata to preallocate: it is off, falloc or full",
            )),
            _ => Ok(()),
        }
    }
}
