//! The drivers: each a file, each with its plain configuration and the function that opens it. Option syntax is not
//! their business.

mod file;
mod null;
mod raw;

pub use file::{DetectZeroes, Discard, FileConfig, FileNode, open_file, open_host_device};
pub use null::{NullConfig, NullNode, open_null};
pub use raw::{RawConfig, RawNode, open_raw};
