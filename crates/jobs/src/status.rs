//! The life of a job as QEMU's `JobStatus` has it: which state follows which, and which commands a state accepts. Only
//! tables; names, order and wording are those of the QAPI schema (`qapi/job.json`).

use std::fmt;

use diskfuse_block::{Error, Kind, Result};

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobType {
    /// Puts data of an overlay into the image below.
    Commit,
    /// Puts data of images below into an overlay.
    Stream,
    /// Keeps a copy that is the same as the disk.
    Mirror,
    /// Makes a copy of what the disk was when it began.
    Backup,
    /// Makes an image.
    Create,
    /// Changes the options of an image.
    Amend,
}

impl JobType {
    /// As in the schema.
    pub fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Stream => "stream",
            Self::Mirror => "mirror",
            Self::Backup => "backup",
            Self::Create => "create",
            Self::Amend => "amend",
        }
    }

    /// Whether it works on a node, so that the commands and events of block jobs are for it too.
    pub fn is_block_job(self) -> bool {
        !matches!(self, Self::Create | Self::Amend)
    }
}

impl fmt::Display for JobType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Its id is taken; nobody sees it yet.
    Undefined,
    /// It is there and has not begun.
    Created,
    /// It works.
    Running,
    /// It stands still because somebody said so, or because of an error.
    Paused,
    /// What it makes is as good as done and is kept so; it can be completed.
    Ready,
    /// Ready, and paused.
    Standby,
    /// Done, and waits for the others of its transaction.
    Waiting,
    /// Waits to be finalized.
    Pending,
    /// It failed, or was cancelled, and puts things in order.
    Aborting,
    /// All is over but for its being dismissed.
    Concluded,
    /// It is gone.
    Null,
}

impl Status {
    /// As in the schema.
    pub fn name(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }

    /// Whether a job may go from here to there.
    pub fn may_become(self, next: Self) -> bool {
        let allowed: &[Self] = match self {
            Self::Undefined => &[Self::Created, Self::Null],
            Self::Created => &[Self::Running, Self::Aborting, Self::Null],
            Self::Running => &[Self::Paused, Self::Ready, Self::Waiting, Self::Aborting],
            Self::Paused => &[Self::Running],
            Self::Ready => &[Self::Standby, Self::Waiting, Self::Aborting],
            Self::Standby => &[Self::Ready],
            Self::Waiting => &[Self::Pending, Self::Aborting],
            Self::Pending | Self::Aborting => &[Self::Aborting, Self::Concluded],
            Self::Concluded => &[Self::Null],
            Self::Null => &[],
        };
        allowed.contains(&next)
    }

    /// Whether its work is over, for good or ill.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Concluded | Self::Null)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What can be asked of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// To give up.
    Cancel,
    /// To stand still.
    Pause,
    /// To go on.
    Resume,
    /// To work at another speed.
    SetSpeed,
    /// To finish what is ready.
    Complete,
    /// To be forgotten.
    Dismiss,
    /// To make its result the truth.
    Finalize,
    /// To do it another way.
    Change,
}

impl Verb {
    /// As in the schema.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed => "set-speed",
            Self::Complete => "complete",
            Self::Dismiss => "dismiss",
            Self::Finalize => "finalize",
            Self::Change => "change",
        }
    }

    fn is_for(self, status: Status) -> bool {
        use Status::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        match self {
            Self::Cancel => {
                matches!(
                    status,
                    Created | Running | Paused | Ready | Standby | Waiting | Pending
                )
            }
            Self::Pause | Self::Resume | Self::SetSpeed | Self::Change => {
                matches!(status, Created | Running | Paused | Ready | Standby)
            }
            Self::Complete => matches!(status, Ready | Standby),
            Self::Finalize => status == Pending,
            Self::Dismiss => status == Concluded,
        }
    }

    /// The error for a job that does not accept it now.
    pub(crate) fn check(self, id: &str, status: Status) -> Result<()> {
        if self.is_for(status) {
            return Ok(());
        }
        let verb = self.name();
        let message = format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'");
        Err(Error::new(Kind::Invalid, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_at_the_wrong_time_is_refused_in_the_words_that_scripts_match() {
        let error = Verb::Complete.check("j0", Status::Running).unwrap_err();
        let expected = "Job 'j0' in state 'running' cannot accept command verb 'complete'";
        assert_eq!(error.to_string(), expected);
        Verb::Complete.check("j0", Status::Ready).unwrap();
        Verb::SetSpeed.check("j0", Status::Standby).unwrap();
        Verb::Dismiss.check("j0", Status::Pending).unwrap_err();
    }

    #[test]
    fn what_is_gone_stays_gone() {
        use Status::{Concluded, Created, Null, Paused, Running};
        for next in [Created, Running, Paused, Concluded, Null] {
            assert!(!Null.may_become(next));
        }
        assert!(Paused.may_become(Running) && !Paused.may_become(Concluded));
    }
}
