//! The daemon's end of the control socket: a plain thread that accepts, and one per connection. It must never decide
//! anything: it reads a request, has it answered, and writes the answer.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::protocol::{Answer, LONGEST_REQUEST, Request};
use super::{SUFFIX, prepare_folder, read_line};
use crate::error::{Error, Result};
use crate::sandbox::{Leftover, Removal};

/// How long a client may take to say what it wants, and to read the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections served at a time; further ones are closed at once.
const MOST_CONNECTIONS: usize = 64;

/// Answers a request; may block for as long as what was asked for takes. `None`: the daemon is ending.
pub type Handler = dyn Fn(Request) -> Option<Answer> + Send + Sync;

/// A socket that is listened on. Dropping it removes the socket and waits, for a short while, until answers that are
/// under way are written.
pub struct Server {
    removal: Removal,
    connections: Arc<Connections>,
}

#[derive(Default)]
struct Connections {
    open: Mutex<usize>,
    one_closed: Condvar,
}

impl Server {
    /// Listens in `folder`, under the process's id.
    pub fn start(folder: &Path, handler: Arc<Handler>) -> Result<Self> {
        prepare_folder(folder)?;
        let id = std::process::id();
        let path = folder.join(format!("{id}.{SUFFIX}"));
        // Whoever finds a socket that refuses connections removes it; so ours gets its name when it listens already.
        // A file of that name can only be a dead process's, whose id we have now.
        let new = folder.join(format!("{id}.new"));
        let _ = fs::remove_file(&new);
        let failed = || {
            format!(
                "Could not listen on the control socket '{}'",
                path.display()
            )
        };
        let listener = UnixListener::bind(&new).map_err(Error::system(failed()))?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|error| {
                let _ = fs::remove_file(&new);
                Error::system(failed())(error)
            })?;
        let stat = path.symlink_metadata().map_err(Error::system(failed()))?;
        let server = Self {
            removal: Removal::new(Leftover::new(path, &stat, false)),
            connections: Arc::default(),
        };
        let connections = Arc::clone(&server.connections);
        std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(128 << 10)
            .spawn(move || accept(&listener, &connections, &handler))
            .map_err(Error::system("Could not start the control thread"))?;
        Ok(server)
    }

    /// What removes the socket.
    pub fn removal(&mut self) -> &mut Removal {
        &mut self.removal
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.removal.carry_out() {
            let path = self.removal.path().display();
            tracing::warn!(%path, %error, "cannot remove the control socket");
        }
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut open = self.connections.open.lock();
        while *open > 0 {
            if self
                .connections
                .one_closed
                .wait_until(&mut open, deadline)
                .timed_out()
            {
                break;
            }
        }
    }
}

/// A connection that is counted for as long as it lives.
struct Counted(Arc<Connections>);

impl Counted {
    fn new(connections: &Arc<Connections>) -> Option<Self> {
        let mut open = connections.open.lock();
        if *open == MOST_CONNECTIONS {
            return None;
        }
        *open += 1;
        Some(Self(Arc::clone(connections)))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        *self.0.open.lock() -= 1;
        self.0.one_closed.notify_all();
    }
}

fn accept(listener: &UnixListener, connections: &Arc<Connections>, handler: &Arc<Handler>) {
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, most likely; trying again at once would only burn a core.
                tracing::warn!(%error, "cannot accept a control connection");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let Some(counted) = Counted::new(connections) else {
            continue;
        };
        let handler = Arc::clone(handler);
        let spawned = std::thread::Builder::new()
            .name("control".to_owned())
            .stack_size(256 << 10)
            .spawn(move || {
                if let Err(error) = serve(stream, &*handler) {
                    tracing::debug!(%error, "a control connection was cut");
                }
                drop(counted);
            });
        if let Err(error) = spawned {
            tracing::warn!(%error, "cannot serve a control connection");
        }
    }
}

fn serve(mut stream: UnixStream, handler: &Handler) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let line = read_line(&mut stream, LONGEST_REQUEST, Instant::now() + PATIENCE)?;
    let answer = match serde_json::from_slice(&line) {
        Ok(request) => handler(request),
        Err(error) => Some(Answer::Failed {
            message: format!("not a request: {error}"),
        }),
    };
    let answer = answer.unwrap_or(Answer::Ending);
    let mut line = serde_json::to_vec(&answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}
