//! What `--object` says: helpers that nodes and exports refer to by id. Makes none of them.

mod qom;
mod secret;
mod shape;
mod throttle_group;

use serde_json::{Map, Value};

use crate::command::HelpTopic;
use crate::error::Error;
use crate::fields::{self, Fields, Tree};
pub(crate) use shape::shape;

pub use qom::Property;
pub use secret::{SecretFormat, SecretOptions, SecretSource};
pub(crate) use throttle_group::property_names as throttle_group_property_names;
pub use throttle_group::{MAX_RATE, ThrottleGroupOptions, ThrottleLimits, ThrottleRate};

/// One object: the argument of `--object` (`ObjectOptions` in QEMU's `qapi/qom.json`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectOptions {
    /// `iothread`: a thread with an event loop.
    Iothread(IothreadOptions),
    /// `throttle-group`: limits that nodes share.
    ThrottleGroup(ThrottleGroupOptions),
    /// `secret`: something not to be seen, by name.
    Secret(SecretOptions),
}

/// Properties of an iothread (`IothreadProperties` in QEMU's `qapi/qom.json`). All numbers go up to `i64::MAX`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IothreadOptions {
    /// The iothread's name: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// The longest busy wait for events before the thread sleeps, in nanoseconds; 0: never waits busily.
    /// Default: [`DEFAULT_POLL_MAX_NS`].
    pub poll_max_ns: u64,
    /// By what the busy wait is multiplied when it was too short; 0: the event loop chooses. Default: 0.
    pub poll_grow: u64,
    /// By what the busy wait is divided when it was too long; 0: it is set to zero at once. Default: 0.
    pub poll_shrink: u64,
    /// How many requests are handed to the kernel in one batch at most; 0: the event loop chooses. Default: 0.
    pub aio_max_batch: u64,
}

/// How long an iothread waits busily when nothing is said, in nanoseconds (what QEMU does).
pub const DEFAULT_POLL_MAX_NS: u64 = 32_768;

/// Types of object that `qemu-storage-daemon` 10.0 and 11.1 know (their `--object help`).
const KNOWN_TO_QEMU: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "iothread",
    "main-loop",
    "monitor-qmp",
    "pr-manager-helper",
    "secret",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// What the argument of `--object` may ask for.
#[derive(Debug)]
pub(crate) enum Request {
    /// An object.
    Object(ObjectOptions),
    /// Which objects there are, or the properties of one.
    Help(HelpTopic),
}

impl ObjectOptions {
    /// The types that can be made.
    pub(crate) fn types() -> &'static [&'static str] {
        &["iothread", "secret", "throttle-group"]
    }

    /// Reads the argument of `--object`, in either syntax. Help (`iothread,help`) is refused here; the command line
    /// serves it.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn parse(argument: &str) -> Result<Self, Error> {
        match Request::parse(argument)? {
            Request::Object(object) => Ok(object),
            Request::Help(_) => Err(Error::NoHelp),
        }
    }

    /// Reads the arguments of `object-add`, which are those of `--object` in JSON.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn from_json(members: Map<String, Value>) -> Result<Self, Error> {
        Self::from_fields(Tree::of_json(members).fields()?)
    }

    pub(crate) fn from_fields(fields: Fields<'_>) -> Result<Self, Error> {
        match Request::of(fields, false)? {
            Request::Object(object) => Ok(object),
            Request::Help(_) => Err(Error::NoHelp),
        }
    }
}

impl Request {
    pub(crate) fn parse(argument: &str) -> Result<Self, Error> {
        let tree = Tree::read(argument, "qom-type")?;
        Self::of(tree.fields_despite_help(), tree.help)
    }

    fn of(mut fields: Fields<'_>, help: bool) -> Result<Self, Error> {
        let kind = fields.text("qom-type")?;
        if help {
            return Ok(Self::Help(match kind {
                Some("iothread") => HelpTopic::Iothread,
                Some("throttle-group") => HelpTopic::ThrottleGroup,
                Some("secret") => HelpTopic::Secret,
                _ => HelpTopic::Objects,
            }));
        }
        let object = match fields.require("qom-type", kind)? {
            "iothread" => IothreadOptions::read(fields).map(ObjectOptions::Iothread),
            "throttle-group" => {
                ThrottleGroupOptions::read(fields).map(ObjectOptions::ThrottleGroup)
            }
            "secret" => SecretOptions::read(fields).map(ObjectOptions::Secret),
            kind if KNOWN_TO_QEMU.contains(&kind) => Err(Error::NotBuilt {
                what: format!("object type '{kind}'"),
            }),
            kind => Err(fields::bad_value(
                "qom-type",
                kind,
                KNOWN_TO_QEMU.iter().copied(),
            )),
        };
        object.map(Self::Object)
    }
}

impl IothreadOptions {
    fn read(mut fields: Fields<'_>) -> Result<Self, Error> {
        let id = fields.identifier("id")?;
        let id = fields.require("id", id)?.to_owned();
        let mut iothread = Self {
            id,
            poll_max_ns: DEFAULT_POLL_MAX_NS,
            poll_grow: 0,
            poll_shrink: 0,
            aio_max_batch: 0,
        };
        iothread.read_properties(&mut fields)?;
        fields.not_built(&["thread-pool-min", "thread-pool-max", "poll-weight"])?;
        fields.finish()?;
        Ok(iothread)
    }

    /// Takes those that are given; on an error none.
    fn read_properties(&mut self, fields: &mut Fields<'_>) -> Result<(), Error> {
        let poll_max_ns = read_property(fields, "poll-max-ns")?;
        let poll_grow = read_property(fields, "poll-grow")?;
        let poll_shrink = read_property(fields, "poll-shrink")?;
        let aio_max_batch = read_property(fields, "aio-max-batch")?;
        self.poll_max_ns = poll_max_ns.unwrap_or(self.poll_max_ns);
        self.poll_grow = poll_grow.unwrap_or(self.poll_grow);
        self.poll_shrink = poll_shrink.unwrap_or(self.poll_shrink);
        self.aio_max_batch = aio_max_batch.unwrap_or(self.aio_max_batch);
        Ok(())
    }
}

fn read_property(fields: &mut Fields<'_>, name: &'static str) -> Result<Option<u64>, Error> {
    let Some(number) = fields.integer(name)? else {
        return Ok(None);
    };
    u64::try_from(number)
        .map(Some)
        .map_err(|_| Error::PropertyRange {
            name: fields.full_name(name),
        })
}

#[cfg(test)]
mod tests;
