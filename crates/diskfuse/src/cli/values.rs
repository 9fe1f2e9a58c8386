//! What may be written behind an option: the words to choose from, and numbers with units. It must never take what it does not understand
//! for a default.

use clap::ValueEnum;
use diskfuse_image::{Format, options};

/// Shells that can be told how to complete a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU Bash.
    Bash,
    /// Z shell.
    Zsh,
    /// fish.
    Fish,
}

/// Whether the daemon gives up what it does not need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// All that this kernel lets it.
    On,
    /// Nothing, to look for faults.
    Off,
}

/// How the host's page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Go around it.
    Direct,
    /// Use it.
    Page,
}

/// Who moves the image's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Aio {
    /// The kernel, through each queue's io_uring.
    IoUring,
    /// Worker threads.
    Threads,
}

/// What happens to space that is not needed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Discard {
    /// It is kept.
    Ignore,
    /// It is given back to the host.
    Unmap,
}

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// By FUSE over io_uring where kernel and event loops have it, else through /dev/fuse.
    Auto,
    /// Through /dev/fuse.
    Device,
    /// By FUSE over io_uring, or fail.
    Uring,
}

/// Where the threads of an export run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Placement {
    /// Where most requests are served, which is tried.
    Auto,
    /// Wherever the scheduler puts them.
    Free,
    /// Each on the CPUs whose requests it serves.
    Pinned,
    /// Each on others than those.
    Spread,
}

/// Whether the kernel reads and writes the image file itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Passthrough {
    /// No.
    Off,
    /// If it can be had.
    Auto,
    /// Yes, or fail.
    On,
}

/// What event loops stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum EventLoop {
    /// io_uring where the kernel allows it, else epoll.
    Auto,
    /// io_uring, or fail.
    IoUring,
    /// epoll and worker threads.
    Epoll,
}

pub(crate) fn parse_format(word: &str) -> Result<Format, String> {
    Format::parse(word).map_err(|error| error.to_string())
}

/// A whole number of bytes with a suffix, a power of 1024.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    if text.contains('.') {
        return Err("not a whole number of bytes; examples: 1048576, 64k, 20G".to_owned());
    }
    options::parse_size(text).map_err(|error| error.to_string())
}

pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && !text.starts_with('+') => Ok(mode),
        _ => Err("not permission bits in octal; examples: 600, 0640".to_owned()),
    }
}

pub(super) fn parse_interval(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("not 0.1 to 3600 seconds".to_owned()),
    }
}

pub(super) fn parse_payload(text: &str) -> Result<u32, String> {
    let too_much = |_| "less than 4G are possible".to_owned();
    u32::try_from(parse_size(text)?).map_err(too_much)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let cases = [
            ("0", 0),
            ("512", 512),
            ("64k", 65536),
            ("1M", 1 << 20),
            ("3GiB", 3 << 30),
            ("7E", 7 << 60),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn modes_are_octal_permission_bits() {
        assert_eq!(parse_mode("0640"), Ok(0o640));
        for text in ["", "8", "1777", "rw", "-1", "+644", "0o600"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "k",
            "-1",
            "+1",
            "1.5G",
            "1x",
            "8E",
            "99999999999999999999",
            "1 k",
            "٣",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
