//! Tells whoever wants to know of requests that the disk failed. Of some of them: a disk that fails everything must not
//! drown who listens, nor cost its queues more than a look at one number.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use diskfuse_block::{Access, Error, Kind};

/// Errors told of in one second, for each export.
const MOST: u64 = 4;

/// Who is told of requests that the disk failed: the node, what was to be done, and the error. At most a few are told of in
/// a second. Called on the queues' threads, several at once; must not block.
#[derive(Clone)]
pub struct OnError(Arc<Tell>);

type Tell = dyn Fn(&str, Access, &Error) + Send + Sync;

impl OnError {
    /// Calls this.
    pub fn new(tell: impl Fn(&str, Access, &Error) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    /// Tells of one.
    pub(crate) fn tell(&self, node: &str, access: Access, error: &Error) {
        (self.0)(node, access, error);
    }
}

impl std::fmt::Debug for OnError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OnError")
    }
}

/// Whether the disk has failed, rather than said that it does not do such things.
pub(crate) fn is_failure(error: &Error) -> bool {
    match error.kind() {
        Kind::Os(errno) => errno != libc::EOPNOTSUPP,
        kind => matches!(kind, Kind::Injected(_) | Kind::Corrupt),
    }
}

/// How many have been told of lately.
pub(crate) struct Pace {
    began: Instant,
    /// The second since then, and in the lowest byte how many were told of in it.
    state: AtomicU64,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self {
            began: Instant::now(),
            state: AtomicU64::new(0),
        }
    }

    /// Whether one more may be told of now; counts it.
    pub(crate) fn allows(&self) -> bool {
        self.allows_in(self.began.elapsed().as_secs())
    }

    fn allows_in(&self, second: u64) -> bool {
        let one_more = |state: u64| {
            let told = if state >> 8 == second {
                state & 0xff
            } else {
                0
            };
            (told < MOST).then_some(second << 8 | (told + 1))
        };
        let relaxed = Ordering::Relaxed;
        self.state.fetch_update(relaxed, relaxed, one_more).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_are_told_of_in_each_second() {
        let pace = Pace::new();
        for second in [0, 1, 7] {
            let told = (0..100).filter(|_| pace.allows_in(second)).count();
            assert_eq!(told as u64, MOST);
        }
    }

    #[test]
    fn refusals_are_no_failures() {
        let error = |kind| Error::new(kind, "x");
        assert!(is_failure(&error(Kind::Os(libc::EIO))));
        assert!(is_failure(&error(Kind::Os(libc::ENOSPC))));
        assert!(is_failure(&error(Kind::Injected(libc::EINVAL))));
        assert!(is_failure(&error(Kind::Corrupt)));
        assert!(!is_failure(&error(Kind::Os(libc::EOPNOTSUPP))));
        assert!(!is_failure(&error(Kind::Unsupported)));
        assert!(!is_failure(&error(Kind::Busy)));
    }
}
