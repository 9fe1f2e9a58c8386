//! Rings, and nodes over the files of an [`Image`](super::image::Image). Every wait has a limit.

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use diskfuse_block::drivers::{Discard, FileConfig, open_file};
use diskfuse_block::{Node, Result, io};
use diskfuse_qcow2::node::{Children, Qcow2Config, Qcow2Node};
use diskfuse_ring::{Buf, Choice, Config, IoThread, Polling, Reply, Ring};

use super::image::Layer;
use super::rng::Rng;

/// Longer than anything here takes.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How the files below an image are opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Below {
    pub direct: bool,
    pub read_only: bool,
}

pub fn ring_config(choice: Choice) -> Config {
    Config {
        choice,
        polling: Polling::OFF,
    }
}

/// Mostly io_uring.
pub fn random_choice(rng: &mut Rng) -> Choice {
    if rng.chance(15) {
        Choice::Epoll
    } else {
        Choice::Auto
    }
}

/// Runs a future on a ring of its own.
pub fn run<F: Future>(choice: Choice, future: F) -> F::Output {
    Ring::new(&ring_config(choice)).unwrap().block_on(future)
}

pub fn threads(choice: Choice, count: u64) -> Vec<IoThread> {
    let spawn = |n| IoThread::spawn(&format!("queue-{n}"), ring_config(choice)).unwrap();
    (0..count).map(spawn).collect()
}

pub fn wait<T>(reply: Reply<T>, what: &dyn std::fmt::Debug) -> T {
    let Ok(answer) = reply.wait_for(LIMIT) else {
        panic!("no answer in {LIMIT:?} to {what:?}");
    };
    answer.unwrap_or_else(|e| panic!("{e}, as its thread panicked, in {what:?}"))
}

pub fn file(path: &Path, below: Below) -> Result<Arc<dyn Node>> {
    Ok(open_file(&FileConfig {
        filename: path.to_owned(),
        direct: below.direct,
        read_only: below.read_only,
        discard: Discard::Unmap,
        ..FileConfig::default()
    })?)
}

/// Opens a chain, the base first; `config` is for the top, everything below is read-only.
pub async fn open(layers: &[Layer], config: &Qcow2Config, below: Below) -> Result<Arc<Qcow2Node>> {
    let (top, rest) = layers.split_last().unwrap();
    let lower = Below {
        read_only: true,
        ..below
    };
    let mut backing: Option<Arc<dyn Node>> = None;
    for layer in rest {
        if layer.options.is_none() {
            backing = Some(file(&layer.path, lower)?);
            continue;
        }
        let config = Qcow2Config {
            read_only: true,
            ..Qcow2Config::default()
        };
        backing = Some(open_one(layer, backing, &config, lower).await?);
    }
    open_one(top, backing, config, below).await
}

async fn open_one(
    layer: &Layer,
    backing: Option<Arc<dyn Node>>,
    config: &Qcow2Config,
    below: Below,
) -> Result<Arc<Qcow2Node>> {
    let data_file = match &layer.data_file {
        Some(path) => Some(file(path, below)?),
        None => None,
    };
    let children = Children {
        file: file(&layer.path, below)?,
        data_file,
        backing,
    };
    Qcow2Node::open(children, config).await
}

/// A buffer whose window holds `bytes`.
pub fn buffer(bytes: &[u8]) -> Buf {
    let mut buf = Buf::new(bytes.len().max(1)).unwrap();
    buf.set_window(0..bytes.len());
    buf.as_mut_slice().copy_from_slice(bytes);
    buf
}

pub async fn write(node: &dyn Node, offset: u64, bytes: &[u8]) -> Result<()> {
    io::write(node, offset, buffer(bytes)).await.0
}

pub async fn read(node: &dyn Node, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut buf = Buf::new((len as usize).max(1)).unwrap();
    buf.set_window(0..len as usize);
    // What was in the buffer before must not show.
    buf.as_mut_slice().fill(0xEE);
    let (result, buf) = io::read(node, offset, buf).await;
    result.map(|()| buf.as_slice().to_vec())
}
