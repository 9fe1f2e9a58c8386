//! What a process gives up once it is set up, so that whoever takes it over by a damaged image can do nothing but serve that
//! image: files and sockets by name (Landlock), system calls (seccomp), capabilities, new privileges, core dumps. It also says
//! that the process writes back for others (`PR_SET_IO_FLUSHER`), so that it never waits for itself when memory is short.
//!
//! It must never let a process go on that has given up less than its kernel could take, nor fail for want of a kernel that can.
//!
//! Descriptors that are open stay usable: what is to be used later is opened before.
//!
//! Source: landlock(7), seccomp(2), capabilities(7), `PR_SET_NO_NEW_PRIVS(2const)`, `PR_SET_IO_FLUSHER(2const)`, core(5).

mod calls;
mod every_thread;
mod filter;
mod paths;
mod step;

use rustix::process::{Resource, Rlimit};

use step::Step;

/// How much is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Everything but what serving takes: nothing is opened, connected, mounted or started any more.
    Sealed,
    /// For a process whose clients name files and sockets that it is to open, and make it mount: other programs, other
    /// processes and the kernel's own set-up are out of reach.
    Open,
    /// For one that also starts a set-user-id program: core dumps.
    Helped,
}

/// Why a process must not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A thread did not answer the signal in time: it hangs in the kernel.
    #[error("thread {0} does not answer")]
    Silent(i32),
    /// A thread could not give up what every thread can.
    #[error("a thread could not give up its rights: {0}")]
    Step(std::io::Error),
    /// The threads cannot be listed, or the signal not be set up.
    #[error("the threads cannot be reached: {0}")]
    Threads(std::io::Error),
    /// Rules were refused that the kernel says it knows.
    #[error("rules for paths: {0}")]
    Paths(#[from] landlock::RulesetError),
    /// The filter is not one; a mistake in this crate.
    #[error("filter of system calls: {0}")]
    Filter(seccompiler::BackendError),
}

/// Gives up what `extent` says, in every thread of the process and those that they make. There is no way back. Call it once,
/// when no thread is about to be made by any other than the caller. Returns what this kernel, or this user, could not have: a
/// few words each, for the log.
pub fn enter(extent: Extent) -> Result<Vec<String>, Error> {
    let mut lacking = Vec::new();
    if let Err(error) = no_core_dumps() {
        lacking.push(format!("core dumps stay on ({error})"));
    }
    if extent == Extent::Helped {
        return Ok(lacking);
    }
    let sealed = extent == Extent::Sealed;
    let paths = if sealed { paths::none()? } else { None };
    if sealed && paths.is_none() {
        lacking.push(
            "files by name are held off by the filter of system calls alone (no Landlock here)"
                .into(),
        );
    }
    // For ever, as a thread that was given up waiting for may still come to it.
    let step: &Step = Box::leak(Box::new(Step::new(paths.as_ref(), sealed)));
    every_thread::perform(step)?;
    if let Some(error) = step.flusher_refused() {
        lacking.push(format!("no PR_SET_IO_FLUSHER ({error})"));
    }
    let programs = filter::programs(extent).map_err(Error::Filter)?;
    for program in programs {
        // Containers may refuse it, and have a filter of their own then.
        if let Err(error) = seccompiler::apply_filter_all_threads(&program) {
            lacking.push(format!("system calls are not filtered ({error})"));
            break;
        }
    }
    Ok(lacking)
}

/// What is in memory is other people's data. A limit of one byte is what the kernel honours also where dumps are piped to a
/// program, which a limit of 0 does not stop (`do_coredump()` in `fs/coredump.c`). The process stays as visible to its
/// own user as it was, which `PR_SET_DUMPABLE` would end.
fn no_core_dumps() -> rustix::io::Result<()> {
    let limit = Some(1);
    rustix::process::setrlimit(
        Resource::Core,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    )
}
