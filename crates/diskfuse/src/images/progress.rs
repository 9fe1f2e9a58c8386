//! A progress bar, on a terminal only. It never says anything into a file or a pipe.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How far a command is. Dropping it takes the bar away.
pub struct Progress(ProgressBar);

impl Progress {
    /// Of `total` bytes.
    pub fn bytes(total: u64) -> Self {
        Self::new(
            total,
            "{bar:40} {percent:>3} %  {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
        )
    }

    /// Of some number of steps that nobody knows yet.
    pub fn steps() -> Self {
        Self::new(0, "{bar:40} {percent:>3} %  {eta} left")
    }

    fn new(total: u64, template: &str) -> Self {
        let target = match std::io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// So much is done, of so much.
    pub fn set(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
