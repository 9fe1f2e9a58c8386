//! Whose thread carries out what a client says.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::time::Instant;

use diskfuse_monitor::{ChardevOptions, MonitorOptions};
use serde_json::json;

use super::*;
use crate::qsd::monitor::Monitors;

const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn whoever_answers_a_command_is_free_for_others_after_one_more() {
    let (to, errands) = channel();
    let to = Mutex::new(to);
    let monitors = Monitors::new(move |errand| drop(to.lock().send(errand)));
    monitors.begin();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qmp");
    let socket = format!("socket,id=c,path={},server=on,wait=off", path.display());
    let socket = ChardevOptions::parse(&socket).unwrap();
    monitors.add_chardev(&socket, &|| false).unwrap();
    monitors
        .add_monitor(&MonitorOptions::parse("c").unwrap())
        .unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let mut lines = BufReader::new(client.try_clone().unwrap()).lines();
    let own = "{'execute': 'query-version'}".repeat(MOST_REQUESTS);
    let said =
        format!("{{'execute': 'qmp_capabilities'}}{{'execute': 'query-block-exports'}}{own}");
    client.write_all(said.as_bytes()).unwrap();
    // The greeting, and the answer to the first one.
    for _ in 0..2 {
        lines.next().unwrap().unwrap();
    }
    let Errand::Request(request) = errands.recv_timeout(LIMIT).unwrap() else {
        panic!("a turn that nobody needs")
    };
    let waiting = || {
        let sessions = monitors.inner.sessions.lock();
        sessions[0].0.state.lock().waiting.len()
    };
    let end = Instant::now() + LIMIT;
    while waiting() < MOST_REQUESTS {
        assert!(Instant::now() < end, "the client is not heard");
        std::thread::sleep(Duration::from_millis(1));
    }
    let Request { reply, .. } = *request;
    reply.send(Ok(json!([])));
    for left in (1..MOST_REQUESTS).rev() {
        assert_eq!(waiting(), left);
        let Ok(Errand::Turn(turn)) = errands.try_recv() else {
            panic!("no turn, with {left} commands waiting")
        };
        turn.take();
    }
    assert_eq!(waiting(), 0);
    assert!(errands.try_recv().is_err(), "a turn that nobody needs");
    for _ in 0..=MOST_REQUESTS {
        let line = lines.next().unwrap().unwrap();
        assert!(line.contains("return"), "{line}");
    }
    monitors.flush_and_close(LIMIT);
}
