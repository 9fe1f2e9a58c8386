//! Keeps the second of two CPUs from falling asleep while a single synchronous caller is served. It never runs on a
//! machine with more or fewer CPUs, never for more than a tenth of a millisecond after a request, and always at the
//! lowest priority, so that whoever wants the CPU has it.
//!
//! Why: with one caller at depth one, caller and server run in turn. The scheduler wakes the one that is asleep on
//! the CPU that is idle, so each request crosses over twice, and waking a halted virtual CPU costs 20 µs and more. If
//! the other CPU is not idle both stay where they are, and a request costs two context switches. Measured on two
//! virtual CPUs, 4 KiB reads of a null disk: 20 kIOPS asleep, 45 with the server spinning, 80 to 95 with this. Servers
//! that spin on every CPU (QEMU's default) have a part of the effect, at the price of all CPUs.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// The CPUs of the machines that this is for.
const CPUS: usize = 2;
/// How long one call keeps the CPU awake.
const HOLD: Duration = Duration::from_micros(100);
/// Looks at the clock once in so many spins; one spin is some 40 ns.
const SPINS: u32 = 16;

struct Watch {
    start: Instant,
    /// Nanoseconds after `start`.
    until: AtomicU64,
    asleep: AtomicBool,
    thread: OnceLock<Thread>,
}

static WATCH: OnceLock<Option<&'static Watch>> = OnceLock::new();

/// Whether this machine has the two CPUs that this is for, and we may use both of them wholly: a container's quota on a
/// larger machine must not be spent on this.
pub(crate) fn is_for_this_machine() -> bool {
    let ours = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == CPUS);
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online");
    ours && online.is_ok_and(|list| list.trim() == "0-1")
}

fn set_up() -> Option<&'static Watch> {
    if !is_for_this_machine() {
        return None;
    }
    let watch: &'static Watch = Box::leak(Box::new(Watch {
        start: Instant::now(),
        until: AtomicU64::new(0),
        asleep: AtomicBool::new(false),
        thread: OnceLock::new(),
    }));
    let thread = std::thread::Builder::new()
        .name("diskfuse-awake".into())
        .stack_size(64 << 10)
        .spawn(move || keep_awake(watch));
    let handle = thread.ok()?;
    // Set once, here.
    let _ = watch.thread.set(handle.thread().clone());
    Some(watch)
}

fn keep_awake(watch: &'static Watch) {
    // At normal priority it would take half a CPU from whoever needs it; rather not at all, then.
    if rustix::process::setpriority_process(None, 19).is_err() {
        return;
    }
    loop {
        let until = watch.until.load(Ordering::Relaxed);
        if watch.start.elapsed().as_nanos() as u64 >= until {
            watch.asleep.store(true, Ordering::SeqCst);
            // Whoever extended the time just before saw a thread awake and will not wake it.
            if watch.until.load(Ordering::SeqCst) == until {
                std::thread::park();
            }
            watch.asleep.store(false, Ordering::SeqCst);
        }
        for _ in 0..SPINS {
            std::hint::spin_loop();
        }
    }
}

/// Keeps the other CPU awake for the time that one request may take, from `now` on.
pub(crate) fn hold(now: Instant) {
    let Some(watch) = WATCH.get_or_init(set_up) else {
        return;
    };
    let until = (now - watch.start.min(now) + HOLD).as_nanos() as u64;
    watch.until.store(until, Ordering::SeqCst);
    if watch.asleep.load(Ordering::SeqCst)
        && let Some(thread) = watch.thread.get()
    {
        thread.unpark();
    }
}
