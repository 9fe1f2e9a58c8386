//! Whether the threads that serve are alive: each is asked for a sign, and the service manager hears of it only when all
//! have given theirs. It must never wait for one.

use std::time::Duration;

use diskfuse_ring::{Mailbox, Reply};

/// Signs that were asked for.
#[derive(Default)]
pub struct Watchdog {
    awaited: Vec<Reply<()>>,
}

impl Watchdog {
    /// Whether all threads that were asked the last time have answered; then these are asked. One that has ended since
    /// counts as well.
    pub fn beat<'m>(&mut self, threads: impl Iterator<Item = &'m Mailbox>) -> bool {
        let awaited = std::mem::take(&mut self.awaited).into_iter();
        self.awaited = awaited
            .filter_map(|sign| sign.wait_for(Duration::ZERO).err())
            .collect();
        if !self.awaited.is_empty() {
            return false;
        }
        self.awaited = threads.map(|thread| thread.call(|| async {})).collect();
        true
    }
}

#[cfg(test)]
mod tests {
    use diskfuse_ring::{Config, IoThread};

    use super::*;

    fn comes_true(mut is: impl FnMut() -> bool) {
        let end = std::time::Instant::now() + Duration::from_secs(5);
        while !is() {
            assert!(std::time::Instant::now() < end, "in vain");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_thread_that_is_stuck_is_noticed_and_one_that_has_ended_is_not_waited_for() {
        let threads: Vec<_> = (0..2)
            .map(|index| IoThread::spawn(&format!("t{index}"), Config::default()).unwrap())
            .collect();
        let mailboxes: Vec<_> = threads
            .iter()
            .map(|thread| thread.mailbox().clone())
            .collect();
        let mut watchdog = Watchdog::default();
        assert!(watchdog.beat(mailboxes.iter()), "nobody was asked before");
        comes_true(|| watchdog.beat(mailboxes.iter()));
        let (free, stuck) = std::sync::mpsc::channel::<()>();
        // It ends when the other half is dropped.
        let stay = move || assert!(stuck.recv().is_err());
        mailboxes[1].post(stay).unwrap();
        comes_true(|| !watchdog.beat(mailboxes.iter()));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!watchdog.beat(mailboxes.iter()));
        drop(free);
        comes_true(|| watchdog.beat(mailboxes.iter()));
        drop(threads);
        comes_true(|| watchdog.beat(mailboxes.iter()));
    }
}
