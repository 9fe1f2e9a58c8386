//! What the crash tests share: a disk in memory that notes every operation, what can be left of it after a crash, a
//! model of what the guest may then find, and random loads. It knows nothing of how the engine does its work.

#![allow(dead_code)]

pub mod case;
#[path = "../support/cases.rs"]
pub mod cases;
pub mod disk;
pub mod guest;
pub mod log;
pub mod made;
pub mod model;
#[path = "../support/rng.rs"]
pub mod rng;
pub mod run;
pub mod states;
#[path = "../support/tools.rs"]
pub mod tools;

/// Bytes that a disk writes whole or not at all.
pub const SECTOR: u64 = 512;
