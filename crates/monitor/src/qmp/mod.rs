//! What goes over the wire of a monitor (QEMU's `docs/interop/qmp-spec`): how a stream is split into messages
//! ([`splitter`]), what a request is ([`request`]), how answers and events are written ([`reply`], [`event`], [`text`]).
//!
//! Pure data: reads no socket, carries no command out. Input is untrusted and bounded in size and depth.

pub mod event;
pub mod reply;
pub mod request;
pub mod splitter;
pub mod text;
mod version;

pub use event::Event;
pub use reply::{ErrorClass, QmpError, greeting};
pub use request::Request;
pub use splitter::Splitter;
pub use text::to_text;
pub use version::version_info;
