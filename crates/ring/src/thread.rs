//! A thread that runs a ring until it is told to stop: what QEMU calls an iothread. It never stops by itself.

use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::config::{Backend, Config};
use crate::error::Error;
use crate::mail::{Mailbox, ReplySender, reply};
use crate::polling::Polling;
use crate::ring::Ring;
use crate::slice::take_usual_slices;

/// A named thread with a ring. Dropping it stops it: tasks that are left are dropped, operations in flight are
/// waited for.
pub struct IoThread {
    mailbox: Mailbox,
    backend: Backend,
    id: u32,
    stop: Option<ReplySender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts the thread and waits until its ring is up.
    pub fn spawn(name: &str, config: Config) -> Result<Self, Error> {
        let (sender, receiver) = mpsc::channel();
        let (stop, stopped) = reply();
        let body = move || {
            take_usual_slices();
            match Ring::new(&config) {
                Ok(ring) => {
                    let id = rustix::thread::gettid()
                        .as_raw_nonzero()
                        .get()
                        .unsigned_abs();
                    if sender
                        .send(Ok((ring.mailbox(), ring.backend(), id)))
                        .is_ok()
                    {
                        // Whether the sender spoke or vanished, it is time to go.
                        let _ = ring.block_on(stopped);
                    }
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(512 << 10)
            .spawn(body)
            .map_err(|source| Error::Setup {
                what: "thread",
                source,
            })?;
        let (mailbox, backend, id) = receiver.recv().map_err(|_| Error::Ended)??;
        Ok(Self {
            mailbox,
            backend,
            id,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// How to reach its ring.
    pub fn mailbox(&self) -> &Mailbox {
        &self.mailbox
    }

    /// Its way to the kernel.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The thread's number as the kernel and its tools know it (gettid(2)); not used again while this value lives.
    pub fn thread_id(&self) -> u32 {
        self.id
    }

    /// Changes how the ring polls before it sleeps, from its next turn on; see [`Mailbox::set_polling`].
    pub fn set_polling(&self, polling: Polling) -> Result<(), Error> {
        self.mailbox.set_polling(polling)
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("an iothread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Choice;
    use crate::current;

    #[test]
    fn polling_changes_while_the_thread_runs() {
        for choice in [Choice::Uring, Choice::Epoll] {
            let config = Config {
                choice,
                polling: Polling::OFF,
            };
            let thread = IoThread::spawn("polling", config).unwrap();
            let settings = || {
                let look = || async { current::with(|inner| inner.spin.borrow().settings) };
                thread.mailbox().call(look).wait().unwrap()
            };
            assert_eq!(settings(), Polling::OFF);
            let other = Polling {
                max: Duration::from_micros(100),
                grow: 4,
                shrink: 2,
            };
            thread.set_polling(other).unwrap();
            assert_eq!(settings(), other);
        }
    }

    #[test]
    fn the_thread_has_the_number_that_the_kernel_knows() {
        let thread = IoThread::spawn("numbered", Config::default()).unwrap();
        let comm = format!("/proc/self/task/{}/comm", thread.thread_id());
        assert_eq!(std::fs::read_to_string(comm).unwrap(), "numbered\n");
    }
}
