//! Turns over ranges: whoever takes a range has it alone until they let go, in the order of arrival. Waiting is done
//! with wakers; the one lock is held for a walk over a short list.

use std::future::poll_fn;
use std::task::{Poll, Waker};

use parking_lot::Mutex;

/// Those who have a range and those who wait for one. May be used from any thread.
#[derive(Default)]
pub struct RangeQueue(Mutex<Places>);

#[derive(Default)]
struct Places {
    next: u64,
    /// In order of arrival. A place has its turn when no earlier one overlaps it.
    places: Vec<Place>,
}

struct Place {
    ticket: u64,
    start: u64,
    end: u64,
    waker: Option<Waker>,
}

/// A range that is taken, until this is dropped.
#[must_use = "dropping it lets the next one in"]
pub struct Turn<'q> {
    queue: &'q RangeQueue,
    ticket: u64,
}

impl RangeQueue {
    /// Resolves when nobody who came earlier has, or waits for, any of the range.
    pub async fn turn(&self, offset: u64, len: u64) -> Turn<'_> {
        let ticket = self.0.lock().arrive(offset, len);
        let turn = Turn {
            queue: self,
            ticket,
        };
        poll_fn(|cx| {
            if self.0.lock().is_turn(ticket, cx.waker()) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
        turn
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let next = self.queue.0.lock().leave(self.ticket);
        next.into_iter().for_each(Waker::wake);
    }
}

impl Place {
    fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

impl Places {
    fn arrive(&mut self, offset: u64, len: u64) -> u64 {
        let ticket = self.next;
        self.next += 1;
        self.places.push(Place {
            ticket,
            start: offset,
            end: offset.saturating_add(len),
            waker: None,
        });
        ticket
    }

    fn is_turn(&mut self, ticket: u64, waker: &Waker) -> bool {
        let Some(mine) = self.places.iter().position(|p| p.ticket == ticket) else {
            return true;
        };
        let (earlier, rest) = self.places.split_at_mut(mine);
        if !earlier.iter().any(|p| p.overlaps(&rest[0])) {
            return true;
        }
        rest[0].waker = Some(waker.clone());
        false
    }

    /// Takes a place out and returns those to wake: all who may have waited for it.
    fn leave(&mut self, ticket: u64) -> Vec<Waker> {
        let Some(index) = self.places.iter().position(|p| p.ticket == ticket) else {
            return Vec::new();
        };
        let gone = self.places.remove(index);
        let behind = self.places[index..].iter_mut();
        let waiting = behind.filter(|p| p.overlaps(&gone));
        waiting.filter_map(|p| p.waker.take()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    #[test]
    fn overlapping_ranges_take_turns_and_others_do_not_wait() {
        let queue = RangeQueue::default();
        let mut cx = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(queue.turn(0, 10)).poll(&mut cx) else {
            panic!("nobody was there");
        };
        let mut second = pin!(queue.turn(5, 10));
        assert!(second.as_mut().poll(&mut cx).is_pending());
        {
            // Behind the second, though the first does not mind; gone before its turn.
            let mut third = pin!(queue.turn(12, 1));
            assert!(third.as_mut().poll(&mut cx).is_pending());
        }
        assert!(pin!(queue.turn(20, 1)).poll(&mut cx).is_ready());
        drop(first);
        assert!(second.as_mut().poll(&mut cx).is_ready());
    }
}
