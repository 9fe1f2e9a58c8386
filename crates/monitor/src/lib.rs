//! The option syntax of `qemu-storage-daemon`, and the words of its monitor, as pure data.
//!
//! Two spellings describe the same options: key=value text ([`keyval`]) and JSON ([`json`]). Both become one tree,
//! which is visited by typed options ([`BlockdevOptions`], [`ExportOptions`], [`ObjectOptions`]); [`command`] reads a
//! whole command line into an ordered list of [`Directive`]s.
//!
//! [`qmp`] is what goes over the wire of a monitor, [`commands`] what may be asked there.
//!
//! What this crate never does: open a file, start a thread, know about disks, rings or FUSE, or print. It says what
//! was asked for. Whether a node exists, an id is taken or a file can be opened is for its callers to find out.
//!
//! Everything here may be called from any thread; nothing blocks. Input is untrusted: depth and counts are bounded,
//! and no input makes it panic.
//!
//! ```
//! use diskfuse_monitor::{BlockDriver, Directive, parse_command_line};
//!
//! let line = ["--blockdev", "null-co,node-name=disk,size=64M", "--pidfile=/run/disk.pid"];
//! let directives = parse_command_line(line.iter().map(Into::into))?;
//! let Directive::Blockdev(node) = &directives[0] else { panic!("the order is kept") };
//! assert_eq!(node.node_name.as_deref(), Some("disk"));
//! assert!(matches!(&node.driver, BlockDriver::NullCo(null) if null.size == 64 << 20));
//! # Ok::<(), diskfuse_monitor::Error>(())
//! ```
//!
//! Messages use the words of `qemu-storage-daemon` wherever it has a message for the same mistake, because scripts match
//! them; a hint may follow in parentheses.

pub mod blockdev;
pub mod chardev;
pub mod command;
pub mod commands;
mod error;
pub mod export;
mod fields;
mod ident;
pub mod json;
pub mod keyval;
mod number;
pub mod object;
pub mod qmp;
mod suggest;
pub mod trace;

pub use blockdev::{
    Aio, BackingRef, BlkdebugOptions, BlockDriver, BlockRef, BlockdevOptions, CacheOptions,
    CacheSizes, DetectZeroes, Discard, FileOptions, Metadata, NullOptions, Qcow2Options,
    RawOptions, ThrottleOptions,
};
pub use chardev::{
    ChardevBackend, ChardevOptions, MonitorOptions, SocketAddress, SocketOptions, SocketRole,
};
pub use command::{
    Directive, EventLoop, FileOption, HelpTopic, parse as parse_command_line, read_file,
};
pub use commands::Command;
pub use error::Error;
pub use export::{
    ExportKind, ExportOptions, ExportThreads, FuseExportOptions, Placement, Transport,
    TransportOptions, parse_cpus,
};
pub use fields::OnOffAuto;
pub use object::{
    IothreadOptions, ObjectOptions, Property, SecretOptions, SecretSource, ThrottleGroupOptions,
    ThrottleLimits, ThrottleRate,
};
pub use qmp::{ErrorClass, Event, QmpError};
pub use trace::TraceOptions;
