//! What the differential, overlap and hostile tests share: seeds, random images by the tools of QEMU, a model of a
//! disk's contents, and chains opened with the engine. Not the crash tests' helpers: those are in `common`.

#![allow(dead_code)]

pub mod atlas;
pub mod bad;
pub mod cases;
pub mod engine;
pub mod image;
pub mod memory;
pub mod model;
pub mod mutate;
pub mod rng;
pub mod session;
pub mod tools;
