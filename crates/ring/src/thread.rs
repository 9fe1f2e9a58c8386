//! A thread that runs a ring until it is told to stop: what QEMU calls an iothread. It never stops by itself.

use std::sync::mpsc;
use std::thread::JoinHandle;

use crate::config::{Backend, Config};
use crate::error::Error;
use crate::mail::{Mailbox, ReplySender, reply};
use crate::ring::Ring;

/// A named thread with a ring. Dropping it stops it: tasks that are left are dropped, operations in flight are
/// waited for.
pub struct IoThread {
    mailbox: Mailbox,
    backend: Backend,
    stop: Option<ReplySender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts the thread and waits until its ring is up.
    pub fn spawn(name: &str, config: Config) -> Result<Self, Error> {
        let (sender, receiver) = mpsc::channel();
        let (stop, stopped) = reply();
        let body = move || match Ring::new(&config) {
            Ok(ring) => {
                if sender.send(Ok((ring.mailbox(), ring.backend()))).is_ok() {
                    // Whether the sender spoke or vanished, it is time to go.
                    let _ = ring.block_on(stopped);
                }
            }
            Err(error) => {
                let _ = sender.send(Err(error));
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
        let (mailbox, backend) = receiver.recv().map_err(|_| Error::Ended)??;
        Ok(Self {
            mailbox,
            backend,
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
