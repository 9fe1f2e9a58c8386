//! The backend for places where io_uring is refused: epoll for descriptors that can be waited for, worker threads
//! for files. Slower, and otherwise the same.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use crate::buf::Buf;
use crate::driver::{Done, Nap};
use crate::fd::SharedFd;
use crate::mail::Postbox;
use crate::op::{Action, CancelKey};
use crate::table::Table;

/// Events taken in one turn.
const BATCH: usize = 64;
const BELL: u64 = u64::MAX;

pub(crate) struct Epoll {
    poller: OwnedFd,
    events: Vec<epoll::Event>,
    /// Done at once, in the call that started them.
    done: Done,
    pub(crate) enters: u64,
}

fn encode(key: CancelKey) -> u64 {
    u64::from(key.generation) << 32 | u64::from(key.index)
}

fn decode(data: u64) -> CancelKey {
    CancelKey {
        index: data as u32,
        generation: (data >> 32) as u32,
    }
}

fn as_result(outcome: rustix::io::Result<usize>) -> i32 {
    match outcome {
        Ok(count) => i32::try_from(count).unwrap_or(i32::MAX),
        Err(errno) => -errno.raw_os_error(),
    }
}

fn read(fd: &SharedFd, buf: &mut Buf) -> i32 {
    as_result(rustix::io::retry_on_intr(|| {
        rustix::io::read(fd, buf.as_mut_slice())
    }))
}

impl Epoll {
    pub(crate) fn new(home: &Arc<Postbox>) -> io::Result<Self> {
        let poller = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(
            &poller,
            home.bell(),
            EventData::new_u64(BELL),
            EventFlags::IN,
        )?;
        Ok(Self {
            poller,
            events: Vec::with_capacity(BATCH),
            done: Vec::new(),
            enters: 0,
        })
    }

    /// Starts an operation; false if it is one for the pool.
    pub(crate) fn start(&mut self, key: CancelKey, table: &mut Table) -> bool {
        let Some(entry) = table.get(key) else {
            return true;
        };
        let action = entry.action;
        let Some(fd) = entry.fd.as_ref() else {
            return true;
        };
        let result = match (action, entry.buf.as_mut()) {
            (Action::ReadReady, Some(buf)) => read(fd, buf),
            (Action::WriteNow { .. }, Some(buf)) => as_result(rustix::io::retry_on_intr(|| {
                rustix::io::write(fd, buf.as_slice())
            })),
            (Action::Poll { events }, _) => {
                let flags = EventFlags::from_bits_retain(events);
                return self.wait_for(key, fd, flags);
            }
            (Action::Command(_), _) => -libc::ENOSYS,
            _ => return false,
        };
        if matches!(action, Action::ReadReady) && result == -libc::EAGAIN {
            return self.wait_for(key, fd, EventFlags::IN | EventFlags::EXCLUSIVE);
        }
        self.done.push((key, result));
        true
    }

    fn wait_for(&mut self, key: CancelKey, fd: &SharedFd, flags: EventFlags) -> bool {
        if let Err(errno) = epoll::add(&self.poller, fd, EventData::new_u64(encode(key)), flags) {
            self.done.push((key, -errno.raw_os_error()));
        }
        true
    }

    pub(crate) fn cancel(&mut self, key: CancelKey, table: &mut Table) {
        let Some(entry) = table.get(key) else { return };
        // What a worker has started runs to its end; what is done already has its result.
        if !matches!(entry.action, Action::Poll { .. } | Action::ReadReady) {
            return;
        }
        let Some(fd) = &entry.fd else { return };
        if epoll::delete(&self.poller, fd).is_ok() {
            self.done.push((key, -libc::ECANCELED));
        }
    }

    pub(crate) fn has_news(&mut self) -> bool {
        if !self.done.is_empty() {
            return true;
        }
        let mut fds = [rustix::event::PollFd::new(
            &self.poller,
            rustix::event::PollFlags::IN,
        )];
        matches!(
            rustix::event::poll(
                &mut fds,
                Some(&Timespec {
                    tv_sec: 0,
                    tv_nsec: 0
                })
            ),
            Ok(1..)
        )
    }

    pub(crate) fn turn(
        &mut self,
        nap: Nap,
        table: &mut Table,
        home: &Arc<Postbox>,
        done: &mut Done,
    ) -> io::Result<()> {
        done.append(&mut self.done);
        let timeout = match nap {
            Nap::None => Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
            _ if !done.is_empty() => Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
            // A time too long for the kernel's struct is as good as none.
            Nap::For(time) => Timespec::try_from(time).ok(),
            Nap::Forever => None,
        };
        self.events.clear();
        self.enters += 1;
        match epoll::wait(
            &self.poller,
            rustix::buffer::spare_capacity(&mut self.events),
            timeout.as_ref(),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        for event in &self.events {
            let data = event.data.u64();
            if data == BELL {
                let _ = rustix::io::read(home.bell(), &mut [0; 8]);
                continue;
            }
            let key = decode(data);
            let Some(entry) = table.get(key) else {
                continue;
            };
            let Some(fd) = &entry.fd else { continue };
            let _ = epoll::delete(&self.poller, fd);
            let result = match entry.buf.as_mut() {
                Some(buf) => read(fd, buf),
                None => { event.flags }.bits() as i32,
            };
            done.push((key, result));
        }
        Ok(())
    }
}
