//! What is to be said about nodes and exports, as QMP says it. It changes nothing.

mod filename;
mod limits;
mod nodes;
mod stats;

pub use filename::child_name;
pub use nodes::{named_block_nodes, snapshot_info};
pub use stats::blockstats;
