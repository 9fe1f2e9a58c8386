//! The memory of one request: where it is read to and where its reply is put together. Laid out so that neither the
//! data of a WRITE nor that of a READ is ever copied: both lie page-aligned right behind their headers.
//!
//! ```text
//!   0 .... 288 ... 4016 ........ 4080 .. 4096 ......................... 4096 + the largest request
//!                  | request header + body | WRITE data
//!                               | reply header | READ data
//!   | headers of a ring entry              | its payload
//! ```

use std::io;

use diskfuse_ring::{Buf, PAGE};
use zerocopy::{Immutable, IntoBytes};

use crate::abi::{IN_HEADER, OUT_HEADER, OutHeader, RingEntry, ring_header};
use crate::request::{Name, WRITE_PAYLOAD};

/// Where data begins: page-aligned.
pub(crate) const DATA: usize = PAGE;
/// Where a request is read to.
const REQUEST: usize = DATA - WRITE_PAYLOAD;
/// Where a reply begins.
const REPLY: usize = DATA - OUT_HEADER;

/// A request's buffer. Between operations it holds its memory; while one is in flight the ring does.
pub(crate) struct SlotBuf {
    buf: Option<Buf>,
    /// Bytes of the data area.
    size: usize,
    /// Bytes of the data area, from its beginning, that are known to be zero.
    zeroed: usize,
    /// Bytes of the data area that may be resident.
    touched: usize,
}

impl SlotBuf {
    /// Memory for requests with up to `size` bytes of data.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        Ok(Self::of(Buf::new(DATA + size)?))
    }

    /// The same, of memory that nobody has written to yet: a page, then whole pages of data.
    pub(crate) fn of(buf: Buf) -> Self {
        let size = buf.capacity().saturating_sub(DATA);
        Self {
            buf: Some(buf),
            size,
            zeroed: size,
            touched: 0,
        }
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
        let end = DATA + self.size;
        self.take().with_window(REQUEST..end)
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
        let len = len.min(WRITE_PAYLOAD + self.size);
        match &mut self.buf {
            Some(buf) => {
                buf.set_window(REQUEST..REQUEST + len);
                buf.as_slice()
            }
            None => &[],
        }
    }

    /// The name that came with a LOOKUP, without the zero at its end.
    pub(crate) fn name(&mut self, name: Name) -> &[u8] {
        let start = match name.in_payload {
            true => DATA,
            false => REQUEST + IN_HEADER,
        };
        let len = (name.len as usize).min(self.size);
        let Some(buf) = &mut self.buf else {
            return &[];
        };
        buf.set_window(start..start + len);
        let bytes = buf.as_slice();
        bytes.split(|&b| b == 0).next().unwrap_or_default()
    }

    /// Puts bytes into the data area behind `at` bytes; false, and nothing is done, if there is no room.
    pub(crate) fn put_bytes(&mut self, at: usize, bytes: &[u8]) -> bool {
        let end = at.saturating_add(bytes.len());
        if end > self.size {
            return false;
        }
        self.dirty(end);
        if let Some(buf) = &mut self.buf {
            buf.set_window(DATA + at..DATA + end);
            buf.as_mut_slice().copy_from_slice(bytes);
        }
        true
    }

    /// Bytes of the data area.
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The memory, for a command of a ring entry.
    pub(crate) fn take_for_command(&mut self) -> Buf {
        self.take()
    }

    /// The headers of the ring entry whose memory this is.
    pub(crate) fn ring_headers(&mut self) -> Option<&[u8; ring_header::SIZE]> {
        let buf = self.buf.as_mut()?;
        buf.set_window(0..ring_header::SIZE);
        buf.as_slice().first_chunk()
    }

    /// Puts the header of an answer with `len` bytes of data where the kernel looks for it in a ring entry.
    pub(crate) fn put_ring_answer(&mut self, header: &OutHeader, len: usize) {
        let entry = RingEntry {
            payload_size: len as u32,
            ..RingEntry::default()
        };
        if let Some(buf) = &mut self.buf {
            buf.set_window(0..ring_header::SIZE);
            let bytes = buf.as_mut_slice();
            bytes[ring_header::IN_OUT..][..OUT_HEADER].copy_from_slice(header.as_bytes());
            bytes[ring_header::ENTRY..].copy_from_slice(entry.as_bytes());
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

    /// Gives the data area's memory back to the kernel but for its first `len` bytes.
    pub(crate) fn release_beyond(&mut self, len: usize) {
        let kept = len.next_multiple_of(PAGE).min(self.size);
        if let Some(buf) = &mut self.buf {
            buf.set_window(DATA + kept..DATA + self.size);
            if buf.release() {
                self.touched = self.touched.min(kept);
            }
            self.zeroed = 0;
        }
    }

    /// Notes that the data area's memory was given back to the kernel.
    pub(crate) fn released(&mut self) {
        self.zeroed = self.size;
        self.touched = 0;
    }

    /// Gives the data area's memory back to the kernel.
    pub(crate) fn release(&mut self) {
        if let Some(buf) = &mut self.buf {
            buf.set_window(DATA..DATA + self.size);
            if buf.release() {
                self.released();
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
        let mut slot = SlotBuf::new(1 << 20).unwrap();
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
        let mut slot = SlotBuf::new(1 << 20).unwrap();
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
        let mut slot = SlotBuf::new(1 << 20).unwrap();
        let buf = slot.take_for_request();
        assert_eq!(buf.len(), WRITE_PAYLOAD + (1 << 20));
        slot.put(buf);
        let buf = slot.take_for_data(1);
        assert_eq!(buf.as_slice().as_ptr() as usize % PAGE, 0);
    }
}
