//! Going to the background. A process with threads cannot be forked safely, so the program starts itself once more,
//! with the same arguments, before it has done anything: that second process is the daemon. Its standard output is a
//! pipe to the first one, which waits until the daemon says that it is ready, or has ended with an error of its own
//! on the terminal. It must never report success for a daemon that is not serving, nor leave a daemon behind for
//! somebody who was told that it failed.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitCode, Stdio};

use crate::error::{Error, Result};
use crate::output;

/// Tells the second process what it is. Its value is the first process's id, so that a variable that strayed into
/// somebody's environment means nothing.
const VARIABLE: &str = "DISKFUSE_DAEMON_OF";

/// What the daemon says when it is ready. What follows is for the first process's standard output.
const READY: &[u8] = b"ready\n";

/// The longest that a daemon may say, in bytes; paths are shorter.
const LONGEST: u64 = 64 << 10;

/// What a process that is asked to go to the background is.
pub enum Role {
    /// The first process: all it does is [`launch`].
    Launcher,
    /// The daemon.
    Daemon(Readiness),
}

/// The duty to say that the daemon is ready. Dropping it means that it failed.
#[must_use = "the first process waits for it"]
pub struct Readiness {
    /// To the first process. Standard output leads nowhere by now, so that nothing strays into it.
    pipe: File,
    /// What standard error is to be, open already: a process in the sandbox opens nothing.
    null: File,
}

/// Finds out what this process is. Called once.
pub fn role() -> Result<Role> {
    let parent = rustix::process::getppid().map(|id| id.as_raw_nonzero().to_string());
    let told = std::env::var(VARIABLE).ok();
    if told.is_none() || told != parent {
        return Ok(Role::Launcher);
    }
    let out = std::io::stdout().as_fd().try_clone_to_owned();
    let pipe = File::from(out.map_err(Error::system(FAILED))?);
    let null = null()?;
    rustix::stdio::dup2_stdout(&null).map_err(Error::system(FAILED))?;
    Ok(Role::Daemon(Readiness { pipe, null }))
}

/// Starts this program once more as the daemon and waits until it is ready (0) or has failed (its exit code; it has
/// said why).
pub fn launch() -> Result<ExitCode> {
    let mut arguments = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(called) = arguments.next() {
        command.arg0(called);
    }
    let daemon = command
        .args(arguments)
        .env(VARIABLE, std::process::id().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(Error::system("Could not start the daemon (/proc/self/exe)"))?;
    wait(daemon)
}

fn wait(mut daemon: Child) -> Result<ExitCode> {
    let mut said = Vec::new();
    if let Some(pipe) = daemon.stdout.take() {
        // What came before an error is all there is.
        let _ = pipe.take(LONGEST).read_to_end(&mut said);
    }
    if let Some(rest) = said.strip_prefix(READY) {
        output::say(&String::from_utf8_lossy(rest))?;
        return Ok(ExitCode::SUCCESS);
    }
    let status = daemon
        .wait()
        .map_err(Error::system("Could not wait for the daemon"))?;
    if let Some(signal) = status.signal() {
        return Err(Error::refused(format!(
            "The daemon was ended by signal {signal} before it was ready"
        )));
    }
    match status.code() {
        None | Some(0) => Err(Error::refused("The daemon ended before it was ready")),
        Some(code) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
    }
}

const FAILED: &str = "Could not go to the background";

fn null() -> Result<File> {
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    null.map_err(Error::system("Could not open /dev/null"))
}

impl Readiness {
    /// Says that the daemon is ready, with `text` for the standard output of the first process, and cuts every tie to
    /// the terminal: session, working directory, standard streams. Relative paths mean nothing afterwards.
    ///
    /// # Errors
    /// The first process is gone, so nobody knows of the daemon: it must undo everything and end.
    pub fn announce(self, text: &str) -> Result<()> {
        // It fails only for the leader of a group, which is free of its terminal's signals already.
        let _ = rustix::process::setsid();
        std::env::set_current_dir("/").map_err(Error::system(FAILED))?;
        // Threads are named after the program's file, which is `exe` here.
        let _ = rustix::thread::set_name(c"diskfuse");
        let mut pipe = &self.pipe;
        pipe.write_all(&[READY, text.as_bytes()].concat())
            .map_err(Error::system("The process that started the daemon is gone"))?;
        // The end of the pipe, by which the first process knows that all has been said, comes when this returns.
        rustix::stdio::dup2_stderr(&self.null).map_err(Error::system(FAILED))
    }
}
