//! Who uses a shown file, for people who want it unmounted: processes that have it open or mapped, and loop devices that
//! stand on it. It must never touch the file itself, which may not answer, and never decide anything: the kernel knows
//! whether a mount is in use, and of other users' processes only root may see more than the number.
//!
//! Source: proc_pid_fdinfo(5) (`mnt_id`), proc_pid_maps(5), `Documentation/ABI` of Linux (`loop/backing_file`).

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Plain;

/// The most that are named.
const MOST: usize = 20;

/// A process, or a device of the kernel's, that uses the file: a line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User(String);

impl std::fmt::Display for User {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Those who use the mount on `mountpoint`, an absolute path, as far as this user may see them: 20 at most.
pub fn users(mountpoint: &Path) -> Vec<User> {
    let mounts = diskfuse_fuse::mounts().unwrap_or_default();
    let Some(mount) = mounts.iter().rfind(|mount| mount.mountpoint == mountpoint) else {
        return Vec::new();
    };
    let devices = loop_devices(mountpoint)
        .into_iter()
        .map(|device| User(format!("loop device {}", device.display())));
    let processes = process_ids().into_iter().filter_map(|process| {
        let folder = PathBuf::from(format!("/proc/{process}"));
        let how = if has_open(&folder, mount.id) {
            "open"
        } else if has_mapped(&folder, mount.minor) {
            "mapped"
        } else {
            return None;
        };
        let command = command(&folder);
        Some(User(format!("process {process} ({command}) has it {how}")))
    });
    devices.chain(processes).take(MOST).collect()
}

fn process_ids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    let mut ids: Vec<u32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        // We may have inherited it; that ends with us.
        .filter(|&id| id != std::process::id())
        .collect();
    ids.sort_unstable();
    ids
}

/// Whether a process has a descriptor on the mount.
fn has_open(process: &Path, mount: u64) -> bool {
    let entries = fs::read_dir(process.join("fdinfo")).into_iter().flatten();
    entries.flatten().any(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let number = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        number.and_then(|number| number.trim().parse().ok()) == Some(mount)
    })
}

/// Whether a process has mapped a file of the device `0:minor`, which is the mount's alone.
fn has_mapped(process: &Path, minor: u32) -> bool {
    let text = fs::read(process.join("maps")).unwrap_or_default();
    let device = format!("00:{minor:02x}");
    String::from_utf8_lossy(&text)
        .lines()
        .any(|line| line.split_whitespace().nth(3) == Some(&device))
}

fn command(process: &Path) -> String {
    let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
    Plain(name.trim_end()).to_string()
}

fn loop_devices(file: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten();
    let mut devices: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
            backing.is_ok_and(|backing| Path::new(backing.trim_end_matches('\n')) == file)
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect();
    devices.sort();
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen_by_what_it_has_open() {
        let file = fs::File::open("/proc/self/mountinfo").unwrap();
        let proc = diskfuse_fuse::mounts().unwrap();
        let proc = proc
            .iter()
            .rfind(|mount| mount.mountpoint == Path::new("/proc"));
        let proc = proc.expect("proc is mounted");
        assert!(has_open(Path::new("/proc/self"), proc.id));
        drop(file);
        assert!(!has_open(Path::new("/proc/self"), u64::MAX));
        assert!(!has_mapped(Path::new("/proc/self"), 0xfffff));
    }

    #[test]
    fn what_is_not_mounted_is_used_by_nobody() {
        assert_eq!(users(Path::new("/no/such/file")), []);
    }
}
