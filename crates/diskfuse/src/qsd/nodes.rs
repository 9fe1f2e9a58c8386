//! Nodes of the storage daemon's command line: from what was written to what the drivers are to do. It opens nothing
//! itself and knows no driver's insides.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use diskfuse_block::drivers::{self, FileConfig, NullConfig, RawConfig};
use diskfuse_block::graph::Drained;
use diskfuse_block::{Aio, Graph, Kind, Locking, Node};
use diskfuse_monitor::blockdev::{DetectZeroes, Discard};
use diskfuse_monitor::{
    BlockDriver, BlockdevOptions, FileOptions, NullOptions, OnOffAuto, RawOptions,
};
use diskfuse_ring::{Config, Polling, Ring};

use super::children::Children;
use super::monitor::Monitors;
use super::objects::Objects;
use super::{filters, qcow2, suggest};
use crate::error::{Error, Result};

/// How long requests in flight are waited for before something is changed.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What makes nodes, and changes them.
pub struct Nodes {
    pub(super) graph: Graph,
    pub(super) objects: Objects,
    /// Whose clients hand over descriptors, and are told when an image is corrupt.
    pub(super) monitors: Monitors,
    /// For formats, which read their metadata before anything is served. Made when it is needed.
    ring: OnceCell<Ring>,
    /// What each node was made of.
    made: RefCell<BTreeMap<String, BlockdevOptions>>,
}

impl Nodes {
    /// Puts nodes into `graph`, which may refer to `objects`, and to what clients of `monitors` have handed over.
    pub fn new(graph: Graph, objects: Objects, monitors: Monitors) -> Self {
        Self {
            graph,
            objects,
            monitors,
            ring: OnceCell::new(),
            made: RefCell::default(),
        }
    }

    /// Makes the node, and the nodes written inside it, and returns its name. On an error the graph is as it was.
    pub fn add(&self, options: &BlockdevOptions) -> Result<String> {
        let graph = &self.graph;
        if let Some(name) = &options.node_name
            && graph.names().contains(name)
        {
            return Err(Error::Refused(format!(
                "Duplicate nodes with node-name='{name}'"
            )));
        }
        if options.force_share && !options.read_only {
            let message = "force-share=on can only be used with read-only images";
            return Err(Error::Refused(message.to_owned()));
        }
        let name = self.make(options)?;
        let options = options.clone();
        self.made.borrow_mut().insert(name.clone(), options);
        Ok(name)
    }

    /// What a node was made of, with the options that it has now.
    pub fn options(&self, name: &str) -> Option<BlockdevOptions> {
        self.made.borrow().get(name).cloned()
    }

    /// A node has other options from now on.
    pub(super) fn note(&self, options: &BlockdevOptions) {
        if let Some(name) = &options.node_name {
            self.made.borrow_mut().insert(name.clone(), options.clone());
        }
    }

    /// Takes a node away that nobody uses, and those below it that nobody named. What was written is on stable storage first.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.graph.check_unused(name)?;
        let mut closed = Ok(());
        for going in self.graph.goes_with(name) {
            let node = self.graph.bare(&going)?;
            if !node.read_only() {
                closed = closed.and(self.run(node.close())?);
            }
        }
        self.take_out(name)?;
        let there = self.graph.names();
        self.made
            .borrow_mut()
            .retain(|name, _| there.contains(name));
        closed.map_err(|error| {
            Error::Refused(format!(
                "Node '{name}' is gone, but what was written to it may not be on the disk: {error}"
            ))
        })
    }

    /// Takes a node out of the graph that has been closed. A job that drains something below it is waited for.
    fn take_out(&self, name: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.graph.remove(name) {
                Err(error) if error.kind() == Kind::Drained && Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                outcome => return Ok(outcome?),
            }
        }
    }

    /// [`Graph::drain`], but not for longer than a disk that works may take: the main thread waits here, and with it every
    /// other command. If it takes longer, everybody goes on.
    pub(super) fn drain(&self, name: &str) -> Result<Drained> {
        let drained = self.run(async {
            let mut drain = pin!(self.graph.drain(name));
            let mut limit = pin!(diskfuse_ring::sleep(PATIENCE));
            std::future::poll_fn(|cx| match drain.as_mut().poll(cx) {
                Poll::Ready(drained) => Poll::Ready(Some(drained)),
                Poll::Pending => limit.as_mut().poll(cx).map(|()| None),
            })
            .await
        })?;
        match drained {
            Some(drained) => Ok(drained?),
            None => Err(Error::Refused(format!(
                "Node '{name}' has requests that its disk has not answered for {} seconds; nothing was changed",
                PATIENCE.as_secs()
            ))),
        }
    }

    /// Refuses a name that no node has, in the words of QEMU.
    pub(super) fn check_there(&self, name: &str) -> Result<()> {
        let names = self.graph.names();
        if names.iter().any(|there| there == name) {
            return Ok(());
        }
        let hint = suggest::hint(name, names.iter().map(String::as_str));
        Err(Error::Refused(format!(
            "Cannot find device='{name}' nor node-name='{name}'{hint}"
        )))
    }

    /// [`Nodes::check_there`] for a word that can only mean a node.
    pub(super) fn check_node(&self, name: &str) -> Result<()> {
        let names = self.graph.names();
        if names.iter().any(|there| there == name) {
            return Ok(());
        }
        let hint = suggest::hint(name, names.iter().map(String::as_str));
        Err(Error::Refused(format!(
            "Cannot find device='' nor node-name='{name}'{hint}"
        )))
    }

    fn make(&self, options: &BlockdevOptions) -> Result<String> {
        let graph = &self.graph;
        let name = options.node_name.as_deref();
        if let BlockDriver::File(file) | BlockDriver::HostDevice(file) = &options.driver
            && file.filename.as_os_str().is_empty()
        {
            let driver = options.driver.name();
            return Err(Error::Refused(format!(
                "The '{driver}' block driver requires a file name"
            )));
        }
        match &options.driver {
            BlockDriver::NullCo(null) => insert(
                graph,
                name,
                drivers::open_null(&null_config("null-co", null, options))?,
            ),
            BlockDriver::NullAio(null) => insert(
                graph,
                name,
                drivers::open_null(&null_config("null-aio", null, options))?,
            ),
            BlockDriver::File(file) => insert(
                graph,
                name,
                drivers::open_file(&self.file_config(file, options))?,
            ),
            BlockDriver::HostDevice(file) => insert(
                graph,
                name,
                drivers::open_host_device(&self.file_config(file, options))?,
            ),
            BlockDriver::Raw(raw) => self.add_raw(raw, options),
            BlockDriver::Qcow2(qcow2) => qcow2::add(self, qcow2, options),
            BlockDriver::Throttle(throttle) => filters::add_throttle(self, throttle, options),
            BlockDriver::Blkdebug(blkdebug) => filters::add_blkdebug(self, blkdebug, options),
        }
    }

    /// How to open a file that is not open yet: by its name, or with a descriptor that a client has handed over.
    fn file_config(&self, file: &FileOptions, options: &BlockdevOptions) -> FileConfig {
        FileConfig {
            opener: self.monitors.fdsets().opener(&file.filename),
            ..file_config(file, options)
        }
    }

    /// Does I/O, here and now.
    pub(super) fn run<F: Future>(&self, future: F) -> Result<F::Output> {
        let ring = match self.ring.get() {
            Some(ring) => ring,
            None => {
                let ring = Ring::new(&Config {
                    choice: self.objects.choice(),
                    polling: Polling::OFF,
                })?;
                self.ring.get_or_init(|| ring)
            }
        };
        Ok(ring.block_on(future))
    }

    fn add_raw(&self, raw: &RawOptions, options: &BlockdevOptions) -> Result<String> {
        let mut children = Children::new(self);
        let below = children.filtered(&raw.file, options)?;
        let config = RawConfig {
            offset: raw.offset,
            size: raw.size,
            read_only: options.read_only,
        };
        let name = options.node_name.as_deref();
        let node = drivers::open_raw(below.node, &config)?;
        let name = self.graph.insert(name, node, &[&below.name])?;
        children.keep();
        Ok(name)
    }
}

fn insert(graph: &Graph, name: Option<&str>, node: Arc<impl Node + 'static>) -> Result<String> {
    Ok(graph.insert(name, node, &[])?)
}

pub(super) fn null_config(
    driver: &'static str,
    null: &NullOptions,
    options: &BlockdevOptions,
) -> NullConfig {
    NullConfig {
        driver,
        size: null.size,
        read_zeroes: null.read_zeroes,
        latency: Duration::from_nanos(null.latency_ns),
        read_only: options.read_only,
    }
}

/// `drop-cache` speaks of migration, which there is none of.
pub(super) fn file_config(file: &FileOptions, options: &BlockdevOptions) -> FileConfig {
    FileConfig {
        filename: file.filename.clone(),
        aio: match file.aio {
            Some(diskfuse_monitor::Aio::Threads) => Aio::Threads,
            // Whoever does not choose gets what is fastest.
            None | Some(diskfuse_monitor::Aio::Native | diskfuse_monitor::Aio::IoUring) => {
                Aio::IoUring
            }
        },
        direct: options.cache.direct,
        no_flush: options.cache.no_flush,
        read_only: options.read_only,
        auto_read_only: options.auto_read_only,
        discard: match options.discard {
            Discard::Ignore => drivers::Discard::Ignore,
            Discard::Unmap => drivers::Discard::Unmap,
        },
        detect_zeroes: detect_zeroes(options.detect_zeroes),
        locking: match (options.force_share, file.locking) {
            // A reader who bears with writers objects to nobody.
            (true, _) | (false, OnOffAuto::Off) => Locking::Off,
            (false, OnOffAuto::Auto) => Locking::Auto,
            (false, OnOffAuto::On) => Locking::On,
        },
        opener: None,
    }
}

/// As the drivers have it.
pub(super) fn detect_zeroes(detect: DetectZeroes) -> drivers::DetectZeroes {
    match detect {
        DetectZeroes::Off => drivers::DetectZeroes::Off,
        DetectZeroes::On => drivers::DetectZeroes::On,
        DetectZeroes::Unmap => drivers::DetectZeroes::Unmap,
    }
}

#[cfg(test)]
mod tests {
    use diskfuse_monitor::BlockRef;
    use diskfuse_ring::Choice;

    use super::super::children::with_outer_say;
    use super::*;

    fn parse(argument: &str) -> BlockdevOptions {
        BlockdevOptions::parse(argument).unwrap()
    }

    fn add_text(graph: &Graph, argument: &str) -> Result<String> {
        Nodes::new(
            graph.clone(),
            Objects::new(Choice::Auto),
            Monitors::new(drop),
        )
        .add(&parse(argument))
    }

    #[test]
    fn nodes_stand_on_named_and_on_inline_nodes() {
        let graph = Graph::new();
        add_text(&graph, "null-co,node-name=disk,size=1M").unwrap();
        add_text(&graph, "raw,node-name=part,file=disk,offset=4k,size=64k").unwrap();
        assert_eq!(graph.get("part").unwrap().size(), 65536);
        assert_eq!(graph.children("part").unwrap(), ["disk"]);
        add_text(
            &graph,
            "raw,node-name=r,file.driver=null-co,file.size=2M,file.node-name=inner",
        )
        .unwrap();
        assert_eq!(graph.get("r").unwrap().size(), 2 << 20);
        assert_eq!(graph.children("r").unwrap(), ["inner"]);
    }

    #[test]
    fn a_node_that_cannot_be_made_leaves_nothing_behind() {
        let graph = Graph::new();
        let error = add_text(
            &graph,
            "raw,node-name=r,offset=2M,file.driver=null-co,file.size=1M",
        )
        .unwrap_err();
        let words = "Offset (2097152) cannot be greater than size of the containing file (1048576)";
        assert_eq!(error.to_string(), words);
        assert_eq!(graph.names(), [""; 0]);
    }

    #[test]
    fn mistakes_are_told_in_known_words() {
        let graph = Graph::new();
        add_text(&graph, "null-co,node-name=disk").unwrap();
        let cases = [
            (
                "null-co,node-name=disk",
                "Duplicate nodes with node-name='disk'",
            ),
            (
                "null-co,node-name=x,force-share=on",
                "force-share=on can only be used with read-only images",
            ),
            (
                "raw,node-name=x,file=dsik",
                "Cannot find device='dsik' nor node-name='dsik' (did you mean 'disk'?)",
            ),
            (
                "file,node-name=x,filename=/no/such/image",
                "Could not open '/no/such/image': No such file or directory",
            ),
        ];
        for (argument, message) in cases {
            let error = add_text(&graph, argument).unwrap_err().to_string();
            assert!(error.starts_with(message), "{argument}: {error}");
        }
        assert_eq!(graph.names(), ["disk"]);
    }

    #[test]
    fn a_raw_node_decides_about_discards_of_the_node_written_inside_it() {
        let effective = |argument: &str| {
            let outer = parse(argument);
            let BlockDriver::Raw(RawOptions {
                file: BlockRef::Inline(inside),
                ..
            }) = &outer.driver
            else {
                panic!("no inline node")
            };
            let inside = with_outer_say(inside, &outer);
            (inside.discard, inside.detect_zeroes)
        };
        let file = "file.driver=file,file.filename=f";
        assert_eq!(
            effective(&format!("raw,node-name=r,{file}")),
            (Discard::Ignore, DetectZeroes::Off)
        );
        assert_eq!(
            effective(&format!(
                "raw,node-name=r,discard=unmap,detect-zeroes=unmap,{file}"
            )),
            (Discard::Unmap, DetectZeroes::Unmap)
        );
    }
}
