//! Answers of the monitor: the greeting, what a command gives back, and errors.

use serde_json::{Map, Value, json};

use super::version_info;
use crate::commands::Kind;
use crate::error::Error;

/// The class of an error (`QapiErrorClass` in QEMU's `qapi/error.json`): what programs look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Any.
    GenericError,
    /// There is no such command, or not now.
    CommandNotFound,
    /// There is no such device.
    DeviceNotFound,
    /// The device, or the job, does not do what it would have to.
    DeviceNotActive,
}

/// Why a command failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// For programs.
    pub class: ErrorClass,
    /// For people, and for the scripts that match it.
    pub desc: String,
}

impl ErrorClass {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
        }
    }
}

impl QmpError {
    /// An error of the class that most have.
    pub fn generic(desc: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, desc)
    }

    /// An error.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> Self {
        let desc = desc.into();
        Self { class, desc }
    }

    /// There is no such command.
    pub fn no_command(name: &str) -> Self {
        // A name is as long as the client likes; nobody needs more of it.
        let name: String = name.chars().take(200).collect();
        let desc = format!("The command {name} has not been found");
        Self::new(ErrorClass::CommandNotFound, desc)
    }
}

impl From<Error> for QmpError {
    fn from(error: Error) -> Self {
        Self::generic(error.to_string())
    }
}

/// The first message of a session.
pub fn greeting() -> Value {
    json!({"QMP": {"version": version_info().to_value(), "capabilities": ["oob"]}})
}

/// The answer to a request with this id. The order of the members is QEMU's: the id comes last, except in an error.
pub fn reply(outcome: Result<Value, QmpError>, id: Option<Value>) -> Value {
    let mut members = Map::new();
    let mut add = |name: &str, value| members.insert(name.to_owned(), value);
    match outcome {
        Ok(value) => {
            add("return", value);
            id.map(|id| add("id", id));
        }
        Err(error) => {
            id.map(|id| add("id", id));
            let error = json!({"class": error.class.name(), "desc": error.desc});
            add("error", error);
        }
    }
    Value::Object(members)
}
