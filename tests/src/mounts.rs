//! What is mounted below a test's folder, and taking it away. Looks at no file behind a mount: that could block for as
//! long as the daemon that serves it.
//!
//! Source: proc_pid_mountinfo(5); `Documentation/filesystems/fuse/fuse.rst` (the control file system).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// One line of mountinfo.
#[derive(Clone, Debug)]
pub struct Mount {
    /// Where it is.
    pub point: PathBuf,
    /// The minor device number, by which the kernel names a FUSE connection.
    pub minor: u32,
    /// Its options, comma-separated: those of the mount, then those of the file system.
    pub options: String,
    /// File system type.
    pub kind: String,
}

/// All mounts that this process sees, in the order in which they were made.
pub fn all() -> Vec<Mount> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").expect("proc is mounted");
    text.lines().filter_map(parse).collect()
}

fn parse(line: &str) -> Option<Mount> {
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let minor = left.nth(2)?.split_once(':')?.1.parse().ok()?;
    let point = unescape(left.nth(1)?);
    let options = left.next()?;
    let mut right = right.split(' ');
    let kind = right.next()?.to_owned();
    let more = right.nth(1)?;
    Some(Mount {
        point,
        minor,
        options: format!("{options},{more}"),
        kind,
    })
}

/// Undoes the kernel's escapes of blanks and backslashes, three octal digits each.
fn unescape(field: &str) -> PathBuf {
    let mut parts = field.split('\\');
    let mut text = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        let (digits, rest) = part.split_at_checked(3).unwrap_or((part, ""));
        text.push(u8::from_str_radix(digits, 8).expect("an escape of the kernel's"));
        text.extend_from_slice(rest.as_bytes());
    }
    PathBuf::from(OsString::from_vec(text))
}

/// The topmost mount exactly on `point`.
pub fn at(point: &Path) -> Option<Mount> {
    all().into_iter().rfind(|mount| mount.point == point)
}

/// All mounts on or below `folder`.
pub fn below(folder: &Path) -> Vec<Mount> {
    let all = all().into_iter();
    all.filter(|mount| mount.point.starts_with(folder))
        .collect()
}

/// Aborts a FUSE connection: every request on it fails at once. False if it is gone already.
pub fn abort(mount: &Mount) -> bool {
    show_connections();
    let file = format!("{CONNECTIONS}/{}/abort", mount.minor);
    std::fs::write(file, "1").is_ok()
}

/// Where systemd does not run nobody has mounted the control file system, without which ordinary users get no FUSE over
/// io_uring.
pub fn show_connections() {
    if at(Path::new(CONNECTIONS)).is_none() {
        let _ = mount("fusectl", CONNECTIONS, "fusectl", MountFlags::empty(), None);
    }
}

/// Takes everything below `folder` away, hung or not: aborts what is FUSE, then detaches, the last mount first.
pub fn sweep(folder: &Path) {
    let mut left = below(folder);
    left.reverse();
    for mount in left {
        if mount.kind.starts_with("fuse") {
            abort(&mount);
        }
        let _ = unmount(&mount.point, UnmountFlags::DETACH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_is_understood() {
        let line =
            r"36 35 0:98 / /m/a\040b\134c rw,noatime shared:1 - fuse.diskfuse /x rw,user_id=0";
        let mount = parse(line).unwrap();
        assert_eq!(mount.point, Path::new(r"/m/a b\c"));
        assert_eq!((mount.minor, mount.kind.as_str()), (98, "fuse.diskfuse"));
        assert_eq!(mount.options, "rw,noatime,rw,user_id=0");
    }
}
