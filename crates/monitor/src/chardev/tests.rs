//! Chardevs and monitors as they are written, right and wrong.

use super::*;

fn socket(argument: &str) -> SocketOptions {
    match ChardevOptions::parse(argument).unwrap().backend {
        ChardevBackend::Socket(socket) => socket,
        other => panic!("{argument}: {other:?}"),
    }
}

#[test]
fn sockets_have_an_address_and_a_role() {
    let unix = SocketAddress::Unix(PathBuf::from("/s"));
    let server = |wait| SocketRole::Server { wait };
    let cases = [
        ("socket,id=c,path=/s,server=on,wait=off", server(false)),
        ("socket,id=c,path=/s,server=on", server(true)),
        ("socket,id=c,path=/s,server,nowait", server(false)),
        ("socket,path=/s,server,nowait,id=c", server(false)),
        (
            "socket,id=c,path=/s",
            SocketRole::Client { reconnect: None },
        ),
        (
            "socket,id=c,path=/s,reconnect=2",
            SocketRole::Client {
                reconnect: Some(Duration::from_secs(2)),
            },
        ),
        (
            "socket,id=c,path=/s,reconnect-ms=250",
            SocketRole::Client {
                reconnect: Some(Duration::from_millis(250)),
            },
        ),
        (
            r#"{"backend": "socket", "id": "c", "path": "/s", "server": true, "wait": false}"#,
            server(false),
        ),
    ];
    for (argument, role) in cases {
        let address = unix.clone();
        assert_eq!(
            socket(argument),
            SocketOptions { address, role },
            "{argument}"
        );
    }
    let tcp = socket("socket,id=c,host=localhost,port=4444,server=on,wait=off");
    assert_eq!(
        tcp.address,
        SocketAddress::Inet {
            host: "localhost".to_owned(),
            port: 4444
        }
    );
    assert_eq!(
        socket("socket,id=c,fd=5,server=on").address,
        SocketAddress::Fd(5)
    );
    let name = socket("socket,id=c,path=name,abstract=on").address;
    assert_eq!(name, SocketAddress::Abstract("name".to_owned()));
}

#[test]
fn a_comma_in_a_path_does_not_make_words() {
    let path = socket("socket,id=c,path=/a,,server,,nowait").address;
    assert_eq!(path, SocketAddress::Unix(PathBuf::from("/a,server,nowait")));
}

#[test]
fn the_other_kinds_are_read() {
    let backend = |argument| ChardevOptions::parse(argument).unwrap().backend;
    assert_eq!(backend("stdio,id=c"), ChardevBackend::Stdio);
    assert_eq!(backend("null,id=c"), ChardevBackend::Null);
    assert_eq!(backend("pty,id=c"), ChardevBackend::Pty { link: None });
    assert_eq!(
        backend("file,id=c,path=/o,input-path=/i,append=on"),
        ChardevBackend::File {
            path: PathBuf::from("/o"),
            input: Some(PathBuf::from("/i")),
            append: true
        }
    );
    let path = PathBuf::from("/p");
    assert_eq!(backend("pipe,id=c,path=/p"), ChardevBackend::Pipe { path });
}

/// As told by `qemu-storage-daemon` 10.0.2.
#[test]
fn mistakes_are_told_in_known_words() {
    let cases = [
        ("null", "chardev: no id specified"),
        ("foo,id=x", "'foo' is not a valid char driver name"),
        ("null,id=x,foo=1", "Invalid parameter 'foo'"),
        ("file,id=x", "chardev: file: no filename given"),
        ("pipe,id=x", "chardev: pipe: no device path given"),
        ("socket,id=x", "Unable to parse FD number "),
        ("socket,id=x,host=h", "chardev: socket: no port given"),
        (
            "socket,id=x,path=/a,host=b",
            "None or one of 'path', 'fd' or 'host' option required.",
        ),
        (
            "socket,id=x,path=/a,server=on,reconnect=5",
            "'reconnect' option is incompatible with socket in server listen mode",
        ),
        (
            "socket,id=x,path=/a,wait=on",
            "'wait' option is incompatible with socket in client connect mode",
        ),
        (
            "socket,id=x,path=/a,reconnect=1,reconnect-ms=3",
            "'reconnect' and 'reconnect-ms' are mutually exclusive",
        ),
        (
            "socket,id=x,path=/a,server=maybe",
            "Parameter 'server' expects 'on' or 'off'",
        ),
        (
            "serial,id=x",
            "chardev 'serial' is not built into this version yet",
        ),
    ];
    for (argument, message) in cases {
        let error = ChardevOptions::parse(argument).unwrap_err().to_string();
        assert_eq!(error, message, "{argument}");
    }
    let error = ChardevOptions::parse("null,id=9x").unwrap_err().to_string();
    assert!(
        error.starts_with("Parameter 'id' expects an identifier"),
        "{error}"
    );
}

#[test]
fn monitors_name_their_chardev() {
    let monitor = MonitorOptions::parse("c").unwrap();
    assert_eq!((monitor.chardev.as_str(), monitor.pretty), ("c", false));
    let monitor = MonitorOptions::parse("chardev=c,mode=control,pretty=on,id=m").unwrap();
    assert_eq!((monitor.id.as_deref(), monitor.pretty), (Some("m"), true));
    let cases = [
        ("id=x", "Parameter 'chardev' is missing"),
        ("c,mode=readline", "Only QMP is supported"),
        ("c,mode=foo", "Parameter 'mode' does not accept value 'foo'"),
        ("c,foo=1", "Parameter 'foo' is unexpected"),
        ("help", "Help is not available for this option (see --help)"),
    ];
    for (argument, message) in cases {
        let error = MonitorOptions::parse(argument).unwrap_err().to_string();
        assert_eq!(error, message, "{argument}");
    }
}
