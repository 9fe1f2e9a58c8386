//! A file that an export shows: the node behind it, the right to use it, and what stat(2) says. An export of one file has
//! one; a tree has many (`tree.rs`). It decides nothing about requests; those who serve them look here.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use diskfuse_block::graph::Attachment;
use diskfuse_block::graph::{DrainHook, User};
use diskfuse_block::{Graph, LocalFuture, Node, Permissions};
use parking_lot::Mutex;

use crate::attributes::{Attributes, Ownership};
use crate::error::Result;
use crate::right::Right;
use crate::shared::Shared;
use crate::shown::Shown;
use crate::watch::Watch;

/// How a file may be used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Use {
    /// It can be written.
    pub(crate) writable: bool,
    /// Writing past the end makes the disk larger.
    pub(crate) growable: bool,
    /// Whose it is.
    pub(crate) ownership: Ownership,
}

/// See the module.
pub(crate) struct File {
    /// Its inode number, which is what requests call it by.
    pub(crate) ino: u64,
    pub(crate) node: Shown,
    pub(crate) right: Right,
    pub(crate) attributes: Attributes,
    pub(crate) writable: bool,
    pub(crate) growable: bool,
    /// What of it makes a tree look different when it is written.
    pub(crate) watch: Option<Watch>,
    /// How often it is open.
    opens: AtomicU64,
    brake: Mutex<Brake>,
}

#[derive(Default)]
struct Brake {
    /// A drain keeps the file's node still, and so the export.
    stopped: bool,
    /// The export, as soon as there is one.
    export: Option<Weak<Shared>>,
}

impl File {
    /// A file over `node` of `graph`; `name` is for messages. It becomes a user of the node, which other files and exports
    /// may read, write and resize as well: each sees what the others do.
    pub(crate) fn attach(
        graph: &Graph,
        node: &str,
        name: String,
        ino: u64,
        how: Use,
        watch: Option<Watch>,
    ) -> Result<Arc<Self>> {
        let Use {
            writable,
            growable,
            ownership,
        } = how;
        let file = Arc::new(Self {
            ino,
            node: Shown::new(graph.get(node)?),
            right: Right::default(),
            attributes: Attributes::new(ino, writable, ownership),
            writable,
            growable,
            watch,
            opens: AtomicU64::new(0),
            brake: Mutex::default(),
        });
        file.show(graph, node, name)?;
        Ok(file)
    }

    /// From now on it shows this node, and uses no other, unless somebody has it open: says whether. Nobody opens it meanwhile.
    pub(crate) fn show(self: &Arc<Self>, graph: &Graph, node: &str, name: String) -> Result<bool> {
        let attach = || {
            let attachment = self.attachment(graph, node, name)?;
            // The node may have been given wraps meanwhile, and may be given some as soon as it is known to be used here.
            self.node.look_up(|| attachment.node())?;
            Ok(attachment)
        };
        self.right.renew_unless(|| self.is_open(), attach)
    }

    fn attachment(self: &Arc<Self>, graph: &Graph, node: &str, name: String) -> Result<Attachment> {
        let hook: Arc<dyn DrainHook> = Arc::<Self>::clone(self);
        let user = User {
            name,
            perm: match (self.writable, self.growable) {
                (true, true) => Permissions::WRITER,
                // Only while it is being resized: see `Right`.
                (true, false) => Permissions::WRITER & !Permissions::RESIZE,
                (false, _) => Permissions::READER,
            },
            shared: Permissions::ALL,
            drain: Some(Arc::downgrade(&hook)),
            follows: true,
        };
        Ok(graph.attach(node, user)?)
    }

    /// The export that it belongs to. Until that is said, nothing can be in flight.
    pub(crate) fn belongs_to(&self, export: &Arc<Shared>) {
        let mut brake = self.brake.lock();
        brake.export = Some(Arc::downgrade(export));
        if brake.stopped {
            export.pause();
        }
    }

    /// `len` bytes at `offset` have changed.
    pub(crate) fn wrote(&self, offset: u64, len: u64) {
        self.attributes.mark_written();
        if let Some(watch) = &self.watch {
            watch.wrote(offset, len);
        }
    }

    /// It is opened once more; false if there is nothing any more that it could show.
    pub(crate) fn opened(&self) -> bool {
        self.right.use_if_there(|| {
            self.opens.fetch_add(1, Ordering::SeqCst);
        })
    }

    /// It has been closed once. True if nobody has it open now.
    pub(crate) fn released(&self) -> bool {
        let close = |opens: u64| opens.checked_sub(1);
        let before = self
            .opens
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, close);
        before.unwrap_or(0) <= 1
    }

    /// Whether somebody has it open.
    pub(crate) fn is_open(&self) -> bool {
        self.opens.load(Ordering::SeqCst) > 0
    }
}

impl DrainHook for File {
    fn quiesce(&self) -> LocalFuture<'_, ()> {
        let mut brake = self.brake.lock();
        let export = brake.export.as_ref().and_then(Weak::upgrade);
        // The graph counts drains: it may ask for this several times, and resumes once.
        if !std::mem::replace(&mut brake.stopped, true)
            && let Some(export) = &export
        {
            export.pause();
        }
        Box::pin(async move {
            if let Some(export) = export {
                export.until_quiet().await;
            }
        })
    }

    fn resume(&self) {
        let mut brake = self.brake.lock();
        if std::mem::replace(&mut brake.stopped, false)
            && let Some(export) = brake.export.as_ref().and_then(Weak::upgrade)
        {
            export.unpause();
        }
    }

    fn switch(&self, node: Arc<dyn Node>) {
        self.node.set(node);
    }

    fn immovable(&self) -> Option<String> {
        let export = self.brake.lock().export.as_ref()?.upgrade()?;
        export.immovable()
    }
}

/// A file as one thread knows it: what it counts references with is its own.
pub(crate) struct Local {
    pub(crate) file: Arc<File>,
    /// The node, and the generation that it was found in. Nothing while the queue rests.
    node: RefCell<Option<(u64, Known)>>,
}

/// A node, counted on one thread only.
type Known = Rc<Arc<dyn Node>>;

impl Local {
    pub(crate) fn new(file: Arc<File>) -> Self {
        Self {
            file,
            node: RefCell::new(None),
        }
    }

    /// The node that the file shows. A request keeps what it got here until it is answered: the file is given another one
    /// only while nothing is in flight.
    pub(crate) fn node(&self) -> Rc<Arc<dyn Node>> {
        let mut known = self.node.borrow_mut();
        if let Some((generation, node)) = &*known
            && *generation == self.file.node.generation()
        {
            return Rc::clone(node);
        }
        let (generation, node) = self.file.node.get();
        let node = Rc::new(node);
        *known = Some((generation, Rc::clone(&node)));
        node
    }

    /// Lets go of the node until there is a request: an idle queue must not keep open what the file shows no more.
    pub(crate) fn let_go_of_node(&self) {
        drop(self.node.take());
    }
}
