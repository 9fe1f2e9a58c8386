//! The two ways to the kernel behind one small interface. Which one it is must never show in results, only in speed.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::epoll::Epoll;
use crate::mail::Postbox;
use crate::op::CancelKey;
use crate::table::Table;
use crate::uring::Uring;

/// How long a turn may sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nap {
    None,
    For(Duration),
    Forever,
}

// One per thread and never moved: a box around the larger one would only cost a look-up per operation.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Driver {
    Uring(Uring),
    Epoll(Epoll),
}

/// Operations that are done, with the kernel's result.
pub(crate) type Done = Vec<(CancelKey, i32)>;

impl Driver {
    /// Starts what the table holds under `key`. File operations that the driver cannot do itself are refused with
    /// `false`: they are for the pool.
    pub(crate) fn start(&mut self, key: CancelKey, table: &mut Table) -> bool {
        match self {
            Self::Uring(uring) => {
                uring.start(key, table);
                true
            }
            Self::Epoll(epoll) => epoll.start(key, table),
        }
    }

    pub(crate) fn cancel(&mut self, key: CancelKey, table: &mut Table) {
        match self {
            Self::Uring(uring) => uring.cancel(key, table),
            Self::Epoll(epoll) => epoll.cancel(key, table),
        }
    }

    /// See [`hurry`](crate::hurry). On epoll everything is done at once anyway.
    pub(crate) fn hurry(&mut self) {
        if let Self::Uring(uring) = self {
            uring.hurry();
        }
    }

    /// Hands over what was started, without waiting.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Uring(uring) => uring.flush(),
            Self::Epoll(_) => Ok(()),
        }
    }

    /// Whether nothing has been started or completed since the last turn, so that the kernel is certain to be where that
    /// left it.
    pub(crate) fn is_quiet(&mut self) -> bool {
        match self {
            Self::Uring(uring) => uring.is_quiet(),
            Self::Epoll(_) => false,
        }
    }

    /// Whether a turn would find something at once. Costs no system call on io_uring.
    pub(crate) fn has_news(&mut self) -> bool {
        match self {
            Self::Uring(uring) => uring.has_news(),
            Self::Epoll(epoll) => epoll.has_news(),
        }
    }

    /// Hands over what was started, sleeps as told unless something is there, and collects what is done.
    pub(crate) fn turn(
        &mut self,
        nap: Nap,
        table: &mut Table,
        home: &Arc<Postbox>,
        done: &mut Done,
    ) -> io::Result<()> {
        match self {
            Self::Uring(uring) => uring.turn(nap, table, home, done),
            Self::Epoll(epoll) => epoll.turn(nap, table, home, done),
        }
    }

    /// System calls made so far for waiting and submitting.
    pub(crate) fn enters(&self) -> u64 {
        match self {
            Self::Uring(uring) => uring.enters,
            Self::Epoll(epoll) => epoll.enters,
        }
    }
}
