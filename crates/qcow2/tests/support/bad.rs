//! One image with one thing wrong: made right by the tools of QEMU, then changed byte by byte, and what must become of it
//! when it is opened, read or written. It never decides what is wrong with an image: the tests do.

use std::sync::Arc;

use diskfuse_block::{Kind, Node};
use diskfuse_qcow2::node::{Qcow2Config, Qcow2Node};
use diskfuse_ring::Choice;

use super::atlas::{self, Atlas, be64, put};
use super::engine::{self, Below, run};
use super::image::{Image, Options};
use super::tools;

pub const CLUSTER: u64 = 4096;
pub const SIZE: u64 = 1 << 20;
pub const INCOMPATIBLE: u64 = 72;
pub const COPIED: u64 = 1 << 63;

/// An image on disk, its bytes to be changed, and where its metadata are.
pub struct Bad {
    pub image: Image,
    pub bytes: Vec<u8>,
    pub atlas: Atlas,
}

impl Bad {
    /// 16 clusters of sevens.
    pub fn new() -> Self {
        let options = Options {
            cluster_size: CLUSTER,
            ..Options::plain()
        };
        Self::with(&options, "write -P 7 0 64k\n")
    }

    pub fn with(options: &Options, script: &str) -> Self {
        let mut image = Image::empty();
        image.create(options, SIZE);
        tools::qemu_io(image.path(), script);
        Self::of(image)
    }

    pub fn of(image: Image) -> Self {
        let bytes = std::fs::read(image.path()).unwrap();
        let atlas = Atlas::of(&bytes);
        Self {
            image,
            bytes,
            atlas,
        }
    }

    pub fn put64(&mut self, at: u64, value: u64) {
        put(&mut self.bytes, at, 8, value);
    }

    pub fn put32(&mut self, at: u64, value: u64) {
        put(&mut self.bytes, at, 4, value);
    }

    pub fn first(&self, kind: atlas::Kind) -> u64 {
        self.atlas.first(kind).start
    }

    /// Sets the L2 entry of a guest cluster.
    pub fn set_entry(&mut self, cluster: u64, value: u64) {
        let at = self.first(atlas::Kind::L2) + cluster * 8;
        self.put64(at, value);
    }

    pub fn entry(&self, cluster: u64) -> u64 {
        be64(&self.bytes, self.first(atlas::Kind::L2) + cluster * 8)
    }

    /// Sets the refcount, of 16 bits, of a cluster of the file.
    pub fn set_refcount(&mut self, offset: u64, value: u64) {
        let block = self.first(atlas::Kind::RefcountBlock);
        put(&mut self.bytes, block + offset / CLUSTER * 2, 2, value);
    }

    pub fn save(&self) {
        std::fs::write(self.image.path(), &self.bytes).unwrap();
    }

    pub fn on_disk(&self) -> Vec<u8> {
        std::fs::read(self.image.path()).unwrap()
    }

    pub fn marked_corrupt(&self) -> bool {
        be64(&self.on_disk(), INCOMPATIBLE) & 2 != 0
    }

    /// Opens it, with these bytes, for reading only or for writing.
    pub async fn open(&self, read_only: bool) -> diskfuse_block::Result<Arc<Qcow2Node>> {
        self.save();
        let config = Qcow2Config {
            read_only,
            discard: true,
            ..Qcow2Config::default()
        };
        let below = Below {
            direct: false,
            read_only,
        };
        engine::open(&self.image.layers, &config, below).await
    }

    /// It must not be opened at all, and the message must say these words.
    pub fn refused(&self, kind: Kind, words: &[&str]) {
        for read_only in [true, false] {
            let opened = run(Choice::Auto, async { self.open(read_only).await.err() });
            let Some(error) = opened else {
                panic!("it was opened; expected: {words:?}");
            };
            let said = error.to_string();
            assert_eq!(error.kind(), kind, "{said}");
            for word in words {
                let has = said.to_lowercase().contains(&word.to_lowercase());
                assert!(has, "'{word}' is not in: {said}");
            }
        }
        assert!(self.on_disk() == self.bytes, "a refused image was changed");
    }

    /// A write that must be answered EIO; the message must say these words, the image must be marked, later writes be
    /// refused, and the data as well as the metadata be what they were.
    pub fn write_refused(&self, at: u64, len: u64, words: &[&str]) {
        run(Choice::Auto, async {
            let node = self.open(false).await.unwrap();
            let wrote = engine::write(&*node, at, &vec![0xAA; len as usize]).await;
            // What is only found when the tables are written is told by the flush at the latest.
            let wrote = match wrote {
                Ok(()) => engine_flush(&node).await,
                error => error,
            };
            let error = wrote.expect_err("it was written");
            let said = error.to_string();
            assert_eq!(error.errno(), 5, "{said}");
            for word in words {
                assert!(said.contains(word), "'{word}' is not in: {said}");
            }
            assert!(self.marked_corrupt(), "not marked as corrupt after: {said}");
            let later = engine::write(&*node, SIZE - 512, &[1; 512]).await;
            assert!(later.is_err(), "writes go on after: {said}");
            let _ = node.close().await;
        });
        let now = self.on_disk();
        for (kind, range) in &self.atlas.regions {
            let range = range.start.max(104) as usize..(range.end as usize).min(self.bytes.len());
            assert!(
                now[range.clone()] == self.bytes[range],
                "{kind:?} was overwritten"
            );
        }
        assert!(self.marked_corrupt());
        let opened = run(Choice::Auto, async { self.open_as_is(false).await.err() });
        let error = opened.expect("a corrupt image was opened for writing");
        assert_eq!(error.kind(), Kind::Corrupt, "{error}");
    }

    /// As it is on disk now.
    pub async fn open_as_is(&self, read_only: bool) -> diskfuse_block::Result<Arc<Qcow2Node>> {
        let config = Qcow2Config {
            read_only,
            ..Qcow2Config::default()
        };
        let below = Below {
            direct: false,
            read_only,
        };
        engine::open(&self.image.layers, &config, below).await
    }

    /// A read that must fail as the image is bad; the message must say these words.
    pub fn unreadable(&self, at: u64, words: &[&str]) {
        run(Choice::Auto, async {
            let node = self.open(true).await.unwrap();
            let read = engine::read(&*node, at, CLUSTER).await;
            let error = read.expect_err("it was read");
            let said = error.to_string();
            assert_eq!(error.errno(), 5, "{said}");
            for word in words {
                assert!(said.contains(word), "'{word}' is not in: {said}");
            }
            node.close().await.unwrap();
        });
        assert!(self.on_disk() == self.bytes, "a read changed the image");
    }
}

pub fn all(bytes: &[u8], value: u8) -> bool {
    bytes.iter().all(|&b| b == value)
}

pub async fn engine_flush(node: &Qcow2Node) -> diskfuse_block::Result<()> {
    node.flush().await
}
