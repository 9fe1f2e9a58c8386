//! What of the command line is here, found out by reading it: every key of QEMU's daemon is tried. Carries nothing out.

use diskfuse_monitor::{ChardevOptions, MonitorOptions, TraceOptions, parse_command_line};

/// What is said beside the rows, by their first words.
pub const NOTES: &[(&str, &str)] = &[
    ("--help", "our own text"),
    (
        "--version",
        "`qemu-storage-daemon compatible: diskfuse version …`, on one line",
    ),
    (
        "--trace",
        "QEMU's events do not exist here; their names switch on the messages of the part of the program that they are about",
    ),
    ("--chardev", "these are keys of every backend"),
    (
        "--chardev socket",
        "`reconnect` (seconds), which QEMU 11 has dropped, is understood as well; `ipv4`, `ipv6`, `nodelay`, `delay` and `tight` are read and change nothing",
    ),
    (
        "--chardev stdio",
        "`signal` is read and changes nothing: Ctrl-C ends the process",
    ),
];

/// The keys of each option that are not those of a command: the option, what makes it complete, and each key with a value.
const KEYS: &[(&str, &str, &[&str])] = &[
    (
        "--chardev socket",
        "socket,id=c",
        &[
            "path=p",
            "port=1,host=h",
            "host=h,port=1",
            "fd=3",
            "path=p,abstract=on",
            "path=p,tight=off",
            "path=p,server=on",
            "path=p,server=on,wait=off",
            "path=p,reconnect-ms=1",
            "host=h,port=1,to=2",
            "host=h,port=1,ipv4=on",
            "host=h,port=1,ipv6=on",
            "host=h,port=1,nodelay=on",
            "host=h,port=1,delay=off",
            "path=p,telnet=on",
            "path=p,tn3270=on",
            "path=p,websocket=on",
            "path=p,tls-creds=t",
            "path=p,tls-authz=t",
        ],
    ),
    ("--chardev stdio", "stdio,id=c", &["signal=off"]),
    (
        "--chardev file",
        "file,id=c",
        &["path=p", "path=p,input-path=p", "path=p,append=on"],
    ),
    ("--chardev pipe", "pipe,id=c", &["path=p"]),
    ("--chardev pty", "pty,id=c", &["path=p"]),
    ("--chardev null", "null,id=c", &[]),
    (
        "--chardev",
        "null,id=c",
        &["logfile=p", "logappend=on", "logtimestamp=on", "mux=on"],
    ),
    ("--chardev udp", "udp,id=c", &["host=h,port=1"]),
    ("--chardev memory", "memory,id=c", &["size=1k"]),
    ("--chardev ringbuf", "ringbuf,id=c", &["size=1k"]),
    ("--chardev parallel", "parallel,id=c", &["path=p"]),
    ("--chardev serial", "serial,id=c", &["path=p"]),
    ("--chardev mux", "mux,id=c", &["chardev=d"]),
    ("--chardev hub", "hub,id=c", &["chardevs.0=d"]),
    ("--monitor", "c", &["id=m", "mode=control", "pretty=on"]),
    ("--trace", "", &["enable=bdrv_*", "events=p", "file=p"]),
    (
        "--nbd-server",
        "",
        &[
            "addr.type=unix,addr.path=p",
            "addr.type=inet,addr.host=h,addr.port=1",
            "max-connections=1",
            "tls-creds=t",
            "tls-authz=t",
            "handshake-max-seconds=1",
        ],
    ),
];

/// The options of QEMU's daemon with an argument that reads as what it says, or none.
const OPTIONS: &[(&str, Option<&str>)] = &[
    ("--help", None),
    ("--version", None),
    ("--blockdev", Some("null-co,node-name=n")),
    ("--daemonize", None),
    ("--export", Some("fuse,id=e,node-name=n,mountpoint=m")),
    ("--object", Some("iothread,id=i")),
    ("--pidfile", Some("p")),
];

/// What is known of one option: the keys that are read, and those that are not.
#[derive(Debug, Default)]
pub struct Row {
    /// Whether the option itself is there.
    pub built: bool,
    /// Keys that are understood.
    pub same: Vec<String>,
    /// Keys that QEMU has and that are refused here.
    pub missing: Vec<String>,
}

/// All options, in the order of the page.
pub fn rows() -> Vec<(&'static str, Row)> {
    let whole = OPTIONS.iter().map(|(option, argument)| {
        let words = std::iter::once(*option).chain(*argument);
        let built = parse_command_line(words.map(Into::into)).is_ok();
        (
            *option,
            Row {
                built,
                ..Row::default()
            },
        )
    });
    whole
        .chain(
            KEYS.iter()
                .map(|(option, start, keys)| (*option, try_keys(option, start, keys))),
        )
        .collect()
}

fn try_keys(option: &str, start: &str, keys: &[&str]) -> Row {
    let mut row = Row::default();
    for key in keys {
        let argument = [start, key].into_iter().filter(|part| !part.is_empty());
        let argument = argument.collect::<Vec<_>>().join(",");
        let read = match option.split(' ').next().unwrap() {
            "--chardev" => ChardevOptions::parse(&argument).map(drop),
            "--monitor" => MonitorOptions::parse(&argument).map(drop),
            "--trace" => TraceOptions::parse(&argument).map(drop),
            option => parse_command_line([option, &argument].map(Into::into).into_iter()).map(drop),
        };
        // The last key of the example is the one that it is about.
        let name = key.rsplit(',').next().unwrap().split('=').next().unwrap();
        match read {
            Ok(()) => row.same.push(name.to_owned()),
            Err(_) => row.missing.push(name.to_owned()),
        }
    }
    row.built = !row.same.is_empty() || is_there_without_keys(option, start);
    row
}

fn is_there_without_keys(option: &str, start: &str) -> bool {
    option.starts_with("--chardev") && ChardevOptions::parse(start).is_ok()
}
