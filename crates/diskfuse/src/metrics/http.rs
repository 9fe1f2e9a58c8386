//! One request and one answer of HTTP/1.1 on a socket, which is closed afterwards. It must never read or wait without a limit.
//!
//! Source: RFC 9112; `httparse` takes the request apart.

use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use prometheus::TEXT_FORMAT;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

/// The longest request, in bytes.
const LONGEST: usize = 8 << 10;
/// The most header fields.
const MOST_FIELDS: usize = 64;

/// What came of reading a request.
enum Asked {
    /// The page, or (`HEAD`) only what is to be said of it.
    Page { head: bool },
    /// Something else, or nothing that makes sense: this status is the answer.
    Refused(&'static str),
}

/// Reads a request from `socket` and answers it with what `page` says; each takes `patience` at most.
pub(super) fn serve(
    socket: &OwnedFd,
    patience: Duration,
    page: impl FnOnce() -> Result<String, String>,
) -> io::Result<()> {
    let asked = read(socket, Instant::now() + patience)?;
    let (status, kind, body, head) = match asked {
        Asked::Refused(status) => (status, "text/plain", format!("{status}\n"), false),
        Asked::Page { head } => match page() {
            Ok(page) => ("200 OK", TEXT_FORMAT, page, head),
            Err(why) => ("503 Service Unavailable", "text/plain", why + "\n", head),
        },
    };
    let mut answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    if !head {
        answer.push_str(&body);
    }
    write(socket, answer.as_bytes(), Instant::now() + patience)?;
    Ok(shutdown(socket, Shutdown::Write)?)
}

fn read(socket: &OwnedFd, deadline: Instant) -> io::Result<Asked> {
    let mut request = Vec::new();
    let mut chunk = [0; 2048];
    loop {
        limit(socket, Timeout::Recv, deadline)?;
        let (count, _) = match recv(socket, &mut chunk[..], RecvFlags::empty()) {
            Ok(got) => got,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        request.extend_from_slice(chunk.get(..count).unwrap_or_default());
        if let Some(asked) = understand(&request) {
            return Ok(asked);
        }
        if request.len() > LONGEST {
            return Ok(Asked::Refused("431 Request Header Fields Too Large"));
        }
    }
}

/// `None`: there is more to come.
fn understand(bytes: &[u8]) -> Option<Asked> {
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Partial) => return None,
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => {
            return Some(Asked::Refused("431 Request Header Fields Too Large"));
        }
        Err(_) => return Some(Asked::Refused("400 Bad Request")),
    }
    let head = match request.method {
        Some("GET") => false,
        Some("HEAD") => true,
        _ => return Some(Asked::Refused("405 Method Not Allowed")),
    };
    let path = request.path.unwrap_or_default().split('?').next();
    Some(match path {
        Some("/metrics") => Asked::Page { head },
        _ => Asked::Refused("404 Not Found"),
    })
}

fn write(socket: &OwnedFd, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        limit(socket, Timeout::Send, deadline)?;
        match send(socket, bytes, SendFlags::NOSIGNAL) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// The next call may take as long as there is until `deadline`.
fn limit(socket: &OwnedFd, which: Timeout, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left < Duration::from_millis(1) {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(set_socket_timeout(socket, which, Some(left))?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(5);

    fn answer_to(request: &[u8]) -> String {
        let (mut here, there) = UnixStream::pair().unwrap();
        let server =
            std::thread::spawn(move || serve(&there.into(), PATIENCE, || Ok("page\n".to_owned())));
        here.write_all(request).unwrap();
        let mut answer = String::new();
        here.read_to_string(&mut answer).unwrap();
        server.join().unwrap().unwrap();
        answer
    }

    #[test]
    fn only_the_page_can_be_had() {
        let page = answer_to(b"GET /metrics?x=y HTTP/1.1\r\nHost: h\r\n\r\n");
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && page.ends_with("\r\n\r\npage\n"));
        assert!(
            page.contains("\r\nContent-Type: text/plain; version=0.0.4"),
            "{page}"
        );
        let head = answer_to(b"HEAD /metrics HTTP/1.0\r\n\r\n");
        assert!(head.contains("Content-Length: 5\r\n") && head.ends_with("\r\n\r\n"));
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("nonsense\0\r\n\r\n", "400"),
        ] {
            let answer = answer_to(request.as_bytes());
            assert!(
                answer.starts_with(&format!("HTTP/1.1 {status} ")),
                "{answer}"
            );
        }
    }

    #[test]
    fn an_endless_request_is_refused() {
        let mut request = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
        request.resize(LONGEST + 1, b'x');
        assert!(answer_to(&request).starts_with("HTTP/1.1 431 "));
    }

    #[test]
    fn whoever_dribbles_or_does_not_read_is_cut_off() {
        let short = Duration::from_millis(100);
        let (mut here, there) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            let _ = here.write_all(b"GET /metrics HTTP/1.1\r\nX: ");
            while here.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let began = Instant::now();
        let socket = there.into();
        assert!(serve(&socket, short, || Ok(String::new())).is_err());
        drop(socket);
        writer.join().unwrap();
        let (mut here, there) = UnixStream::pair().unwrap();
        here.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
        let large = "x".repeat(8 << 20);
        assert!(serve(&there.into(), short, || Ok(large)).is_err());
        assert!(began.elapsed() < Duration::from_secs(3));
    }
}
