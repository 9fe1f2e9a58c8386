//! Waiting until something that several threads change is as wanted. It never blocks a thread, and forgets nobody.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::{Poll, Waker};
use std::time::Duration;

use diskfuse_ring::sleep;
use parking_lot::Mutex;

/// Those who wait. May be used from any thread.
#[derive(Default)]
pub(crate) struct Signal(Mutex<Vec<Waker>>);

impl Signal {
    /// Something has changed: everyone looks again.
    pub(crate) fn notify(&self) {
        let waiting = std::mem::take(&mut *self.0.lock());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Resolves to what `look` finds, when it finds something. Whoever changes what it looks at notifies afterwards.
    pub(crate) async fn until<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| {
            if let Some(found) = look() {
                return Poll::Ready(found);
            }
            {
                let mut waiting = self.0.lock();
                if !waiting.iter().any(|w| w.will_wake(cx.waker())) {
                    waiting.push(cx.waker().clone());
                }
            }
            // It may have changed between the two lines above.
            look().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// [`Signal::until`] for `limit` at most; `None` if it found nothing by then. On a ring's thread.
    pub(crate) async fn until_or<T>(
        &self,
        limit: Duration,
        look: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        let mut found = pin!(self.until(look));
        let mut late = pin!(sleep(limit));
        poll_fn(|cx| match found.as_mut().poll(cx) {
            Poll::Ready(found) => Poll::Ready(Some(found)),
            Poll::Pending => late.as_mut().poll(cx).map(|()| None),
        })
        .await
    }
}
