//! One refcount in a block's bytes: 1 to 64 bits wide, big-endian; widths below a byte count from the least significant
//! bit (specification, "Refcount block entry").

/// The refcount at `index`, `1 << order` bits wide. 0 past the end of the block.
#[inline]
pub fn get(block: &[u8], order: u32, index: usize) -> u64 {
    let Some(bytes) = place(block.len(), order, index).and_then(|r| block.get(r)) else {
        return 0;
    };
    if order < 3 {
        let shift = (index << order) & 7;
        return u64::from(bytes[0] >> shift) & mask(order);
    }
    bytes.iter().fold(0, |all, &b| all << 8 | u64::from(b))
}

/// Stores the refcount at `index`; bits that do not fit are cut off. Nothing happens past the end of the block.
#[inline]
pub fn set(block: &mut [u8], order: u32, index: usize, value: u64) {
    let len = block.len();
    let Some(bytes) = place(len, order, index).and_then(|r| block.get_mut(r)) else {
        return;
    };
    if order < 3 {
        let shift = (index << order) & 7;
        let mask = mask(order) << shift;
        bytes[0] = (u64::from(bytes[0]) & !mask | (value << shift) & mask) as u8;
        return;
    }
    let width = bytes.len();
    bytes.copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

fn mask(order: u32) -> u64 {
    (1 << (1 << order)) - 1
}

/// The bytes that hold it.
fn place(len: usize, order: u32, index: usize) -> Option<std::ops::Range<usize>> {
    let start = index.checked_shl(order)? >> 3;
    let end = start + (1usize << order).div_ceil(8);
    (end <= len).then_some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_what_was_stored_and_touches_nothing_else() {
        for order in 0..=6 {
            let count = (64 * 8) >> order;
            let mut block = [0u8; 64];
            let max = u64::MAX >> (64 - (1u32 << order));
            for index in 0..count {
                set(&mut block, order, index, max);
                assert_eq!(get(&block, order, index), max);
                let others = (0..count).filter(|&n| n != index);
                assert!(others.into_iter().all(|n| get(&block, order, n) == 0));
                set(&mut block, order, index, 0);
                assert_eq!(block, [0; 64]);
            }
            assert_eq!(get(&block, order, count), 0, "past the end");
        }
    }

    #[test]
    fn bytes_are_those_of_the_specification() {
        let mut block = [0u8; 8];
        set(&mut block, 4, 1, 0x1234);
        assert_eq!(block[..4], [0, 0, 0x12, 0x34]);
        let mut block = [0u8; 8];
        set(&mut block, 1, 1, 3);
        assert_eq!(block[0], 0b1100);
    }
}
