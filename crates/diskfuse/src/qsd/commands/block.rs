//! Commands about nodes.

use diskfuse_monitor::BlockdevOptions;

use super::{Commands, Outcome, done};

/// `blockdev-add`
pub fn add(commands: &Commands, options: &BlockdevOptions) -> Outcome {
    done(commands.nodes.add(options))
}
