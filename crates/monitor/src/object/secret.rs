//! `secret`: something that is not to be seen on a command line, by name. Reads no file, and never shows what it is in a
//! message.

use std::fmt;
use std::path::PathBuf;

use super::qom::Property;
use crate::error::Error;
use crate::fields::Fields;

/// Properties of a secret (`SecretProperties` in QEMU's `qapi/qom.json`), but for those that say that it is encrypted
/// itself.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretOptions {
    /// The secret's name: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// Where it is.
    pub source: SecretSource,
    /// How it is written there. Default: raw.
    pub format: SecretFormat,
}

/// Where a secret is.
#[derive(Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// `data`: here.
    Data(String),
    /// `file`: it is what is in this file.
    File(PathBuf),
}

/// How a secret is written (`QCryptoSecretFormat` in QEMU's `qapi/crypto.json`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SecretFormat {
    /// `raw`: as it is.
    #[default]
    Raw,
    /// `base64`: as text that stands for bytes (RFC 4648, section 4).
    Base64,
}

impl SecretFormat {
    const WORDS: &[(&str, Self)] = &[("raw", Self::Raw), ("base64", Self::Base64)];

    fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Base64 => "base64",
        }
    }
}

impl SecretOptions {
    pub(super) fn read(mut fields: Fields<'_>) -> Result<Self, Error> {
        let id = fields.identifier("id")?;
        let id = fields.require("id", id)?.to_owned();
        let data = fields.text("data")?;
        let file = fields.text("file")?;
        let format = fields.word("format", SecretFormat::WORDS)?;
        fields.not_built(&["keyid", "iv"])?;
        fields.finish()?;
        let source = match (data, file) {
            (Some(data), None) => SecretSource::Data(data.to_owned()),
            (None, Some(file)) => SecretSource::File(PathBuf::from(file)),
            (Some(_), Some(_)) => {
                return Err(Error::Object("'file' and 'data' are mutually exclusive"));
            }
            (None, None) => {
                return Err(Error::Object("Either 'file' or 'data' must be provided"));
            }
        };
        let secret = Self {
            id,
            source,
            format: format.unwrap_or_default(),
        };
        if let SecretSource::Data(data) = &secret.source {
            secret.check(data.as_bytes())?;
        }
        Ok(secret)
    }

    /// Whether this is a secret in the format that was said.
    ///
    /// # Errors
    /// In QEMU's words, without what is wrong with it.
    pub fn check(&self, written: &[u8]) -> Result<(), Error> {
        let base64 = |byte: &u8| byte.is_ascii_alphanumeric() || b"+/=\n".contains(byte);
        if self.format == SecretFormat::Base64 && !written.iter().all(base64) {
            return Err(Error::Object("Base64 data contains invalid characters"));
        }
        Ok(())
    }

    pub(super) fn properties(&self) -> Vec<Property> {
        let (data, file) = match &self.source {
            SecretSource::Data(data) => (Some(data.as_str()), None),
            SecretSource::File(file) => (None, Some(file.to_string_lossy())),
        };
        vec![
            Property::text("data", data.unwrap_or_default()),
            Property::text("file", &file.unwrap_or_default()),
            Property {
                kind: "QCryptoSecretFormat",
                ..Property::text("format", self.format.word())
            },
        ]
    }
}

impl fmt::Debug for SecretOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretOptions")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
