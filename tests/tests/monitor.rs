//! The monitor of `diskfuse qsd`, talked to as its clients do, and as they should not.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use diskfuse_e2e::{
    Bed, Daemon, Qmp, Stage, Tool, diskfuse, everywhere, mounts, once, process, wait_until,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

fn chardev(path: &Path) -> String {
    format!("socket,id=c,path={},server=on,wait=off", path.display())
}

/// A daemon with a monitor on `socket` and nothing else.
fn start(bed: &Bed, socket: &Path) -> Daemon {
    bed.qsd(&["--chardev", &chardev(socket), "--monitor", "c"], &[])
}

/// Whoever takes the first answer for "all is up" must not write to the file below.
#[test]
fn the_first_answer_comes_when_everything_is_mounted() {
    once(|bed| {
        let socket = bed.path("qmp");
        let mut options = ["--chardev", &chardev(&socket), "--monitor", "c"]
            .map(str::to_owned)
            .to_vec();
        options.extend(["--blockdev".to_owned(), "null-co,node-name=n".to_owned()]);
        let mountpoints: Vec<_> = (0..40).map(|n| bed.mountpoint(&format!("m{n}"))).collect();
        for (number, mountpoint) in mountpoints.iter().enumerate() {
            let at = mountpoint.display();
            options.push("--export".to_owned());
            options.push(format!("fuse,id=e{number},node-name=n,mountpoint={at}"));
        }
        let daemon = bed.qsd(&options, &[]);
        let mut qmp = Qmp::silent(&socket);
        assert!(qmp.message()["QMP"].is_object());
        qmp.run("qmp_capabilities", json!({}));
        let last = mountpoints.last().unwrap();
        assert_eq!(std::fs::metadata(last).unwrap().len(), 1 << 30);
        drop(daemon);
    });
}

#[test]
fn a_session_from_greeting_to_quit() {
    everywhere(|bed| {
        let (image, mountpoint) = (bed.image("i", SIZE), bed.mountpoint("m"));
        let socket = bed.path("qmp");
        let daemon = start(bed, &socket);
        let (mut qmp, greeting) = Qmp::greeted(&socket);
        assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
        assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 10);
        let words = "Expecting capabilities negotiation with 'qmp_capabilities'";
        assert_eq!(qmp.refused("query-version", json!({})), words);
        qmp.run("qmp_capabilities", json!({}));
        let words = "Capabilities negotiation is already complete, command ignored";
        assert_eq!(qmp.refused("qmp_capabilities", json!({})), words);
        let answer = qmp.ask("foo", json!({}));
        let error =
            json!({"class": "CommandNotFound", "desc": "The command foo has not been found"});
        assert_eq!(answer["error"], error);

        let node = json!({"driver": "file", "node-name": "disk", "filename": image});
        qmp.run("blockdev-add", node);
        let export =
            json!({"type": "fuse", "id": "e", "node-name": "disk", "mountpoint": mountpoint});
        let began = Instant::now();
        qmp.run("block-export-add", export.clone());
        assert!(began.elapsed() < Duration::from_secs(10));
        assert_eq!(std::fs::read(&mountpoint).unwrap().len(), SIZE);
        let words = "Block export id 'e' is already in use";
        assert_eq!(qmp.refused("block-export-add", export.clone()), words);
        let info = json!({"id": "e", "type": "fuse", "node-name": "disk", "shutting-down": false});
        assert_eq!(qmp.run("query-block-exports", json!({})), json!([info]));

        qmp.run("block-export-del", json!({"id": "e"}));
        assert_eq!(
            qmp.event("BLOCK_EXPORT_DELETED")["data"],
            json!({"id": "e"})
        );
        assert!(mounts::at(&mountpoint).is_none());
        let words = "Export 'e' is not found";
        assert_eq!(qmp.refused("block-export-del", json!({"id": "e"})), words);

        qmp.run("block-export-add", export);
        qmp.send("{'execute': 'quit', 'id': 'last'}");
        // The event comes first, as QEMU's does.
        let event = qmp.message();
        assert_eq!(event["event"], "BLOCK_EXPORT_DELETED");
        let keys: Vec<&String> = event.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["timestamp", "event", "data"]);
        assert_eq!(qmp.message(), json!({"return": {}, "id": "last"}));
        assert_eq!(qmp.try_message(), None);
        assert!(daemon.ends().status().success());
        assert!(mounts::at(&mountpoint).is_none());
        assert!(!socket.exists(), "the socket is left behind");
    });
}

#[test]
fn standard_streams_take_commands_over_several_lines() {
    once(|_| {
        let mut child = Command::new("timeout")
            .arg("20")
            .arg(diskfuse())
            .args(["qsd", "--chardev", "stdio,id=c", "--monitor", "chardev=c"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("timeout(1)");
        let mut input = child.stdin.take().unwrap();
        input
            .write_all(b"{'execute':\n'qmp_capabilities'}\n{'execute': 'query-commands', \n 'id': 1}{'execute': 'quit'}")
            .unwrap();
        drop(input);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<&str> = text.split_terminator("\r\n").collect();
        assert!(
            lines[0].starts_with(r#"{"QMP": {"version": {"qemu": {"micro": "#),
            "{text}"
        );
        assert_eq!(lines[1], r#"{"return": {}}"#);
        assert!(
            lines[2].contains(r#"{"name": "block-export-add"}"#),
            "{text}"
        );
        assert!(lines[2].ends_with(r#"], "id": 1}"#), "{text}");
        assert_eq!(lines[3..], [r#"{"return": {}}"#]);
    });
}

#[test]
fn pretty_answers_have_a_line_for_each_member() {
    once(|bed| {
        let socket = bed.path("qmp");
        let daemon = bed.qsd(
            &[
                "--chardev",
                &chardev(&socket),
                "--monitor",
                "chardev=c,pretty=on",
            ],
            &[],
        );
        let mut qmp = Qmp::silent(&socket);
        qmp.send("{'execute': 'qmp_capabilities'}{'execute': 'quit'}");
        let mut text = String::new();
        qmp.socket().read_to_string(&mut text).unwrap();
        assert!(
            text.starts_with("{\r\n    \"QMP\": {\r\n        \"version\": {\r\n"),
            "{text}"
        );
        assert!(
            text.ends_with("}\r\n{\r\n    \"return\": {\r\n    }\r\n}\r\n"),
            "{text}"
        );
        assert!(daemon.ends().status().success());
    });
}

#[test]
fn bad_input_costs_an_error_and_neither_memory_nor_the_session() {
    once(|bed| {
        let socket = bed.path("qmp");
        let daemon = start(bed, &socket);
        let mut qmp = Qmp::connect(&socket);
        let before = process::memory(daemon.pid(), "VmRSS");
        let deep = "[".repeat(10_000);
        let cases: [(&[u8], &str); 7] = [
            (b"}", "JSON parse error"),
            (b"{\"execute\": \"\x80\"}", "JSON parse error"),
            (
                b"{\"execute\": 1}",
                "QMP input member 'execute' must be a string",
            ),
            (b"{\"a\": 1, \"a\": 2}", "JSON parse error, duplicate key"),
            (
                b"{\"execute\": \"quit\", \"x\": 1}",
                "QMP input member 'x' is unexpected",
            ),
            (
                b"{\"execute\": \"quit\", \"arguments\": {\"y\": 1}}",
                "Parameter 'y' is unexpected",
            ),
            (deep.as_bytes(), "JSON nesting depth limit exceeded"),
        ];
        for (bytes, words) in cases {
            qmp.send(bytes);
            qmp.send("\n");
            let answer = qmp.message();
            let told = answer["error"]["desc"].as_str().unwrap();
            assert!(told.starts_with(words), "{answer}");
            assert_eq!(answer["error"]["class"], "GenericError");
        }
        // A line of 64 MiB.
        qmp.send("{\"execute\": \"");
        for _ in 0..64 {
            qmp.send(vec![b'x'; 1 << 20]);
        }
        qmp.send("\"}\n");
        assert_eq!(
            qmp.message()["error"]["desc"],
            "JSON token size limit exceeded"
        );
        // How clients get a session back into a known state.
        qmp.send(b"{\"execute\": \"\xff");
        assert!(qmp.message()["error"].is_object());
        qmp.run("query-version", json!({}));
        let grown = process::memory(daemon.pid(), "VmHWM").saturating_sub(before);
        assert!(grown < 16 << 20, "grown by {grown}");
        // Half a command, and gone; the next client is served.
        qmp.send("{\"execute\": \"qui");
        drop(qmp);
        Qmp::connect(&socket).run("query-commands", json!({}));
        daemon.stop();
    });
}

#[test]
fn requests_are_answered_in_order_and_some_may_overtake() {
    once(|bed| {
        let socket = bed.path("qmp");
        let daemon = start(bed, &socket);
        let (mut qmp, _) = Qmp::greeted(&socket);
        qmp.send("{'exec-oob': 'query-version', 'id': 0}");
        let words = "QMP input member 'exec-oob' is unexpected";
        assert_eq!(qmp.message()["error"]["desc"], words);
        qmp.run("qmp_capabilities", json!({"enable": ["oob"]}));
        let mut all = String::new();
        for id in 0..200 {
            let command = if id % 2 == 0 {
                "query-version"
            } else {
                "query-block-exports"
            };
            all += &json!({"execute": command, "id": id}).to_string();
        }
        qmp.send(&all);
        for id in 0..200 {
            assert_eq!(qmp.message()["id"], id);
        }
        qmp.send("{'exec-oob': 'query-version', 'id': 1}");
        assert!(qmp.message().get("return").is_some());
        qmp.send("{'exec-oob': 'quit', 'id': 1}");
        let words = "The command quit does not support OOB";
        assert_eq!(qmp.message()["error"]["desc"], words);
        daemon.stop();
    });
}

#[test]
fn a_client_that_never_reads_holds_up_nobody() {
    once(|bed| {
        let (one, two) = (bed.path("one"), bed.path("two"));
        let second = chardev(&two).replace("id=c", "id=d");
        let daemon = bed.qsd(
            &[
                "--chardev",
                &chardev(&one),
                "--monitor",
                "c",
                "--chardev",
                &second,
                "--monitor",
                "d",
            ],
            &[],
        );
        let mut stuck = Qmp::silent(&one);
        stuck.send("{'execute': 'qmp_capabilities'}");
        // More than it will ever be answered: at some point nobody reads it any more.
        stuck
            .socket()
            .set_write_timeout(Some(Duration::from_millis(300)))
            .unwrap();
        let request = "{'execute': 'query-qmp-schema'}".repeat(1000);
        for _ in 0..100 {
            if stuck.socket().write_all(request.as_bytes()).is_err() {
                break;
            }
        }
        let mut qmp = Qmp::connect(&two);
        let mut slowest = Duration::ZERO;
        for _ in 0..500 {
            let began = Instant::now();
            qmp.run("query-block-exports", json!({}));
            slowest = slowest.max(began.elapsed());
        }
        assert!(slowest < Duration::from_secs(5), "{slowest:?}");
        assert!(process::memory(daemon.pid(), "VmRSS") < 200 << 20);
        qmp.run("quit", json!({}));
        assert!(daemon.ends().status().success());
        drop(stuck);
    });
}

#[test]
fn descriptors_are_handed_over() {
    once(|bed| {
        let socket = bed.path("qmp");
        let daemon = start(bed, &socket);
        let mut qmp = Qmp::connect(&socket);
        let words = "No file descriptor supplied via SCM_RIGHTS";
        assert_eq!(qmp.refused("getfd", json!({"fdname": "x"})), words);
        let send = |qmp: &Qmp, command: &str| {
            let file = std::fs::File::open("/dev/null").unwrap();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [file.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let bytes = [IoSlice::new(command.as_bytes())];
            sendmsg(qmp.socket(), &bytes, &mut control, SendFlags::empty()).unwrap();
        };
        send(&qmp, "{'execute': 'add-fd', 'arguments': {'opaque': 'o'}}");
        let added = qmp.message()["return"].take();
        assert_eq!(added["fdset-id"], 0);
        let sets = qmp.run("query-fdsets", json!({}));
        assert_eq!(sets[0]["fds"][0]["opaque"], "o");
        qmp.run("remove-fd", json!({"fdset-id": 0}));
        assert_eq!(qmp.run("query-fdsets", json!({})), json!([]));
        send(&qmp, "{'execute': 'getfd', 'arguments': {'fdname': 'x'}}");
        assert_eq!(qmp.message(), json!({"return": {}}));
        qmp.run("closefd", json!({"fdname": "x"}));
        qmp.refused("closefd", json!({"fdname": "x"}));
        daemon.stop();
    });
}

#[test]
fn sockets_that_others_serve_are_left_alone_and_dead_ones_are_replaced() {
    once(|bed| {
        let socket = bed.path("qmp");
        // Left behind by a process that is gone.
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        let daemon = start(bed, &socket);
        drop(Qmp::connect(&socket));
        let words = "Address already in use";
        let second = ["qsd", "--chardev", &chardev(&socket), "--monitor", "c"];
        bed.diskfuse(second)
            .refused(1, &["Failed to bind socket to", words]);
        drop(Qmp::connect(&socket));
        daemon.stop();
        assert!(!socket.exists());
        std::fs::write(&socket, "mine").unwrap();
        bed.diskfuse(second).refused(1, &[words]);
        assert_eq!(std::fs::read(&socket).unwrap(), b"mine");
    });
}

#[test]
fn waiting_for_the_first_client_ends_with_it_or_with_a_signal() {
    once(|bed| {
        let (socket, mountpoint) = (bed.path("qmp"), bed.mountpoint("m"));
        let chardev = chardev(&socket).replace("wait=off", "wait=on");
        let export = format!("fuse,id=e,node-name=n,mountpoint={}", mountpoint.display());
        let arguments = [
            "--chardev",
            &chardev,
            "--monitor",
            "c",
            "--blockdev",
            "null-co,node-name=n",
            "--export",
            &export,
        ];
        let daemon = bed.qsd(&arguments, &[]);
        std::thread::sleep(Duration::from_millis(200));
        assert!(mounts::at(&mountpoint).is_none());
        let mut qmp = Qmp::connect(&socket);
        assert_eq!(qmp.run("query-block-exports", json!({}))[0]["id"], "e");
        daemon.stop();
        let daemon = bed.qsd(&arguments, &[]);
        // Before it listens a signal would simply end it.
        wait_until("it listens", Duration::from_secs(20), || socket.exists());
        daemon.stop();
    });
}

/// What a program does with the client that QEMU's own tools use.
const SCRIPT: &str = "
import asyncio, sys
from qemu.qmp import QMPClient
async def main():
    qmp = QMPClient('test')
    await qmp.connect(sys.argv[1])
    assert qmp.greeting.QMP.version['qemu']['major'] == 10
    await qmp.execute('blockdev-add', {'driver': 'null-co', 'node-name': 'n', 'size': 65536})
    with qmp.listener('BLOCK_EXPORT_DELETED') as listener:
        export = {'type': 'fuse', 'id': 'e', 'node-name': 'n', 'mountpoint': sys.argv[2]}
        await qmp.execute('block-export-add', export)
        await qmp.execute('block-export-del', {'id': 'e'})
        event = await listener.get()
        assert event['data'] == {'id': 'e'}, event
    names = [command['name'] for command in await qmp.execute('query-commands')]
    schema = await qmp.execute('query-qmp-schema')
    told = [entry['name'] for entry in schema if entry['meta-type'] == 'command']
    assert names == told
    await qmp.execute('quit')
    try:
        await qmp.disconnect()
    except EOFError:
        pass  # the daemon has hung up first, as it was told to
asyncio.run(asyncio.wait_for(main(), 20))
";

/// The client that QEMU's own tools use.
#[test]
fn the_python_client_is_served() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("qemu.qmp");
    let python = folder.join("bin/python");
    let minutes = Duration::from_secs(180);
    let installed = || {
        let check = Tool::new(&python).args(["-c", "import qemu.qmp"]);
        python.exists() && check.output().status.success()
    };
    if !installed() {
        Tool::new("python3")
            .args(["-m", "venv"])
            .arg(&folder)
            .limit(minutes)
            .run();
        let install = ["-m", "pip", "install", "--quiet", "qemu.qmp"];
        Tool::new(&python).args(install).limit(minutes).run();
    }
    once(|bed| {
        let (socket, mountpoint) = (bed.path("qmp"), bed.mountpoint("m"));
        let daemon = start(bed, &socket);
        drop(Qmp::silent(&socket));
        let tool = Tool::new(&python)
            .args(["-c", SCRIPT])
            .arg(&socket)
            .arg(&mountpoint);
        tool.run();
        assert!(daemon.ends().status().success());
    });
}

/// The time from a command to its answer, for people to look at; the limit is far above what it takes.
#[test]
fn a_round_trip_is_short() {
    once(|bed| {
        let socket = bed.path("qmp");
        let daemon = start(bed, &socket);
        let mut qmp = Qmp::connect(&socket);
        let mut times: Vec<Duration> = (0..200)
            .map(|_| {
                let began = Instant::now();
                let exports: Value = qmp.run("query-block-exports", json!({}));
                assert_eq!(exports, json!([]));
                began.elapsed()
            })
            .collect();
        times.sort_unstable();
        println!("median {:?}, worst {:?}", times[100], times[199]);
        assert!(times[100] < Duration::from_millis(200), "{:?}", times[100]);
        daemon.stop();
    });
}

#[test]
fn what_there_is_not_is_told_as_nothing() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        stage.add_raw("disk");
        // There are no devices, whatever nodes there are.
        assert_eq!(stage.run("query-block", json!({})), json!([]));
        let kinds = stage.run("query-chardev-backends", json!({}));
        let kinds = kinds.as_array().unwrap();
        assert!(kinds.contains(&json!({"name": "socket"})), "{kinds:?}");
        assert!(!kinds.contains(&json!({"name": "ringbuf"})), "{kinds:?}");
        stage.stop();
    });
}

/// The slice that the scheduler gives a thread, in nanoseconds; `None` if the kernel does not tell.
fn slice(pid: u32, name: &str) -> Option<u64> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    let task = tasks.find(|task| {
        let comm = std::fs::read_to_string(task.join("comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    });
    let about = std::fs::read_to_string(task.expect(name).join("sched")).ok()?;
    let line = about.lines().find(|line| line.starts_with("se.slice"))?;
    line.split(':').nth(1)?.trim().parse().ok()
}

#[test]
fn who_answers_has_short_turns_and_who_moves_data_does_not() {
    once(|bed| {
        let mut stage = Stage::start(bed);
        let new = json!({"qom-type": "iothread", "id": "late"});
        stage.run("object-add", new);
        let pid = stage.daemon.pid();
        let Some(usual) = slice(std::process::id(), &own_name()) else {
            println!("the kernel does not tell of slices");
            stage.stop();
            return;
        };
        for name in ["diskfuse", "monitor0", "monitor1"] {
            assert_eq!(slice(pid, name), Some(100_000), "{name}");
        }
        for name in ["IO t0", "IO late"] {
            assert_eq!(slice(pid, name), Some(usual), "{name}");
        }
        stage.stop();
    });
}

/// The name of the thread that the test runs on.
fn own_name() -> String {
    let comm = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
    comm.trim_end().to_owned()
}
