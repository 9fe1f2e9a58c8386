//! Sockets of chardevs, and of metrics: listening, connecting, and the paths that are left behind.

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use diskfuse_monitor::SocketAddress;
use diskfuse_ring::Reason;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

use super::stream::Stream;
use crate::error::{Error, Result};
use crate::sandbox::{Leftover, Removal};

/// How often whoever waits for a client looks whether it is still to wait.
const TICK: Duration = Duration::from_millis(50);

/// How long others may take to make a socket. It takes them no time, but who may open a folder may lock it for ever.
const TURN: Duration = Duration::from_secs(2);

/// How long a host may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);

/// A socket in the file system that this process has made. Dropping it removes the path, if it is still that socket.
pub struct MadePath {
    removal: Removal,
}

impl MadePath {
    fn of(path: &Path) -> Option<Self> {
        // The working directory may change.
        let path = std::path::absolute(path).ok()?;
        let stat = std::fs::symlink_metadata(&path).ok()?;
        stat.file_type().is_socket().then(|| Self {
            removal: Removal::new(Leftover::new(path, &stat, false)),
        })
    }

    /// What removes it.
    pub fn removal(&mut self) -> &mut Removal {
        &mut self.removal
    }
}

impl Drop for MadePath {
    fn drop(&mut self) {
        if let Err(error) = self.removal.carry_out() {
            let path = self.removal.path().display();
            tracing::debug!(%error, %path, "cannot remove a socket");
        }
    }
}

/// A socket that is listened on.
pub enum Listener {
    /// Unix.
    Unix(UnixListener),
    /// TCP.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens.
    pub fn open(address: &SocketAddress) -> Result<(Self, Option<MadePath>)> {
        let (listener, made) = Self::bind(address)?;
        // A client that has gone again must not make its acceptance wait for the next one.
        let outcome = match &listener {
            Self::Unix(listener) => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        };
        outcome.map_err(Error::system("Failed to listen on socket"))?;
        Ok((listener, made))
    }

    fn bind(address: &SocketAddress) -> Result<(Self, Option<MadePath>)> {
        match address {
            SocketAddress::Unix(path) => {
                let listener = listen_on(path)?;
                Ok((Self::Unix(listener), MadePath::of(path)))
            }
            SocketAddress::Abstract(name) => {
                let failed = || format!("Failed to bind socket to {name}");
                let address = SocketAddr::from_abstract_name(name);
                let listener = address.and_then(|address| UnixListener::bind_addr(&address));
                let listener = listener.map_err(Error::system(failed()))?;
                Ok((Self::Unix(listener), None))
            }
            SocketAddress::Inet { host, port } => {
                let host = if host.is_empty() { "::" } else { host };
                let failed = || format!("Failed to bind socket to {host}:{port}");
                let listener = TcpListener::bind((host, *port)).map_err(Error::system(failed()))?;
                Ok((Self::Tcp(listener), None))
            }
            SocketAddress::Fd(number) => {
                let fd = inherited(*number)?;
                let domain = rustix::net::sockopt::socket_domain(&fd);
                let is_unix = domain == Ok(rustix::net::AddressFamily::UNIX);
                let listener = if is_unix {
                    Self::Unix(UnixListener::from(fd))
                } else {
                    Self::Tcp(TcpListener::from(fd))
                };
                Ok((listener, None))
            }
        }
    }

    /// Waits for the next client; for as long as `interrupted`, if it is given, does not say otherwise. `None`: it is not
    /// to wait any more, or nothing can come.
    pub fn accept(&self, interrupted: Option<&dyn Fn() -> bool>) -> Option<Stream> {
        let fd = match self {
            Self::Unix(listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        };
        let tick = Timespec {
            tv_sec: 0,
            tv_nsec: i64::try_from(TICK.as_nanos()).unwrap_or_default(),
        };
        let limit = interrupted.is_some().then_some(&tick);
        while !interrupted.is_some_and(|interrupted| interrupted()) {
            let mut fds = [PollFd::new(&fd, PollFlags::IN)];
            match poll(&mut fds, limit) {
                Ok(0) | Err(Errno::INTR) => continue,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot wait for clients");
                    return None;
                }
            }
            match self.accept_now() {
                Ok(socket) => return Some(Stream::socket(socket)),
                Err(error) => {
                    tracing::debug!(%error, "a client was lost");
                    // Nor is there any use in trying at once again when descriptors have run out.
                    std::thread::sleep(TICK);
                }
            }
        }
        None
    }

    fn accept_now(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Unix(listener) => listener.accept().map(|(socket, _)| socket.into()),
            Self::Tcp(listener) => {
                let (socket, _) = listener.accept()?;
                socket.set_nodelay(true)?;
                Ok(socket.into())
            }
        }
    }
}

/// Listens on a path. A socket that stands there is removed if nobody answers and it is this user's.
fn listen_on(path: &Path) -> Result<UnixListener> {
    // Until it listens: what two find dead at a time, the slower one would remove when it is the quicker one's new socket.
    let _turn = turn(path);
    let failed = || format!("Failed to bind socket to {}", path.display());
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path) => {
            std::fs::remove_file(path).map_err(Error::system(failed()))?;
            UnixListener::bind(path).map_err(Error::system(failed()))
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(Error::refused(format!(
            "UNIX socket path '{}' is too long (Path must be less than 108 bytes)",
            path.display()
        ))),
        other => other.map_err(Error::system(failed())),
    }
}

/// Waits until nobody else makes a socket in the folder of `path`; others may again when what is returned is dropped. It is a lock of
/// the folder itself, so nothing is left behind. Where there is no such lock, and where somebody does not let go of it, it is done
/// without.
fn turn(path: &Path) -> Option<File> {
    let path = std::path::absolute(path).ok()?;
    let folder = File::open(path.parent()?).ok()?;
    let end = Instant::now() + TURN;
    loop {
        match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(folder),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => {
                tracing::debug!(%error, path = %path.display(), "no turn to make a socket");
                return None;
            }
        }
    }
}

fn is_stale(path: &Path) -> bool {
    let Ok(found) = std::fs::symlink_metadata(path) else {
        return false;
    };
    let ours = found.uid() == rustix::process::geteuid().as_raw();
    let nobody = || {
        UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    found.file_type().is_socket() && ours && nobody()
}

/// Connects.
pub fn connect(address: &SocketAddress) -> Result<Stream> {
    let socket: OwnedFd = match address {
        SocketAddress::Unix(path) => {
            let failed = || format!("Failed to connect to '{}'", path.display());
            UnixStream::connect(path)
                .map_err(Error::system(failed()))?
                .into()
        }
        SocketAddress::Abstract(name) => {
            let address = SocketAddr::from_abstract_name(name);
            address
                .and_then(|address| UnixStream::connect_addr(&address))
                .map_err(Error::system(format!("Failed to connect to '{name}'")))?
                .into()
        }
        SocketAddress::Inet { host, port } => {
            let failed = || format!("Failed to connect to '{host}:{port}'");
            let host = if host.is_empty() { "localhost" } else { host };
            connect_tcp(host, *port)
                .map_err(Error::system(failed()))?
                .into()
        }
        SocketAddress::Fd(number) => inherited(*number)?,
    };
    Ok(Stream::socket(socket))
}

fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut outcome = Err(io::ErrorKind::NotFound.into());
    for address in (host, port).to_socket_addrs()? {
        outcome = TcpStream::connect_timeout(&address, CONNECT);
        if outcome.is_ok() {
            break;
        }
    }
    let socket = outcome?;
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// A duplicate of a socket that the process was started with.
fn inherited(number: i32) -> Result<OwnedFd> {
    let failed = |error| {
        let reason = Reason(&io::Error::from(error)).to_string();
        Error::refused(format!("Cannot use file descriptor '{number}': {reason}"))
    };
    let this = pidfd_open(getpid(), PidfdFlags::empty()).map_err(failed)?;
    let fd = match pidfd_getfd(&this, number, PidfdGetfdFlags::empty()) {
        Ok(fd) => Some(fd),
        Err(Errno::BADF) => None,
        Err(error) => return Err(failed(error)),
    };
    let is_socket = |fd: &OwnedFd| rustix::net::sockopt::socket_domain(fd).is_ok();
    fd.filter(is_socket)
        .ok_or_else(|| Error::refused(format!("File descriptor '{number}' is not a socket")))
}

/// Waits for this long, or until it is over.
pub fn pause(time: Duration, over: &AtomicBool) {
    let mut left = time;
    while !left.is_zero() && !over.load(Ordering::SeqCst) {
        let step = left.min(TICK);
        std::thread::sleep(step);
        left -= step;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn of_many_who_find_a_dead_socket_one_gets_its_place_and_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        for _ in 0..200 {
            drop(UnixListener::bind(&path).unwrap());
            let start = Barrier::new(4);
            let race = || {
                start.wait();
                listen_on(&path).ok()
            };
            let listeners: Vec<_> = std::thread::scope(|scope| {
                let racers: Vec<_> = (0..4).map(|_| scope.spawn(race)).collect();
                let ended = racers.into_iter().map(|racer| racer.join().unwrap());
                ended.collect()
            });
            let mut there = listeners.into_iter().flatten();
            let winner = there.next().unwrap();
            assert!(
                there.next().is_none(),
                "one who lost its place without a word"
            );
            winner.set_nonblocking(true).unwrap();
            let _client = UnixStream::connect(&path).unwrap();
            assert!(winner.accept().is_ok());
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn who_does_not_let_go_of_the_folder_keeps_nobody_from_listening() {
        let folder = tempfile::tempdir().unwrap();
        let theirs = File::open(folder.path()).unwrap();
        flock(&theirs, FlockOperation::LockExclusive).unwrap();
        let path = folder.path().join("s");
        let listener = listen_on(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(listener);
    }
}
