//! Buffers that a request needs for itself: to put a cluster together, to read what is compressed. Each thread keeps a
//! few, as a fresh one costs the kernel a page fault for every page. What is in one is what was in it last.

use std::cell::RefCell;

use diskfuse_block::{Error, Result};
use diskfuse_ring::Buf;

/// Buffers that a thread keeps, and bytes of one at most.
const KEPT: usize = 8;
const KEPT_BYTES: usize = 256 << 10;

thread_local! {
    static SPARE: RefCell<Vec<Buf>> = const { RefCell::new(Vec::new()) };
}

/// A buffer with a window of `len` bytes. It holds anything.
pub(super) fn take(len: usize) -> Result<Buf> {
    let kept = SPARE.with_borrow_mut(|spare| {
        let fits = spare.iter().rposition(|buf| buf.capacity() >= len)?;
        Some(spare.swap_remove(fits))
    });
    match kept {
        Some(buf) => Ok(buf.with_window(0..len)),
        None => {
            // Alike, so that the next one who asks can use it.
            let size = if len > KEPT_BYTES { len } else { KEPT_BYTES };
            let buf = Buf::new(size).map_err(|e| Error::os(format!("allocate {size} bytes"), e))?;
            Ok(buf.with_window(0..len))
        }
    }
}

/// Gives a buffer back.
pub(super) fn give(buf: Buf) {
    SPARE.with_borrow_mut(|spare| {
        if spare.len() < KEPT && buf.capacity() == KEPT_BYTES {
            spare.push(buf);
        }
    });
}
