//! How an export leaves: however its end came, through [`Daemon::remove`]. Whatever waits for a disk waits in a thread of its own.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use diskfuse_fuse::{End, Export};

use super::{Attendant, Daemon, Event, Key, spawn};
use crate::control::protocol::{Answer, Unmount, WirePath};
use crate::error::Error;

impl Daemon {
    pub(super) fn stop_all(&mut self) {
        let keys: Vec<Key> = self.exports.keys().copied().collect();
        for key in keys {
            self.stop(key);
        }
    }

    /// Begins to stop an export, if that has not begun.
    pub(super) fn stop(&mut self, key: Key) {
        let Some(entry) = self.exports.get_mut(&key) else {
            return;
        };
        // Only one thread at a time stops it, so that the error of its last flush comes to whoever waits. If the one that
        // tries leaves it as it is, it is stopped then.
        if !std::mem::replace(&mut entry.stopping, true) && !entry.trying {
            self.stop_now(key);
        }
    }

    pub(super) fn stop_now(&mut self, key: Key) {
        self.in_a_thread(key, |export| Some(export.stop()));
    }

    /// Begins to stop an export, which stays as it is if somebody uses the file.
    pub(super) fn stop_unless_busy(&mut self, key: Key) {
        let Some(entry) = self.exports.get_mut(&key) else {
            return;
        };
        if !entry.stopping && !std::mem::replace(&mut entry.trying, true) {
            self.in_a_thread(key, |export| match export.stop_unless_busy() {
                Err(diskfuse_fuse::Error::Busy { .. }) => None,
                outcome => Some(outcome),
            });
        }
    }

    /// Has `work` stop an export; `None` is that it has not.
    pub(super) fn in_a_thread(
        &mut self,
        key: Key,
        work: fn(&Export) -> Option<std::result::Result<(), diskfuse_fuse::Error>>,
    ) {
        let Some(entry) = self.exports.get(&key) else {
            return;
        };
        let export = Arc::clone(&entry.export);
        let sender = self.sender.clone();
        let outcome = move |export: Arc<Export>| match work(&export) {
            Some(outcome) => Event::Stopped(key, outcome),
            None => Event::Busy(key),
        };
        let in_thread = move || {
            let event = outcome(export);
            let _ = sender.send(event);
        };
        if let Err(error) = spawn("stop", in_thread) {
            tracing::debug!(%error, "no thread to stop an export with; doing it here");
            // The daemon holds the other end itself.
            let _ = self.sender.send(outcome(Arc::clone(&entry.export)));
        }
    }

    /// An export was not stopped, because somebody uses the file.
    pub(super) fn busy(&mut self, key: Key) {
        let Some(entry) = self.exports.get_mut(&key) else {
            return;
        };
        entry.trying = false;
        if entry.stopping {
            self.stop_now(key);
            return;
        }
        for reply in std::mem::take(&mut entry.waiting) {
            let _ = reply.send(Answer::Busy);
        }
    }

    /// An export that nobody told to end has ended: what is left of it goes the same way as every other one's.
    pub(super) fn ended(&mut self, key: Key, end: End) {
        let Some(entry) = self.exports.get(&key) else {
            return;
        };
        if entry.stopping || entry.trying {
            return;
        }
        let (id, path) = (entry.export.id(), entry.export.mountpoint().display());
        match end {
            // The export itself has said so.
            End::Stopped | End::Unmounted => {
                tracing::info!("export '{id}' on '{path}' has ended: {end}");
            }
            End::Halted => {
                let message = format!("export '{id}' on '{path}' has ended: {end}");
                self.failed.get_or_insert(Error::Refused(message));
            }
        }
        self.stop(key);
    }

    /// Forgets an export that has been stopped, and returns its id.
    pub(super) fn remove(
        &mut self,
        key: Key,
        outcome: std::result::Result<(), diskfuse_fuse::Error>,
    ) -> Option<String> {
        let mut entry = self.exports.remove(&key)?;
        let id = entry.export.id().to_owned();
        let waiting = std::mem::take(&mut entry.waiting);
        drop(entry);
        if !self.is_over() {
            self.manager.status(&self.summary());
        }
        let answer = match outcome {
            Ok(()) => Answer::Unmounted {
                ends: self.is_over(),
            },
            Err(error) => {
                let message = error.to_string();
                tracing::error!("{message}");
                self.failed.get_or_insert(error.into());
                Answer::Failed { message }
            }
        };
        for reply in waiting {
            let _ = reply.send(answer.clone());
        }
        Some(id)
    }

    /// Tells of exports that are gone. At the end the youngest comes first, as with QEMU, although they end all at once.
    pub(super) fn tell_of_gone(&mut self, attendant: &mut dyn Attendant) {
        while let Some((&youngest, _)) = self.gone.last_key_value() {
            let left = self.exports.last_key_value();
            if self.ending && left.is_some_and(|(&left, _)| left > youngest) {
                return;
            }
            if let Some(id) = self.gone.remove(&youngest) {
                attendant.export_gone(&id);
            }
        }
        if self.ending && self.exports.is_empty() {
            attendant.exports_gone();
        }
    }

    pub(super) fn unmount(&mut self, mountpoint: &WirePath, how: Unmount, reply: Sender<Answer>) {
        let mut all = self.exports.iter_mut();
        let found = all.find(|(_, entry)| entry.export.mountpoint() == mountpoint.0);
        let Some((&key, entry)) = found else {
            let message = format!(
                "nothing is exported on '{}' any more",
                mountpoint.0.display()
            );
            let _ = reply.send(Answer::Failed { message });
            return;
        };
        match how {
            Unmount::UnlessBusy => {
                entry.waiting.push(reply);
                self.stop_unless_busy(key);
            }
            Unmount::Forcibly => {
                entry.waiting.push(reply);
                self.stop(key);
            }
            Unmount::Lazily => detach(Arc::clone(&entry.export), reply),
        }
    }
}

/// Takes the name of an export's file away, and answers.
fn detach(export: Arc<Export>, reply: Sender<Answer>) {
    let work = move || {
        let answer = match export.detach() {
            Ok(()) => Answer::Unmounted { ends: false },
            Err(error) => Answer::Failed {
                message: error.to_string(),
            },
        };
        let _ = reply.send(answer);
    };
    if let Err(error) = spawn("detach", work) {
        // Whoever waits hears that there is no answer.
        tracing::warn!(%error, "no thread to take a mount away with");
    }
}
