//! A stream of bytes in both directions, and the descriptors that come with it.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, Shutdown, recvmsg, shutdown,
};

/// Descriptors of one message at most; as many as QEMU takes.
const MOST_FDS: usize = 16;

/// An open stream.
pub struct Stream {
    /// Where bytes come from; nothing ever does if there is none.
    pub input: Option<Arc<OwnedFd>>,
    /// Where bytes go; they are dropped if there is none.
    pub output: Option<Arc<OwnedFd>>,
    /// Whether both are one socket.
    pub socket: bool,
}

impl Stream {
    /// A connected socket.
    pub fn socket(socket: OwnedFd) -> Self {
        let socket = Arc::new(socket);
        Self {
            input: Some(Arc::clone(&socket)),
            output: Some(socket),
            socket: true,
        }
    }

    /// Waits for bytes and takes as many as there are; 0: there will be no more. Descriptors that come along are put
    /// behind those in `fds`; of more than [`MOST_FDS`] the oldest are closed.
    pub fn receive(&self, buffer: &mut [u8], fds: &mut VecDeque<OwnedFd>) -> io::Result<usize> {
        let Some(input) = &self.input else {
            return Ok(0);
        };
        loop {
            let outcome = if self.socket {
                receive_with_fds(input, buffer, fds)
            } else {
                rustix::io::read(input.as_fd(), &mut *buffer)
            };
            match outcome {
                Err(rustix::io::Errno::INTR) => {}
                // Standard input may have been made so by whoever shares it.
                Err(rustix::io::Errno::AGAIN) => wait_readable(input)?,
                other => return Ok(other?),
            }
        }
    }

    /// Makes whoever waits for bytes see the end, if it is a socket.
    pub fn shut_down(&self) {
        if let Some(socket) = self.input.as_ref().filter(|_| self.socket) {
            // It fails if the other side has gone already.
            let _ = shutdown(socket, Shutdown::Both);
        }
    }
}

fn wait_readable(fd: &OwnedFd) -> io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    match poll(&mut [PollFd::new(fd, PollFlags::IN)], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn receive_with_fds(
    socket: &OwnedFd,
    buffer: &mut [u8],
    fds: &mut VecDeque<OwnedFd>,
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(buffer)];
    let received = recvmsg(socket, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    while fds.len() > MOST_FDS {
        fds.pop_front();
    }
    Ok(received.bytes)
}
