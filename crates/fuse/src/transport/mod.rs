//! How requests get from the kernel to a queue and answers back: `device` (reading and writing `/dev/fuse`) or `uring` (FUSE
//! over io_uring). Which of them it is gets decided here, before the kernel's first word is answered: a mount must
//! never hang because the faster way turned out not to be there.

pub(crate) mod cpus;
pub(crate) mod device;
pub(crate) mod uring;

use std::num::NonZeroU16;

use diskfuse_ring::Mailbox;

use crate::error::{Error, Result};

/// Which way to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// FUSE over io_uring where kernel and event loops have it, else the device.
    #[default]
    Auto,
    /// `/dev/fuse`.
    Device,
    /// FUSE over io_uring, or an error.
    Uring,
}

/// Where the threads of an export run that serve the kernel's queues (one queue for each CPU).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// Wherever serves most requests, which is tried.
    #[default]
    Auto,
    /// Wherever the scheduler puts them.
    Free,
    /// Each on the CPUs whose queues it serves.
    Pinned,
    /// Each on other CPUs than those whose queues it serves.
    Spread,
    /// Thread N on the N-th of these CPUs, from the beginning again if there are more threads.
    Cpus(Vec<u16>),
}

/// How an export talks to the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransportOptions {
    /// Which way.
    pub transport: Transport,
    /// Requests that each of the kernel's queues hands out at once (uring only); by default as many as make
    /// 256 with all queues together, or whose largest requests take 128 MiB, but 4 at least.
    pub depth: Option<NonZeroU16>,
    /// The largest request in bytes, a multiple of 4096: at least 4096, and at most what the kernel allows, which is
    /// also the default up to 4 MiB.
    pub max_payload: Option<u32>,
    /// Where the threads run (uring only).
    pub placement: Placement,
}

/// Requests in flight that all queues of the kernel together are made for: four jobs at depth 64.
const ENTRIES: usize = 256;
/// Bytes that all entries together take at most when all hold their largest request, unless `FEWEST` of each queue take
/// more.
const MEMORY: usize = 128 << 20;
/// The fewest entries of a queue by default. With many CPUs each has few requests at a time, and the memory of those
/// that are all in use at once (entries times the largest request) is to stay well below a gibibyte.
const FEWEST: usize = 4;
/// The most entries of a queue.
const DEEPEST: u16 = 1024;
/// The largest request, in bytes, unless told otherwise: a larger one is split by the kernel. It is also the limit of a
/// kernel that nobody has told otherwise.
const LARGEST_BY_DEFAULT: u32 = 4 << 20;
/// The largest request that can be asked for, in bytes: a page count of 16 bits, rounded down.
const LARGEST: u32 = 128 << 20;

/// What an export asks the kernel for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// FUSE over io_uring, if the kernel offers it.
    pub(crate) ring: Option<RingPlan>,
    /// Why not, if it was not ruled out by the options.
    pub(crate) obstacle: Option<String>,
    /// The device is no alternative.
    pub(crate) insist: bool,
    /// The largest request in bytes, a multiple of 4096.
    pub(crate) max_request: usize,
}

impl Plan {
    /// Bytes of data that the memory of a request must hold.
    ///
    /// Source: `FUSE_MIN_READ_BUFFER` in `include/uapi/linux/fuse.h`: the kernel asks for so much whatever was agreed.
    pub(crate) fn memory(&self) -> usize {
        self.max_request.max(8192)
    }
}

/// The entries of an export's queues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RingPlan {
    /// Of the kernel: one for each CPU that there may ever be.
    pub(crate) queues: u16,
    /// Entries of each.
    pub(crate) depth: u16,
}

/// Decides as far as that can be done before the kernel has spoken. [`Error::Options`] if what was asked for cannot be.
pub(crate) fn plan(options: &TransportOptions, threads: &[Mailbox]) -> Result<Plan> {
    let max_request = max_request(options.max_payload)?;
    let mut plan = Plan {
        ring: None,
        obstacle: None,
        insist: options.transport == Transport::Uring,
        max_request,
    };
    if options.transport == Transport::Device {
        return Ok(plan);
    }
    match obstacle(threads) {
        None => plan.ring = Some(ring_plan(options.depth, max_request)?),
        Some(obstacle) if plan.insist => return Err(Error::NoRing(obstacle)),
        Some(obstacle) => {
            tracing::info!("requests come through /dev/fuse: {obstacle}");
            plan.obstacle = Some(obstacle);
        }
    }
    Ok(plan)
}

fn ring_plan(depth: Option<NonZeroU16>, max_request: usize) -> Result<RingPlan> {
    let failed = |source| Error::Cpus { source };
    let queues = cpus::possible().map_err(failed)?;
    let depth = match depth {
        Some(depth) if depth.get() > DEEPEST => {
            let message = format!("depth must be from 1 to {DEEPEST}");
            return Err(Error::Options(message));
        }
        Some(depth) => depth.get(),
        None => {
            let all = ENTRIES.min(MEMORY / max_request.max(1));
            (all / usize::from(queues.max(1))).clamp(FEWEST, ENTRIES) as u16
        }
    };
    Ok(RingPlan { queues, depth })
}

/// Whether the kernel lets this host use FUSE over io_uring: `None` if so.
fn obstacle(threads: &[Mailbox]) -> Option<String> {
    if let Some(obstacle) = switched_off() {
        return Some(obstacle);
    }
    let asked: Vec<_> = threads
        .iter()
        .map(|thread| thread.call(|| async { diskfuse_ring::carries_commands() }))
        .collect();
    let all = asked
        .into_iter()
        .all(|reply| matches!(reply.wait(), Ok(true)));
    (!all).then(|| {
        "FUSE over io_uring needs event loops that stand on io_uring (Linux 5.19)".to_owned()
    })
}

/// What the module's parameter says, for people.
pub(crate) fn switched_off() -> Option<String> {
    const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";
    match std::fs::read_to_string(PARAMETER) {
        Ok(value) if value.trim() == "Y" => None,
        Ok(_) => Some(format!(
            "FUSE over io_uring is switched off; 'echo Y > {PARAMETER}', as root, switches it on"
        )),
        Err(_) => Some("this kernel has no FUSE over io_uring (Linux 6.14 has it)".to_owned()),
    }
}

/// The largest request, in bytes.
fn max_request(wanted: Option<u32>) -> Result<usize> {
    // 256 pages where the kernel does not say (before Linux 6.13).
    let pages = std::fs::read_to_string("/proc/sys/fs/fuse/max_pages_limit");
    let pages = pages.ok().and_then(|text| text.trim().parse().ok());
    let allowed = pages
        .unwrap_or(256_u32)
        .saturating_mul(4096)
        .clamp(4096, LARGEST);
    match wanted {
        None => Ok(allowed.min(LARGEST_BY_DEFAULT) as usize),
        Some(wanted) if wanted < 4096 || !wanted.is_multiple_of(4096) => Err(Error::Options(
            "max-payload must be a multiple of 4096 bytes, and 4096 at least".to_owned(),
        )),
        Some(wanted) if wanted > allowed => Err(Error::Options(format!(
            "max-payload can be {allowed} bytes at most here: the kernel allows {} pages of 4096 bytes a request \
             (/proc/sys/fs/fuse/max_pages_limit)",
            allowed / 4096
        ))),
        Some(wanted) => Ok(wanted as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_shared_out_and_bounded() {
        let default = ring_plan(None, 1 << 20).unwrap();
        let depth = usize::from(default.depth);
        assert!(default.queues >= 1);
        assert!(depth == FEWEST || (depth * usize::from(default.queues)) << 20 <= MEMORY);
        assert_eq!(
            usize::from(ring_plan(None, 128 << 20).unwrap().depth),
            FEWEST
        );
        let asked = ring_plan(NonZeroU16::new(7), 1 << 20).unwrap();
        assert_eq!(asked.depth, 7);
        assert!(ring_plan(NonZeroU16::new(DEEPEST + 1), 1 << 20).is_err());
    }

    #[test]
    fn the_largest_request_is_whole_pages_and_no_more_than_the_kernel_allows() {
        assert!(max_request(None).unwrap().is_multiple_of(4096));
        assert_eq!(max_request(Some(8192)).unwrap(), 8192);
        for wrong in [0, 1, 4095, 4097, LARGEST + 4096] {
            assert!(max_request(Some(wrong)).is_err(), "{wrong}");
        }
    }
}
