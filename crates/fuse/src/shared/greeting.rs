//! How an export and the kernel begin: what they agree on, by which way requests come from then on, and who waits for that. Nothing
//! here is on the way of a request but a look at the way, which changes once.

use std::sync::atomic::Ordering;

use diskfuse_ring::SharedFd;

use super::{BY_DEVICE, BY_RING, Greeting, REGISTERING, Shared};
use crate::error::Error;
use crate::transport;

impl Shared {
    /// Whether the kernel is to be asked for FUSE over io_uring.
    pub(crate) fn offers_ring(&self) -> bool {
        self.plan.ring.is_some() && self.forgone.get().is_none()
    }

    /// Does without FUSE over io_uring, for the reason `why`; an error if it had to be. Called before the kernel has
    /// spoken.
    pub(crate) fn forgo_ring(&self, why: String) -> crate::error::Result<()> {
        if self.plan.insist {
            return Err(Error::NoRing(why));
        }
        tracing::info!(export = %self.options.id, "requests come through /dev/fuse: {why}");
        let _ = self.forgone.set(why);
        Ok(())
    }

    /// Whether requests come in entries of FUSE over io_uring.
    pub(crate) fn by_ring(&self) -> bool {
        self.way.load(Ordering::Relaxed) == BY_RING
    }

    /// Whether the queues are to offer their entries to the kernel.
    pub(crate) fn registering(&self) -> bool {
        self.way.load(Ordering::SeqCst) == REGISTERING
    }

    /// Whether the kernel may have entries of ours.
    pub(crate) fn has_entries(&self) -> bool {
        self.ring_agreed.load(Ordering::SeqCst)
    }

    /// Notes what the kernel has agreed on. The error is for people: it had to.
    pub(crate) fn agreed_on(
        &self,
        ring: bool,
        passthrough: bool,
    ) -> std::result::Result<(), String> {
        self.passthrough_agreed.store(passthrough, Ordering::SeqCst);
        self.ring_agreed.store(ring, Ordering::SeqCst);
        if ring || !self.offers_ring() {
            return Ok(());
        }
        let why = transport::switched_off()
            .unwrap_or_else(|| "the kernel does not offer FUSE over io_uring".to_owned());
        if self.plan.insist {
            return Err(format!("transport=uring: {why}"));
        }
        tracing::info!(export = %self.options.id, "requests come through /dev/fuse: {why}");
        Ok(())
    }

    /// The kernel has been answered: the export is usable, or will be when all entries are registered.
    pub(crate) fn introduced(&self, connection: &SharedFd) {
        let agreed = self.passthrough_agreed.load(Ordering::SeqCst);
        if let Some(backing) = self.backing.get()
            && let Err(why) = backing.hand_over(agreed, connection)
        {
            self.greet(Err(why));
            return;
        }
        if self.has_entries() {
            self.way.store(REGISTERING, Ordering::SeqCst);
            self.wake_all();
        } else {
            self.greet(Ok(()));
        }
    }

    /// A queue has offered its entries. When the last one has, it is known how requests come.
    pub(crate) fn registered(&self, outcome: Greeting) {
        if let Err(why) = outcome {
            self.refusal.lock().get_or_insert(why);
        }
        if self.unregistered.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        let refusal = self.refusal.lock().take();
        let way = if refusal.is_none() {
            BY_RING
        } else {
            BY_DEVICE
        };
        self.way.store(way, Ordering::SeqCst);
        match refusal {
            Some(why) if self.plan.insist => self.greet(Err(format!("transport=uring: {why}"))),
            Some(why) => {
                tracing::warn!(export = %self.options.id, "requests come through /dev/fuse: {why}");
                self.greet(Ok(()));
            }
            None => self.greet(Ok(())),
        }
    }

    /// Notes how the first exchange with the kernel went.
    pub(crate) fn greet(&self, outcome: Greeting) {
        let mut greeting = self.greeting.lock();
        if greeting.is_none() {
            self.greeted.store(outcome.is_ok(), Ordering::SeqCst);
            *greeting = Some(outcome);
            self.changed.notify_all();
        }
        drop(greeting);
        self.wake_all();
    }

    /// Blocks until the kernel was answered; `None` if that takes longer than `limit`.
    pub(crate) fn wait_for_greeting(&self, limit: std::time::Duration) -> Option<Greeting> {
        let mut greeting = self.greeting.lock();
        let waiting = |g: &mut Option<Greeting>| g.is_none();
        self.changed.wait_while_for(&mut greeting, waiting, limit);
        greeting.clone()
    }
}
