//! `--metrics`: what the daemon counts, for Prometheus and whatever else reads its text format. The socket is made before
//! anything is mounted; afterwards clients are only accepted, read from and answered. A client must never hold anything but a
//! thread of its own, of which there are few and each for a few seconds only.

mod http;
mod text;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use diskfuse_monitor::SocketAddress;
use parking_lot::Mutex;

use crate::control::protocol::{Answer, ExportStatus, Request};
use crate::error::{Error, Result};
use crate::qsd::monitor::socket::{Listener, MadePath};
use crate::sandbox::Removal;

/// Clients served at a time; further ones are closed at once.
const MOST_CLIENTS: usize = 16;
/// How long a client may take to ask, and how long to take the answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the main thread may take to say what there is: it may be waiting for a disk.
const ANSWER: Duration = Duration::from_secs(2);

type Ask = dyn Fn(Request) -> Receiver<Answer> + Send + Sync;

/// A socket that is listened on. Dropping it removes its path.
pub struct Metrics {
    listener: Listener,
    made: Option<MadePath>,
}

/// Metrics that are served. Dropping it removes the socket's path; the thread ends with the process.
pub struct Served {
    /// Kept for as long as it is served.
    made: Option<MadePath>,
}

impl Metrics {
    /// Listens on `address`: `HOST:PORT`, `[IPv6]:PORT` or `unix:PATH`.
    ///
    /// # Errors
    /// It is not an address; somebody else has it; or at the path there is something that is not a dead socket of this user.
    pub fn listen(address: &str) -> Result<Self> {
        let failed = |error| Error::Refused(format!("--metrics {address}: {error}"));
        let parsed = parse(address).ok_or_else(|| {
            let examples =
                "not an address; examples: 127.0.0.1:9100, [::1]:9100, unix:/run/diskfuse.metrics";
            failed(Error::refused(examples))
        })?;
        let (listener, made) = Listener::open(&parsed).map_err(failed)?;
        Ok(Self { listener, made })
    }

    /// Answers clients from now on, on threads of its own, with what `ask` is answered.
    pub fn serve(
        self,
        ask: impl Fn(Request) -> Receiver<Answer> + Send + Sync + 'static,
    ) -> Result<Served> {
        let Self { listener, made } = self;
        let counter = Arc::new(Counter::new(ask));
        thread(move || accept(&listener, &counter))
            .map_err(Error::system("Could not serve metrics"))?;
        Ok(Served { made })
    }
}

impl Served {
    /// What removes the socket's path, if it has one.
    pub fn removal(&mut self) -> Option<&mut Removal> {
        self.made.as_mut().map(MadePath::removal)
    }
}

fn parse(address: &str) -> Option<SocketAddress> {
    if let Some(path) = address.strip_prefix("unix:") {
        return (!path.is_empty()).then(|| SocketAddress::Unix(PathBuf::from(path)));
    }
    if let Ok(address) = address.parse::<SocketAddr>() {
        return inet(&address.ip().to_string(), address.port());
    }
    let (host, port) = address.rsplit_once(':')?;
    let is_name = !host.is_empty() && !host.contains([':', '[', ']', '/']);
    is_name.then_some(())?;
    inet(host, port.parse().ok()?)
}

/// Nobody would know which port the system has chosen.
fn inet(host: &str, port: u16) -> Option<SocketAddress> {
    let host = host.to_owned();
    (port != 0).then_some(SocketAddress::Inet { host, port })
}

fn thread(work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    let thread = std::thread::Builder::new().name("metrics".to_owned());
    thread.stack_size(256 << 10).spawn(work).map(drop)
}

fn accept(listener: &Listener, counter: &Arc<Counter>) {
    let clients = Arc::new(AtomicUsize::new(0));
    // There is nobody who interrupts: the process's end does.
    while let Some(stream) = listener.accept(None) {
        let Some(socket) = stream.input else { continue };
        let Some(client) = Client::admit(&clients) else {
            continue;
        };
        let counter = Arc::clone(counter);
        let served = thread(move || {
            if let Err(error) = http::serve(&socket, PATIENCE, || page(&counter)) {
                tracing::debug!(%error, "a client of the metrics was cut off");
            }
            drop(client);
        });
        if let Err(error) = served {
            tracing::warn!(%error, "cannot serve a client of the metrics");
        }
    }
}

/// A client that is counted for as long as it is served.
struct Client(Weak<AtomicUsize>);

impl Client {
    fn admit(clients: &Arc<AtomicUsize>) -> Option<Self> {
        // Only one thread admits.
        let admitted = clients.load(Ordering::SeqCst) < MOST_CLIENTS;
        admitted.then(|| {
            clients.fetch_add(1, Ordering::SeqCst);
            Self(Arc::downgrade(clients))
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let Some(clients) = self.0.upgrade() {
            clients.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Where clients ask the main thread, one after the other: however many come while it waits for a disk, one question lies before
/// it.
struct Counter {
    ask: Box<Ask>,
    /// The answer that somebody has stopped waiting for.
    owed: Mutex<Option<Receiver<Answer>>>,
}

impl Counter {
    fn new(ask: impl Fn(Request) -> Receiver<Answer> + Send + Sync + 'static) -> Self {
        Self {
            ask: Box::new(ask),
            owed: Mutex::default(),
        }
    }

    /// What there is; `None` if the main thread does not say so in this time, or is ending.
    fn exports(&self, patience: Duration) -> Option<Vec<ExportStatus>> {
        let end = Instant::now() + patience;
        let left = || end.saturating_duration_since(Instant::now());
        let mut owed = self.owed.try_lock_until(end)?;
        if let Some(answer) = owed.take() {
            // It may tell of a moment that is long over, so it is not used.
            if let Err(RecvTimeoutError::Timeout) = answer.recv_timeout(left()) {
                *owed = Some(answer);
                return None;
            }
        }
        let answer = (self.ask)(Request::List);
        match answer.recv_timeout(left()) {
            Ok(Answer::Exports { exports }) => Some(exports),
            Err(RecvTimeoutError::Timeout) => {
                *owed = Some(answer);
                None
            }
            _ => None,
        }
    }
}

/// The page, or why there is none.
fn page(counter: &Counter) -> std::result::Result<String, String> {
    let exports = counter.exports(ANSWER);
    text::page(&exports.ok_or("the daemon is busy or ending")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_hosts_with_ports_or_paths() {
        let inet = |host: &str, port| {
            let host = host.to_owned();
            Some(SocketAddress::Inet { host, port })
        };
        assert_eq!(parse("127.0.0.1:9100"), inet("127.0.0.1", 9100));
        assert_eq!(parse("[::1]:9100"), inet("::1", 9100));
        assert_eq!(parse("localhost:80"), inet("localhost", 80));
        let path = SocketAddress::Unix(PathBuf::from("/a:b"));
        assert_eq!(parse("unix:/a:b"), Some(path));
        for wrong in [
            "",
            "9100",
            ":9100",
            "::1:9100",
            "h:",
            "h:0",
            "h:65536",
            "unix:",
            "/path",
            "http://h:1",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn no_more_clients_are_admitted_than_there_may_be() {
        let clients = Arc::default();
        let admitted: Vec<_> = std::iter::repeat_with(|| Client::admit(&clients))
            .take(17)
            .collect();
        assert!(admitted[..16].iter().all(Option::is_some) && admitted[16].is_none());
        drop(admitted);
        assert!(Client::admit(&clients).is_some());
    }

    #[test]
    fn one_question_lies_before_a_main_thread_that_does_not_answer() {
        let (sender, mut asked) = std::sync::mpsc::channel();
        let sender = Mutex::new(sender);
        let counter = Counter::new(move |_| {
            let (reply, answer) = std::sync::mpsc::channel();
            sender.lock().send(reply).unwrap();
            answer
        });
        let short = Duration::from_millis(10);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..3 {
                        assert!(counter.exports(short).is_none());
                    }
                });
            }
        });
        let waiting: Vec<_> = asked.try_iter().collect();
        assert_eq!(waiting.len(), 1);
        // It goes on: what it was asked then is answered, and what is asked now.
        let exports = Vec::new;
        let _ = waiting[0].send(Answer::Exports { exports: exports() });
        std::thread::scope(|scope| {
            let asked = &mut asked;
            scope.spawn(move || {
                let reply = asked.recv_timeout(Duration::from_secs(10)).unwrap();
                reply.send(Answer::Exports { exports: exports() }).unwrap();
            });
            assert!(counter.exports(Duration::from_secs(10)).is_some());
        });
        assert!(asked.try_recv().is_err());
    }
}
