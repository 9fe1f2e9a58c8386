//! What is mounted where, from `/proc/self/mountinfo` (proc(5)), and taking mounts away. Looks at no file behind a mount:
//! that could block for as long as the daemon that serves it.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

use crate::error::{At, Result};

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where it is mounted.
    pub point: PathBuf,
    /// Directory or file of its file system that is shown there.
    pub root: PathBuf,
    /// File system type.
    pub kind: String,
}

/// All mounts of this process's namespace, in mountinfo's order: of two on one point the later one is on top.
pub fn all() -> Result<Vec<Mount>> {
    let path = Path::new(MOUNTINFO);
    Ok(parse(&fs::read(path).at("read", path)?))
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let root = unescape(fields.nth(3)?);
    let point = unescape(fields.next()?);
    // Options and optional fields up to a lone dash, then the type.
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount {
        point,
        root,
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
}

/// Undoes the kernel's escaping of blanks and backslashes as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| {
                digits.iter().try_fold(0u32, |value, digit| {
                    (b'0'..=b'7')
                        .contains(digit)
                        .then(|| value * 8 + u32::from(digit - b'0'))
                })
            });
        if let Some(value) = octal.and_then(|value| u8::try_from(value).ok()) {
            bytes.push(value);
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))
}

/// Whether something is mounted exactly on `point` (an absolute path without symbolic links).
pub fn is_mounted(point: &Path) -> Result<bool> {
    Ok(all()?.iter().any(|mount| mount.point == point))
}

/// Type of the file system that holds `path`.
pub fn file_system_of(path: &Path) -> Result<String> {
    let mounts = all()?;
    let holder = mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.as_os_str().len());
    Ok(holder.map_or_else(|| "unknown".to_owned(), |mount| mount.kind.clone()))
}

/// Takes whatever is still mounted on `point` away, also when its server hangs (lazily). Best effort: used on ways out.
pub fn detach(point: &Path) {
    // A few at most can be stacked on one point; the bound keeps a mount that refuses from holding us.
    for _ in 0..4 {
        if !is_mounted(point).unwrap_or(false) || unmount(point, UnmountFlags::DETACH).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_optional_fields_are_read() {
        let text = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw\n\
            40 35 0:44 / /w/export rw - fuse /dev/fuse rw,user_id=0\n";
        assert_eq!(
            parse(text),
            [
                Mount {
                    point: "/mnt2".into(),
                    root: "/mnt1".into(),
                    kind: "ext3".into()
                },
                Mount {
                    point: "/w/export".into(),
                    root: "/".into(),
                    kind: "fuse".into()
                },
            ]
        );
    }

    #[test]
    fn escaped_blanks_are_undone() {
        assert_eq!(unescape(br"/a\040b\134c\0"), PathBuf::from(r"/a b\c\0"));
    }

    #[test]
    fn a_line_that_is_cut_off_is_left_out() {
        assert_eq!(parse(b"36 35 98:0 /mnt1\n"), []);
    }

    #[test]
    fn proc_is_mounted_here_and_has_its_type() {
        assert!(is_mounted(Path::new("/proc")).unwrap());
        assert_eq!(
            file_system_of(Path::new("/proc/self/status")).unwrap(),
            "proc"
        );
    }
}
