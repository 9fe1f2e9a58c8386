//! What the lock-free parts are made of: the real thing, or, with the feature `loom`, models of it whose every
//! interleaving is tried (see `slices_model`). Nothing else may know the difference.

#[cfg(not(feature = "loom"))]
mod real {
    pub(crate) use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

    pub(crate) use diskfuse_ring::Words;
    pub(crate) use parking_lot::Mutex;
}

#[cfg(feature = "loom")]
mod real {
    use std::io;
    use std::ops::{Deref, Range};

    use loom::sync::MutexGuard;
    pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

    /// A few words; never more than a model can explore.
    pub(crate) struct Words(Vec<AtomicU64>);

    impl Words {
        pub(crate) fn new(len: usize) -> io::Result<Self> {
            Ok(Self((0..len.min(64)).map(|_| AtomicU64::new(0)).collect()))
        }

        pub(crate) fn release(&self, _: Range<usize>) {}
    }

    impl Deref for Words {
        type Target = [AtomicU64];
        fn deref(&self) -> &[AtomicU64] {
            &self.0
        }
    }

    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        }
    }
}

pub(crate) use real::*;
