//! Commands about objects.

use diskfuse_monitor::ObjectOptions;

use super::{Commands, Outcome, done};

/// `object-add`
pub fn add(commands: &mut Commands, options: &ObjectOptions) -> Outcome {
    done(commands.iothreads.add(options))
}
