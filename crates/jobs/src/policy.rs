//! What a job does about errors of its source and of its target: decided by what its starter said. It does nothing
//! itself.

use diskfuse_block::Error;

use crate::event::{ErrorAction, IoStatus};

/// `on-source-error` and `on-target-error` (`BlockdevOnError`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// It tries again, and goes on meanwhile.
    Ignore,
    /// It pauses if there is no space, else it fails.
    Enospc,
    /// It pauses.
    Stop,
    /// What the device would do: jobs have none, so as [`OnError::Enospc`].
    Auto,
}

impl OnError {
    /// What is done about this error.
    pub(crate) fn action(self, error: &Error) -> ErrorAction {
        match self {
            Self::Report => ErrorAction::Report,
            Self::Ignore => ErrorAction::Ignore,
            Self::Stop => ErrorAction::Stop,
            Self::Enospc | Self::Auto => match error.errno() {
                libc::ENOSPC => ErrorAction::Stop,
                _ => ErrorAction::Report,
            },
        }
    }
}

/// How an error that stopped a job is shown.
pub(crate) fn io_status(error: &Error) -> IoStatus {
    match error.errno() {
        libc::ENOSPC => IoStatus::NoSpace,
        _ => IoStatus::Failed,
    }
}
