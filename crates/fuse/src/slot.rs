//! The memory of one request: where it is read to and where its reply is put together. Laid out so that neither the
//! data of a WRITE nor that of a READ is ever copied: both lie page-aligned right behind their headers.
//!
//! ```text
//!   0 ............ 4016 ........ 4080 .. 4096 ......................... 4096 + 1 MiB
//!                  | request header + body | WRITE data
//!                               | reply header | READ data
//! ```

use std::io;

use diskfuse_ring::{Buf, PAGE};
use zerocopy::{Immutable, IntoBytes};

use crate::abi::{OUT_HEADER, OutHeader};
use crate::handshake::MAX_REQUEST;
use crate::request::WRITE_PAYLOAD;

/// Where data begins: page-aligned.
const DATA: usize = PAGE;
/// Where a request is read to.
const REQUEST: usize = DATA - WRITE_PAYLOAD;
/// Where a reply begins.
const REPLY: usize = DATA - OUT_HEADER;

/// A request's buffer. Between operations it holds its memory; while one is in flight the ring does.
pub(crate) struct SlotBuf {
    buf: Option<Buf>,
    /// Bytes of the data area, from its beginning, that are known to be zero.
    zeroed: usize,
    /// Bytes of the data area that may be resident.
    touched: usize,
}

impl SlotBuf {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            buf: Some(Buf::new(DATA + MAX_REQUEST)?),
            zeroed: MAX_REQUEST,
            touched: 0,
        })
    }

    /// The memory, for an operation. It must come back by [`SlotBuf::put`].
    fn take(&mut self) -> Buf {
        match self.buf.take() {
            Some(buf) => buf,
            // Each caller in this crate puts back what it took before anybody else can look.
            None => unreachable!("the buffer of a slot is in flight"),
        }
    }

    /// The memory with the window that a request is read to.
    pub(crate) fn take_for_request(&mut self) -> Buf {
        self.take().with_window(REQUEST..DATA + MAX_REQUEST)
    }

    /// The memory with the window that `len` bytes of data are read to or written from.
    pub(crate) fn take_for_data(&mut self, len: usize) -> Buf {
        self.take().with_window(DATA..DATA + len)
    }

    /// The memory with the window of a reply with `len` bytes of data.
    pub(crate) fn take_for_reply(&mut self, header: &OutHeader, len: usize) -> Buf {
        let mut buf = self.take().with_window(REPLY..DATA + len);
        buf.as_mut_slice()[..OUT_HEADER].copy_from_slice(header.as_bytes());
        buf
    }

    pub(crate) fn put(&mut self, buf: Buf) {
        self.buf = Some(buf);
    }

    /// Notes that the kernel has put a request of `len` bytes here, and shows it.
    pub(crate) fn request(&mut self, len: usize) -> &[u8] {
        self.dirty(len.saturating_sub(WRITE_PAYLOAD));
        match &mut self.buf {
            Some(buf) => {
                buf.set_window(REQUEST..REQUEST + len.min(WRITE_PAYLOAD + MAX_REQUEST));
                buf.as_slice()
            }
            None => &[],
        }
    }

    /// Notes that the first `len` bytes of the data area hold something.
    pub(crate) fn dirty(&mut self, len: usize) {
        if len > 0 {
            self.zeroed = 0;
            self.touched = self.touched.max(len);
        }
    }

    /// Makes the first `len` bytes of the data area zero; mostly they are already.
    pub(crate) fn zero(&mut self, len: usize) {
        if self.zeroed < len {
            if let Some(buf) = &mut self.buf {
                buf.set_window(DATA..DATA + len);
                buf.as_mut_slice().fill(0);
            }
            self.zeroed = len;
            self.touched = self.touched.max(len);
        }
    }

    /// Puts a struct into the data area; its length in bytes.
    pub(crate) fn put_struct<T: IntoBytes + Immutable>(&mut self, value: &T) -> usize {
        let bytes = value.as_bytes();
        self.dirty(bytes.len());
        if let Some(buf) = &mut self.buf {
            buf.set_window(DATA..DATA + bytes.len());
            buf.as_mut_slice().copy_from_slice(bytes);
        }
        bytes.len()
    }

    /// Bytes of data that may be resident.
    pub(crate) fn touched(&self) -> usize {
        self.touched
    }

    /// Gives the data area's memory back to the kernel.
    pub(crate) fn release(&mut self) {
        if let Some(buf) = &mut self.buf {
            buf.set_window(DATA..DATA + MAX_REQUEST);
            if buf.release() {
                self.zeroed = MAX_REQUEST;
                self.touched = 0;
            } else {
                // Whatever is there stays there, and must not be taken for zeroes.
                self.zeroed = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(slot: &mut SlotBuf, len: usize) -> Vec<u8> {
        let buf = slot.take_for_data(len);
        let bytes = buf.as_slice().to_vec();
        slot.put(buf);
        bytes
    }

    #[test]
    fn zeroes_are_zeroes_whatever_was_there() {
        let mut slot = SlotBuf::new().unwrap();
        slot.zero(4096);
        assert_eq!(data(&mut slot, 4096), [0; 4096]);
        slot.put_struct(&[0xffu8; 104]);
        slot.zero(64);
        slot.zero(4096);
        assert_eq!(data(&mut slot, 4096), [0; 4096]);
        let mut buf = slot.take_for_data(8192);
        buf.as_mut_slice().fill(9);
        slot.put(buf);
        slot.dirty(8192);
        slot.release();
        slot.zero(8192);
        assert_eq!(data(&mut slot, 8192), [0; 8192]);
    }

    #[test]
    fn a_reply_is_header_and_data_in_one_piece() {
        let mut slot = SlotBuf::new().unwrap();
        let len = slot.put_struct(&0x0102_0304_u32);
        let header = OutHeader {
            len: 20,
            error: 0,
            unique: u64::MAX,
        };
        let buf = slot.take_for_reply(&header, len);
        assert_eq!(buf.len(), 20);
        assert_eq!(&buf.as_slice()[..16], header.as_bytes());
        assert_eq!(&buf.as_slice()[16..], 0x0102_0304_u32.as_bytes());
    }

    #[test]
    fn data_of_a_write_is_page_aligned() {
        let mut slot = SlotBuf::new().unwrap();
        let buf = slot.take_for_request();
        assert_eq!(buf.len(), WRITE_PAYLOAD + MAX_REQUEST);
        slot.put(buf);
        let buf = slot.take_for_data(1);
        assert_eq!(buf.as_slice().as_ptr() as usize % PAGE, 0);
    }
}
