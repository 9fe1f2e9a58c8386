//! Bytes: what tests write, and memory that O_DIRECT accepts.

/// `len` bytes that differ from sector to sector and from one `seed` to the next, and are never all zeroes: what is
/// missing, shifted or stale is found by comparing.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    // The xorshift64* generator, see Vigna, "An experimental exploration of Marsaglia's xorshift generators".
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Memory that begins on a page, as O_DIRECT wants it.
pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

/// Larger than any alignment that a disk here asks for.
const PAGE: usize = 4096;

impl Aligned {
    /// `len` zeroes.
    pub fn zeroes(len: usize) -> Self {
        let memory = vec![0; len + PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        Self { memory, start, len }
    }

    /// A copy.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut copy = Self::zeroes(bytes.len());
        copy.bytes_mut().copy_from_slice(bytes);
        copy
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_differ_by_seed_and_by_sector() {
        let (a, b) = (pattern(4096, 1), pattern(4096, 2));
        assert_ne!(a, b);
        assert_ne!(a[..512], a[512..1024]);
        assert_eq!(a, pattern(4096, 1));
        assert_eq!(pattern(1000, 3).len(), 1000);
    }

    #[test]
    fn aligned_memory_is_aligned() {
        for len in [1, 512, 8192] {
            let memory = Aligned::copy_of(&pattern(len, 7));
            assert_eq!(memory.bytes().as_ptr().align_offset(PAGE), 0);
            assert_eq!(memory.bytes(), pattern(len, 7));
        }
    }
}
