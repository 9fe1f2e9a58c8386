//! The transport over io_uring: each possible CPU has a queue of entries; an entry's completion is a request, and one
//! submission both answers it and asks for the next. A thread serves its queues with one system call per batch.
//!
//! Source: `include/uapi/linux/fuse.h` and `Documentation/filesystems/fuse/fuse-io-uring.rst` of Linux 6.18.

// Building and pushing of submissions that name memory by address.
#![allow(unsafe_code)]

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use rustix::io::Errno;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::bare::memory::Memory;
use crate::bare::wire::{self, Answer, Answers, IN_HEADER, MAX_REQUEST, Request};
use crate::error::{At, Error, Result};

/// Entries of each CPU's queue: as many requests as a job of the benchmark has in flight.
const DEPTH: u32 = 64;
/// `FUSE_IO_URING_CMD_REGISTER`: an entry asks for its first request.
const REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`: an entry answers a request and asks for the next.
const COMMIT_AND_FETCH: u32 = 2;

/// Bytes of `struct fuse_uring_req_header`.
const HEADERS: usize = 288;
/// In it: the operation's struct of a request.
const OP_IN: usize = 128;
/// In it: the number under which an answer is committed.
const COMMIT_ID: usize = 256 + 8;
/// In it: bytes of the payload.
const PAYLOAD_SIZE: usize = 256 + 16;
/// From one entry's headers to the next's: whole cache lines.
const HEADERS_STRIDE: usize = 320;
/// From one entry's payload to the next's: a page more than it needs, so that not all begin in the same set of a cache.
const PAYLOAD_STRIDE: usize = MAX_REQUEST + 4096;
/// Where `len` is in a submission (`struct io_uring_sqe`); the crate has no setter for it.
const SQE_LEN: usize = 24;

const DEVICE: &str = "the io_uring of /dev/fuse";

/// The CPUs whose queues a thread serves.
#[derive(Debug, PartialEq, Eq)]
pub struct Share {
    cpus: Vec<u16>,
    /// Whether it is the only thread of its only CPU, and may stay there.
    pinned: bool,
}

impl Share {
    /// The share of thread `number` of `threads`, where there are `cpus` in all.
    pub fn new(number: u32, threads: u32, cpus: u32) -> Self {
        Self {
            cpus: (0..cpus)
                .filter(|cpu| cpu % threads == number)
                .filter_map(|cpu| u16::try_from(cpu).ok())
                .collect(),
            pinned: threads == cpus,
        }
    }
}

/// How many CPUs the kernel is ready for, on line or not: each has a queue, and none is served before all have an entry.
pub fn possible_cpus() -> Result<u32> {
    let path = Path::new("/sys/devices/system/cpu/possible");
    let text = fs::read_to_string(path).at("read", path)?;
    count_cpus(&text)
        .ok_or_else(|| Error::Usage(format!("unexpected list of CPUs: {}", text.trim())))
}

/// The number of CPUs in a list like `0-3,8`.
fn count_cpus(text: &str) -> Option<u32> {
    text.trim().split(',').try_fold(0u32, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// Serves the queues of `share` until the mount is gone. INIT must have been answered.
pub fn serve(device: &OwnedFd, share: &Share, answers: &Answers) -> Result<()> {
    if let (true, [cpu]) = (share.pinned, &share.cpus[..]) {
        let mut set = CpuSet::new();
        set.set(usize::from(*cpu));
        if let Err(error) = sched_setaffinity(None, &set) {
            eprintln!("bare-server: CPU {cpu} is served from elsewhere: {error}");
        }
    }
    let mut server = Server::new(device, share)?;
    server.register(share)?;
    server.run(answers)
}

struct Server {
    // Before the memory: the kernel must have let go of it first.
    ring: IoUring<Entry128, cqueue::Entry>,
    memory: Memory,
    /// Number of entries of all queues.
    entries: usize,
    /// The queue (CPU) of each entry.
    queues: Vec<u16>,
}

impl Server {
    fn new(device: &OwnedFd, share: &Share) -> Result<Self> {
        let queues: Vec<u16> = share
            .cpus
            .iter()
            .flat_map(|cpu| std::iter::repeat_n(*cpu, DEPTH as usize))
            .collect();
        let entries = queues.len();
        let ring = IoUring::<Entry128, cqueue::Entry>::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries.next_power_of_two() as u32)
            .at("set up", Path::new(DEVICE))?;
        ring.submitter()
            .register_files(&[device.as_raw_fd()])
            .at("register the device with", Path::new(DEVICE))?;
        let memory = Memory::new(entries * (HEADERS_STRIDE + PAYLOAD_STRIDE))
            .at("map the buffers of", Path::new(DEVICE))?;
        Ok(Self {
            ring,
            memory,
            entries,
            queues,
        })
    }

    fn headers(entry: usize) -> usize {
        entry * HEADERS_STRIDE
    }

    fn payload(&self, entry: usize) -> usize {
        self.entries * HEADERS_STRIDE + entry * PAYLOAD_STRIDE
    }

    /// Registers every entry with its two buffers.
    fn register(&mut self, share: &Share) -> Result<()> {
        debug_assert_eq!(self.entries, share.cpus.len() * DEPTH as usize);
        // Each is two of `struct iovec`. The kernel reads them while it takes the submission.
        let buffers: Vec<[usize; 4]> = (0..self.entries)
            .map(|entry| {
                let headers = self.memory.address(Self::headers(entry), HEADERS);
                let payload = self.memory.address(self.payload(entry), MAX_REQUEST);
                [headers, HEADERS, payload, MAX_REQUEST]
            })
            .collect();
        for (entry, buffer) in buffers.iter().enumerate() {
            self.push(entry, REGISTER, 0, Some(buffer));
        }
        self.ring
            .submit()
            .at("register entries with", Path::new(DEVICE))?;
        Ok(())
    }

    /// Queues a submission. There is always room: an entry has one at a time.
    fn push(&mut self, entry: usize, operation: u32, commit: u64, buffers: Option<&[usize; 4]>) {
        // `struct fuse_uring_cmd_req`: flags, the number to be committed, the queue.
        let mut command = [0; 80];
        command[8..16].copy_from_slice(&commit.to_ne_bytes());
        command[16..18].copy_from_slice(&self.queues[entry].to_ne_bytes());
        let submission = opcode::UringCmd80::new(types::Fixed(0), operation)
            .cmd(command)
            .addr(buffers.map(|buffers| buffers.as_ptr() as u64))
            .build()
            .user_data(entry as u64);
        let submission = match buffers {
            Some(_) => with_length(submission, 2),
            None => submission,
        };
        // SAFETY: the buffers that an entry is registered with are in `memory`, which outlives the ring and into which
        // no references exist; the array that names them lives until the submission has been taken.
        let pushed = unsafe { self.ring.submission().push(&submission) };
        debug_assert!(pushed.is_ok());
    }

    fn run(&mut self, answers: &Answers) -> Result<()> {
        let mut batch: Vec<(usize, i32)> = Vec::with_capacity(self.entries);
        loop {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                    return Err(error).at("wait for", Path::new(DEVICE));
                }
                _ => {}
            }
            let completions = self.ring.completion();
            batch.extend(completions.map(|one| (one.user_data() as usize, one.result())));
            for (entry, result) in batch.drain(..) {
                if result >= 0 {
                    let commit = self.answer(entry, answers);
                    self.push(entry, COMMIT_AND_FETCH, commit, None);
                    continue;
                }
                match Errno::from_raw_os_error(-result) {
                    Errno::NOTCONN | Errno::CONNABORTED => return Ok(()),
                    errno => return Err(errno).at("take requests from", Path::new(DEVICE)),
                }
            }
        }
    }

    /// Puts the answer to an entry's request into its buffers; returns the number under which it is committed.
    fn answer(&mut self, entry: usize, answers: &Answers) -> u64 {
        let headers = Self::headers(entry);
        let payload = self.payload(entry);
        let request = Request::parse(&self.memory.get::<IN_HEADER>(headers));
        let body = self.memory.get::<40>(headers + OP_IN);
        let (errno, length) = match answers.to(request, &body) {
            Answer::Silence => (0, 0),
            Answer::Error(errno) => (errno, 0),
            Answer::Body(bytes) => {
                self.memory.put(payload, bytes);
                (0, bytes.len())
            }
            Answer::Written(bytes) => {
                self.memory.put(payload, &bytes);
                (0, bytes.len())
            }
            // What lies there: zeroes, or what was last written through this entry. To clear it would be work.
            Answer::Data(length) => (0, length),
        };
        let header = wire::out_header(request.unique, errno, length);
        self.memory.put(headers, &header);
        let size = (length as u32).to_ne_bytes();
        self.memory.put(headers + PAYLOAD_SIZE, &size);
        u64::from_ne_bytes(self.memory.get(headers + COMMIT_ID))
    }
}

/// Sets the submission's `len`.
fn with_length(mut submission: Entry128, length: u32) -> Entry128 {
    // SAFETY: `Entry128` is `repr(C)`, 128 bytes of plain integers in the kernel's layout, where `len` is a u32 at 24;
    // every value is valid in it.
    unsafe {
        (&raw mut submission)
            .cast::<u8>()
            .add(SQE_LEN)
            .cast::<u32>()
            .write_unaligned(length);
    }
    submission
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_counted_in_ranges_and_alone() {
        assert_eq!(count_cpus("0\n"), Some(1));
        assert_eq!(count_cpus("0-3,8,10-11\n"), Some(7));
        for wrong in ["", "3-1", "a", "0-4294967295"] {
            assert_eq!(count_cpus(wrong), None, "{wrong:?}");
        }
        assert!(possible_cpus().unwrap() >= 1);
    }

    #[test]
    fn every_cpu_is_served_by_one_thread() {
        for threads in 1..=3 {
            let shares: Vec<Share> = (0..threads)
                .map(|number| Share::new(number, threads, 3))
                .collect();
            let mut cpus: Vec<u16> = shares.iter().flat_map(|share| share.cpus.clone()).collect();
            cpus.sort_unstable();
            assert_eq!(cpus, [0, 1, 2]);
            assert!(shares.iter().all(|share| share.pinned == (threads == 3)));
        }
    }

    #[test]
    fn the_length_is_where_the_kernel_reads_it() {
        let build = |length| {
            let plain = opcode::UringCmd80::new(types::Fixed(0), REGISTER).build();
            let submission = with_length(plain, length);
            // SAFETY: 128 bytes without padding, all of them initialised.
            unsafe { std::mem::transmute::<Entry128, [u8; 128]>(submission) }
        };
        let (none, two) = (build(0), build(2));
        let changed: Vec<usize> = (0..128).filter(|at| none[*at] != two[*at]).collect();
        assert_eq!(changed.len(), 1);
        assert_eq!(two[24..28], 2u32.to_ne_bytes());
    }
}
