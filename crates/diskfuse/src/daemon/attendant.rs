//! Who is told of what happens in the process beside its exports: the monitors' side of the storage daemon, or nobody. The main
//! thread calls; nothing here may wait for a disk or a client.

use std::sync::mpsc::Sender;
use std::time::Instant;

use super::{Daemon, Event};
use crate::qsd::monitor;

/// What belongs to more than the exports: commands of monitors, and what their clients are told.
pub trait Attendant {
    /// Carries out a command. Called on the main thread.
    fn carry_out(&mut self, daemon: &mut Daemon, request: monitor::Request);

    /// When commands that wait for something are to be tried again, if there are any: [`Attendant::again`] is called then.
    fn due(&self) -> Option<Instant>;

    /// Carries out what waits, as far as it can be by now. Called on the main thread.
    fn again(&mut self, daemon: &mut Daemon);

    /// An export has ended and left nothing behind. When everything ends, the youngest comes first.
    fn export_gone(&mut self, id: &str);

    /// Everything ends, and this is so for all exports.
    fn exports_gone(&mut self);

    /// What [`Daemon::errand`] asked for.
    fn look_after(&mut self);

    /// No command is taken any more.
    fn hang_up(&mut self);

    /// Everything is to end. Called once, before the exports are stopped; must not wait. If there is something to wait
    /// for, `over` is to be called when it is done, from any thread; dropping it does the same.
    fn ending(&mut self, over: Over);
}

/// Says that what belongs to more than the exports has ended: see [`Attendant::ending`].
pub struct Over(pub(super) Sender<Event>);

impl Drop for Over {
    fn drop(&mut self) {
        // Fails when the main thread is past caring.
        let _ = self.0.send(Event::Over);
    }
}

/// Nobody: there are no monitors.
pub struct Nobody;

impl Attendant for Nobody {
    fn carry_out(&mut self, _: &mut Daemon, request: monitor::Request) {
        // Dropping it answers it.
        drop(request);
    }

    fn due(&self) -> Option<Instant> {
        None
    }

    fn again(&mut self, _: &mut Daemon) {}

    fn export_gone(&mut self, _: &str) {}

    fn exports_gone(&mut self) {}

    fn look_after(&mut self) {}

    fn hang_up(&mut self) {}

    fn ending(&mut self, _: Over) {}
}
