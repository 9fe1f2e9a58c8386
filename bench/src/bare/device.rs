//! The transport over `/dev/fuse`: read(2) brings a request, writev(2) takes its answer, one thread per descriptor. Blocking
//! and with nothing between the two calls, so that it costs what they cost.
//!
//! Source: `include/uapi/linux/fuse.h` (`FUSE_DEV_IOC_CLONE`), `fs/fuse/dev.c` of Linux.

// One ioctl, for which there is no safe call.
#![allow(unsafe_code)]

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};

use crate::bare::wire::{self, Answer, Answers, IN_HEADER, MAX_REQUEST, Request};
use crate::error::{At, Error, Result};

/// The device.
pub const PATH: &str = "/dev/fuse";
/// `FUSE_DEV_IOC_CLONE`: `_IOR(229, 0, uint32_t)`.
const CLONE: rustix::ioctl::Opcode = opcode::read::<u32>(229, 0);
/// Bytes of the largest message: headers and the data of a WRITE.
const MESSAGE: usize = MAX_REQUEST + 4096;

/// Opens the device, blocking.
pub fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open(PATH, flags, Mode::empty())?)
}

/// Opens it once more, for the mount of `first`.
pub fn join(first: &OwnedFd) -> Result<OwnedFd> {
    let device = open().at("open", Path::new(PATH))?;
    let number = first.as_raw_fd() as u32;
    // SAFETY: the kernel reads one u32 through the pointer, which `Setter` provides, and changes only `device`.
    unsafe { ioctl(device.as_fd(), Setter::<CLONE, u32>::new(number)) }
        .at("clone", Path::new(PATH))?;
    Ok(device)
}

/// Reads INIT, which is there as soon as the mount is, and answers it.
pub fn handshake(device: &OwnedFd, uring: bool) -> Result<()> {
    let mut message = vec![0; MESSAGE];
    let length = loop {
        match rustix::io::read(device, &mut message[..]) {
            Err(Errno::INTR | Errno::AGAIN) => {}
            read => break read.at("read INIT from", Path::new(PATH))?,
        }
    };
    let answer = wire::answer_init(&message[..length], uring)
        .map_err(|reason| Error::Usage(reason.to_owned()))?;
    rustix::io::write(device, &answer).at("answer INIT on", Path::new(PATH))?;
    Ok(())
}

/// Serves one descriptor until its mount is gone.
pub fn serve(device: &OwnedFd, answers: &Answers) -> Result<()> {
    let zeroes = vec![0; MAX_REQUEST];
    let mut message = vec![0; MESSAGE];
    loop {
        match rustix::io::read(device, &mut message[..]) {
            Ok(length) => {
                if let Err(errno) = answer(device, &message[..length], answers, &zeroes)
                    // Its caller was killed, or the mount went away meanwhile.
                    && !matches!(errno, Errno::NOENT | Errno::NODEV)
                {
                    return Err(errno).at("answer on", Path::new(PATH));
                }
            }
            // NOENT: the request was taken back before we had it.
            Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
            Err(Errno::NODEV) => return Ok(()),
            Err(errno) => return Err(errno).at("read", Path::new(PATH)),
        }
    }
}

fn answer(
    device: &OwnedFd,
    message: &[u8],
    answers: &Answers,
    zeroes: &[u8],
) -> rustix::io::Result<()> {
    let (header, body) = message.split_at(IN_HEADER.min(message.len()));
    let request = Request::parse(header);
    let answer = answers.to(request, body);
    let (errno, body) = match &answer {
        Answer::Silence => return Ok(()),
        Answer::Error(errno) => (*errno, &[][..]),
        Answer::Body(body) => (0, *body),
        Answer::Written(written) => (0, &written[..]),
        // Never more than `MAX_REQUEST`.
        Answer::Data(length) => (0, &zeroes[..*length]),
    };
    let header = wire::out_header(request.unique, errno, body.len());
    rustix::io::writev(device, &[IoSlice::new(&header), IoSlice::new(body)]).map(drop)
}
