//! What can be left of disks after a crash, made from the log of a run. Durable is what had ended before a flush began
//! that has ended; of everything else any part may be there, by sectors, in the order in which it was done. It must
//! never leave out what a flush promised, nor put in what had not begun.

use super::SECTOR;
use super::log::{Log, Op, Record, Time};
use super::rng::Rng;

/// One state after a crash.
pub struct State {
    /// What each disk holds.
    pub disks: Vec<Vec<u8>>,
    /// When the crash was.
    pub time: Time,
    /// Which of the operations that were not durable are there, for people.
    pub how: String,
}

/// Which of the operations that are not durable are there.
#[derive(Clone, Copy, Debug)]
enum Choice {
    None,
    All,
    /// Without the last ones.
    AllButLast(usize),
    /// The last ones.
    Last(usize),
    /// One, by its place in the log.
    Only(usize),
    /// All but one, by its place in the log.
    AllBut(usize),
    /// Each with a chance, in percent.
    Random(u64),
    /// All or none of those in a region of so many bytes, so that a table, say, is old or new as a whole.
    Regions(u64),
    /// All, but of one, by its place in the log, some sectors only.
    Torn(usize),
    /// Nothing but some sectors of one.
    OnlyTorn(usize),
    /// Every sector of everything with a chance, in percent.
    Sectors(u64),
}

impl Choice {
    fn random(rng: &mut Rng) -> Self {
        let percent = rng.pick(&[10, 50, 90]);
        let few = rng.below(8) as usize;
        match rng.below(8) {
            0 => Self::None,
            1 => Self::All,
            2 => Self::AllButLast(few),
            3 => Self::Last(few),
            4 => Self::Sectors(percent),
            5 | 6 => Self::Regions(512 << rng.below(8)),
            _ => Self::Random(percent),
        }
    }
}

/// Which sectors of one operation are there.
enum Part {
    Whole,
    Nothing,
    /// Each with a chance, in percent.
    Some(u64),
}

/// The disks as they are on the media while a crash moves forward in time.
struct Media<'a> {
    log: &'a Log,
    durable: Vec<Vec<u8>>,
    /// What is applied to `durable`.
    applied: Vec<bool>,
}

impl<'a> Media<'a> {
    fn new(log: &'a Log, initial: &[Vec<u8>]) -> Self {
        Self {
            log,
            durable: initial.to_vec(),
            applied: vec![false; log.records.len()],
        }
    }

    /// Makes durable what is at `time`, and returns what else may be there, in the order in which it was done.
    fn advance(&mut self, time: Time) -> Vec<(usize, &'a Record)> {
        let log = self.log;
        let mut pending = Vec::new();
        for disk in 0..self.durable.len() {
            let mine = |record: &&Record| record.disk == disk && record.began <= time;
            let flushed = log.records.iter().filter(mine).filter(|r| {
                matches!(r.op, Op::Flush) && r.ok && r.ended.is_some_and(|ended| ended <= time)
            });
            let flushed = flushed.map(|r| r.began).max().unwrap_or(0);
            let mut now_durable = Vec::new();
            for (index, record) in log.records.iter().enumerate() {
                if !mine(&record) || self.applied[index] || matches!(record.op, Op::Flush) {
                    continue;
                }
                if record.ended.is_some_and(|ended| ended < flushed) {
                    self.applied[index] = true;
                    now_durable.push(record);
                } else {
                    pending.push((index, record));
                }
            }
            now_durable.sort_by_key(|record| record.ended);
            for record in now_durable {
                apply(
                    &mut self.durable[disk],
                    &record.op,
                    &Part::Whole,
                    true,
                    &mut Rng::new(0),
                );
            }
        }
        // What has not ended comes last, in the order in which it began.
        let order = |(_, record): &(usize, &Record)| match record.ended {
            Some(ended) if ended <= time => (ended, 0),
            _ => (time + 1, record.began),
        };
        pending.sort_by_key(order);
        pending
    }

    fn state(
        &self,
        time: Time,
        pending: &[(usize, &Record)],
        choice: Choice,
        rng: &mut Rng,
    ) -> State {
        let mut disks = self.durable.clone();
        // A file whose growth is not there loses what was written past its end, or has grown by it.
        let extends = rng.chance(50);
        let regions = rng.next();
        let mut there = Vec::new();
        for (place, &(index, record)) in pending.iter().enumerate() {
            let left = pending.len() - place;
            let part = part(choice, index, left, record, regions, rng);
            if !matches!(part, Part::Nothing) {
                there.push(index);
            }
            apply(&mut disks[record.disk], &record.op, &part, extends, rng);
        }
        for disk in &mut disks {
            disk.resize(disk.len().next_multiple_of(SECTOR as usize), 0);
        }
        State {
            disks,
            time,
            how: format!(
                "crash at {time}, {choice:?}: of the operations {:?} that were not durable {there:?} are there, {}",
                pending.iter().map(|p| p.0).collect::<Vec<_>>(),
                if extends {
                    "and extend the file"
                } else {
                    "but not past the end of the file"
                },
            ),
        }
    }
}

/// What is there of the record at `index`, behind which come `left - 1` more.
fn part(
    choice: Choice,
    index: usize,
    left: usize,
    record: &Record,
    regions: u64,
    rng: &mut Rng,
) -> Part {
    let whole_if = |there: bool| if there { Part::Whole } else { Part::Nothing };
    match choice {
        Choice::AllButLast(count) => whole_if(left > count),
        Choice::Last(count) => whole_if(left <= count),
        Choice::Only(one) => whole_if(index == one),
        Choice::AllBut(one) => whole_if(index != one),
        Choice::Random(percent) => whole_if(rng.chance(percent)),
        Choice::Regions(bytes) => {
            let region = record.op.range().start / bytes;
            whole_if(Rng::new(regions ^ region).chance(50))
        }
        Choice::Torn(one) | Choice::OnlyTorn(one) if index == one => Part::Some(50),
        Choice::All | Choice::Torn(_) => Part::Whole,
        Choice::None | Choice::OnlyTorn(_) => Part::Nothing,
        Choice::Sectors(percent) => Part::Some(percent),
    }
}

/// Does one operation, or some sectors of it.
fn apply(disk: &mut Vec<u8>, op: &Op, part: &Part, extends: bool, rng: &mut Rng) {
    let is_there = |rng: &mut Rng| match part {
        Part::Whole => true,
        Part::Nothing => false,
        Part::Some(percent) => rng.chance(*percent),
    };
    if let Op::Resize { size, grow } = op {
        if is_there(rng) && (!grow || *size > disk.len() as u64) {
            disk.resize(*size as usize, 0);
        }
        return;
    }
    let range = op.range();
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min((at / SECTOR + 1) * SECTOR);
        if is_there(rng) {
            let is_write = matches!(op, Op::Write { .. });
            if is_write && extends && end > disk.len() as u64 {
                disk.resize(end as usize, 0);
            }
            let reached = end.min(disk.len() as u64).max(at.min(disk.len() as u64));
            let (start, end) = (at.min(reached) as usize, reached as usize);
            match op {
                Op::Write { data, .. } => {
                    let from = (at - range.start) as usize;
                    disk[start..end].copy_from_slice(&data[from..from + (end - start)]);
                }
                Op::Fill { fill, .. } => disk[start..end].fill(*fill),
                Op::Resize { .. } | Op::Flush => {}
            }
        }
        at = end;
    }
}

/// Until when each record is not durable: the end of the first flush that began after it had ended.
fn undurable_until(log: &Log) -> Vec<Time> {
    let flushes: Vec<&Record> = log
        .records
        .iter()
        .filter(|r| matches!(r.op, Op::Flush) && r.ok && r.ended.is_some())
        .collect();
    let until = |record: &Record| {
        let covers =
            |f: &&&Record| f.disk == record.disk && record.ended.is_some_and(|e| e < f.began);
        let first = flushes.iter().filter(covers).filter_map(|f| f.ended).min();
        first.map_or(log.now(), |ended| ended - 1)
    };
    log.records.iter().map(until).collect()
}

/// When to crash, and what is there then. An order between two operations is broken by a state without the first one
/// and with all others, or by one with nothing but the second; so most states are about one operation.
fn plan(log: &Log, rng: &mut Rng, wanted: usize) -> Vec<(Time, Choice)> {
    let until = undurable_until(log);
    let changes: Vec<usize> = (0..log.records.len())
        .filter(|&index| !matches!(log.records[index].op, Op::Flush))
        .collect();
    let mut plan = vec![(log.now(), Choice::None), (log.now(), Choice::All)];
    while plan.len() < wanted {
        let any = rng.below(log.now() + 1);
        let kind = if changes.is_empty() { 9 } else { rng.below(10) };
        if kind >= 8 {
            plan.push((any, Choice::random(rng)));
            continue;
        }
        let one = rng.pick(&changes);
        let (began, last) = (log.records[one].began, until[one]);
        let some_time = rng.within(began..last.max(began) + 1);
        plan.push(match kind {
            0..=2 => (last, Choice::AllBut(one)),
            3 => (some_time, Choice::Only(one)),
            4 => (last, Choice::Torn(one)),
            5 => (some_time, Choice::OnlyTorn(one)),
            6 => (some_time, Choice::Torn(one)),
            _ => (some_time, Choice::random(rng)),
        });
    }
    plan.sort_by_key(|&(time, _)| time);
    plan
}

/// Shows `judge` so many states, the same for the same `rng`.
pub fn sample(
    log: &Log,
    initial: &[Vec<u8>],
    rng: &mut Rng,
    wanted: usize,
    mut judge: impl FnMut(State),
) {
    let mut media = Media::new(log, initial);
    for (time, choice) in plan(log, rng, wanted) {
        let pending = media.advance(time);
        judge(media.state(time, &pending, choice, rng));
    }
}

/// Shows `judge` every state of a short log, each operation whole, missing, or torn somewhere.
pub fn exhaust(log: &Log, initial: &[Vec<u8>], mut judge: impl FnMut(State)) {
    let mut media = Media::new(log, initial);
    let mut rng = Rng::new(1);
    for time in 0..=log.now() {
        let pending = media.advance(time);
        assert!(pending.len() < 12, "too many states");
        for set in 0..1u32 << pending.len() {
            let chosen: Vec<_> = (0..pending.len())
                .filter(|place| set >> place & 1 == 1)
                .map(|place| pending[place])
                .collect();
            let mut all = vec![Choice::All];
            all.extend(chosen.iter().map(|&(index, _)| Choice::Torn(index)));
            for choice in all {
                judge(media.state(time, &chosen, choice, &mut rng));
            }
        }
    }
}
