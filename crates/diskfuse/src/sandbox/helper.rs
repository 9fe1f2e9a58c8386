//! The helper process: unmounts and removes at the end what a daemon in the sandbox cannot. It is this program once more, started
//! before the sandbox is closed, told all of its deeds, and cut off from hearing of others. It ends with the daemon, and does
//! nothing by itself: what a killed daemon leaves is left.

use std::ffi::OsStr;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::deed::{self, Deed, LONGEST, Order, Removal};
use crate::error::{Error, Result};

/// What the program is called when it is to be the helper.
pub const NAME: &str = "diskfuse-helper";

/// How long the helper may take to end after its last deed.
const PATIENCE: Duration = Duration::from_secs(1);

const FAILED: &str = "Could not start the helper process for the end (--sandbox off does without)";

/// The helper, as the daemon has it.
pub struct Helper {
    child: Child,
    /// Messages of a deed and the connection for it.
    channel: OwnedFd,
}

/// The helper when it knows all its deeds.
pub struct Told(Child);

impl Helper {
    /// Starts it.
    pub fn start() -> Result<Self> {
        let (channel, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(Error::system(FAILED))?;
        let child = Command::new("/proc/self/exe")
            .arg0(NAME)
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            // What a terminal sends to the daemon's group is not for the helper.
            .process_group(0)
            .spawn()
            .map_err(Error::system(FAILED))?;
        Ok(Self { child, channel })
    }

    /// Tells it of a deed.
    pub fn tell(&self, deed: &Deed) -> Result<Order> {
        let failed = || Error::system("Could not tell the helper process of what it is to do");
        let words = serde_json::to_vec(deed).map_err(|error| failed()(error.into()))?;
        let (ours, theirs) = UnixStream::pair().map_err(failed())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut with = SendAncillaryBuffer::new(&mut space);
        let rights = [theirs.as_fd()];
        with.push(SendAncillaryMessage::ScmRights(&rights));
        let words = [IoSlice::new(&words)];
        rustix::net::sendmsg(&self.channel, &words, &mut with, SendFlags::NOSIGNAL)
            .map_err(|errno| failed()(errno.into()))?;
        drop(theirs);
        Order::new(ours).map_err(failed())
    }

    /// Has it remove what this process would.
    pub fn take_over(&self, removal: &mut Removal) -> Result<()> {
        removal.delegate(|leftover| self.tell(&Deed::Remove(leftover.clone())))
    }

    /// That was all.
    pub fn told(self) -> Told {
        Told(self.child)
    }
}

impl Told {
    /// Waits for its end, which comes when all orders are gone.
    pub fn wait(mut self) {
        let end = Instant::now() + PATIENCE;
        while let Ok(None) = self.0.try_wait() {
            if Instant::now() > end {
                tracing::debug!("the helper process is still there");
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Whether this program is to be the helper.
pub fn is_meant(name: &OsStr) -> bool {
    name == NAME
}

/// The helper's life.
pub fn main() -> ExitCode {
    // Threads and processes are named after the program's file, which is `exe` here.
    let _ = rustix::thread::set_name(c"diskfuse-helper");
    // Whoever ends the daemon and all that belongs to it, as service managers do, still wants it to end in order.
    let unheeded = Arc::default();
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        if signal_hook::flag::register(signal, Arc::clone(&unheeded)).is_err() {
            return ExitCode::FAILURE;
        }
    }
    let mut threads = Vec::new();
    while let Some((deed, stream)) = hear() {
        let serve = move || deed::serve(&deed, &stream);
        let thread = std::thread::Builder::new().stack_size(256 << 10);
        // The order of a deed without a thread is refused, as its connection is gone.
        threads.extend(thread.spawn(serve));
    }
    for thread in threads {
        // A connection that broke is one that nobody waits for.
        let _ = thread.join();
    }
    ExitCode::SUCCESS
}

/// The next deed; `None` when all are told.
fn hear() -> Option<(Deed, UnixStream)> {
    let mut words = vec![0; LONGEST as usize];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut with = RecvAncillaryBuffer::new(&mut space);
    let heard = loop {
        let into = &mut [IoSliceMut::new(&mut words)];
        match rustix::net::recvmsg(
            rustix::stdio::stdin(),
            into,
            &mut with,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            heard => break heard.ok()?,
        }
    };
    let deed = serde_json::from_slice(words.get(..heard.bytes)?).ok()?;
    let fd = with.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    })?;
    Some((deed, fd.into()))
}
