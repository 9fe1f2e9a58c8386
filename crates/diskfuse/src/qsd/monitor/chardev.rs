//! Chardevs: where a monitor's clients come from. Reads and writes nothing itself.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use diskfuse_monitor::{ChardevBackend, ChardevOptions, SocketAddress, SocketOptions, SocketRole};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::socket::{Listener, MadePath, connect, pause};
use super::stream::Stream;
use crate::error::{Error, Result};
use crate::output;

/// How often a terminal that nobody has open is looked at.
const TERMINAL_TICK: Duration = Duration::from_millis(200);

/// An open chardev.
pub struct Chardev {
    filename: String,
    source: Source,
}

/// Where streams come from.
enum Source {
    /// Clients come, one after the other; the first may be here already.
    Listener(Listener, Option<Stream>),
    /// This one only.
    Once(Option<Stream>),
    /// This process connects, and does so again after this time. The first connection may be there already.
    Client(SocketAddress, Duration, Option<Stream>),
    /// A terminal, again and again.
    Terminal(Arc<OwnedFd>),
}

impl Chardev {
    /// Opens it. With `wait=on` this waits for the first client, or until `interrupted` says so.
    pub fn open(
        options: &ChardevOptions,
        interrupted: &dyn Fn() -> bool,
    ) -> Result<(Self, Option<MadePath>)> {
        let mut made = None;
        let (filename, source) = match &options.backend {
            ChardevBackend::Socket(socket) => {
                let (source, path) = open_socket(socket, interrupted)?;
                made = path;
                (socket_name(socket), source)
            }
            ChardevBackend::Stdio => ("stdio".to_owned(), Source::Once(Some(stdio()?))),
            ChardevBackend::File {
                path,
                input,
                append,
            } => {
                let stream = open_file(path, input.as_deref(), *append)?;
                ("file".to_owned(), Source::Once(Some(stream)))
            }
            ChardevBackend::Pipe { path } => {
                ("pipe".to_owned(), Source::Once(Some(open_pipe(path)?)))
            }
            ChardevBackend::Pty { link } => open_terminal(&options.id, link.as_deref())?,
            ChardevBackend::Null => ("null".to_owned(), Source::Once(None)),
        };
        Ok((Self { filename, source }, made))
    }

    /// Where it leads, as QEMU calls it.
    pub fn filename(&self) -> &str {
        &self.filename
    }

    /// Waits for the next client. `None`: there will be none.
    pub fn next_stream(&mut self, closing: &AtomicBool) -> Option<Stream> {
        let over = || closing.load(Ordering::SeqCst);
        match &mut self.source {
            Source::Listener(listener, first) => first.take().or_else(|| listener.accept(None)),
            Source::Once(stream) => stream.take(),
            Source::Client(address, time, first) => {
                if let Some(first) = first.take() {
                    return Some(first);
                }
                while !over() {
                    pause(*time, closing);
                    match connect(address) {
                        Ok(stream) => return Some(stream),
                        Err(error) => tracing::debug!("{error}"),
                    }
                }
                None
            }
            Source::Terminal(terminal) => {
                // Whoever had it open has closed it: reading would tell nothing but that.
                while is_hung_up(terminal) {
                    if over() {
                        return None;
                    }
                    pause(TERMINAL_TICK, closing);
                }
                Some(Stream {
                    input: Some(Arc::clone(terminal)),
                    output: Some(Arc::clone(terminal)),
                    socket: false,
                })
            }
        }
    }
}

fn open_socket(
    options: &SocketOptions,
    interrupted: &dyn Fn() -> bool,
) -> Result<(Source, Option<MadePath>)> {
    let address = &options.address;
    match options.role {
        SocketRole::Server { wait } => {
            let (listener, made) = Listener::open(address)?;
            let first = if wait {
                let name = socket_name(options);
                tracing::info!("waiting for a connection on {name}");
                listener.accept(Some(interrupted))
            } else {
                None
            };
            Ok((Source::Listener(listener, first), made))
        }
        SocketRole::Client { reconnect: None } => Ok((Source::Once(Some(connect(address)?)), None)),
        SocketRole::Client {
            reconnect: Some(time),
        } => {
            let first = connect(address)
                .map_err(|error| tracing::info!("{error}; trying again"))
                .ok();
            Ok((Source::Client(address.clone(), time, first), None))
        }
    }
}

/// As `query-chardev` has it.
fn socket_name(options: &SocketOptions) -> String {
    let server = match options.role {
        SocketRole::Server { .. } => ",server=on",
        SocketRole::Client { .. } => "",
    };
    match &options.address {
        SocketAddress::Unix(path) => format!("unix:{}{server}", path.display()),
        SocketAddress::Abstract(name) => format!("unix:{name},abstract=on{server}"),
        SocketAddress::Inet { host, port } => format!("tcp:{host}:{port}{server}"),
        SocketAddress::Fd(number) => format!("fd:{number}{server}"),
    }
}

fn stdio() -> Result<Stream> {
    let failed = "Could not use the standard streams";
    let input = std::io::stdin().as_fd().try_clone_to_owned();
    let output = std::io::stdout().as_fd().try_clone_to_owned();
    Ok(Stream {
        input: Some(Arc::new(input.map_err(Error::system(failed))?)),
        output: Some(Arc::new(output.map_err(Error::system(failed))?)),
        socket: false,
    })
}

fn open_file(path: &Path, input: Option<&Path>, append: bool) -> Result<Stream> {
    let failed = |path: &Path| format!("Could not open '{}'", path.display());
    let mut options = OpenOptions::new();
    options.create(true).write(true);
    options.append(append).truncate(!append);
    let output = options.open(path).map_err(Error::system(failed(path)))?;
    let input = input.map(|path| File::open(path).map_err(Error::system(failed(path))));
    Ok(Stream {
        input: input.transpose()?.map(|file| Arc::new(file.into())),
        output: Some(Arc::new(output.into())),
        socket: false,
    })
}

/// Opening a named pipe for both directions never waits for the other side.
fn open_pipe(path: &Path) -> Result<Stream> {
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    let beside = |end: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    let failed = || format!("Could not open '{}'", path.display());
    let (input, output) = match (open(&beside(".in")), open(&beside(".out"))) {
        (Ok(input), Ok(output)) => (input, output),
        _ => {
            let both = open(path).map_err(Error::system(failed()))?;
            let output = both.try_clone().map_err(Error::system(failed()))?;
            (both, output)
        }
    };
    Ok(Stream {
        input: Some(Arc::new(input.into())),
        output: Some(Arc::new(output.into())),
        socket: false,
    })
}

fn open_terminal(id: &str, link: Option<&Path>) -> Result<(String, Source)> {
    let failed = || "Failed to create PTY".to_owned();
    let system = |error: rustix::io::Errno| Error::system(failed())(error);
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let terminal = openpt(flags).map_err(system)?;
    grantpt(&terminal).map_err(system)?;
    unlockpt(&terminal).map_err(system)?;
    // Bytes as they are, without echo.
    let mut attributes = tcgetattr(&terminal).map_err(system)?;
    attributes.make_raw();
    tcsetattr(&terminal, OptionalActions::Now, &attributes).map_err(system)?;
    let name = ptsname(&terminal, Vec::new()).map_err(system)?;
    let name = name.to_string_lossy().into_owned();
    if let Some(link) = link {
        let what = format!("Failed to create PTY symlink '{}'", link.display());
        std::os::unix::fs::symlink(&name, link).map_err(Error::system(what))?;
    }
    output::say(&format!("char device redirected to {name} (label {id})\n"))?;
    Ok((format!("pty:{name}"), Source::Terminal(Arc::new(terminal))))
}

fn is_hung_up(terminal: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(terminal, PollFlags::IN)];
    let at_once = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&at_once)).is_ok()
        && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP))
}
