//! What `--chardev` and `--monitor` say: where a stream of bytes comes from and goes to, and that a monitor talks there.
//! Opens nothing.
//!
//! Source: `qemu-storage-daemon --chardev help`, QEMU's `qapi/char.json` and `qapi/control.json`.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::Error;
use crate::fields::{Fields, Tree};

/// One chardev: the argument of `--chardev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChardevOptions {
    /// The name that a monitor refers to: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// What it is.
    pub backend: ChardevBackend,
}

/// The kinds of chardev that exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChardevBackend {
    /// `socket`.
    Socket(SocketOptions),
    /// `stdio`: the standard streams of the process.
    Stdio,
    /// `file`: output is written there; there is input only if a file for it is named.
    File {
        /// `path`: where output goes.
        path: PathBuf,
        /// `input-path`: where input comes from.
        input: Option<PathBuf>,
        /// `append`: whether what is there is kept. Default: off.
        append: bool,
    },
    /// `pipe`: the named pipes `PATH.in` and `PATH.out`, or `PATH` for both.
    Pipe {
        /// `path`.
        path: PathBuf,
    },
    /// `pty`: a new terminal.
    Pty {
        /// `path`: a symbolic link to the terminal is made there.
        link: Option<PathBuf>,
    },
    /// `null`: nothing comes, nothing is kept.
    Null,
}

/// A socket (`ChardevSocket`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketOptions {
    /// Which one.
    pub address: SocketAddress,
    /// What is done with it.
    pub role: SocketRole,
}

/// The address of a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketAddress {
    /// `path`: in the file system.
    Unix(PathBuf),
    /// `path` with `abstract=on`: a name that the kernel keeps (unix(7)), without padding.
    Abstract(String),
    /// `host` and `port`: TCP.
    Inet {
        /// A name or an address; empty: every address.
        host: String,
        /// The port.
        port: u16,
    },
    /// `fd`: a descriptor that the process was started with; a listening socket for a server.
    Fd(i32),
}

/// Who calls whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketRole {
    /// `server=on`: clients come, one at a time.
    Server {
        /// `wait`: whether the first one is waited for before anything else happens. Default: on.
        wait: bool,
    },
    /// The process connects when it starts.
    Client {
        /// `reconnect` or `reconnect-ms`: how long after a lost connection, and between tries, the next try is made;
        /// `None`: never.
        reconnect: Option<Duration>,
    },
}

/// One monitor: the argument of `--monitor` (`MonitorOptions`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MonitorOptions {
    /// Its own name, which nothing refers to.
    pub id: Option<String>,
    /// The chardev that it talks over.
    pub chardev: String,
    /// Whether messages get a line for each member. Default: off.
    pub pretty: bool,
}

/// What the argument of `--chardev` may ask for.
#[derive(Debug)]
pub(crate) enum Request {
    /// A chardev.
    Chardev(ChardevOptions),
    /// What there is, or the parameters.
    Help,
}

/// Kinds of chardev of QEMU's that are not built here.
const KNOWN_TO_QEMU: &[&str] = &[
    "dbus", "memory", "mux", "parallel", "ringbuf", "serial", "testdev", "udp", "vc",
];

impl ChardevBackend {
    /// The names of all kinds.
    pub const KINDS: &[&str] = &["socket", "stdio", "file", "pipe", "pty", "null"];
}

impl ChardevOptions {
    /// Reads the argument of `--chardev`. Help is refused here; the command line serves it.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn parse(argument: &str) -> Result<Self, Error> {
        match Request::parse(argument)? {
            Request::Chardev(chardev) => Ok(chardev),
            Request::Help => Err(Error::NoHelp),
        }
    }

    fn read(mut fields: Fields<'_>) -> Result<Self, Error> {
        let backend = fields.text("backend")?.unwrap_or_default();
        let id = fields.identifier("id")?;
        let id = id.ok_or_else(|| said("chardev: no id specified"))?;
        let backend = read_backend(backend, &mut fields)?;
        fields.not_built(&["logfile", "logappend"])?;
        // A monitor shares its chardev with nothing, so there is nothing to switch on.
        if fields.boolean("mux")? == Some(true) {
            return Err(Error::NotBuilt {
                what: "parameter 'mux'".to_owned(),
            });
        }
        fields.finish().map_err(|error| match error {
            Error::Unexpected { name, .. } => said(format!("Invalid parameter '{name}'")),
            error => error,
        })?;
        Ok(Self {
            id: id.to_owned(),
            backend,
        })
    }
}

impl Request {
    pub(crate) fn parse(argument: &str) -> Result<Self, Error> {
        let tree = Tree::read(&spell_out(argument), "backend")?;
        if tree.help {
            return Ok(Self::Help);
        }
        ChardevOptions::read(tree.fields()?).map(Self::Chardev)
    }
}

/// Writes the short forms `server`, `nowait` and the like as QEMU understands them: `server=on`, `wait=off`.
fn spell_out(argument: &str) -> String {
    const SHORT: &[(&str, &str)] = &[
        ("server", "server=on"),
        ("noserver", "server=off"),
        ("wait", "wait=on"),
        ("nowait", "wait=off"),
        ("append", "append=on"),
        ("abstract", "abstract=on"),
    ];
    if argument.starts_with('{') {
        return argument.to_owned();
    }
    // A word between two single commas is a word of its own: a doubled comma leaves an empty one beside it.
    let words: Vec<&str> = argument.split(',').collect();
    let lone = |index: usize| {
        let beside = |index: usize| words.get(index).is_none_or(|word| !word.is_empty());
        index > 0 && beside(index - 1) && (beside(index + 1) || index + 2 >= words.len())
    };
    let spelled = words.iter().enumerate().map(|(index, word)| {
        let short = SHORT.iter().find(|(short, _)| short == word);
        short
            .filter(|_| lone(index))
            .map_or(*word, |(_, long)| *long)
    });
    spelled.collect::<Vec<_>>().join(",")
}

fn read_backend(name: &str, fields: &mut Fields<'_>) -> Result<ChardevBackend, Error> {
    match name {
        "socket" => read_socket(fields).map(ChardevBackend::Socket),
        "stdio" => {
            // Ctrl-C ends the process whatever is said here: nothing puts the terminal into raw mode.
            fields.boolean("signal")?;
            Ok(ChardevBackend::Stdio)
        }
        "file" => {
            let path = fields.text("path")?;
            let path = path.ok_or_else(|| said("chardev: file: no filename given"))?;
            Ok(ChardevBackend::File {
                path: PathBuf::from(path),
                input: fields.text("input-path")?.map(PathBuf::from),
                append: fields.boolean("append")?.unwrap_or(false),
            })
        }
        "pipe" => {
            let path = fields.text("path")?;
            let path = path.ok_or_else(|| said("chardev: pipe: no device path given"))?;
            Ok(ChardevBackend::Pipe {
                path: PathBuf::from(path),
            })
        }
        "pty" => Ok(ChardevBackend::Pty {
            link: fields.text("path")?.map(PathBuf::from),
        }),
        "null" => Ok(ChardevBackend::Null),
        name if KNOWN_TO_QEMU.contains(&name) => Err(Error::NotBuilt {
            what: format!("chardev '{name}'"),
        }),
        name => Err(said(format!("'{name}' is not a valid char driver name"))),
    }
}

fn read_socket(fields: &mut Fields<'_>) -> Result<SocketOptions, Error> {
    fields.not_built(&[
        "telnet",
        "tn3270",
        "websocket",
        "tls-creds",
        "tls-authz",
        "to",
    ])?;
    let address = read_address(fields)?;
    let server = fields.boolean("server")?.unwrap_or(false);
    let wait = fields.boolean("wait")?;
    let seconds = fields.integer("reconnect")?;
    let milliseconds = fields.integer("reconnect-ms")?;
    if seconds.is_some() && milliseconds.is_some() {
        return Err(said(
            "'reconnect' and 'reconnect-ms' are mutually exclusive",
        ));
    }
    let reconnect = seconds
        .map(|seconds| seconds.saturating_mul(1000))
        .or(milliseconds);
    let role = match (server, wait, reconnect) {
        (true, _, Some(_)) => {
            return Err(said(
                "'reconnect' option is incompatible with socket in server listen mode",
            ));
        }
        (false, Some(_), _) => {
            return Err(said(
                "'wait' option is incompatible with socket in client connect mode",
            ));
        }
        (true, wait, None) => SocketRole::Server {
            wait: wait.unwrap_or(true),
        },
        (false, None, reconnect) => SocketRole::Client {
            reconnect: reconnect
                .and_then(|milliseconds| u64::try_from(milliseconds).ok())
                .filter(|milliseconds| *milliseconds > 0)
                .map(Duration::from_millis),
        },
    };
    Ok(SocketOptions { address, role })
}

fn read_address(fields: &mut Fields<'_>) -> Result<SocketAddress, Error> {
    let path = fields.text("path")?;
    let host = fields.text("host")?;
    let port = fields.text_or_integer("port")?;
    let fd = fields.text_or_integer("fd")?;
    let is_abstract = fields.boolean("abstract")?.unwrap_or(false);
    // Names for the kernel's table are never padded here (`tight`).
    fields.boolean("tight")?;
    // What is sent goes out at once in any case; which addresses a name has is for the system to say.
    for name in ["nodelay", "delay", "ipv4", "ipv6"] {
        fields.boolean(name)?;
    }
    match (path, host, fd) {
        (Some(path), None, None) if is_abstract => Ok(SocketAddress::Abstract(path.to_owned())),
        (Some(path), None, None) => Ok(SocketAddress::Unix(PathBuf::from(path))),
        (None, Some(host), None) => {
            let port = port.ok_or_else(|| said("chardev: socket: no port given"))?;
            let number = port.parse();
            Ok(SocketAddress::Inet {
                host: host.to_owned(),
                port: number.map_err(|_| fields.expects("port", "a number from 0 to 65535"))?,
            })
        }
        (None, None, fd) => {
            let number = fd.as_deref().unwrap_or_default();
            let parsed = number.parse().ok().filter(|number| *number >= 0);
            let fd = parsed.ok_or_else(|| said(format!("Unable to parse FD number {number}")))?;
            Ok(SocketAddress::Fd(fd))
        }
        _ => Err(said(
            "None or one of 'path', 'fd' or 'host' option required.",
        )),
    }
}

impl MonitorOptions {
    /// Reads the argument of `--monitor`, in either syntax.
    ///
    /// # Errors
    /// The first mistake, in the words of `qemu-storage-daemon`.
    pub fn parse(argument: &str) -> Result<Self, Error> {
        let tree = Tree::read(argument, "chardev")?;
        let mut fields = tree.fields()?;
        let id = fields.text("id")?.map(str::to_owned);
        let is_control = fields.word("mode", &[("readline", false), ("control", true)])?;
        let pretty = fields.boolean("pretty")?.unwrap_or(false);
        let chardev = fields.text("chardev")?;
        let chardev = fields.require("chardev", chardev)?.to_owned();
        fields.finish()?;
        if is_control == Some(false) {
            return Err(Error::OnlyQmp);
        }
        Ok(Self {
            id,
            chardev,
            pretty,
        })
    }
}

fn said(sentence: impl Into<String>) -> Error {
    Error::Chardev(sentence.into())
}

#[cfg(test)]
mod tests;
