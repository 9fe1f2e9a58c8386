//! What the service manager (systemd) is told: that the files are usable, what is going on, that the process is alive,
//! that it ends. It must never wait for the manager, nor fail because there is none.
//!
//! Source: sd_notify(3), sd_watchdog_enabled(3).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The manager that started this process, if one did.
#[derive(Debug, Default)]
pub struct Manager {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Manager {
    /// As `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` say.
    pub fn from_environment() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Self::default();
        };
        let socket = connect(&name)
            .inspect_err(|error| tracing::warn!(?name, %error, "cannot reach the service manager"));
        let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let interval = number("WATCHDOG_USEC").filter(|&interval| ours && interval > 0);
        Self {
            socket: socket.ok(),
            watchdog: interval.map(Duration::from_micros),
        }
    }

    /// How often [`Manager::alive`] is to be said: several times in the interval after which the manager loses patience.
    pub fn tick(&self) -> Option<Duration> {
        let interval = self.watchdog.filter(|_| self.socket.is_some())?;
        Some((interval / 4).max(Duration::from_millis(1)))
    }

    /// Everything is usable. `status` is for people.
    pub fn ready(&self, status: &str) {
        let process = std::process::id();
        self.say(&format!("READY=1\nMAINPID={process}\n{}", line(status)));
    }

    /// Something has changed.
    pub fn status(&self, status: &str) {
        self.say(&line(status));
    }

    /// The process is in order.
    pub fn alive(&self) {
        self.say("WATCHDOG=1\n");
    }

    /// The process is about to end.
    pub fn stopping(&self) {
        self.say("STOPPING=1\nSTATUS=Writing back\n");
    }

    fn say(&self, words: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(words.as_bytes())
        {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }
}

/// A status in the form of the protocol, in which a line feed would begin another variable.
fn line(status: &str) -> String {
    format!("STATUS={}\n", crate::error::Plain(status))
}

/// A path, or a name in the abstract space with `@` in front.
fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(socket: &UnixDatagram) -> String {
        let mut words = [0; 512];
        let count = socket.recv(&mut words).unwrap();
        String::from_utf8(words[..count].to_vec()).unwrap()
    }

    #[test]
    fn a_path_and_an_abstract_name_are_reached() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("diskfuse-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let cases = [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (
                UnixDatagram::bind_addr(&address).unwrap(),
                format!("@{name}").into(),
            ),
        ];
        for (listener, name) in cases {
            let manager = Manager {
                socket: Some(connect(&name).unwrap()),
                watchdog: Some(Duration::from_secs(4)),
            };
            assert_eq!(manager.tick(), Some(Duration::from_secs(1)));
            manager.status("a\nREADY=1");
            assert_eq!(heard(&listener), "STATUS=a\\nREADY=1\n");
            manager.alive();
            assert_eq!(heard(&listener), "WATCHDOG=1\n");
        }
        assert!(connect(OsStr::new("/no/such/socket")).is_err());
    }

    #[test]
    fn without_a_manager_nothing_is_said_and_nothing_fails() {
        let manager = Manager::default();
        assert_eq!(manager.tick(), None);
        manager.ready("x");
        manager.stopping();
    }
}
