//! `diskfuse umount`: finds who shows the file, has it written back and taken away, and waits until that is done; or says
//! who uses the file. It must never unmount anything that is not ours.

pub mod helper;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::cli::UmountArgs;
use crate::control::client::{Daemon, Daemons, Outcome};
use crate::control::protocol::{Unmount, WirePath};
use crate::control::{self, client};
use crate::error::{Error, Plain, Result};
use crate::{busy, mountpoint, output};

/// How often it is tried again while somebody uses the file.
const AGAIN: Duration = Duration::from_millis(100);

/// Carries the command out.
pub fn run(arguments: &UmountArgs) -> Result<ExitCode> {
    let typed = &arguments.path;
    let what = format!("Could not find '{}'", typed.display());
    let path = diskfuse_fuse::absolute(typed).map_err(Error::system(what))?;
    let seconds = arguments.timeout.map(u64::from);
    let deadline = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let found = client::find(&control::folder())?;
    let targets = choose(&found, &path, arguments.all)?;
    let mut done = !targets.is_empty();
    for (daemon, mountpoint) in targets {
        unmount(daemon, &mountpoint, arguments, deadline)?;
    }
    if !done && arguments.force {
        done = cut_off(&path)?;
    }
    // A look at the file of a daemon that is stopped may take until that goes on, whatever signals we get meanwhile.
    if (!done || arguments.all) && found.silent.is_empty() {
        done |= heal(&path)?;
    }
    match done {
        true => Ok(ExitCode::SUCCESS),
        false => Err(nothing_there(typed, &path, &found)),
    }
}

fn unmount(
    daemon: &Daemon,
    mountpoint: &WirePath,
    arguments: &UmountArgs,
    deadline: Option<Instant>,
) -> Result<()> {
    let how = match (arguments.lazy, arguments.force) {
        (true, _) => Unmount::Lazily,
        (false, true) => Unmount::Forcibly,
        (false, false) => Unmount::UnlessBusy,
    };
    let shown = mountpoint.0.display();
    loop {
        let still_waiting = || {
            let line = format_args!("'{shown}' is still being written back …");
            output::complain("diskfuse", line);
        };
        match daemon.unmount(mountpoint, how, deadline, still_waiting)? {
            Outcome::Unmounted => return Ok(()),
            Outcome::Unfinished => {
                return Err(Error::Refused(format!(
                    "'{shown}' is still being written back; its daemon goes on with it"
                )));
            }
            Outcome::Busy => {
                let over = deadline.is_some_and(|at| at <= Instant::now() + AGAIN);
                if !arguments.wait || over {
                    return Err(in_use(&mountpoint.0));
                }
                std::thread::sleep(AGAIN);
            }
        }
    }
}

/// Who uses the file, and what can be done.
fn in_use(mountpoint: &Path) -> Error {
    let users = users_of(mountpoint);
    Error::Refused(format!(
        "{users}\nIt is left as it is. --wait waits for the end of that, --lazy takes the name away and lets it go on, \
         --force lets it fail."
    ))
}

/// Says that the file is in use, and by whom, a line for each.
fn users_of(mountpoint: &Path) -> String {
    let users = busy::users(mountpoint);
    let mut message = format!("'{}' is in use", mountpoint.display());
    if users.is_empty() {
        message.push_str(" by somebody whom only root may see");
    }
    for user in &users {
        // Writing to a String cannot fail.
        let _ = write!(message, "\n  {user}");
    }
    message
}

/// Ends the mount of a daemon that does not answer; true if there was one. What a daemon that is there had not written is
/// lost.
fn cut_off(path: &Path) -> Result<bool> {
    let done = diskfuse_fuse::abort(path)?;
    if done {
        let path = Plain(&path.display().to_string()).to_string();
        output::complain(
            "diskfuse",
            format_args!("'{path}' was cut off from its daemon, which cannot be reached"),
        );
    }
    Ok(done)
}

/// What is to be unmounted: the export on `path`, else those of the image `path`.
fn choose<'d>(found: &'d Daemons, path: &Path, all: bool) -> Result<Vec<(&'d Daemon, WirePath)>> {
    let exports = || {
        found
            .answering
            .iter()
            .flat_map(|daemon| daemon.exports.iter().map(move |export| (daemon, export)))
    };
    let is_image = |image: &Option<WirePath>| image.as_ref().is_some_and(|image| image.0 == path);
    let on_path = exports().find(|(_, export)| export.mountpoint.0 == path);
    if let Some((daemon, export)) = on_path
        && !all
    {
        return Ok(vec![(daemon, export.mountpoint.clone())]);
    }
    let of_image: Vec<_> = exports()
        .filter(|(_, export)| is_image(&export.image) || export.mountpoint.0 == path)
        .map(|(daemon, export)| (daemon, export.mountpoint.clone()))
        .collect();
    if of_image.len() > 1 && !all {
        let mut message = format!(
            "'{}' is shown {} times; name one of these, or take all away with --all:",
            path.display(),
            of_image.len()
        );
        for (_, mountpoint) in &of_image {
            message = format!("{message}\n  {}", mountpoint.0.display());
        }
        return Err(Error::Refused(message));
    }
    Ok(of_image)
}

/// Takes away what a killed daemon left mounted on `path`, or on other files for the image `path`. True if there was
/// something.
fn heal(path: &Path) -> Result<bool> {
    let mut done = mountpoint::heal(path)?;
    let mounts =
        diskfuse_fuse::mounts().map_err(Error::system("Could not read the list of mounts"))?;
    let of_image: Vec<PathBuf> = mounts
        .into_iter()
        .filter(|mount| mount.fs_type == diskfuse_fuse::FS_TYPE && mount.source == path.as_os_str())
        .map(|mount| mount.mountpoint)
        .collect();
    for mountpoint in of_image {
        done |= mountpoint::heal(&mountpoint)?;
    }
    Ok(done)
}

/// Why there is nothing to be done.
fn nothing_there(typed: &Path, path: &Path, found: &Daemons) -> Error {
    let typed = typed.display();
    let mounts = diskfuse_fuse::mounts().unwrap_or_default();
    let there = mounts.iter().rfind(|mount| mount.mountpoint == path);
    let mut message = match there {
        Some(mount) if mount.fs_type == diskfuse_fuse::FS_TYPE => format!(
            "'{typed}' is shown by a daemon that cannot be reached: another user's, or one in another container"
        ),
        Some(mount) => format!(
            "'{typed}' is not ours: it is a mount of type {}; use umount(8)",
            mount.fs_type
        ),
        None => {
            format!("'{typed}' is neither shown nor a mountpoint of ours (see `diskfuse list`)")
        }
    };
    for sentence in &found.silent {
        message = format!("{message}\n{sentence}");
    }
    if !found.silent.is_empty() {
        message.push_str("\n--force cuts the file off from a daemon that does not answer");
    }
    Error::Refused(message)
}
