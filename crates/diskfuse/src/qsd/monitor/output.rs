//! What is on its way to one client. A client that does not read must never hold up anybody: whoever sends never waits.
//! What the client's socket takes at once is written by the sender itself, the rest by a thread made for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

/// Bytes that may wait before events are dropped. Answers are not: their number is bounded by that of the requests that
/// are read, which stops long before.
const MOST_WAITING: usize = 4 << 20;

/// What a pipe or terminal that can be written to takes without blocking (`PIPE_BUF`).
const PIECE: usize = 4096;

/// How often a writer looks whether it is still wanted.
const TICK_MS: i64 = 100;

/// Who can wait for what is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An answer, or the greeting.
    Answer,
    /// An event; dropped when too much is waiting.
    Event,
}

/// The way to one client. Clones lead to the same one.
#[derive(Clone)]
pub struct Output(Arc<Shared>);

struct Shared {
    fd: Arc<OwnedFd>,
    /// Whether it is a socket, which can be written to without ever blocking.
    socket: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Vec<u8>>,
    /// Bytes in `waiting`, and in what the writer has taken out of it.
    bytes: usize,
    /// Somebody is writing; the order would be lost if another one did.
    busy: bool,
    has_thread: bool,
    closed: bool,
    dropped: u64,
}

impl Output {
    /// To this descriptor.
    pub fn new(fd: Arc<OwnedFd>, socket: bool) -> Self {
        Self(Arc::new(Shared {
            fd,
            socket,
            state: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// Sends a text; returns at once.
    pub fn send(&self, kind: Kind, text: &str) {
        let shared = &self.0;
        let mut state = shared.state.lock();
        if state.closed {
            return;
        }
        if kind == Kind::Event && state.bytes + text.len() > MOST_WAITING {
            state.dropped += 1;
            if state.dropped == 1 {
                drop(state);
                tracing::warn!("a client of the monitor does not read; it will miss events");
            }
            return;
        }
        let mut rest = text.as_bytes();
        state.bytes += rest.len();
        if shared.socket && state.waiting.is_empty() && !state.busy {
            state.busy = true;
            drop(state);
            let outcome = shared.write_now(&mut rest);
            state = shared.state.lock();
            state.busy = false;
            match outcome {
                Ok(()) => state.bytes = state.bytes.saturating_sub(text.len() - rest.len()),
                Err(_) => state.close(),
            }
            if !rest.is_empty() && !state.closed {
                state.waiting.push_front(rest.to_vec());
            }
        } else {
            state.waiting.push_back(rest.to_vec());
        }
        self.wake_writer(&mut state);
        drop(state);
        shared.changed.notify_all();
    }

    /// Makes a thread if there is something to write and nobody who will.
    fn wake_writer(&self, state: &mut State) {
        if state.waiting.is_empty() || state.busy || state.has_thread || state.closed {
            return;
        }
        let shared = Arc::clone(&self.0);
        let thread = std::thread::Builder::new().name("monitor-out".to_owned());
        match thread.stack_size(64 << 10).spawn(move || shared.write_on()) {
            Ok(_) => state.has_thread = true,
            Err(error) => {
                tracing::warn!(%error, "no thread to write to a client of the monitor; closing it");
                state.close();
            }
        }
    }

    /// Waits until less than this many bytes are waiting, or the client is gone.
    pub fn wait_below(&self, bytes: usize) {
        let mut state = self.0.state.lock();
        while state.bytes >= bytes && !state.closed {
            self.0.changed.wait(&mut state);
        }
    }

    /// Waits until everything is written, for so long at most.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.0.state.lock();
        while state.bytes > 0 && !state.closed {
            if self.0.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
    }

    /// Drops what is waiting, and all that comes.
    pub fn close(&self) {
        self.0.state.lock().close();
        self.0.changed.notify_all();
    }
}

impl State {
    fn close(&mut self) {
        self.closed = true;
        self.waiting.clear();
        self.bytes = 0;
    }
}

impl Shared {
    /// Writes what the socket takes at once; `rest` is what it does not take.
    fn write_now(&self, rest: &mut &[u8]) -> io::Result<()> {
        while !rest.is_empty() {
            match send(&self.fd, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => *rest = rest.get(count..).unwrap_or_default(),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The writer's thread: until the client is gone.
    fn write_on(&self) {
        loop {
            let mut state = self.state.lock();
            while (state.waiting.is_empty() || state.busy) && !state.closed {
                self.changed.wait(&mut state);
            }
            let Some(text) = state.waiting.pop_front() else {
                return;
            };
            state.busy = true;
            drop(state);
            let outcome = self.write_patiently(&text);
            let mut state = self.state.lock();
            state.busy = false;
            state.bytes = state.bytes.saturating_sub(text.len());
            if outcome.is_err() {
                state.close();
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    fn write_patiently(&self, text: &[u8]) -> io::Result<()> {
        let mut rest = text;
        while !rest.is_empty() {
            if self.state.lock().closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: TICK_MS * 1_000_000,
            };
            match poll(&mut fds, Some(&tick)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) if self.socket => self.write_now(&mut rest)?,
                Ok(_) => {
                    let piece = rest.get(..PIECE).unwrap_or(rest);
                    match rustix::io::write(self.fd.as_fd(), piece) {
                        Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                        Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Output, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Output::new(Arc::new(ours.into()), true), theirs)
    }

    #[test]
    fn all_arrives_in_order_however_slowly_it_is_read() {
        let (output, mut client) = pair();
        let text = |number: u32| format!("{number} {}\n", "x".repeat(10_000));
        let began = Instant::now();
        for number in 0..100 {
            output.send(Kind::Answer, &text(number));
        }
        assert!(began.elapsed() < Duration::from_secs(5), "sending waits");
        let expected: String = (0..100).map(text).collect();
        let mut read = vec![0; expected.len()];
        client.read_exact(&mut read).unwrap();
        assert!(read == expected.as_bytes());
        output.flush(Duration::from_secs(5));
        assert_eq!(output.0.state.lock().bytes, 0);
        output.close();
    }

    #[test]
    fn a_client_that_never_reads_costs_a_bounded_amount_and_no_time() {
        let (output, client) = pair();
        let text = "x".repeat(1000);
        let began = Instant::now();
        for _ in 0..100_000 {
            output.send(Kind::Event, &text);
        }
        assert!(began.elapsed() < Duration::from_secs(20), "sending waits");
        let state = output.0.state.lock();
        assert!(state.bytes <= MOST_WAITING && state.dropped > 50_000);
        drop((state, client));
        output.flush(Duration::from_secs(5));
        output.close();
    }

    #[test]
    fn nobody_there_is_no_reason_to_wait() {
        let (output, client) = pair();
        drop(client);
        output.send(Kind::Answer, "x");
        output.wait_below(1);
        output.flush(Duration::from_secs(5));
        assert!(output.0.state.lock().closed);
    }
}
