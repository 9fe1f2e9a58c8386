//! The asking end of control sockets. A daemon that is dead, stopped or gone mad must never keep it from finishing:
//! every wait has a limit, except for an unmount, which takes as long as the disk takes and says so, unless its caller
//! sets a limit.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::PidfdFlags;

use super::protocol::{Answer, ExportStatus, LONGEST_ANSWER, Request, Unmount, WirePath};
use super::{SUFFIX, check_ours, read_line};
use diskfuse_ring::Reason;

use crate::error::{Error, Result};

/// How long a daemon may take to list its exports.
const PATIENCE: Duration = Duration::from_secs(2);

/// After how long a wait for an unmount is worth a word.
const WORTH_A_WORD: Duration = Duration::from_secs(5);

/// A daemon that is there.
#[derive(Debug)]
pub struct Daemon {
    socket: PathBuf,
    /// What it serves.
    pub exports: Vec<ExportStatus>,
    /// When it said so.
    pub answered: Instant,
}

/// How often one that is ending is asked again.
const AGAIN: Duration = Duration::from_millis(20);

/// Everything that listens in a folder.
#[derive(Debug, Default)]
pub struct Daemons {
    /// Those that answered, by process id.
    pub answering: Vec<Daemon>,
    /// A sentence about each of those that did not.
    pub silent: Vec<String>,
}

/// Asks all daemons of `folder` what they serve. Sockets of daemons that are dead are removed.
pub fn find(folder: &Path) -> Result<Daemons> {
    find_within(folder, PATIENCE)
}

/// The same, with less patience: a daemon that takes longer is silent.
pub fn find_within(folder: &Path, patience: Duration) -> Result<Daemons> {
    let failed = || format!("Could not look for daemons in '{}'", folder.display());
    match folder.symlink_metadata() {
        Ok(stat) => check_ours(folder, &stat)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Daemons::default()),
        Err(error) => return Err(Error::system(failed())(error)),
    }
    let entries = fs::read_dir(folder).map_err(Error::system(failed()))?;
    let mut sockets: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|suffix| suffix == SUFFIX))
        .collect();
    sockets.sort_by_key(|path| process_id(path));
    let answers: Vec<_> = std::thread::scope(|scope| {
        // All at once, so that several that do not answer cost one wait.
        let asked: Vec<_> = sockets
            .iter()
            .map(|path| scope.spawn(|| ask(path, patience)))
            .collect();
        asked
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .collect()
    });
    let mut found = Daemons::default();
    for (socket, answer) in sockets.into_iter().zip(answers) {
        match answer {
            Ok(Ok(Some((answered, exports)))) => found.answering.push(Daemon {
                socket,
                exports,
                answered,
            }),
            Ok(Ok(None)) => {}
            Ok(Err(error)) => found.silent.push(silence(&socket, &error)),
            Err(_) => found
                .silent
                .push(format!("asking '{}' failed", socket.display())),
        }
    }
    Ok(found)
}

fn process_id(socket: &Path) -> Option<u32> {
    socket.file_stem()?.to_str()?.parse().ok()
}

fn silence(socket: &Path, error: &io::Error) -> String {
    let who = match process_id(socket) {
        Some(id) => format!("the daemon with process id {id}"),
        None => format!("whoever listens on '{}'", socket.display()),
    };
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
            format!("{who} does not answer (stopped, or stuck?)")
        }
        _ => format!("{who} cannot be asked: {}", Reason(error)),
    }
}

/// What the daemon behind a socket serves, and when it said so; `None` if there is no daemon any more.
fn ask(socket: &Path, patience: Duration) -> io::Result<Option<(Instant, Vec<ExportStatus>)>> {
    let deadline = Instant::now() + patience;
    loop {
        match ask_once(socket, deadline)? {
            // It shows nothing any more, and is gone itself in a moment; or when its images are closed, on a slow disk.
            Some(Said::Ending) if Instant::now() + AGAIN < deadline => std::thread::sleep(AGAIN),
            Some(Said::Exports(exports)) => return Ok(Some((Instant::now(), exports))),
            Some(Said::Ending) | None => return Ok(None),
        }
    }
}

/// What a daemon says.
enum Said {
    Exports(Vec<ExportStatus>),
    Ending,
}

fn ask_once(socket: &Path, deadline: Instant) -> io::Result<Option<Said>> {
    let mut stream = match connect(socket) {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // Nobody listens, and it listened before it got this name: its process is dead.
            let _ = fs::remove_file(socket);
            return Ok(None);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    send(&mut stream, &Request::List)?;
    match read_answer(&mut stream, deadline) {
        Ok(Answer::Exports { exports }) => Ok(Some(Said::Exports(exports))),
        Ok(Answer::Ending) => Ok(Some(Said::Ending)),
        Ok(Answer::Failed { message }) => Err(io::Error::other(message)),
        Ok(Answer::Unmounted { .. } | Answer::Busy) => Err(io::ErrorKind::InvalidData.into()),
        // It ended while we asked.
        Err(error) if is_end(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// Connects without waiting: a daemon that does not accept for so long that its backlog is full is not waited for.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd: OwnedFd =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(socket)?)?;
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn send(stream: &mut UnixStream, request: &Request) -> io::Result<()> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn read_answer(stream: &mut UnixStream, deadline: Instant) -> io::Result<Answer> {
    let line = read_line(stream, LONGEST_ANSWER, deadline)?;
    Ok(serde_json::from_slice(&line)?)
}

/// What came of asking for an unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Unmounted,
    /// Somebody uses the file, so nothing was done.
    Busy,
    /// The time was up; it goes on by itself.
    Unfinished,
}

impl Daemon {
    /// Whether its mounts are those of this process: it is in the same mount namespace. False if that cannot be told.
    pub fn sees_our_mounts(&self) -> bool {
        let space = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
        let its = connect(&self.socket)
            .and_then(|stream| Ok(rustix::net::sockopt::socket_peercred(&stream)?))
            .and_then(|peer| space(&peer.pid.as_raw_nonzero().to_string()));
        matches!((its, space("self")), (Ok(its), Ok(ours)) if its == ours)
    }

    /// Has the export at `mountpoint` drained, flushed and unmounted, and waits until that is done, `deadline` at the
    /// latest, and until the process has ended if that was what it was there for. Calls `still_waiting` once if it takes
    /// long.
    pub fn unmount(
        &self,
        mountpoint: &WirePath,
        how: Unmount,
        deadline: Option<Instant>,
        still_waiting: impl FnOnce(),
    ) -> Result<Outcome> {
        let failed = || {
            format!(
                "Could not ask for '{}' to be unmounted",
                mountpoint.0.display()
            )
        };
        let mut stream = connect(&self.socket).map_err(Error::system(failed()))?;
        let process = process_of(&stream);
        let request = Request::Unmount {
            mountpoint: mountpoint.clone(),
            how,
        };
        send(&mut stream, &request).map_err(Error::system(failed()))?;
        let ready = wait_readable(&stream, deadline, still_waiting);
        if !ready.map_err(Error::system(failed()))? {
            return Ok(Outcome::Unfinished);
        }
        match read_answer(&mut stream, Instant::now() + PATIENCE) {
            Ok(Answer::Unmounted { ends }) => {
                if ends {
                    wait_for_end(process)?;
                }
                Ok(Outcome::Unmounted)
            }
            Ok(Answer::Busy) => Ok(Outcome::Busy),
            Ok(Answer::Ending) => Err(Error::refused("The daemon is ending already")),
            Ok(Answer::Failed { message }) => Err(Error::refused(message)),
            Ok(Answer::Exports { .. }) => Err(Error::refused(format!(
                "{}: the answer makes no sense",
                failed()
            ))),
            Err(error) if is_end(&error) => Err(Error::refused(
                "The daemon ended without an answer: what was written last may be lost",
            )),
            Err(error) => Err(Error::system(failed())(error)),
        }
    }
}

/// Waits for the answer; false if `deadline` passed.
fn wait_readable(
    stream: &UnixStream,
    deadline: Option<Instant>,
    still_waiting: impl FnOnce(),
) -> io::Result<bool> {
    let left = || deadline.map(|at| at.saturating_duration_since(Instant::now()));
    let first = left().map_or(WORTH_A_WORD, |left| left.min(WORTH_A_WORD));
    if wait(stream, Some(first))? {
        return Ok(true);
    }
    if left().is_some_and(|left| left.is_zero()) {
        return Ok(false);
    }
    still_waiting();
    wait(stream, left())
}

/// A handle on the process at the other end, by which its end can be seen. `None` if it is gone already, or if the
/// kernel has no such handles.
fn process_of(stream: &UnixStream) -> Option<OwnedFd> {
    let peer = rustix::net::sockopt::socket_peercred(stream).ok()?;
    rustix::process::pidfd_open(peer.pid, PidfdFlags::empty()).ok()
}

fn wait_for_end(process: Option<OwnedFd>) -> Result<()> {
    let Some(process) = process else {
        return Ok(());
    };
    match wait(&process, Some(Duration::from_secs(30))) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::refused(
            "It is unmounted, but its daemon does not end",
        )),
        Err(error) => Err(Error::system("Could not wait for the daemon's end")(error)),
    }
}

/// Waits until there is something to read, or the other end is gone. False if the limit passed.
fn wait(fd: &impl std::os::fd::AsFd, limit: Option<Duration>) -> io::Result<bool> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left
            .map(Timespec::try_from)
            .transpose()
            .map_err(io::Error::other)?;
        match rustix::event::poll(&mut [PollFd::new(fd, PollFlags::IN)], left.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    use super::super::server::Server;
    use super::*;

    fn status(mountpoint: &str) -> ExportStatus {
        ExportStatus {
            image: None,
            mountpoint: Path::new(mountpoint).into(),
            pid: std::process::id(),
            id: "e".to_owned(),
            node: "n".to_owned(),
            format: "raw".to_owned(),
            writable: false,
            stopping: false,
            queues: 1,
            transport: "device".to_owned(),
            passthrough: false,
            in_flight: 0,
            reads: 1,
            writes: 2,
            read_bytes: 3,
            written_bytes: u64::MAX,
            flushes: 5,
            errors: 6,
            per_queue: Vec::new(),
            metadata_cache: None,
        }
    }

    fn folder() -> tempfile::TempDir {
        use std::os::unix::fs::PermissionsExt;
        let private = fs::Permissions::from_mode(0o700);
        tempfile::Builder::new()
            .permissions(private)
            .tempdir()
            .unwrap()
    }

    fn server(folder: &Path) -> Server {
        let handler = |request| {
            Some(match request {
                Request::List => Answer::Exports {
                    exports: vec![status("/m")],
                },
                Request::Unmount { mountpoint, how } if mountpoint.0 == Path::new("/busy") => {
                    match how {
                        Unmount::UnlessBusy => Answer::Busy,
                        _ => Answer::Unmounted { ends: false },
                    }
                }
                Request::Unmount { mountpoint, .. } if mountpoint.0 == Path::new("/slow") => {
                    std::thread::sleep(Duration::from_millis(300));
                    Answer::Unmounted { ends: false }
                }
                Request::Unmount { mountpoint, .. } if mountpoint.0 == Path::new("/m") => {
                    Answer::Unmounted { ends: false }
                }
                Request::Unmount { .. } => Answer::Failed {
                    message: "no such export".to_owned(),
                },
            })
        };
        Server::start(folder, Arc::new(handler)).unwrap()
    }

    /// Nobody is told that somebody does not answer because a daemon is just ending.
    #[test]
    fn a_daemon_that_is_ending_is_waited_for() {
        let folder = folder();
        let server = Server::start(folder.path(), Arc::new(|_| None)).unwrap();
        let end = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(server);
        });
        let found = find(folder.path()).unwrap();
        assert!(found.answering.is_empty());
        assert_eq!(found.silent, [""; 0]);
        end.join().unwrap();
        let server = Server::start(folder.path(), Arc::new(|_| None)).unwrap();
        let found = find_within(folder.path(), Duration::from_millis(200)).unwrap();
        assert!(found.answering.is_empty());
        assert_eq!(found.silent, [""; 0], "it goes on for long");
        drop(server);
    }

    #[test]
    fn a_daemon_is_found_asked_and_gone_again() {
        let folder = folder();
        let server = server(folder.path());
        let found = find(folder.path()).unwrap();
        assert_eq!(found.silent, [""; 0]);
        assert_eq!(found.answering.len(), 1);
        assert_eq!(found.answering[0].exports, [status("/m")]);
        let daemon = &found.answering[0];
        let unmount = |path: &str, how, limit: Option<Duration>| {
            let deadline = limit.map(|limit| Instant::now() + limit);
            daemon.unmount(&Path::new(path).into(), how, deadline, || {
                panic!("it answers at once")
            })
        };
        let (careful, soon) = (Unmount::UnlessBusy, Some(Duration::from_millis(10)));
        assert_eq!(unmount("/m", careful, None).unwrap(), Outcome::Unmounted);
        assert_eq!(unmount("/busy", careful, None).unwrap(), Outcome::Busy);
        let forced = unmount("/busy", Unmount::Forcibly, None).unwrap();
        assert_eq!(forced, Outcome::Unmounted);
        assert_eq!(
            unmount("/slow", careful, soon).unwrap(),
            Outcome::Unfinished
        );
        let error = unmount("/other", careful, None).unwrap_err();
        assert_eq!(error.to_string(), "no such export");
        drop(server);
        assert!(find(folder.path()).unwrap().answering.is_empty());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_socket_is_for_its_owner_only() {
        use std::os::unix::fs::MetadataExt;
        let folder = folder();
        let _server = server(folder.path());
        let socket = folder.path().join(format!("{}.sock", std::process::id()));
        assert_eq!(socket.symlink_metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn nonsense_and_endless_lines_do_not_disturb_the_daemon() {
        let folder = folder();
        let _server = server(folder.path());
        let socket = folder.path().join(format!("{}.sock", std::process::id()));
        let mut nonsense = UnixStream::connect(&socket).unwrap();
        nonsense.write_all(b"{\"command\":\"dance\"}\n").unwrap();
        let answer = read_answer(&mut nonsense, Instant::now() + PATIENCE).unwrap();
        assert!(matches!(answer, Answer::Failed { message } if message.contains("dance")));
        let mut endless = UnixStream::connect(&socket).unwrap();
        endless
            .set_write_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        // It is cut off long before all of it is sent.
        assert!((0..64).any(|_| endless.write_all(&vec![b' '; 64 << 10]).is_err()));
        assert_eq!(find(folder.path()).unwrap().answering.len(), 1);
    }

    #[test]
    fn the_socket_of_a_dead_daemon_is_removed() {
        let folder = folder();
        let path = folder.path().join("1.sock");
        drop(UnixListener::bind(&path).unwrap());
        let found = find(folder.path()).unwrap();
        assert!(found.answering.is_empty() && found.silent.is_empty());
        assert!(!path.exists());
    }

    #[test]
    fn daemons_that_do_not_answer_are_named_and_cost_one_wait_together() {
        let folder = folder();
        let _server = server(folder.path());
        let stuck: Vec<_> = (1..=3)
            .map(|id| UnixListener::bind(folder.path().join(format!("{id}.sock"))).unwrap())
            .collect();
        let start = Instant::now();
        let found = find(folder.path()).unwrap();
        assert!(start.elapsed() < 2 * PATIENCE, "{:?}", start.elapsed());
        assert_eq!(found.answering.len(), 1);
        assert_eq!(found.silent.len(), stuck.len());
        assert!(
            found.silent[0].contains("process id 1 "),
            "{:?}",
            found.silent
        );
    }

    #[test]
    fn a_full_backlog_is_not_waited_for() {
        let folder = folder();
        let path = folder.path().join("1.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let mut waiting = Vec::new();
        while let Ok(stream) = connect(&path) {
            waiting.push(stream);
            assert!(waiting.len() < 10_000, "the backlog has an end");
        }
        let start = Instant::now();
        assert_eq!(find(folder.path()).unwrap().silent.len(), 1);
        assert!(start.elapsed() < PATIENCE);
    }
}
