//! Nodes opened anew with other options while they are in use (`blockdev-reopen`): all that are named, or none.

use std::collections::BTreeMap;
use std::sync::Arc;

use diskfuse_block::drivers::{self, FileNode, RawConfig};
use diskfuse_block::graph::{Change, ChildRole, Drained};
use diskfuse_block::{Node, downcast};
use diskfuse_monitor::blockdev::BackingRef;
use diskfuse_monitor::{BlockDriver, BlockRef, BlockdevOptions};
use diskfuse_qcow2::node::{Anew, Children, Qcow2Config, Qcow2Node};

use crate::error::{Error, Result};
use crate::qsd::nodes::{self, Nodes};
use crate::qsd::{filters, qcow2, query::child_name};

/// Opens each of the nodes anew with all of the options given for it. Nodes above that read their tables from one of
/// them are opened anew as well, as they were.
pub fn reopen(nodes: &Nodes, all: &[BlockdevOptions]) -> Result<()> {
    let mut work = Reopening {
        nodes,
        made: BTreeMap::new(),
        changes: Vec::new(),
        anew: Vec::new(),
        drained: Vec::new(),
    };
    work.carry_out(all)?;
    for options in all {
        nodes.note(options);
    }
    Ok(())
}

struct Reopening<'n> {
    nodes: &'n Nodes,
    made: BTreeMap<String, Arc<dyn Node>>,
    changes: Vec<Change>,
    /// Images that were closed for it, and go on as they were if it comes to nothing.
    anew: Vec<Anew>,
    /// Last, so that nobody goes on before that.
    drained: Vec<Drained>,
}

impl Reopening<'_> {
    fn carry_out(&mut self, all: &[BlockdevOptions]) -> Result<()> {
        let mut names = Vec::new();
        for options in all {
            let name = self.check(options)?;
            if names.contains(&name) {
                return Err(Error::Refused(format!("Node '{name}' is named twice")));
            }
            names.push(name.clone());
            // Closing flushes; most of it is done before anybody has to wait.
            let node = self.nodes.graph.bare(&name)?;
            if !node.read_only() {
                self.nodes.run(node.flush())??;
            }
            let drained = self.nodes.drain(&name)?;
            self.drained.push(drained);
        }
        // Those below come first: each is made on what is below it then.
        for name in self.lowest_first() {
            let given = all.iter().find(|o| o.node_name.as_deref() == Some(&*name));
            let with = match given {
                Some(options) => self.make(&name, options)?,
                None if self.must_follow(&name)? => self.follow(&name)?,
                None => continue,
            };
            self.made.insert(name.clone(), Arc::clone(&with));
            self.changes.push(Change::Swap { node: name, with });
        }
        let removed = self.nodes.graph.change(&self.changes)?;
        self.anew.drain(..).for_each(Anew::keep);
        // The new ones are in force, whatever becomes of those that are gone.
        for node in removed {
            if let Err(error) = self.nodes.run(node.close())? {
                tracing::error!(
                    "a node that nothing stands on any more could not be closed: {error}"
                );
            }
        }
        Ok(())
    }

    fn check(&self, options: &BlockdevOptions) -> Result<String> {
        let Some(name) = &options.node_name else {
            return Err(Error::refused("node-name not specified"));
        };
        let there = self.nodes.graph.bare(name)?;
        let driver = options.driver.name();
        if there.driver() != driver {
            return Err(Error::refused("Cannot change the option 'driver'"));
        }
        if let (Some(image), BlockDriver::Qcow2(given)) =
            (downcast::<Qcow2Node>(&*there), &options.driver)
        {
            let has_one =
                image.header().backing.is_some() || self.kept(name, ChildRole::Backing)?.is_some();
            if given.backing == BackingRef::Image && has_one {
                return Err(Error::Refused(format!("backing is missing for '{name}'")));
            }
        }
        Ok(name.clone())
    }

    fn lowest_first(&self) -> Vec<String> {
        let mut names = crate::daemon::names_from_above(&self.nodes.graph);
        names.reverse();
        names
    }

    /// Whether a node has what it cannot exchange on one that was made anew.
    fn must_follow(&self, name: &str) -> Result<bool> {
        let graph = &self.nodes.graph;
        let is_image = downcast::<Qcow2Node>(&*graph.bare(name)?).is_some();
        let edges = graph.edges(name)?;
        let mut tables = edges.iter().filter(|(role, _)| *role != ChildRole::Backing);
        Ok(is_image && tables.any(|(_, child)| self.made.contains_key(child)))
    }

    /// What is below, as it will be.
    fn child(&self, name: &str) -> Result<Arc<dyn Node>> {
        match self.made.get(name) {
            Some(made) => Ok(Arc::clone(made)),
            None => Ok(self.nodes.graph.get(name)?),
        }
    }

    fn make(&mut self, name: &str, options: &BlockdevOptions) -> Result<Arc<dyn Node>> {
        let bare = self.nodes.graph.bare(name)?;
        match &options.driver {
            BlockDriver::NullCo(null) | BlockDriver::NullAio(null) => {
                let driver = options.driver.name();
                let config = nodes::null_config(driver, null, options);
                Ok(drivers::open_null(&config)?)
            }
            BlockDriver::File(file) | BlockDriver::HostDevice(file) => {
                let Some(there) = downcast::<FileNode>(&*bare) else {
                    return Err(Error::refused("Cannot change the option 'driver'"));
                };
                if there.config().filename != file.filename {
                    return Err(Error::refused("Cannot change the option 'filename'"));
                }
                self.nodes.run(there.flush())??;
                Ok(there.reopen(&nodes::file_config(file, options))?)
            }
            BlockDriver::Raw(raw) => {
                let child = self.reference(name, ChildRole::Filtered, &raw.file)?;
                let config = RawConfig {
                    offset: raw.offset,
                    size: raw.size,
                    read_only: options.read_only,
                };
                Ok(drivers::open_raw(child, &config)?)
            }
            BlockDriver::Throttle(throttle) => {
                let child = self.reference(name, ChildRole::Filtered, &throttle.file)?;
                filters::throttle_on(self.nodes, child, throttle, options)
            }
            BlockDriver::Blkdebug(blkdebug) => {
                let child = self.reference(name, ChildRole::Filtered, &blkdebug.image)?;
                filters::blkdebug_on(child, blkdebug, options)
            }
            BlockDriver::Qcow2(given) => {
                let file = self.reference(name, ChildRole::File, &given.file)?;
                let data_file = match &given.data_file {
                    Some(data) => Some(self.reference(name, ChildRole::Data, data)?),
                    None => self.kept(name, ChildRole::Data)?,
                };
                let backing = match &given.backing {
                    BackingRef::Nothing => {
                        self.set_child(name, ChildRole::Backing, None);
                        None
                    }
                    // It has none, or one would have to be said.
                    BackingRef::Image => None,
                    BackingRef::Node(node) => {
                        Some(self.reference(name, ChildRole::Backing, node)?)
                    }
                };
                let children = Children {
                    file,
                    data_file,
                    backing,
                };
                self.open_again(name, &qcow2::config(given, options), children)
            }
        }
    }

    /// The node above those that were made anew, as it was.
    fn follow(&mut self, name: &str) -> Result<Arc<dyn Node>> {
        let bare = self.nodes.graph.bare(name)?;
        let Some(image) = downcast::<Qcow2Node>(&*bare) else {
            return Err(Error::refused(format!("Node '{name}' is not an image")));
        };
        let Some(file) = self.kept(name, ChildRole::File)? else {
            return Err(Error::refused(format!("Node '{name}' has no file")));
        };
        let children = Children {
            file,
            data_file: self.kept(name, ChildRole::Data)?,
            backing: self.kept(name, ChildRole::Backing)?,
        };
        self.open_again(name, image.config(), children)
    }

    fn open_again(
        &mut self,
        name: &str,
        config: &Qcow2Config,
        children: Children,
    ) -> Result<Arc<dyn Node>> {
        let bare = self.nodes.graph.bare(name)?;
        let Some(image) = downcast::<Qcow2Node>(&*bare) else {
            return Err(Error::refused("Cannot change the option 'driver'"));
        };
        let config = &Qcow2Config {
            on_corrupt: image.config().on_corrupt.clone(),
            ..config.clone()
        };
        let anew = self.nodes.run(image.open_anew(config, children))??;
        let node = anew.node();
        self.anew.push(anew);
        Ok(node)
    }

    /// The node that stands in a role now.
    fn kept(&self, name: &str, role: ChildRole) -> Result<Option<Arc<dyn Node>>> {
        let edges = self.nodes.graph.edges(name)?;
        let edge = edges.into_iter().find(|(there, _)| *there == role);
        edge.map(|(_, child)| self.child(&child)).transpose()
    }

    /// The node that is named for a role.
    fn reference(&mut self, name: &str, role: ChildRole, to: &BlockRef) -> Result<Arc<dyn Node>> {
        let child = match to {
            BlockRef::Name(child) => child.clone(),
            BlockRef::Inline(inside) => match &inside.node_name {
                Some(child) if self.made.contains_key(child) => child.clone(),
                _ => {
                    return Err(Error::refused(
                        "Nodes below are given by their names when a node is opened anew; open them anew beside it",
                    ));
                }
            },
        };
        self.nodes.check_node(&child)?;
        if child == name {
            return Err(Error::Refused(format!(
                "Making '{child}' a {} child of '{name}' would create a cycle",
                child_name(self.nodes.graph.bare(name)?.driver(), role)
            )));
        }
        self.set_child(name, role, Some(child.clone()));
        self.child(&child)
    }

    fn set_child(&mut self, name: &str, role: ChildRole, child: Option<String>) {
        let parent = name.to_owned();
        self.changes.push(Change::SetChild {
            parent,
            role,
            child,
        });
    }
}
