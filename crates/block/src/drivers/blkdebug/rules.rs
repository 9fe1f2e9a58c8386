//! The rules: events put errors in force and change a number, the state; requests meet the errors that are in force.
//! Does no I/O and knows no node.

use std::time::Duration;

use crate::SECTOR;
use crate::node::Access;

/// What rules wait for, in QEMU's words (`BlkdebugEvent` in its `qapi/block-core.json`). Its other events speak of what
/// happens inside formats and never come here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `none`: once, when the node is made.
    None,
    /// `read_aio`: a read begins.
    ReadAio,
    /// `write_aio`: a write of data begins.
    WriteAio,
    /// `pwritev`: a write of data begins; comes behind `write_aio`.
    Pwritev,
    /// `pwritev_zero`: a write of zeroes begins.
    PwritevZero,
    /// `pwritev_done`: a write of data or zeroes is over, whether or not it went well.
    PwritevDone,
    /// `flush_to_os`: a flush begins.
    FlushToOs,
    /// `flush_to_disk`: a flush begins; comes behind `flush_to_os`.
    FlushToDisk,
}

impl Event {
    /// By QEMU's name; `None` for a name that is not one of these.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "none" => Self::None,
            "read_aio" => Self::ReadAio,
            "write_aio" => Self::WriteAio,
            "pwritev" => Self::Pwritev,
            "pwritev_zero" => Self::PwritevZero,
            "pwritev_done" => Self::PwritevDone,
            "flush_to_os" => Self::FlushToOs,
            "flush_to_disk" => Self::FlushToDisk,
            _ => return None,
        })
    }
}

/// Kinds of request (`BlkdebugIOType` in QEMU's schema).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoType {
    /// A read.
    Read,
    /// A write of data.
    Write,
    /// A write of zeroes.
    WriteZeroes,
    /// A discard.
    Discard,
    /// A flush.
    Flush,
    /// The question what a range holds.
    BlockStatus,
}

/// A rule: from this event on, until another event puts other errors in force, requests fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InjectError {
    /// When it comes in force.
    pub event: Event,
    /// The state that it takes for that; 0: any.
    pub state: i64,
    /// Which requests fail; all but [`IoType::BlockStatus`] if it does not say.
    pub io_type: Option<IoType>,
    /// What they are answered, as in errno.h; 0: they are not failed, and later rules do not fail them either.
    pub errno: i32,
    /// How long it takes until they are.
    pub delay: Duration,
    /// Only requests for a range that holds this sector of 512 bytes fail.
    pub sector: Option<u64>,
    /// The rule is gone when one request has failed, or has been held back.
    pub once: bool,
}

/// A rule: when this event comes, the state changes. The state is 1 at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SetState {
    /// The event.
    pub event: Event,
    /// The state that it takes; 0: any.
    pub state: i64,
    /// The new state.
    pub new_state: i64,
}

/// A request that a rule speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) errno: i32,
    pub(super) delay: Duration,
}

/// All rules of a node, and what is in force.
#[derive(Debug)]
pub(super) struct Rules {
    state: i64,
    errors: Vec<(u64, InjectError)>,
    changes: Vec<SetState>,
    /// The numbers of the errors in force, in their order.
    active: Vec<u64>,
}

impl Rules {
    /// The node is made: [`Event::None`] has come.
    pub(super) fn new(errors: &[InjectError], changes: &[SetState]) -> Self {
        let mut rules = Self {
            state: 1,
            errors: (0..).zip(errors.iter().copied()).collect(),
            changes: changes.to_vec(),
            active: Vec::new(),
        };
        rules.event(Event::None);
        rules
    }

    /// An event comes.
    pub(super) fn event(&mut self, event: Event) {
        let state = self.state;
        let fits = |of: Event, wanted: i64| of == event && (wanted == 0 || wanted == state);
        let errors = self.errors.iter();
        let errors: Vec<u64> = errors
            .filter(|(_, error)| fits(error.event, error.state))
            .map(|(number, _)| *number)
            .collect();
        // What is in force stays so until there is something else.
        if !errors.is_empty() {
            self.active = errors;
        }
        if let Some(change) = self.changes.iter().find(|c| fits(c.event, c.state)) {
            self.state = change.new_state;
        }
    }

    /// What the rules say to a request for this range; a flush has none.
    pub(super) fn meet(&mut self, io_type: IoType, offset: u64, len: u64) -> Option<Hit> {
        let speaks = |error: &InjectError| {
            let fits = match error.io_type {
                Some(only) => only == io_type,
                None => io_type != IoType::BlockStatus,
            };
            fits && error.sector.is_none_or(|sector| {
                let at = sector.saturating_mul(SECTOR);
                at >= offset && at - offset < len
            })
        };
        let (number, error) = *self
            .errors
            .iter()
            .find(|(number, error)| self.active.contains(number) && speaks(error))?;
        // One that only keeps later ones away stays: no request has failed.
        if error.once && (error.errno != 0 || !error.delay.is_zero()) {
            self.errors.retain(|(other, _)| *other != number);
            self.active.retain(|other| *other != number);
        }
        Some(Hit {
            errno: error.errno,
            delay: error.delay,
        })
    }

    /// Whether such transfers can meet a rule, or are an event that one waits for.
    pub(super) fn concern(&self, access: Access) -> bool {
        let (io_type, events): (_, &[Event]) = match access {
            Access::Read => (IoType::Read, &[Event::ReadAio]),
            Access::Write => (
                IoType::Write,
                &[Event::WriteAio, Event::Pwritev, Event::PwritevDone],
            ),
        };
        let active = |(number, error): &(u64, InjectError)| {
            self.active.contains(number) && error.io_type.is_none_or(|only| only == io_type)
        };
        self.errors.iter().any(active)
            || self.errors.iter().any(|(_, e)| events.contains(&e.event))
            || self.changes.iter().any(|c| events.contains(&c.event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(event: Event, errno: i32) -> InjectError {
        InjectError {
            event,
            state: 0,
            io_type: None,
            errno,
            delay: Duration::ZERO,
            sector: None,
            once: false,
        }
    }

    fn change(event: Event, state: i64, new_state: i64) -> SetState {
        SetState {
            event,
            state,
            new_state,
        }
    }

    fn read(rules: &mut Rules) -> i32 {
        rules.event(Event::ReadAio);
        rules.meet(IoType::Read, 0, 4096).map_or(0, |hit| hit.errno)
    }

    fn write(rules: &mut Rules) -> i32 {
        rules.event(Event::WriteAio);
        rules.event(Event::Pwritev);
        let hit = rules.meet(IoType::Write, 0, 4096);
        rules.event(Event::PwritevDone);
        hit.map_or(0, |hit| hit.errno)
    }

    /// As `qemu-io` sees it with a raw node above a blkdebug node: QEMU 10.0.2.
    #[test]
    fn the_first_rule_counts_and_one_that_is_used_up_gives_way() {
        let first = InjectError {
            once: true,
            ..error(Event::ReadAio, 28)
        };
        let mut rules = Rules::new(&[first, error(Event::ReadAio, 5)], &[]);
        assert_eq!([(); 3].map(|()| read(&mut rules)), [28, 5, 5]);
    }

    /// QEMU 10.0.2.
    #[test]
    fn one_that_only_keeps_others_away_is_never_used_up() {
        let first = InjectError {
            once: true,
            ..error(Event::ReadAio, 0)
        };
        let mut rules = Rules::new(&[first, error(Event::ReadAio, 5)], &[]);
        assert_eq!([(); 3].map(|()| read(&mut rules)), [0, 0, 0]);
    }

    #[test]
    fn errors_stay_in_force_until_an_event_brings_others() {
        let mut rules = Rules::new(&[error(Event::Pwritev, 5)], &[]);
        assert_eq!(read(&mut rules), 0);
        assert_eq!(write(&mut rules), 5);
        assert_eq!(read(&mut rules), 5);
        let reads = InjectError {
            io_type: Some(IoType::Read),
            ..error(Event::None, 28)
        };
        let mut rules = Rules::new(&[reads, error(Event::WriteAio, 5)], &[]);
        assert_eq!(read(&mut rules), 28);
        assert_eq!(write(&mut rules), 5);
        assert_eq!(read(&mut rules), 5);
    }

    #[test]
    fn what_the_end_of_a_write_puts_in_force_spares_that_write() {
        let mut rules = Rules::new(&[error(Event::PwritevDone, 5)], &[]);
        assert_eq!(write(&mut rules), 0);
        assert_eq!(write(&mut rules), 5);
    }

    #[test]
    fn states_lead_from_one_request_to_another() {
        let third = InjectError {
            state: 3,
            ..error(Event::ReadAio, 5)
        };
        let changes = [
            change(Event::WriteAio, 1, 2),
            change(Event::FlushToDisk, 2, 3),
        ];
        let mut rules = Rules::new(&[third], &changes);
        assert_eq!(read(&mut rules), 0);
        assert_eq!(write(&mut rules), 0);
        assert_eq!(read(&mut rules), 0);
        rules.event(Event::FlushToDisk);
        assert_eq!([read(&mut rules), read(&mut rules)], [5, 5]);
    }

    #[test]
    fn a_change_of_state_counts_from_the_next_event_on_and_the_first_one_wins() {
        let second = InjectError {
            state: 2,
            ..error(Event::ReadAio, 28)
        };
        let changes = [change(Event::ReadAio, 0, 2), change(Event::ReadAio, 0, 3)];
        let mut rules = Rules::new(&[second], &changes);
        assert_eq!([read(&mut rules), read(&mut rules)], [0, 28]);
    }

    #[test]
    fn the_state_at_the_beginning_is_one() {
        for (state, errno) in [(0, 5), (1, 5), (2, 0)] {
            let rule = InjectError {
                state,
                ..error(Event::None, 5)
            };
            let mut rules = Rules::new(&[rule], &[change(Event::ReadAio, 0, 2)]);
            assert_eq!(read(&mut rules), errno, "{state}");
            assert_eq!(read(&mut rules), errno, "{state}");
        }
    }

    #[test]
    fn a_sector_is_met_by_ranges_that_hold_it() {
        let rule = InjectError {
            sector: Some(8),
            ..error(Event::None, 5)
        };
        let mut rules = Rules::new(&[rule], &[]);
        let mut met = |offset, len| rules.meet(IoType::Read, offset, len).is_some();
        assert!(!met(0, 4096) && met(4096, 1) && met(0, 4097) && !met(4097, 4096));
        assert!(rules.meet(IoType::Flush, 0, 0).is_none());
        let last = InjectError {
            sector: Some(u64::MAX),
            ..rule
        };
        assert!(
            Rules::new(&[last], &[])
                .meet(IoType::Read, 0, 512)
                .is_none()
        );
    }

    #[test]
    fn a_block_status_fails_only_if_that_is_said() {
        let mut rules = Rules::new(&[error(Event::None, 5)], &[]);
        assert!(rules.meet(IoType::BlockStatus, 0, 512).is_none());
        assert!(rules.meet(IoType::Discard, 0, 512).is_some());
        let rule = InjectError {
            io_type: Some(IoType::BlockStatus),
            ..error(Event::None, 5)
        };
        let mut rules = Rules::new(&[rule], &[]);
        assert!(rules.meet(IoType::BlockStatus, 0, 512).is_some());
        assert!(rules.meet(IoType::Discard, 0, 512).is_none());
    }

    #[test]
    fn transfers_that_no_rule_speaks_of_are_of_no_concern() {
        let concern = |rules: &Rules| [Access::Read, Access::Write].map(|a| rules.concern(a));
        assert_eq!(concern(&Rules::new(&[], &[])), [false, false]);
        let once = InjectError {
            once: true,
            io_type: Some(IoType::Read),
            ..error(Event::None, 5)
        };
        let mut rules = Rules::new(&[once], &[]);
        assert_eq!(concern(&rules), [true, false]);
        read(&mut rules);
        assert_eq!(concern(&rules), [false, false]);
        let waits = Rules::new(&[error(Event::Pwritev, 5)], &[]);
        assert_eq!(concern(&waits), [false, true]);
        let moves = Rules::new(&[], &[change(Event::ReadAio, 0, 2)]);
        assert_eq!(concern(&moves), [true, false]);
    }
}
