//! A process that somebody else has taken over: each of its threads makes the system calls that it is told to, and its own business
//! goes on afterwards as if nothing had been. It must never leave a thread stopped: who traces lets go when he ends, however he does.
//!
//! No floating-point state is touched, and no function of the process is called, as a debugger would.
//!
//! Source: ptrace(2), syscall(2) "Architecture calling conventions".

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use libc::user_regs_struct;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::wait_until;

const SOON: Duration = Duration::from_secs(10);

/// An argument of a system call.
#[derive(Clone, Copy, Debug)]
pub enum Argument {
    /// The value itself.
    Number(i64),
    /// Its address, with a zero at the end.
    Text(&'static str),
}

impl From<i64> for Argument {
    fn from(number: i64) -> Self {
        Self::Number(number)
    }
}

impl From<&'static str> for Argument {
    fn from(text: &'static str) -> Self {
        Self::Text(text)
    }
}

/// A system call.
#[derive(Clone, Debug)]
pub struct Call {
    /// As in `libc::SYS_…`.
    pub number: i64,
    /// Six at most; those that are not there are 0.
    pub arguments: Vec<Argument>,
}

/// A thread that stands still, and where it stood.
struct Held {
    thread: Pid,
    before: user_regs_struct,
}

/// A process all of whose threads stand still.
pub struct Captive {
    threads: Vec<Held>,
    memory: File,
    /// Where in its memory an instruction is that makes a system call.
    instruction: u64,
}

impl Captive {
    /// Stops all threads but the kernel's own workers for rings, which run no code of the process.
    pub fn take(pid: u32) -> Self {
        let threads: Vec<_> = crate::process::threads(pid)
            .into_iter()
            .map(|thread| hold(Pid::from_raw(thread.cast_signed())))
            .collect();
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .unwrap();
        // A thread that waits in the kernel stands right behind one.
        let instruction = threads.iter().find_map(|held| {
            let at = registers::next(&held.before) - registers::SYSCALL.len() as u64;
            let mut found = registers::SYSCALL.map(|_| 0);
            let read = memory.read_exact_at(&mut found, at);
            (read.is_ok() && found == registers::SYSCALL).then_some(at)
        });
        Self {
            threads,
            memory,
            instruction: instruction.expect("some thread waits in the kernel"),
        }
    }

    /// Has every thread make the call: the errno each was answered, 0 for success.
    pub fn call(&self, call: &Call) -> Vec<i32> {
        let answers = self.threads.iter().map(|held| self.one(held, call));
        answers.collect()
    }

    fn one(&self, held: &Held, call: &Call) -> i32 {
        // Below what the thread uses of its stack, and what a function may use without saying so.
        let mut text_at = registers::stack(&held.before) - 1024;
        let mut arguments = [0; 6];
        for (value, argument) in arguments.iter_mut().zip(&call.arguments) {
            *value = match argument {
                Argument::Number(number) => number.cast_unsigned(),
                Argument::Text(text) => {
                    let bytes = [text.as_bytes(), &[0]].concat();
                    text_at -= bytes.len() as u64;
                    self.memory.write_all_at(&bytes, text_at).unwrap();
                    text_at
                }
            };
        }
        let mut changed = held.before;
        registers::set_call(&mut changed, self.instruction, call.number, arguments);
        ptrace::setregs(held.thread, changed).unwrap();
        ptrace::step(held.thread, None).unwrap();
        let stop = await_stop(held.thread);
        assert!(
            matches!(stop, WaitStatus::Stopped(_, Signal::SIGTRAP)),
            "{call:?}: {stop:?}"
        );
        let answer = registers::answer(&ptrace::getregs(held.thread).unwrap());
        match -answer {
            errno @ 1..4096 => i32::try_from(errno).unwrap(),
            _ => 0,
        }
    }
}

impl Drop for Captive {
    fn drop(&mut self) {
        for held in &self.threads {
            // The call in which it was interrupted is made again, as after any signal.
            let restored = ptrace::setregs(held.thread, held.before);
            let gone = ptrace::detach(held.thread, None);
            if let Err(error) = restored.and(gone) {
                eprintln!("thread {} cannot go on: {error}", held.thread);
            }
        }
    }
}

fn hold(thread: Pid) -> Held {
    ptrace::seize(thread, Options::empty()).unwrap();
    ptrace::interrupt(thread).unwrap();
    await_stop(thread);
    let before = ptrace::getregs(thread).unwrap();
    Held { thread, before }
}

fn await_stop(thread: Pid) -> WaitStatus {
    let mut status = WaitStatus::StillAlive;
    wait_until("a thread has stopped", SOON, || {
        let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
        status = match waitpid(thread, Some(flags)) {
            Err(Errno::EINTR) => WaitStatus::StillAlive,
            other => other.unwrap(),
        };
        status != WaitStatus::StillAlive
    });
    status
}

#[cfg(target_arch = "x86_64")]
mod registers {
    use libc::user_regs_struct as Registers;

    pub const SYSCALL: [u8; 2] = [0x0f, 0x05];

    pub fn next(registers: &Registers) -> u64 {
        registers.rip
    }

    pub fn stack(registers: &Registers) -> u64 {
        registers.rsp
    }

    pub fn set_call(registers: &mut Registers, at: u64, number: i64, arguments: [u64; 6]) {
        registers.rip = at;
        registers.rax = number.cast_unsigned();
        // Not in a call that is to be made again.
        registers.orig_rax = u64::MAX;
        [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ] = arguments;
    }

    pub fn answer(registers: &Registers) -> i64 {
        registers.rax.cast_signed()
    }
}
