//! The command line by which umount(8) has a mount of the type `fuse.diskfuse` taken away. The kernel does not wait for the daemon
//! of a FUSE mount, so that the image may still be written when an unmount by umount(8) or systemd is over; this waits until
//! it is closed. It must never take away another mount than umount(8) would: whatever is not the plain unmount of
//! an export that its daemon has mounted, where we see it, is given back to umount(8).
//!
//! Source: umount(8), "External helpers" and "Exit status".

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use super::users_of;
use crate::control::client::{self, Daemon, Outcome};
use crate::control::protocol::{Unmount, WirePath};
use crate::error::{Error, Result};
use crate::{control, output};

/// The name under which umount(8) calls us.
const NAME: &str = "umount.fuse.diskfuse";

/// umount(8): the unmount failed.
const FAILED: u8 = 32;

/// Whether umount(8) has called us, by this name.
pub fn is_meant(name: &OsStr) -> bool {
    name == NAME
}

/// Unmounts as umount(8) asks for it, and answers with its exit codes.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let failed = |error: Error| {
        output::complain(NAME, error);
        ExitCode::from(FAILED)
    };
    if let Some(path) = plain(&arguments)
        && let Some((daemon, mountpoint)) = daemon_of(path)
    {
        return unmount(&daemon, &mountpoint).map_or_else(failed, |()| ExitCode::SUCCESS);
    }
    let mut umount = Command::new("umount");
    umount.arg("-i").args(without_type(arguments));
    // Only comes back if it fails.
    let source = umount.exec();
    failed(Error::system("Could not run umount(8)")(source))
}

/// What is to be unmounted, if nothing else is asked for: `-n` and `-v` ask for nothing, and `-t` says what our name says.
fn plain(arguments: &[OsString]) -> Option<&Path> {
    let mut path = None;
    let mut rest = arguments.iter();
    while let Some(word) = rest.next() {
        match word.as_bytes() {
            b"-t" => drop(rest.next()),
            [b'-', letters @ ..] if !letters.is_empty() => {
                if letters.iter().any(|letter| !b"nv".contains(letter)) {
                    return None;
                }
            }
            _ if path.is_none() => path = Some(Path::new(word)),
            _ => return None,
        }
    }
    path
}

/// What umount(8) itself is to be told: there `-t` belongs to `-a`.
fn without_type(arguments: Vec<OsString>) -> Vec<OsString> {
    let mut kept = Vec::with_capacity(arguments.len());
    let mut rest = arguments.into_iter();
    while let Some(word) = rest.next() {
        match word.as_bytes() {
            b"-t" => drop(rest.next()),
            _ => kept.push(word),
        }
    }
    kept
}

/// The daemon that has mounted the one mount that is at `path`.
fn daemon_of(path: &Path) -> Option<(Daemon, WirePath)> {
    let path = diskfuse_fuse::absolute(path).ok()?;
    let mounts = diskfuse_fuse::mounts().ok()?;
    let mut there = mounts.iter().filter(|mount| mount.mountpoint == path);
    let only = there.next().filter(|_| there.next().is_none())?;
    if only.fs_type != diskfuse_fuse::FS_TYPE {
        return None;
    }
    let found = client::find(&control::folder()).ok()?;
    let mountpoint = WirePath::from(&*path);
    let serves = |daemon: &Daemon| {
        let mut all = daemon.exports.iter();
        all.any(|export| export.mountpoint == mountpoint)
    };
    let daemon = found.answering.into_iter().find(serves)?;
    daemon.sees_our_mounts().then_some((daemon, mountpoint))
}

fn unmount(daemon: &Daemon, mountpoint: &WirePath) -> Result<()> {
    let shown = mountpoint.0.display();
    let still_waiting = || {
        output::complain(
            NAME,
            format_args!("'{shown}' is still being written back …"),
        );
    };
    match daemon.unmount(mountpoint, Unmount::UnlessBusy, None, still_waiting)? {
        Outcome::Unmounted => Ok(()),
        Outcome::Busy => Err(Error::Refused(users_of(&mountpoint.0))),
        // Only with a limit, and there is none.
        Outcome::Unfinished => Err(Error::Refused(format!("'{shown}' is still written back"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn only_a_plain_unmount_is_ours() {
        for line in ["/m", "/m -n", "/m -v -t fuse.diskfuse", "-nv /m"] {
            assert_eq!(plain(&words(line)), Some(Path::new("/m")), "{line}");
        }
        for line in [
            "/m -l",
            "/m -nf",
            "/m -r",
            "/m -N /proc/1/ns/mnt",
            "/m /n",
            "",
        ] {
            assert_eq!(plain(&words(line)), None, "{line}");
        }
    }

    #[test]
    fn umount_is_told_everything_but_the_type() {
        let told = without_type(words("/m -l -t fuse.diskfuse -N 7"));
        assert_eq!(told, words("/m -l -N 7"));
    }
}
