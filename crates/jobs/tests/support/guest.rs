//! A guest: threads that write and read a node as fast as they can, stop when they are drained, and know what must be there.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};
use std::task::{Poll, Waker};

use diskfuse_block::graph::{Attachment, DrainHook, User};
use diskfuse_block::{Graph, LocalFuture, Node, Permissions, Zeroes};
use diskfuse_ring::{Config, IoThread, Reply};

use super::rng::Rng;
use super::{KIB, LIMIT, assert_same, read, write};

/// Bytes that one thread has for itself, in turn with the others: less than a cluster, so that they meet in clusters.
const STRIPE: u64 = 12 * KIB;

pub struct Guest {
    shared: Arc<Shared>,
    attachment: Option<Attachment>,
    threads: Vec<IoThread>,
    done: Vec<Reply<()>>,
}

struct Shared {
    node: Mutex<Arc<dyn Node>>,
    paused: AtomicBool,
    stopped: AtomicBool,
    in_flight: AtomicUsize,
    operations: AtomicU64,
    failures: AtomicU64,
    does: Does,
    waiting: Mutex<Vec<Waker>>,
    model: Mutex<Vec<u8>>,
}

/// What a guest does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    /// Writes and reads.
    Everything,
    /// The same; errors are counted, not failures of the test.
    Forgiving,
    /// Reads, and asks what is there.
    Reads,
}

impl Shared {
    fn wake(&self) {
        for waker in self.waiting.lock().unwrap().drain(..) {
            waker.wake();
        }
    }

    async fn until(&self, what: impl Fn() -> bool) {
        std::future::poll_fn(|cx| {
            if what() {
                return Poll::Ready(());
            }
            self.waiting.lock().unwrap().push(cx.waker().clone());
            match what() {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }

    /// False if it is time to stop.
    async fn enter(&self) -> bool {
        loop {
            self.until(|| !self.paused.load(SeqCst) || self.stopped.load(SeqCst))
                .await;
            if self.stopped.load(SeqCst) {
                return false;
            }
            self.in_flight.fetch_add(1, SeqCst);
            if !self.paused.load(SeqCst) {
                return true;
            }
            self.leave();
        }
    }

    fn leave(&self) {
        self.in_flight.fetch_sub(1, SeqCst);
        self.wake();
    }
}

impl DrainHook for Shared {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        self.paused.store(true, SeqCst);
        Box::pin(self.until(|| self.in_flight.load(SeqCst) == 0))
    }

    fn resume(&self) {
        self.paused.store(false, SeqCst);
        self.wake();
    }

    fn switch(&self, node: Arc<dyn Node>) {
        *self.node.lock().unwrap() = node;
    }
}

impl Guest {
    /// `threads` threads on a node which shows `model` now.
    pub fn start(graph: &Graph, node: &str, model: Vec<u8>, threads: u64, seed: u64) -> Self {
        Self::start_with(graph, node, model, threads, seed, Does::Everything)
    }

    /// The same, but some writes may fail.
    pub fn forgiving(graph: &Graph, node: &str, model: Vec<u8>, threads: u64, seed: u64) -> Self {
        Self::start_with(graph, node, model, threads, seed, Does::Forgiving)
    }

    /// One that only reads, and always finds `model`.
    pub fn reading(graph: &Graph, node: &str, model: Vec<u8>, threads: u64, seed: u64) -> Self {
        Self::start_with(graph, node, model, threads, seed, Does::Reads)
    }

    fn start_with(
        graph: &Graph,
        name: &str,
        model: Vec<u8>,
        threads: u64,
        seed: u64,
        does: Does,
    ) -> Self {
        let shared = Arc::new(Shared {
            node: Mutex::new(graph.get(name).unwrap()),
            paused: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
            operations: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            does,
            waiting: Mutex::default(),
            model: Mutex::new(model),
        });
        let hook: Arc<dyn DrainHook> = Arc::<Shared>::clone(&shared);
        let user = User {
            name: "export 'guest'".to_owned(),
            perm: match does {
                Does::Reads => Permissions::CONSISTENT_READ,
                _ => Permissions::CONSISTENT_READ | Permissions::WRITE,
            },
            shared: Permissions::ALL,
            drain: Some(Arc::downgrade(&hook) as Weak<dyn DrainHook>),
            follows: true,
        };
        // A job that has just begun drains for a moment.
        let begun = std::time::Instant::now();
        while graph.is_drained(name) {
            assert!(begun.elapsed() < super::LIMIT, "'{name}' stays drained");
            std::thread::yield_now();
        }
        let attachment = graph.attach(name, user).unwrap();
        let spawn = |n| IoThread::spawn(&format!("guest-{n}"), Config::default()).unwrap();
        let rings: Vec<_> = (0..threads).map(spawn).collect();
        // Several tasks on each thread keep several requests in flight.
        let tasks = 3;
        let mut done = Vec::new();
        for (n, thread) in (0..).zip(&rings) {
            for task in 0..tasks {
                let shared = Arc::clone(&shared);
                let writer = (n * tasks + task, threads * tasks);
                let body = move || work(shared, writer, seed);
                done.push(thread.mailbox().call(body));
            }
        }
        Self {
            shared,
            attachment: Some(attachment),
            threads: rings,
            done,
        }
    }

    /// What must be there now; only to be trusted while it is drained or stopped.
    pub fn model(&self) -> Vec<u8> {
        self.shared.model.lock().unwrap().clone()
    }

    pub fn operations(&self) -> u64 {
        self.shared.operations.load(SeqCst)
    }

    pub fn failures(&self) -> u64 {
        self.shared.failures.load(SeqCst)
    }

    pub fn node(&self) -> String {
        self.attachment.as_ref().unwrap().node_name()
    }

    /// Stops all threads; each must have done its work without a mistake.
    pub fn stop(&mut self) {
        self.shared.stopped.store(true, SeqCst);
        self.shared.wake();
        for reply in self.done.drain(..) {
            let Ok(answer) = reply.wait_for(LIMIT) else {
                panic!("a guest does not stop");
            };
            answer.expect("a guest found a mistake, see above");
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.stopped.store(true, SeqCst);
        self.shared.wake();
        self.threads.clear();
        drop(self.attachment.take());
    }
}

/// Leaves also when a check fails.
struct InFlight<'s>(&'s Shared);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

async fn work(shared: Arc<Shared>, (writer, writers): (u64, u64), seed: u64) {
    let mut rng = Rng::new(seed ^ (writer + 1).wrapping_mul(0x5851_F42D_4C95_7F2D));
    let size = shared.model.lock().unwrap().len() as u64;
    let stripes = size / (STRIPE * writers);
    while shared.enter().await {
        let _in_flight = InFlight(&shared);
        let node = Arc::clone(&*shared.node.lock().unwrap());
        let stripe = (rng.below(stripes) * writers + writer) * STRIPE;
        let first = rng.below(STRIPE / 512);
        let sectors = rng.within(1..STRIPE / 512 - first + 1);
        let (at, len) = (stripe + first * 512, sectors * 512);
        let range = at as usize..(at + len) as usize;
        let what = match shared.does {
            Does::Reads => 8 + rng.below(4),
            _ => rng.below(10),
        };
        match what {
            0..6 => {
                let mut bytes = vec![0; len as usize];
                rng.fill(&mut bytes);
                let written = write(&*node, at, &bytes).await;
                settle(&shared, &*node, written, range, &bytes).await;
            }
            6 => {
                let written = node.write_zeroes(at, len, Zeroes::MayUnmap).await;
                settle(&shared, &*node, written, range, &vec![0; len as usize]).await;
            }
            11 => {
                let status = node.block_status(at, len).await.unwrap();
                let there = at as usize..(at + status.len) as usize;
                let is_zero = || shared.model.lock().unwrap()[there].iter().all(|b| *b == 0);
                assert!(
                    !status.zero || is_zero(),
                    "no zeroes at {at:#x}: {status:?}"
                );
            }
            _ => {
                let found = read(&*node, at, len).await.unwrap();
                let expected = shared.model.lock().unwrap()[range].to_vec();
                assert_same(&found, &expected, &format!("the guest reads at {at:#x}"));
            }
        }
        shared.operations.fetch_add(1, SeqCst);
    }
}

/// Notes what was written. After an error that is forgiven, what is there is looked at.
async fn settle(
    shared: &Shared,
    node: &dyn Node,
    written: diskfuse_block::Result<()>,
    range: std::ops::Range<usize>,
    bytes: &[u8],
) {
    match written {
        Ok(()) => shared.model.lock().unwrap()[range].copy_from_slice(bytes),
        Err(error) => {
            assert!(shared.does == Does::Forgiving, "{error}");
            shared.failures.fetch_add(1, SeqCst);
            let found = read(node, range.start as u64, range.len() as u64)
                .await
                .unwrap();
            shared.model.lock().unwrap()[range].copy_from_slice(&found);
        }
    }
}
