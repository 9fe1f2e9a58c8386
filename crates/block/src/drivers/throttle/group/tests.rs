use super::super::bucket::{Rate, Rates};
use super::*;

fn operations(average: u64) -> ThrottleLimits {
    let total = Rate {
        average,
        ..Rate::default()
    };
    ThrottleLimits {
        operations: Rates {
            total,
            ..Rates::default()
        },
        ..ThrottleLimits::default()
    }
}

/// A group under a clock of the test's own.
struct Bench {
    state: State,
    start: Instant,
}

impl Bench {
    fn new(limits: ThrottleLimits) -> Self {
        let state = State {
            buckets: Buckets::new(limits),
            ..State::default()
        };
        Self {
            state,
            start: Instant::now(),
        }
    }

    fn at(&self, milliseconds: u64) -> Instant {
        self.start + Duration::from_millis(milliseconds)
    }

    /// Has as many requests wait.
    fn queue(&mut self, member: u64, access: Access, count: usize) -> Vec<u64> {
        let ask = |_| self.state.admit(member, access, 512, self.start);
        (0..count).filter_map(ask).collect()
    }

    /// How many still wait.
    fn left(&self, member: u64, access: Access) -> usize {
        self.state.members[&member].waiting[index(access)].len()
    }
}

#[test]
fn members_take_turns_however_many_requests_they_have() {
    let mut bench = Bench::new(operations(100));
    let (greedy, modest) = (bench.state.join(), bench.state.join());
    // The first eleven find the bucket empty.
    assert_eq!(bench.queue(greedy, Access::Read, 11).len(), 0);
    assert_eq!(bench.queue(greedy, Access::Read, 60).len(), 60);
    assert_eq!(bench.queue(modest, Access::Read, 6).len(), 6);
    for millisecond in 0..100 {
        bench.state.pump(bench.at(millisecond));
    }
    let passed = 60 - bench.left(greedy, Access::Read);
    let modest_passed = 6 - bench.left(modest, Access::Read);
    assert!((9..=10).contains(&(passed + modest_passed)));
    assert!(
        passed.abs_diff(modest_passed) <= 1,
        "{passed} {modest_passed}"
    );
    // Who has nothing waiting is not waited for.
    for millisecond in 100..610 {
        bench.state.pump(bench.at(millisecond));
    }
    assert_eq!(bench.left(modest, Access::Read), 0);
    assert!((4..=6).contains(&bench.left(greedy, Access::Read)));
}

#[test]
fn reads_and_writes_share_a_common_limit_evenly() {
    let mut bench = Bench::new(operations(100));
    let member = bench.state.join();
    bench.queue(member, Access::Read, 11);
    bench.queue(member, Access::Read, 100);
    bench.queue(member, Access::Write, 100);
    for millisecond in 0..1000 {
        bench.state.pump(bench.at(millisecond));
    }
    let (reads, writes) = (
        100 - bench.left(member, Access::Read),
        100 - bench.left(member, Access::Write),
    );
    assert!(reads.abs_diff(writes) <= 1, "{reads} {writes}");
    assert!((98..=101).contains(&(reads + writes)));
}

#[test]
fn a_member_that_is_let_go_waits_for_nothing_but_is_counted() {
    let mut bench = Bench::new(operations(10));
    let (drained, other) = (bench.state.join(), bench.state.join());
    bench.queue(drained, Access::Write, 2);
    assert_eq!(bench.queue(drained, Access::Write, 20).len(), 20);
    assert_eq!(bench.queue(other, Access::Write, 1).len(), 1);
    bench.state.members.get_mut(&drained).unwrap().released = 1;
    bench.state.pump(bench.at(0));
    assert_eq!(bench.left(drained, Access::Write), 0);
    assert_eq!(bench.left(other, Access::Write), 1);
    assert_eq!(bench.queue(drained, Access::Write, 5).len(), 0);
    bench.state.pump(bench.at(2500));
    assert_eq!(bench.left(other, Access::Write), 1);
    bench.state.pump(bench.at(2700));
    assert_eq!(bench.left(other, Access::Write), 0);
}

#[test]
fn whoever_gives_up_hands_the_time_keeping_on() {
    let mut bench = Bench::new(operations(10));
    let member = bench.state.join();
    bench.queue(member, Access::Read, 2);
    let waiting = bench.queue(member, Access::Read, 3);
    bench.state.pump(bench.at(0));
    let keeper = |bench: &Bench| bench.state.alarms[0].map(|alarm| alarm.number);
    assert_eq!(keeper(&bench), Some(waiting[0]));
    assert!(bench.state.forget(member, Access::Read, waiting[0]));
    assert!(!bench.state.forget(member, Access::Read, waiting[0]));
    bench.state.pump(bench.at(1));
    assert_eq!(keeper(&bench), Some(waiting[1]));
    assert!(bench.state.forget(member, Access::Read, waiting[1]));
    assert!(bench.state.forget(member, Access::Read, waiting[2]));
    bench.state.pump(bench.at(1));
    assert_eq!((keeper(&bench), bench.state.count), (None, [0, 0]));
}

#[test]
fn other_limits_wake_whoever_keeps_the_time() {
    let mut bench = Bench::new(operations(1));
    let member = bench.state.join();
    bench.queue(member, Access::Read, 1);
    let waiting = bench.queue(member, Access::Read, 3);
    bench.state.pump(bench.at(0));
    let late = bench.state.alarms[0].unwrap().due;
    bench.state.buckets = Buckets::new(operations(100));
    bench.state.alarms = [None; 2];
    bench.state.pump(bench.at(1));
    assert_eq!(bench.left(member, Access::Read), 0, "{waiting:?}");
    assert!(late > bench.at(500));
}
