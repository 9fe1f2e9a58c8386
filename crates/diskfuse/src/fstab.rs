//! The command line that mount(8) uses, by which an image stands in `/etc/fstab`: as `mount.diskfuse` (type `diskfuse`), as
//! `mount.fuse.diskfuse`, or by way of libfuse's `mount.fuse3` (type `fuse.diskfuse`), which says
//! `diskfuse IMAGE MOUNTPOINT -o OPTIONS`. It becomes the command line of `diskfuse mount`, whose options all can be written
//! here; it must never mean anything that cannot be said there. A comma ends an option of mount(8), so where a list is wanted a
//! colon stands for it.
//!
//! Source: mount(8), "External helpers" and "Exit status"; mount.fuse3(8).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, Parser};

use crate::cli::{Cli, Command};
use crate::qsd::suggest;
use crate::{mount, output};

/// Names under which mount(8) calls us.
const NAMES: [&str; 2] = ["mount.diskfuse", "mount.fuse.diskfuse"];

/// mount(8): the command line is wrong.
const WRONG: u8 = 1;
/// mount(8): the mount failed.
const FAILED: u8 = 32;

/// What the kernel, mount(8) or systemd make of these is all that there is to be made of them: when to mount and for whom,
/// and what our mounts are in any case (`nosuid`, `nodev`, `noatime`, `default_permissions`).
const OF_OTHERS: [&str; 30] = [
    "defaults",
    "auto",
    "noauto",
    "user",
    "nouser",
    "users",
    "owner",
    "group",
    "nofail",
    "_netdev",
    "dev",
    "nodev",
    "suid",
    "nosuid",
    "exec",
    "noexec",
    "async",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "silent",
    "loud",
    "default_permissions",
];

/// Options of `diskfuse mount` that a mount of mount(8)'s cannot have, or that are said by `rw`.
const NOT_HERE: [&str; 4] = ["writable", "foreground", "help", "version"];

/// Options whose value is a list, in which a colon parts what a comma parts on the command line.
const LISTS: [&str; 1] = ["cpus"];

/// Whether mount(8) or mount.fuse3 has called us, by `name`, with these arguments.
pub fn is_meant(name: &OsStr, arguments: &[OsString]) -> bool {
    let by_fuse = || match arguments {
        [image, _, flag, _] => {
            let is_command = Cli::command().find_subcommand(image).is_some();
            flag == "-o" && !is_command && !image.as_bytes().starts_with(b"-")
        }
        _ => false,
    };
    NAMES.iter().any(|known| name == *known) || by_fuse()
}

/// Mounts as mount(8) asks for it, and answers with its exit codes.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    let name = NAMES[0];
    let line = match translate(arguments) {
        Ok(Line { fake: true, .. }) => return ExitCode::SUCCESS,
        Ok(line) => line.words,
        Err(message) => {
            output::complain(name, message);
            return ExitCode::from(WRONG);
        }
    };
    match Cli::try_parse_from(line).map(|cli| cli.command) {
        Ok(Command::Mount(arguments)) => match mount::run(&arguments) {
            Ok(code) if code == ExitCode::SUCCESS => code,
            // It has said why, or the daemon has.
            Ok(_) => ExitCode::from(FAILED),
            Err(error) => {
                output::complain(name, error);
                ExitCode::from(FAILED)
            }
        },
        Ok(_) => ExitCode::from(WRONG),
        Err(error) => {
            output::complain(name, error.to_string().trim_start_matches("error: "));
            ExitCode::from(WRONG)
        }
    }
}

/// A command line of `diskfuse`.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    words: Vec<OsString>,
    /// Everything but the mount itself is to be done.
    fake: bool,
}

fn translate(arguments: Vec<OsString>) -> Result<Line, String> {
    let mut paths = Vec::new();
    let mut options = Vec::new();
    let (mut sloppy, mut fake, mut verbose) = (false, false, false);
    let mut rest = arguments.into_iter();
    while let Some(word) = rest.next() {
        let letters = match word.as_bytes() {
            [b'-', letters @ ..] if !letters.is_empty() => letters,
            _ => {
                paths.push(word);
                continue;
            }
        };
        match letters {
            b"o" => {
                let all = rest.next().ok_or("-o needs options behind it")?;
                let words = all.as_bytes().split(|&byte| byte == b',');
                options.extend(words.filter(|word| !word.is_empty()).map(<[u8]>::to_vec));
            }
            // The type: ours, or we had not been called.
            b"t" => drop(rest.next()),
            _ => {
                for letter in letters {
                    match letter {
                        b's' => sloppy = true,
                        b'f' => fake = true,
                        b'v' => verbose = true,
                        // About /etc/mtab, which is the kernel's list by now.
                        b'n' => {}
                        _ => {
                            let word = word.display();
                            return Err(format!("'{word}' is not an option of a mount helper's"));
                        }
                    }
                }
            }
        }
    }
    let [image, mountpoint]: [OsString; 2] = paths
        .try_into()
        .map_err(|_| "usage: mount.diskfuse IMAGE MOUNTPOINT [-fnsv] [-o OPTIONS]")?;
    let mut words = vec![OsString::from("diskfuse"), "mount".into()];
    // As everywhere in fstab: it can be written unless it is said to be read-only.
    let mut writable = true;
    for option in options {
        match option.as_slice() {
            b"rw" => writable = true,
            b"ro" => writable = false,
            option => match word_of(option) {
                Ok(word) => words.extend(word),
                Err(_) if sloppy => {}
                Err(message) => return Err(message),
            },
        }
    }
    if writable {
        words.push("--writable".into());
    }
    if verbose
        && !words
            .iter()
            .any(|word| word.as_bytes().starts_with(b"--log="))
    {
        words.push("--log=info".into());
    }
    words.extend(["--".into(), image, mountpoint]);
    Ok(Line { words, fake })
}

/// The option of `diskfuse mount` that is meant; none for those that are for others.
fn word_of(option: &[u8]) -> Result<Option<OsString>, String> {
    let mut parts = option.splitn(2, |&byte| byte == b'=');
    let key = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let value = parts.next();
    let foreign = ["x-", "X-", "comment"]
        .iter()
        .any(|start| key.starts_with(start));
    if foreign || (value.is_none() && OF_OTHERS.contains(&key.as_str())) {
        return Ok(None);
    }
    let known = known();
    let long = match key.as_str() {
        "queues" => "threads".to_owned(),
        key => key.replace('_', "-"),
    };
    let Some((_, takes_value)) = known.iter().find(|(name, _)| *name == long) else {
        return Err(unknown(&key, &known));
    };
    let mut word = format!("--{long}").into_bytes();
    match (takes_value, value) {
        (true, Some(value)) => {
            word.push(b'=');
            let is_list = LISTS.contains(&long.as_str());
            let parted = |&byte: &u8| match byte {
                b':' if is_list => b',',
                byte => byte,
            };
            word.extend(value.iter().map(parted));
        }
        (false, None) => {}
        (true, None) => return Err(format!("option '{key}' needs a value: {key}=…")),
        (false, Some(_)) => return Err(format!("option '{key}' takes no value")),
    }
    Ok(Some(OsString::from_vec(word)))
}

/// The options of `diskfuse mount`, and whether each takes a value.
fn known() -> Vec<(String, bool)> {
    let cli = Cli::command();
    let mount = cli.find_subcommand("mount").into_iter();
    mount
        .flat_map(clap::Command::get_arguments)
        .filter_map(|argument| {
            let flag = matches!(argument.get_action(), ArgAction::SetTrue);
            Some((argument.get_long()?.to_owned(), !flag))
        })
        .filter(|(name, _)| !NOT_HERE.contains(&name.as_str()))
        .collect()
}

fn unknown(key: &str, known: &[(String, bool)]) -> String {
    let names = known.iter().map(|(name, _)| name.replace('-', "_"));
    let names: Vec<String> = names.chain(["rw".into(), "ro".into()]).collect();
    let hint = match suggest::hint(key, names.iter().map(String::as_str)) {
        none if none.is_empty() => format!("; known are {}", names.join(", ")),
        hint => hint,
    };
    let key = key.escape_debug();
    format!("option '{key}' is not known{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(arguments: &[&str]) -> Vec<OsString> {
        arguments.iter().map(OsString::from).collect()
    }

    fn line(arguments: &[&str]) -> Result<Vec<String>, String> {
        let line = translate(words(arguments))?;
        assert!(!line.fake);
        let words = line.words.into_iter();
        Ok(words.map(|word| word.into_string().unwrap()).collect())
    }

    #[test]
    fn mount_and_mount_fuse_are_recognised_and_people_are_not() {
        let mount = OsStr::new("mount.diskfuse");
        assert!(is_meant(mount, &words(&["i", "m"])));
        let ours = OsStr::new("diskfuse");
        assert!(is_meant(ours, &words(&["/i", "/m", "-o", "rw,dev,suid"])));
        assert!(!is_meant(ours, &words(&["mount", "i", "-o", "m"])));
        assert!(!is_meant(ours, &words(&["mount", "i", "m"])));
        assert!(!is_meant(ours, &words(&["--help"])));
    }

    #[test]
    fn options_become_those_of_the_mount_command() {
        let options = "rw,uid=5,nofail,_netdev,x-systemd.automount,allow_other,queues=3,idle_timeout=9,noexec";
        let expected = [
            "diskfuse",
            "mount",
            "--uid=5",
            "--allow-other",
            "--threads=3",
            "--idle-timeout=9",
            "--writable",
            "--",
            "/i",
            "/m",
        ];
        assert_eq!(line(&["/i", "/m", "-o", options]).unwrap(), expected);
        let read_only = ["diskfuse", "mount", "--", "/i", "/m"];
        assert_eq!(
            line(&["/i", "/m", "-n", "-o", "ro,dev,suid"]).unwrap(),
            read_only
        );
        assert!(translate(words(&["/i", "/m", "-vf"])).unwrap().fake);
    }

    #[test]
    fn a_colon_parts_the_items_of_a_list_and_nothing_else() {
        let line = |options| line(&["/i:j", "/m:n", "-o", options]).unwrap();
        assert!(line("cpus=0:2-3").contains(&"--cpus=0,2-3".to_owned()));
        let others = line("metrics=127.0.0.1:9100");
        assert!(others.contains(&"--metrics=127.0.0.1:9100".to_owned()));
        assert_eq!(others[others.len() - 2..], ["/i:j", "/m:n"]);
    }

    #[test]
    fn what_is_not_known_is_refused_with_a_hint_unless_mount_is_sloppy() {
        let refused = |options: &str| line(&["/i", "/m", "-o", options]).unwrap_err();
        assert!(refused("alow_other").contains("did you mean 'allow_other'?"));
        assert!(
            refused("zzz").contains("; known are ") && refused("zzz").contains(", threads, "),
            "{}",
            refused("zzz")
        );
        assert!(refused("uid").contains("uid=…"));
        assert!(refused("allow_other=1").contains("takes no value"));
        assert!(refused("foreground").contains("not known"));
        assert!(line(&["/i", "/m", "-s", "-o", "zzz"]).is_ok());
        assert!(line(&["/i"]).unwrap_err().contains("usage"));
        assert!(line(&["/i", "/m", "-N", "x"]).is_err());
        assert!(line(&["/i", "/m", "-o"]).is_err());
    }
}
