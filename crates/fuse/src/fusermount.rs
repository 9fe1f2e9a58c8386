//! fusermount3: the set-user-id program by which users who are not root mount and unmount FUSE. It must never be waited for
//! without a limit, and what it says is handed on together with what to do about it.
//!
//! It mounts what it was told to and sends back the open `/dev/fuse` over the Unix socket whose descriptor number stands
//! in `_FUSE_COMMFD`. That socket is its standard input here, so that no other program that is started meanwhile can
//! inherit it.
//!
//! Source: fusermount3(1), and `doc/` of libfuse.

use std::ffi::OsString;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags};

use crate::mount::MountOptions;

const PROGRAM: &str = "fusermount3";
/// How long it may take. An unmount waits for what the kernel still has to write.
const LIMIT: Duration = Duration::from_secs(30);
/// The most of its words that are kept, in bytes.
const WORDS: u64 = 4096;

/// Mounts on the regular file `path` and returns the connection's `/dev/fuse`, non-blocking. The error says what
/// fusermount3 said and what to do.
pub(crate) fn mount(path: &Path, options: &MountOptions<'_>) -> io::Result<OwnedFd> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut command = Command::new(PROGRAM);
    command
        .env("_FUSE_COMMFD", "0")
        .arg("-o")
        .arg(words(options))
        .arg("--")
        .arg(path)
        .stdin(theirs);
    run(command)?;
    let device = receive(&ours)?;
    rustix::fs::fcntl_setfl(&device, OFlags::RDWR | OFlags::NONBLOCK)?;
    Ok(device)
}

/// Takes the mount at `path` away: `lazily` even if somebody uses it, else with EBUSY if so.
pub(crate) fn unmount(path: &Path, lazily: bool) -> io::Result<()> {
    let mut command = Command::new(PROGRAM);
    command.arg("-u");
    if lazily {
        command.arg("-z");
    }
    command.arg("--").arg(path).stdin(Stdio::null());
    run(command)
}

/// The options as fusermount3 takes them. What stands before its commas can hold any byte: it undoes backslashes.
fn words(options: &MountOptions<'_>) -> OsString {
    let mut words = Vec::new();
    let access = if options.read_only { "ro" } else { "rw" };
    let others = if options.allow_other {
        ",allow_other"
    } else {
        ""
    };
    let max_read = options.max_read;
    words.extend_from_slice(
        format!(
            "{access},nosuid,nodev,noatime,default_permissions,max_read={max_read}{others},subtype=diskfuse,fsname="
        )
        .as_bytes(),
    );
    for &byte in options.source.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            words.push(b'\\');
        }
        words.push(byte);
    }
    OsString::from_vec(words)
}

/// Runs it to its end.
fn run(mut command: Command) -> io::Result<()> {
    let child = command
        // Its own words, not a translation's.
        .env("LC_ALL", "C")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.map_err(|error| not_started(&error))?;
    if !ends(&child)? {
        let _ = child.kill();
        let _ = child.wait();
        return Err(io::Error::other(format!(
            "{PROGRAM} has not ended after {} seconds",
            LIMIT.as_secs()
        )));
    }
    let status = child.wait()?;
    if status.success() {
        return Ok(());
    }
    let mut said = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What came before an error is all there is.
        let _ = stderr.take(WORDS).read_to_end(&mut said);
    }
    Err(explain(&String::from_utf8_lossy(&said)))
}

/// Waits for its end; false if the limit passed.
fn ends(child: &Child) -> io::Result<bool> {
    let pidfd = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec::try_from(LIMIT).map_err(io::Error::other)?;
    loop {
        match rustix::event::poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes the descriptor that was sent.
fn receive(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut messages = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let mut parts = [io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, &mut parts, &mut messages, flags)?;
    let device = messages.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sent) => sent.next(),
        _ => None,
    });
    device.ok_or_else(|| io::Error::other(format!("{PROGRAM} sent no descriptor")))
}

fn not_started(error: &io::Error) -> io::Error {
    let why = match error.kind() {
        io::ErrorKind::NotFound => {
            "only root may mount without fusermount3, and it is not installed \
             (apt install fuse3, or run this as root)"
        }
        io::ErrorKind::PermissionDenied => {
            "only root may mount without fusermount3, and this user may not run it \
             (join the group that owns it, often 'fuse', or run this as root)"
        }
        _ => return io::Error::other(format!("could not start {PROGRAM}: {error}")),
    };
    io::Error::new(error.kind(), why)
}

/// What it said, with what to do about it.
fn explain(said: &str) -> io::Error {
    let said = said.trim();
    let said = said
        .strip_prefix(PROGRAM)
        .map_or(said, |rest| rest.trim_start_matches([':', ' ']));
    if said.ends_with("Device or resource busy") {
        return io::Error::from_raw_os_error(libc::EBUSY);
    }
    let advice = if said.contains("user_allow_other") {
        " (write a line 'user_allow_other' to /etc/fuse.conf as root, or let nobody else in)"
    } else if said.contains("/dev/fuse") {
        " (this user needs access to /dev/fuse: chmod 666 /dev/fuse as root, or join its group; \
         in a container: --device /dev/fuse)"
    } else if said.contains("failed to open") && said.ends_with("Permission denied") {
        " (the file to mount on must be one that this user may write: give it to this user, or name another)"
    } else if said.contains("mounting over filesystem type") {
        " (name a file on another file system)"
    } else if said.contains("mount_max") || said.contains("too many") {
        " (mount_max in /etc/fuse.conf sets how many a user may have)"
    } else if said.ends_with("Operation not permitted") {
        " (is fusermount3 set-user-id root? Containers and services without new privileges do not let it be; \
         'unshare -Urm' gives a place where mounting needs no fusermount3)"
    } else {
        ""
    };
    let said = if said.is_empty() {
        "it failed without a word"
    } else {
        said
    };
    io::Error::other(format!("{PROGRAM}: {said}{advice}"))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    fn options(source: &OsStr) -> MountOptions<'_> {
        MountOptions {
            source,
            read_only: true,
            directory: false,
            allow_other: true,
            max_read: 4096,
            abortable: false,
        }
    }

    #[test]
    fn a_source_cannot_smuggle_options_in() {
        let words = words(&options(OsStr::new("/a,allow_root\\,b")));
        assert_eq!(
            words,
            "ro,nosuid,nodev,noatime,default_permissions,max_read=4096,allow_other,subtype=diskfuse,\
             fsname=/a\\,allow_root\\\\\\,b"
        );
    }

    #[test]
    fn what_it_says_comes_with_a_remedy() {
        let cases = [
            (
                "fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf\n",
                "write a line",
            ),
            (
                "fusermount3: failed to open /dev/fuse: Permission denied",
                "chmod 666",
            ),
            (
                "fusermount3: failed to open /m: Permission denied",
                "give it to this user",
            ),
            (
                "fusermount3: mount failed: Operation not permitted",
                "set-user-id",
            ),
            ("", "without a word"),
        ];
        for (said, remedy) in cases {
            let text = explain(said).to_string();
            assert!(text.contains(remedy), "{text}");
            assert!(text.starts_with("fusermount3: "), "{text}");
        }
        let busy = "fusermount3: failed to unmount /m: Device or resource busy\n";
        assert_eq!(explain(busy).raw_os_error(), Some(libc::EBUSY));
    }
}
