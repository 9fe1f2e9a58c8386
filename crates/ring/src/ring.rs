//! The event loop of one thread, from outside: made, run until a future is done, and shut down so that nothing is in
//! flight when it is gone.

use std::future::Future;
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{Backend, Config};
use crate::current::Running;
use crate::driver::{Done, Nap};
use crate::error::Error;
use crate::inner::Inner;
use crate::mail::Mailbox;

/// How long a ring that ends waits for commands that the kernel has.
const COMMANDS_LINGER: Duration = Duration::from_secs(2);

/// The event loop of one thread. It cannot leave the thread that made it.
pub struct Ring {
    inner: Rc<Inner>,
    stays: PhantomData<*const ()>,
}

impl Ring {
    /// Makes a ring for the calling thread. [`Error::UringRefused`] only if io_uring was asked for by name.
    pub fn new(config: &Config) -> Result<Self, Error> {
        Ok(Self {
            inner: Rc::new(Inner::new(config)?),
            stays: PhantomData,
        })
    }

    /// The way to the kernel that was chosen.
    pub fn backend(&self) -> Backend {
        self.inner.backend()
    }

    /// How other threads reach this ring.
    pub fn mailbox(&self) -> Mailbox {
        Mailbox(Arc::clone(&self.inner.post))
    }

    /// Runs the loop until `future` is done. Other tasks keep their state for the next call. Panics if a ring runs on
    /// this thread already, or if the kernel refuses to let the loop wait, which leaves nothing that could go on.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let _running = Running::enter(&self.inner);
        let mut output = None;
        {
            let main = pin!(async { output = Some(future.await) });
            let mut main: Option<Pin<&mut dyn Future<Output = ()>>> = Some(main);
            let inner = &self.inner;
            let main_id = inner.tasks.borrow_mut().insert(&inner.post, None);
            inner.ready.borrow_mut().push_back(main_id);
            let mut done = Done::with_capacity(256);
            while main.is_some() {
                inner.run_ready(&mut main, main_id);
                if main.is_none() {
                    break;
                }
                if let Err(error) = inner.turn(&mut done) {
                    panic!("the event loop cannot wait: {error}");
                }
            }
            inner.tasks.borrow_mut().remove(main_id);
        }
        match output {
            Some(output) => output,
            None => unreachable!("the loop above ends when the future has"),
        }
    }

    /// Drops all tasks, cancels what can be cancelled and waits until nothing is in flight.
    fn shut_down(&self) {
        let _running = Running::enter(&self.inner);
        let inner = &self.inner;
        let ids = inner.tasks.borrow().ids();
        for id in ids {
            let task = inner.tasks.borrow_mut().remove(id);
            drop(task);
        }
        let flying = inner.ops.borrow().flying();
        for key in flying {
            inner.cancel(key);
        }
        let start = Instant::now();
        let mut warned = false;
        let mut done = Done::new();
        loop {
            let (left, commands) = {
                let ops = inner.ops.borrow();
                (ops.in_flight(), ops.commands())
            };
            if left == 0 {
                break;
            }
            // Whoever gave a command sees to its end; one that is still there is the kernel's until the ring is closed.
            if left == commands && start.elapsed() > COMMANDS_LINGER {
                tracing::warn!(
                    commands,
                    "the kernel keeps commands; closing the event loop under them"
                );
                inner.ops.borrow_mut().leak_commands();
                break;
            }
            // A timer of its own keeps the wait from being endless without a word.
            let mut ops = inner.ops.borrow_mut();
            let nap = if inner.post.lie_down() {
                Nap::For(Duration::from_millis(500))
            } else {
                Nap::None
            };
            let turned = inner
                .driver
                .borrow_mut()
                .turn(nap, &mut ops, &inner.post, &mut done);
            drop(ops);
            inner.post.get_up();
            if let Err(error) = turned {
                // The kernel may still write to what is in flight: rather lose the memory than free it.
                tracing::error!(%error, "the event loop cannot wait for what is in flight");
                std::mem::forget(Rc::clone(inner));
                break;
            }
            for (key, result) in done.drain(..) {
                inner.complete(key, result);
            }
            inner.read_mail();
            if !warned && start.elapsed() > Duration::from_secs(10) {
                warned = true;
                let left = inner.ops.borrow().in_flight();
                tracing::warn!(
                    left,
                    "still waiting for operations that the kernel has not finished"
                );
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shut_down();
        self.inner.post.close();
    }
}
