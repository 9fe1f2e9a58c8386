//! The table of one ring's operations: what each needs kept alive, and who is to hear of it. It owns the buffers and
//! descriptors of everything in flight, and must never let go of either before the kernel has answered.

use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};

use crate::buf::Buf;
use crate::command::CommandSink;
use crate::fd::SharedFd;
use crate::op::{Action, CancelKey, Finished, outcome};

/// An operation in flight and all that it needs.
pub(crate) struct Entry {
    generation: u32,
    state: State,
    pub(crate) action: Action,
    pub(crate) fd: Option<SharedFd>,
    pub(crate) buf: Option<Buf>,
    pub(crate) bufs: Vec<Buf>,
    pub(crate) iovecs: Vec<libc::iovec>,
    /// Whether a worker thread does it, whatever the backend.
    pub(crate) pooled: bool,
}

enum State {
    Free,
    Flying(Option<Waker>),
    /// Whoever is to have the answer, and his name for it. The kernel has the command while the entry has its memory.
    Commanded(Weak<dyn CommandSink>, u32),
    Abandoned,
    Done(i32),
}

impl Entry {
    /// Whether the kernel or a worker still has it.
    fn in_flight(&self) -> bool {
        match self.state {
            State::Flying(_) | State::Abandoned => true,
            State::Commanded(..) => self.buf.is_some(),
            State::Done(_) | State::Free => false,
        }
    }
}

/// Who is to hear of an operation that is done.
pub(crate) enum Hearer {
    /// Nobody.
    Nobody,
    /// The task that waits for it.
    Task(Waker),
    /// The task that waits for something new.
    Fetcher(Waker),
    /// Who gave the command, with its name and its memory.
    Commander(Rc<dyn CommandSink>, u32, Buf),
}

/// Every operation of one ring.
pub(crate) struct Table {
    entries: Vec<Entry>,
    free: Vec<u32>,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Operations that the kernel or a worker still has.
    pub(crate) fn in_flight(&self) -> usize {
        self.entries.iter().filter(|e| e.in_flight()).count()
    }

    /// Commands that the kernel still has. It gives none back but by its own decision.
    pub(crate) fn commands(&self) -> usize {
        let commanded = |e: &&Entry| matches!(e.state, State::Commanded(..)) && e.buf.is_some();
        self.entries.iter().filter(commanded).count()
    }

    /// Gives the memory of the commands in flight up for good, as the kernel may write to it for a while after their ring
    /// is closed.
    pub(crate) fn leak_commands(&mut self) {
        for entry in &mut self.entries {
            if matches!(entry.state, State::Commanded(..)) {
                std::mem::forget(entry.buf.take());
                entry.state = State::Done(-libc::ECANCELED);
            }
        }
    }

    /// Whether an operation still waits for something to read. Transfers cannot be cancelled, so trying again to do
    /// so would never end.
    pub(crate) fn still_waits(&mut self, key: CancelKey) -> bool {
        self.get(key).is_some_and(|entry| {
            matches!(entry.state, State::Flying(_) | State::Abandoned)
                && matches!(entry.action, Action::ReadReady)
        })
    }

    /// Keys of everything in flight, to cancel it.
    pub(crate) fn flying(&self) -> Vec<CancelKey> {
        (0u32..)
            .zip(&self.entries)
            .filter(|(_, e)| matches!(e.state, State::Flying(_) | State::Abandoned))
            .map(|(index, e)| CancelKey {
                index,
                generation: e.generation,
            })
            .collect()
    }

    /// Makes an entry; the caller fills in the rest and starts it.
    pub(crate) fn insert(&mut self, action: Action, fd: &SharedFd, buf: Option<Buf>) -> CancelKey {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry {
                generation: 0,
                state: State::Free,
                action,
                fd: None,
                buf: None,
                bufs: Vec::new(),
                iovecs: Vec::new(),
                pooled: false,
            });
            self.entries.len() as u32 - 1
        });
        let entry = &mut self.entries[index as usize];
        entry.state = State::Flying(None);
        entry.action = action;
        entry.fd = Some(fd.clone());
        entry.buf = buf;
        entry.pooled = false;
        CancelKey {
            index,
            generation: entry.generation,
        }
    }

    /// The entry behind a key, unless it is of an earlier life.
    pub(crate) fn get(&mut self, key: CancelKey) -> Option<&mut Entry> {
        self.entries
            .get_mut(key.index as usize)
            .filter(|e| e.generation == key.generation && !matches!(e.state, State::Free))
    }

    /// Names who is to have the answer of a command.
    pub(crate) fn commanded_by(&mut self, key: CancelKey, sink: Weak<dyn CommandSink>, name: u32) {
        if let Some(entry) = self.get(key) {
            entry.state = State::Commanded(sink, name);
        }
    }

    /// Makes an entry whose command was answered ready for the next one. False, and the memory is dropped, if it is not
    /// such an entry.
    pub(crate) fn command_again(&mut self, key: CancelKey, action: Action, buf: Buf) -> bool {
        match self.get(key) {
            Some(entry) if matches!(entry.state, State::Commanded(..)) && entry.buf.is_none() => {
                entry.action = action;
                entry.buf = Some(buf);
                true
            }
            _ => false,
        }
    }

    /// Gives an entry up whose command was answered.
    pub(crate) fn end_commands(&mut self, key: CancelKey) {
        if self
            .get(key)
            .is_some_and(|e| matches!(e.state, State::Commanded(..)) && e.buf.is_none())
        {
            self.recycle(key.index);
        }
    }

    /// Takes the kernel's answer: `result` is a count or a negative errno. Returns who is to hear of it.
    pub(crate) fn complete(&mut self, key: CancelKey, result: i32) -> Hearer {
        let Some(entry) = self.get(key) else {
            return Hearer::Nobody;
        };
        if let State::Commanded(sink, name) = &entry.state {
            let hearer = match (sink.upgrade(), entry.buf.take()) {
                (Some(sink), Some(buf)) => Hearer::Commander(sink, *name, buf),
                _ => Hearer::Nobody,
            };
            // After an error there is nothing to go on with.
            if result < 0 || matches!(hearer, Hearer::Nobody) {
                self.recycle(key.index);
            }
            return hearer;
        }
        let waited = matches!(entry.action, Action::ReadReady);
        match std::mem::replace(&mut entry.state, State::Done(result)) {
            State::Flying(Some(waker)) if waited => Hearer::Fetcher(waker),
            State::Flying(Some(waker)) => Hearer::Task(waker),
            State::Abandoned => {
                self.recycle(key.index);
                Hearer::Nobody
            }
            // Not looked at yet; and `get` finds no free entries, and nothing completes twice.
            State::Flying(None) | State::Commanded(..) | State::Done(_) | State::Free => {
                Hearer::Nobody
            }
        }
    }

    pub(crate) fn poll(&mut self, key: CancelKey, cx: &mut Context<'_>) -> Poll<Finished> {
        let Some(entry) = self.get(key) else {
            return Poll::Pending;
        };
        match &mut entry.state {
            State::Done(result) => {
                let finished = Finished {
                    result: outcome(*result),
                    buf: entry.buf.take(),
                    bufs: std::mem::take(&mut entry.bufs),
                };
                self.recycle(key.index);
                Poll::Ready(finished)
            }
            State::Flying(waker) => {
                if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                    *waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
            State::Abandoned | State::Commanded(..) | State::Free => Poll::Pending,
        }
    }

    pub(crate) fn abandon(&mut self, key: CancelKey) {
        let Some(entry) = self.get(key) else { return };
        match entry.state {
            State::Flying(_) => entry.state = State::Abandoned,
            State::Done(_) => self.recycle(key.index),
            State::Abandoned | State::Commanded(..) | State::Free => {}
        }
    }

    fn recycle(&mut self, index: u32) {
        let entry = &mut self.entries[index as usize];
        entry.state = State::Free;
        entry.generation = entry.generation.wrapping_add(1) & GENERATIONS;
        entry.fd = None;
        entry.buf = None;
        entry.bufs.clear();
        entry.iovecs.clear();
        self.free.push(index);
    }
}

/// Generations count in 30 bits: the two above them tell backends' own messages apart.
pub(crate) const GENERATIONS: u32 = (1 << 30) - 1;
