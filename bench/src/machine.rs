//! Where a run took place: hardware, kernel, versions, date, commit. Facts only, nothing that identifies the machine.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde::Serialize;

use crate::error::{At, Result};
use crate::{fio, mounts};

/// Facts about the machine and the tree that a report needs to be understood later.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Model name of the first processor.
    pub cpu: String,
    /// Number of processors this process may use.
    pub cores: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Type of the file system that holds the image.
    pub file_system: String,
    /// Version of fio.
    pub fio: String,
    /// Start of the run, UTC.
    pub date: String,
    /// Commit of the source tree, with `+` when it has changes; `none` when there is no commit.
    pub commit: String,
}

impl Machine {
    /// Looks around; `work` is the directory of the image, `tree` the source tree.
    pub fn look(work: &Path, tree: &Path) -> Result<Self> {
        let read = |path: &str| fs::read_to_string(path).at("read", Path::new(path));
        let memory_kib: u64 = field(&read("/proc/meminfo")?, "MemTotal")
            .and_then(|value| value.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        Ok(Self {
            cpu: field(&read("/proc/cpuinfo")?, "model name")
                .unwrap_or_else(|| "unknown".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: memory_kib / 1024,
            kernel: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            file_system: mounts::file_system_of(work)?,
            fio: fio::version()?,
            date: answer(Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]))
                .unwrap_or_default(),
            commit: commit(tree),
        })
    }
}

fn commit(tree: &Path) -> String {
    let git = |arguments: &[&str]| answer(Command::new("git").arg("-C").arg(tree).args(arguments));
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "none".to_owned();
    };
    let changed = git(&["status", "--porcelain"]).is_none_or(|changes| !changes.is_empty());
    if changed { commit + "+" } else { commit }
}

/// What a program that succeeds prints, trimmed.
fn answer(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn field(text: &str, name: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_ends_at_its_colon() {
        let text = "model\t\t: 85\nmodel name\t: Some CPU @ 2.0GHz: fast\n";
        assert_eq!(
            field(text, "model name").as_deref(),
            Some("Some CPU @ 2.0GHz: fast")
        );
        assert_eq!(field(text, "flags"), None);
    }

    #[test]
    fn a_tree_without_a_commit_says_so() {
        assert_eq!(commit(tempfile::tempdir().unwrap().path()), "none");
    }
}
