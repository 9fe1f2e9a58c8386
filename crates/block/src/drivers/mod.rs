//! The drivers: each a file or a folder, each with its plain configuration and the function that opens it. Option syntax
//! is not their business.

mod blkdebug;
mod file;
mod null;
mod raw;
mod throttle;

use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::graph::ChildRole;
use crate::node::Node;

pub use blkdebug::{
    BlkdebugConfig, BlkdebugNode, Event, InjectError, IoType, SetState, open_blkdebug,
};
pub use file::{DetectZeroes, Discard, FileConfig, FileNode, open_file, open_host_device};
pub use null::{NullConfig, NullNode, open_null};
pub use raw::{RawConfig, RawNode, open_raw};
pub use throttle::{Rate, Rates, ThrottleGroup, ThrottleLimits, ThrottleNode, open_throttle};

/// The child of a filter that is put on others: there must be one.
fn only_child(driver: &str, children: &[(ChildRole, Arc<dyn Node>)]) -> Result<Arc<dyn Node>> {
    match children {
        [(_, child)] => Ok(Arc::clone(child)),
        _ => {
            let message = format!("a node of driver '{driver}' stands on one other node");
            Err(Error::new(Kind::Unsupported, message))
        }
    }
}
