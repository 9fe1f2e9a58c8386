//! An export: a node of the graph, or a tree of them, a mount, and as many queues as it was given threads. It owns the way in and the way
//! out: nothing is left mounted when it is gone, and it is gone only when nothing is in flight.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use diskfuse_block::Graph;
use diskfuse_ring::{Mailbox, SharedFd};
use parking_lot::Mutex;

use crate::abi::ROOT;
use crate::content::Content;
use crate::error::{Error, Result};
use crate::file::{File, Use};
use crate::mount::{self, Mount, MountOptions};
use crate::passthrough::{Backing, Passthrough};
use crate::queue::{self, Membership};
use crate::shared::{AllowOther, End, ExportOptions, QueueStats, Shared, Stats};
use crate::transport::{self, device};
use crate::tree::{Entry, Refresh, Tree};
use crate::unmount::Unmounter;

/// How long the kernel may take to say its first word after mount(2).
const GREETING: Duration = Duration::from_secs(10);
/// How long a stop waits before it says what it waits for.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is given back at the end, in this order.
struct Held {
    mount: Mount,
    /// Queue 0's descriptor: while it is open the kernel keeps requests waiting instead of failing them.
    device: SharedFd,
}

/// A running export. Dropping it stops it.
pub struct Export {
    shared: Arc<Shared>,
    mountpoint: PathBuf,
    held: Mutex<Option<Held>>,
}

impl Export {
    /// Attaches to node `node` of `graph`, mounts, and serves with one queue on each of `threads` (at least one).
    /// Blocks until the file is usable; call it from a thread without a ring. `on_end` runs once, on some thread,
    /// when the last queue is done and everything is flushed, however the end came; it must not block. If this
    /// returns an error nothing is left mounted, and `on_end` may still run.
    pub fn start(
        options: ExportOptions,
        graph: &Graph,
        node: &str,
        threads: &[Mailbox],
        on_end: Box<dyn FnOnce(End) + Send>,
    ) -> Result<Arc<Self>> {
        let disk = graph.get(node)?;
        if options.writable && disk.read_only() {
            let message = "Cannot export read-only node as writable";
            return Err(Error::Options(message.into()));
        }
        mount::check(&options.mountpoint)?;
        let how = Use {
            writable: options.writable,
            growable: options.growable,
            ownership: options.ownership,
        };
        let name = format!("export '{}'", options.id);
        let attach = || File::attach(graph, node, name, ROOT, how, None).map(Content::File);
        Self::begin(options, attach, threads, on_end)
    }

    /// The same for a directory with `root` in it, over any nodes of `graph`. `refresh` is asked to look at the disk anew when
    /// somebody synchronises a directory (`sync DIR`), and after a write that an entry's watch notices.
    pub fn start_tree(
        options: ExportOptions,
        graph: &Graph,
        root: Vec<(OsString, Entry)>,
        refresh: Option<Arc<dyn Refresh>>,
        threads: &[Mailbox],
        on_end: Box<dyn FnOnce(End) + Send>,
    ) -> Result<Arc<Self>> {
        if options.growable || options.passthrough == Passthrough::On {
            let message = "a directory export can neither be growable nor have passthrough";
            return Err(Error::Options(message.into()));
        }
        mount::check_directory(&options.mountpoint)?;
        let (id, how) = (
            options.id.clone(),
            Use {
                writable: options.writable,
                growable: false,
                ownership: options.ownership,
            },
        );
        let attach = || Tree::new(graph, &id, how, root, refresh).map(Content::Tree);
        Self::begin(options, attach, threads, on_end)
    }

    /// What both ways have in common, once the mountpoint has been looked at.
    fn begin(
        mut options: ExportOptions,
        attach: impl FnOnce() -> Result<Content>,
        threads: &[Mailbox],
        on_end: Box<dyn FnOnce(End) + Send>,
    ) -> Result<Arc<Self>> {
        if threads.is_empty() {
            return Err(Error::Options(format!(
                "export '{}' has no thread to run on",
                options.id
            )));
        }
        options.ownership.check(options.allow_other)?;
        if let Ok(absolute) = mount::absolute(&options.mountpoint) {
            options.mountpoint = absolute;
        }
        let plan = transport::plan(&options.transport, threads)?;
        let content = attach()?;
        let shared = Arc::new(Shared::new(options, content, plan, threads, on_end));
        // From here on a drain waits for the queues: if they do not come to be, it must hear of it.
        let memberships: Vec<_> = (0..threads.len())
            .map(|index| Membership::new(&shared, index))
            .collect();
        shared.content.belongs_to(&shared);
        // After the image is ours: it sets the same locks once more.
        if let Some(file) = shared.content.root_file()
            && let Some(backing) = Backing::prepare(&shared.options, &*file.node.get().1)?
        {
            // Set once, here.
            let _ = shared.backing.set(backing);
        }
        let (mount, device) = mount_it(&shared)?;
        let devices = queue_devices(&device, threads.len())?;
        let mountpoint = mount.path().to_owned();
        let queues = threads.iter().zip(devices).zip(memberships);
        for ((mailbox, device), mut membership) in queues {
            membership.begins();
            // The queue's end is told by its membership, so nobody waits for this reply.
            drop(mailbox.call(move || queue::run(membership, device)));
        }
        let export = Arc::new(Self {
            shared,
            mountpoint,
            held: Mutex::new(Some(Held { mount, device })),
        });
        match export.shared.wait_for_greeting(GREETING) {
            Some(Ok(())) => Ok(export),
            Some(Err(why)) => Err(Error::Handshake(why)),
            None => Err(Error::Handshake(
                "the kernel's FUSE did not say anything".into(),
            )),
        }
    }

    /// Unmounts, then does what [`Export::stop`] does; or, if somebody uses the file, changes nothing and answers
    /// [`Error::Busy`]. The same rules as for `stop`.
    pub fn stop_unless_busy(&self) -> Result<()> {
        {
            let mut held = self.held.lock();
            if let Some(held) = &mut *held {
                // Requests are served meanwhile: the kernel may have something to write back.
                self.shared.expect_unmount(true);
                if let Err(error) = held.mount.unmount_unless_busy() {
                    self.shared.expect_unmount(false);
                    return Err(error);
                }
            }
        }
        self.stop()
    }

    /// Takes the file's name away at once and goes on serving those who have it open; the export ends with the last of
    /// them. Call it from a thread without a ring.
    pub fn detach(&self) -> Result<()> {
        let mut held = self.held.lock();
        let Some(held) = &mut *held else {
            return Ok(());
        };
        self.shared.expect_unmount(true);
        held.mount.unmount()
    }

    /// Drains, flushes and unmounts. Blocks until nothing is in flight; call it from a thread without a ring. Who
    /// still has the file open gets ENOTCONN from then on. An error of the flush is returned, once, after all of that.
    pub fn stop(&self) -> Result<()> {
        self.shared.end(End::Stopped);
        // Whoever comes second finds nothing to give back, and must not return before the first has done it.
        let mut held = self.held.lock();
        let let_go = self.shared.content.let_go();
        while !self.shared.wait_for_end(PATIENCE) {
            let left = self.shared.stats().in_flight;
            tracing::warn!(
                export = self.id(),
                in_flight = left,
                "still waiting for the disk"
            );
        }
        drop(let_go);
        let Some(Held { mut mount, device }) = held.take() else {
            return Ok(());
        };
        // Entries that the kernel has keep the connection open, whatever else is closed.
        let unmounted = match self.shared.has_entries() {
            true => mount.abort(),
            false => mount.unmount(),
        };
        drop(device);
        self.shared.content.take_back();
        match self.shared.take_flush_error() {
            Some(error) => {
                if let Err(error) = unmounted {
                    tracing::error!(%error, "a mount is left behind");
                }
                Err(error.into())
            }
            None => unmounted,
        }
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.shared.options.id
    }

    /// The node that it shows now; empty when it has ended.
    pub fn node_name(&self) -> String {
        let main = self.shared.content.main();
        main.map_or_else(String::new, |file| file.right.node_name())
    }

    /// The absolute path of its file.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Has another process take the mount away when the time comes: `by`, which is made of the mount's path and id, for
    /// [`unmount`](crate::unmount()). Nothing is asked if the mount is gone already.
    pub fn delegate_unmount<E>(
        &self,
        by: impl FnOnce(&Path, u64) -> std::result::Result<Box<dyn Unmounter>, E>,
    ) -> std::result::Result<(), E> {
        if let Some(held) = &mut *self.held.lock()
            && let Some(id) = held.mount.id()
        {
            held.mount.delegate(by(&self.mountpoint, id)?);
        }
        Ok(())
    }

    /// Whether the file can be written.
    pub fn writable(&self) -> bool {
        self.shared.options.writable
    }

    /// The disk has another size, and not by this export's doing: the kernel asks for it again. Any thread may call it.
    pub fn size_changed(&self) {
        // One that is being stopped has nobody to tell.
        if let Some(held) = self.held.try_lock()
            && let Some(held) = &*held
            && let Some(file) = self.shared.content.main()
            && let Err(error) = device::forget_attributes(&held.device, file.ino)
        {
            // ENOENT: nobody has looked at the file so far.
            tracing::debug!(export = self.id(), %error, "the kernel did not forget the size");
        }
    }

    /// What it has done.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// What each queue has done. Counters are read one after the other while requests go on, so they may disagree by some.
    /// Any thread may call it; it asks nobody.
    pub fn queue_stats(&self) -> Vec<QueueStats> {
        self.shared.queue_stats()
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::error!(%error, "export '{}' did not end cleanly", self.id());
        }
    }
}

/// Mounts as the options say; `allow-other=auto` tries with others first.
fn mount_it(shared: &Shared) -> Result<(Mount, SharedFd)> {
    let options = &shared.options;
    let filename = shared.content.filename();
    let mount = |allow_other| {
        let mount_options = MountOptions {
            source: mount::source_name(filename.as_deref()),
            read_only: !options.writable,
            directory: shared.content.tree().is_some(),
            allow_other,
            max_read: shared.plan.max_request as u32,
            abortable: shared.offers_ring(),
        };
        Mount::new(&options.mountpoint, &mount_options)
    };
    let ((mount, device), others) = match options.allow_other {
        AllowOther::On => (mount(true)?, true),
        AllowOther::Off => (mount(false)?, false),
        // The file's mode lets nobody but root in, and stays so.
        AllowOther::Root => (mount(true)?, false),
        AllowOther::Auto => match mount(true) {
            Ok(mounted) => (mounted, true),
            Err(_) => (mount(false)?, false),
        },
    };
    shared.others_allowed.store(others, Ordering::Relaxed);
    if shared.offers_ring() && !mount.can_abort() {
        shared.forgo_ring(
            "a connection by FUSE over io_uring must be aborted at the end, and this user may not open \
             /sys/fs/fuse/connections (mount -t fusectl fusectl /sys/fs/fuse/connections as root, if it is empty)"
                .to_owned(),
        )?;
    }
    Ok((mount, device))
}

/// One descriptor for each queue, the first being the one that the mount was made with.
fn queue_devices(first: &SharedFd, queues: usize) -> Result<Vec<SharedFd>> {
    let further = (1..queues)
        .map(|queue| device::clone_of(first).map_err(|source| Error::Queue { queue, source }));
    std::iter::once(Ok(first.clone())).chain(further).collect()
}
