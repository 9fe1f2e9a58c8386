//! What the queues of one export share: options, the node, flags that stop and pause them, counters. The flags and
//! counters are atomics on cache lines of their own; the locks here are for the way in and out, never for a request.

mod greeting;

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, Waker};

use diskfuse_ring::{Mailbox, Waits};
use parking_lot::{Condvar, Mutex};

use crate::attributes::Ownership;
use crate::content::Content;
use crate::latency::{Histograms, Latencies, RequestKind};
use crate::passthrough::{Backing, Passthrough};
use crate::transport::{Plan, TransportOptions};
use crate::trouble::{OnError, Pace};

/// Who but the owner may use the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AllowOther {
    /// Everybody whom the file's mode lets, if the kernel allows us to say so; else only the owner.
    #[default]
    Auto,
    /// Everybody whom the file's mode lets.
    On,
    /// Only the user who runs the daemon.
    Off,
    /// The owner and root: others are let in and kept out by the file's mode, which then lets nobody else do anything.
    Root,
}

/// Requests that the kernel keeps in flight in the background, unless told otherwise. The kernel's own default is
/// 12, which holds libaio back; four jobs at depth 64 are what this stands for.
pub const DEFAULT_MAX_BACKGROUND: u16 = 256;

/// An export's options, as QEMU's `--export type=fuse` has them.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Its name.
    pub id: String,
    /// What to mount on: a regular file, or a directory for a tree.
    pub mountpoint: PathBuf,
    /// Whether the file can be written.
    pub writable: bool,
    /// Whether writing past the end makes the disk larger.
    pub growable: bool,
    /// Who may use the file.
    pub allow_other: AllowOther,
    /// Whose the file is, and what its mode says at first.
    pub ownership: Ownership,
    /// Requests that the kernel keeps in flight in the background, 1 to 65535.
    pub max_background: u16,
    /// How requests come and answers go.
    pub transport: TransportOptions,
    /// Whether the kernel is to read and write the image file itself.
    pub passthrough: Passthrough,
    /// Who is told of requests that the disk failed, beside the log.
    pub on_error: Option<OnError>,
}

/// Why an export ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Stopped,
    /// Somebody else took its mount away, or aborted its connection.
    Unmounted,
    /// The kernel's words made no sense any more, so none was trusted.
    Halted,
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Stopped => "it was stopped",
            Self::Unmounted => "it was unmounted from outside",
            Self::Halted => "a request broke the protocol",
        })
    }
}

/// What an export has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Whether requests come through FUSE over io_uring.
    pub uring: bool,
    /// Whether the kernel reads and writes the image file itself; then the other figures do not tell of it.
    pub passthrough: bool,
    /// Queues, one descriptor and thread each.
    pub queues: usize,
    /// Queues that fetch requests at present; the others wait until the load is worth another thread.
    pub active_queues: usize,
    /// Requests not yet answered.
    pub in_flight: u64,
    /// READ requests answered.
    pub reads: u64,
    /// WRITE requests answered.
    pub writes: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// FLUSH and FSYNC requests answered.
    pub flushes: u64,
    /// Requests of any kind that were answered with an error of the disk.
    pub errors: u64,
}

/// What one queue of an export has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueStats {
    /// Requests not yet answered.
    pub in_flight: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests of any kind that were answered with an error of the disk.
    pub errors: u64,
    /// Requests answered, in the order of [`RequestKind::ALL`].
    pub requests: [Latencies; RequestKind::ALL.len()],
    /// How its thread has waited, whatever it serves.
    pub waits: Waits,
}

/// One queue's flags and counters. Only its own thread writes the counters, so that none of them needs a locked
/// instruction.
#[repr(align(128))]
#[derive(Default)]
pub(crate) struct Lane {
    /// The task that fetches; set once, when it starts.
    pub(crate) fetcher: OnceLock<Waker>,
    /// It does not fetch and has nothing in flight.
    pub(crate) quiet: AtomicBool,
    /// Idle time of its thread, in nanoseconds.
    pub(crate) idle: AtomicU64,
    pub(crate) in_flight: AtomicU32,
    /// Requests that came in entries, up to a few; see `queue/placement.rs`.
    pub(crate) came: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) latencies: Histograms,
}

/// Adds to a counter that only this thread writes.
pub(crate) fn bump(counter: &AtomicU64, by: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(by),
        Ordering::Relaxed,
    );
}

const RUNNING: u8 = 0;
const STOPPED: u8 = 1;
const UNMOUNTED: u8 = 2;
const HALTED: u8 = 3;

/// Requests come through `/dev/fuse`.
const BY_DEVICE: u8 = 0;
/// The kernel agreed on FUSE over io_uring, and the queues offer it their entries.
const REGISTERING: u8 = 1;
/// Requests come in entries.
const BY_RING: u8 = 2;

/// The outcome of the first exchange with the kernel.
pub(crate) type Greeting = std::result::Result<(), String>;

type OnEnd = Box<dyn FnOnce(End) + Send>;

/// See the module.
pub(crate) struct Shared {
    pub(crate) options: ExportOptions,
    /// Whether others were let in, after `auto` was tried.
    pub(crate) others_allowed: AtomicBool,
    pub(crate) content: Content,
    pub(crate) plan: Plan,
    pub(crate) pace: Pace,
    /// How requests come.
    way: AtomicU8,
    /// The kernel has agreed on entries, which it may hold from then on.
    ring_agreed: AtomicBool,
    /// The kernel has agreed on reading and writing the image file itself.
    passthrough_agreed: AtomicBool,
    /// Set before anything is mounted, or never.
    pub(crate) backing: OnceLock<Backing>,
    /// Queues that have not offered their entries yet.
    unregistered: AtomicUsize,
    /// Why entries are not asked for although the plan has them; set before anything is served, or never.
    forgone: OnceLock<String>,
    /// We take the mount away ourselves: that the connection ends is no news.
    leaving: AtomicBool,
    /// Why the first of them that failed did.
    refusal: Mutex<Option<String>>,
    pub(crate) lanes: Box<[Lane]>,
    /// The threads of the lanes.
    threads: Box<[Mailbox]>,
    /// Queues that fetch; see `queue/scale.rs`.
    pub(crate) active: AtomicUsize,
    /// The most queues that may fetch at once: more threads than CPUs only wait for each other.
    pub(crate) most_active: usize,
    /// Files for whose sake the export stands still: drains under way.
    pauses: AtomicUsize,
    phase: AtomicU8,
    /// Set when the kernel has been answered: other queues than the first may fetch from then on.
    greeted: AtomicBool,
    greeting: Mutex<Option<Greeting>>,
    drainers: Mutex<Vec<Waker>>,
    /// Why the flush at the end failed.
    flush_error: Mutex<Option<diskfuse_block::Error>>,
    /// Queues that may still touch the node.
    serving: AtomicUsize,
    /// Queues that have not ended.
    left: AtomicUsize,
    ended: Mutex<Option<OnEnd>>,
    changed: Condvar,
}

impl Shared {
    pub(crate) fn new(
        options: ExportOptions,
        content: Content,
        plan: Plan,
        threads: &[Mailbox],
        on_end: OnEnd,
    ) -> Self {
        let queues = threads.len();
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let most_active = queues.min(cpus);
        Self {
            options,
            others_allowed: AtomicBool::new(false),
            content,
            plan,
            pace: Pace::new(),
            way: AtomicU8::new(BY_DEVICE),
            ring_agreed: AtomicBool::new(false),
            passthrough_agreed: AtomicBool::new(false),
            backing: OnceLock::new(),
            unregistered: AtomicUsize::new(queues),
            forgone: OnceLock::new(),
            leaving: AtomicBool::new(false),
            refusal: Mutex::new(None),
            lanes: (0..queues).map(|_| Lane::default()).collect(),
            threads: threads.into(),
            active: AtomicUsize::new(1),
            most_active,
            pauses: AtomicUsize::new(0),
            phase: AtomicU8::new(RUNNING),
            greeted: AtomicBool::new(false),
            greeting: Mutex::new(None),
            drainers: Mutex::new(Vec::new()),
            flush_error: Mutex::new(None),
            serving: AtomicUsize::new(queues),
            left: AtomicUsize::new(queues),
            ended: Mutex::new(Some(on_end)),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn wake_all(&self) {
        for lane in &self.lanes {
            if let Some(waker) = lane.fetcher.get() {
                waker.wake_by_ref();
            }
        }
    }

    /// Whether the export is to end, for whatever reason.
    pub(crate) fn ending(&self) -> bool {
        self.phase.load(Ordering::SeqCst) != RUNNING
    }

    pub(crate) fn paused(&self) -> bool {
        self.pauses.load(Ordering::SeqCst) > 0
    }

    /// Whether queue `index` is one of those that fetch, or that serve entries.
    pub(crate) fn wanted(&self, index: usize) -> bool {
        index == 0
            || self.by_ring()
            || (self.greeted.load(Ordering::Relaxed) && index < self.active.load(Ordering::Relaxed))
    }

    /// Sets how many queues fetch, and tells them.
    pub(crate) fn set_active(&self, active: usize) {
        self.active
            .store(active.clamp(1, self.most_active), Ordering::SeqCst);
        self.wake_all();
    }

    /// Begins the end; the first reason counts. True if this call did it.
    pub(crate) fn end(&self, why: End) -> bool {
        let phase = match why {
            End::Stopped => STOPPED,
            End::Unmounted => UNMOUNTED,
            End::Halted => HALTED,
        };
        let first = self
            .phase
            .compare_exchange(RUNNING, phase, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok();
        if first {
            let gone = "the kernel's FUSE went away before it was answered";
            self.greet(Err(gone.to_owned()));
        }
        self.wake_all();
        first
    }

    fn why(&self) -> End {
        match self.phase.load(Ordering::SeqCst) {
            UNMOUNTED => End::Unmounted,
            HALTED => End::Halted,
            _ => End::Stopped,
        }
    }

    /// Sets whether we are about to take the mount away ourselves.
    pub(crate) fn expect_unmount(&self, leaving: bool) {
        self.leaving.store(leaving, Ordering::SeqCst);
    }

    /// The connection is gone. True if that is news.
    pub(crate) fn disconnected(&self) -> bool {
        match self.leaving.load(Ordering::SeqCst) {
            true => {
                self.end(End::Stopped);
                false
            }
            false => self.end(End::Unmounted),
        }
    }

    /// A queue has nothing in flight and fetches no more. True for the last one: it flushes the node.
    pub(crate) fn done_serving(&self) -> bool {
        self.serving.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// The flush at the end failed. Whoever stops the export must not be told that all is well, unless no write was ever
    /// answered with success: then there is nothing that anybody could miss.
    pub(crate) fn last_flush_failed(&self, error: diskfuse_block::Error) {
        if self.content.ever_written() || self.backing.get().is_some() {
            self.flush_failed(error);
        } else {
            tracing::debug!(export = %self.options.id, %error, "nothing was written, and the last flush failed");
        }
    }

    /// Notes what whoever stops the export has to know.
    pub(crate) fn flush_failed(&self, error: diskfuse_block::Error) {
        tracing::error!(export = %self.options.id, %error, "the last flush failed");
        *self.flush_error.lock() = Some(error);
    }

    /// What [`Shared::flush_failed`] has noted, once.
    pub(crate) fn take_flush_error(&self) -> Option<diskfuse_block::Error> {
        self.flush_error.lock().take()
    }

    /// A queue has ended: `served` if it came to its proper end, else its thread is gone and with it whatever it had
    /// in flight, so the export cannot go on. The last one ends the export.
    pub(crate) fn queue_ended(&self, index: usize, served: bool) {
        if !served {
            self.end(End::Halted);
            let message = format!("queue {index} ended before its last flush");
            self.flush_failed(diskfuse_block::Error::new(
                diskfuse_block::Kind::Ended,
                message,
            ));
        }
        self.lanes[index].quiet.store(true, Ordering::SeqCst);
        self.forget_queue();
        self.became_quiet();
    }

    fn forget_queue(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        let on_end = self.ended.lock().take();
        if let Some(on_end) = on_end {
            on_end(self.why());
        }
        let _greeting = self.greeting.lock();
        self.changed.notify_all();
    }

    /// Blocks until every queue has ended.
    pub(crate) fn wait_for_end(&self, limit: std::time::Duration) -> bool {
        let mut greeting = self.greeting.lock();
        let waiting = |_: &mut _| self.left.load(Ordering::SeqCst) != 0;
        !self
            .changed
            .wait_while_for(&mut greeting, waiting, limit)
            .timed_out()
    }

    /// A queue has become quiet: whoever drains looks again.
    pub(crate) fn became_quiet(&self) {
        for waker in self.drainers.lock().drain(..) {
            waker.wake();
        }
    }

    fn all_quiet(&self) -> bool {
        self.lanes.iter().all(|l| l.quiet.load(Ordering::SeqCst))
            || self.left.load(Ordering::SeqCst) == 0
    }

    pub(crate) fn stats(&self) -> Stats {
        let mut stats = Stats {
            queues: self.lanes.len(),
            uring: self.by_ring(),
            passthrough: self.backing.get().is_some_and(|b| b.id().is_some()),
            active_queues: match self.by_ring() {
                true => self.lanes.len(),
                false => self.active.load(Ordering::Relaxed),
            },
            ..Stats::default()
        };
        for lane in &self.lanes {
            let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            stats.in_flight += u64::from(lane.in_flight.load(Ordering::Relaxed));
            stats.reads += of(&lane.reads);
            stats.writes += of(&lane.writes);
            stats.read_bytes += of(&lane.read_bytes);
            stats.written_bytes += of(&lane.written_bytes);
            stats.flushes += of(&lane.flushes);
            stats.errors += of(&lane.errors);
        }
        stats
    }

    pub(crate) fn queue_stats(&self) -> Vec<QueueStats> {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let both = self.lanes.iter().zip(&self.threads);
        both.map(|(lane, thread)| QueueStats {
            in_flight: u64::from(lane.in_flight.load(Ordering::Relaxed)),
            read_bytes: of(&lane.read_bytes),
            written_bytes: of(&lane.written_bytes),
            errors: of(&lane.errors),
            requests: lane.latencies.read(),
            waits: thread.waits(),
        })
        .collect()
    }

    /// Starts nothing new, until [`Shared::unpause`] has been called as often as this.
    pub(crate) fn pause(&self) {
        self.pauses.fetch_add(1, Ordering::SeqCst);
        self.wake_all();
    }

    /// See [`Shared::pause`].
    pub(crate) fn unpause(&self) {
        self.pauses.fetch_sub(1, Ordering::SeqCst);
        self.wake_all();
    }

    /// Resolves when nothing is in flight, on the ring of whoever asks.
    pub(crate) async fn until_quiet(&self) {
        std::future::poll_fn(|cx| {
            if self.all_quiet() {
                return Poll::Ready(());
            }
            self.drainers.lock().push(cx.waker().clone());
            // A queue may have become quiet between the two lines above.
            if self.all_quiet() {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// Why the export cannot be drained, if so.
    pub(crate) fn immovable(&self) -> Option<String> {
        let passes = self
            .backing
            .get()
            .is_some_and(|backing| backing.id().is_some());
        let why = "the kernel reads and writes the image file of the export itself (passthrough), and cannot be stopped";
        passes.then(|| why.to_owned())
    }
}
