//! How `list` and `umount` reach running daemons: each daemon listens on a Unix socket in a folder that only its user
//! may enter, `/run/diskfuse` for root, `$XDG_RUNTIME_DIR/diskfuse` for others, else `/run/user/UID/diskfuse` or `/tmp/diskfuse-UID`. One
//! connection carries one request and one answer, a line of JSON each. Whoever may open the socket may ask; file modes
//! are the only check. It must never wait for ever, nor read without a limit.

pub mod client;
pub mod counters;
pub mod protocol;
pub mod server;

use std::fs::{DirBuilder, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// What socket files end in. Others in the folder are none of ours, or not ready.
const SUFFIX: &str = "sock";

/// Where this user's daemons listen. In a user namespace it is the folder of the user who made it, whoever he is inside.
pub fn folder() -> PathBuf {
    let user = user();
    if user == 0 {
        return PathBuf::from("/run/diskfuse");
    }
    let named = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    // Where it is when nobody says so: in services, and after su(1).
    let usual = PathBuf::from(format!("/run/user/{user}"));
    let runtime = named
        .into_iter()
        .chain([usual])
        .find(|folder| is_own(folder));
    match runtime {
        Some(runtime) => runtime.join("diskfuse"),
        None => PathBuf::from(format!("/tmp/diskfuse-{user}")),
    }
}

fn is_own(folder: &Path) -> bool {
    let own = |stat: Metadata| stat.is_dir() && stat.uid() == rustix::process::geteuid().as_raw();
    folder.is_absolute() && folder.metadata().is_ok_and(own)
}

/// This process's user, as the user namespace around ours knows him.
///
/// Source: user_namespaces(7), "User and group ID mappings".
fn user() -> u32 {
    let inside = rustix::process::geteuid().as_raw();
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    outside(&map, inside).unwrap_or(inside)
}

fn outside(map: &str, inside: u32) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u32>);
        let mut number = || numbers.next()?.ok();
        let (first, outside, count) = (number()?, number()?, number()?);
        let index = inside.checked_sub(first)?;
        (index < count)
            .then(|| outside.checked_add(index))
            .flatten()
    })
}

/// Makes the folder if it is missing, and makes sure that nobody else can put anything into it.
fn prepare_folder(folder: &Path) -> Result<()> {
    let failed = || {
        format!(
            "Could not make the folder for control sockets '{}'",
            folder.display()
        )
    };
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::system(failed())(error));
        }
        _ => {}
    }
    let stat = folder.symlink_metadata().map_err(Error::system(failed()))?;
    check_ours(folder, &stat)
}

/// A folder that somebody else owns or may write to is a trap.
fn check_ours(folder: &Path, stat: &Metadata) -> Result<()> {
    let ours = stat.is_dir()
        && stat.uid() == rustix::process::geteuid().as_raw()
        && stat.mode() & 0o777 == 0o700;
    if ours {
        return Ok(());
    }
    let folder = folder.display();
    Err(Error::refused(format!(
        "'{folder}' is not a folder that only this user may enter (it must be ours, with mode 0700): remove it, or name another \
         runtime folder of this user in XDG_RUNTIME_DIR"
    )))
}

/// Reads up to the end of the first line, `longest` bytes at most and until `deadline` at the latest.
fn read_line(stream: &mut UnixStream, longest: usize, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let count = match stream.read(&mut chunk) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        };
        let new = chunk.get(..count).unwrap_or_default();
        let end = new.iter().position(|&byte| byte == b'\n');
        line.extend_from_slice(new.get(..end.unwrap_or(count)).unwrap_or_default());
        if line.len() > longest {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if end.is_some() {
            return Ok(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn a_line_is_read_across_packets_and_what_follows_is_ignored() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            for part in ["{\"a\"", ":1}", "\nrest"] {
                there.write_all(part.as_bytes()).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        assert_eq!(read_line(&mut here, 100, soon()).unwrap(), b"{\"a\":1}");
        writer.join().unwrap();
    }

    #[test]
    fn an_endless_line_a_silent_peer_and_a_cut_line_are_errors() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        there.write_all(&[b'x'; 200]).unwrap();
        let error = read_line(&mut here, 100, soon()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);

        let at_once = Instant::now() + Duration::from_millis(20);
        let error = read_line(&mut here, 1000, at_once).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        there.write_all(b"half").unwrap();
        drop(there);
        let error = read_line(&mut here, 1000, soon()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_peer_that_dribbles_cannot_outlast_the_deadline() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            while there.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let start = Instant::now();
        let error = read_line(&mut here, 1 << 20, start + Duration::from_millis(100)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(start.elapsed() < Duration::from_secs(2));
        drop(here);
        writer.join().unwrap();
    }

    #[test]
    fn the_user_outside_of_a_namespace_is_found() {
        assert_eq!(outside("         0          0 4294967295\n", 7), Some(7));
        assert_eq!(outside("0 1000 1\n", 0), Some(1000));
        assert_eq!(outside("0 1000 1\n1 100000 65536\n", 5), Some(100_004));
        assert_eq!(outside("0 1000 1\n", 1), None);
        assert_eq!(outside("nonsense\n", 0), None);
    }

    #[test]
    fn a_folder_that_others_may_enter_is_refused() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("run");
        prepare_folder(&folder).unwrap();
        assert_eq!(folder.metadata().unwrap().mode() & 0o777, 0o700);
        prepare_folder(&folder).unwrap();
        std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(
            prepare_folder(&folder)
                .unwrap_err()
                .to_string()
                .contains("0700")
        );
        let link = outer.path().join("link");
        std::os::unix::fs::symlink(outer.path(), &link).unwrap();
        assert!(prepare_folder(&link).is_err());
    }
}
