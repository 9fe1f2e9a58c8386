//! The image that file cells use: fully written, so that no cell measures allocation, and cached or not as a cell wants.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, fadvise};

use crate::error::{At, Result};
use crate::signals;

const CHUNK: usize = 1 << 20;

/// The image file.
pub struct Image {
    /// Where it lies.
    pub path: PathBuf,
}

impl Image {
    /// Writes an image of `mebibytes` MiB, named `disk.raw`, into `directory`.
    pub fn create(directory: &Path, mebibytes: u64) -> Result<Self> {
        let path = directory.join("disk.raw");
        let mut file = File::create(&path).at("create", &path)?;
        let mut chunk = vec![0u8; CHUNK];
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..mebibytes {
            signals::check()?;
            // Not zeroes and not one repeated chunk: nothing below may find a short form for it.
            for word in chunk.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            file.write_all(&chunk).at("write", &path)?;
        }
        file.sync_all().at("sync", &path)?;
        Ok(Self { path })
    }

    /// Brings the image to rest before a measurement: nothing dirty, and all of it in the page cache or none.
    pub fn settle(&self, cached: bool) -> Result<()> {
        let mut file = File::open(&self.path).at("open", &self.path)?;
        file.sync_all().at("sync", &self.path)?;
        if !cached {
            return fadvise(file.as_fd(), 0, None, Advice::DontNeed)
                .at("drop the cache of", &self.path);
        }
        let mut chunk = vec![0u8; CHUNK];
        while file.read(&mut chunk).at("read", &self.path)? > 0 {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn an_image_is_fully_allocated_and_not_repetitive() {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::create(directory.path(), 2).unwrap();
        let metadata = std::fs::metadata(&image.path).unwrap();
        assert_eq!(metadata.len(), 2 << 20);
        assert!(metadata.blocks() * 512 >= 2 << 20);
        let bytes = std::fs::read(&image.path).unwrap();
        assert_ne!(bytes[..CHUNK], bytes[CHUNK..]);
        image.settle(true).unwrap();
        image.settle(false).unwrap();
    }
}
