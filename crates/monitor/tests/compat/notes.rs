//! What the lists cannot know: how something differs although both have it. Each is about a place of one of the lists, and
//! was seen by trying both. Names nothing that the lists tell by themselves.

/// What stands above the tables.
pub const GENERAL: &str = "\
# diskfuse qsd beside qemu-storage-daemon

Each option, command and event of `qemu-storage-daemon` 11.1.3, and what `diskfuse qsd` makes of it: **same**, **differs** (how is
said beside it), or **not built**: options are then refused by name, and commands are answered with `CommandNotFound`.
Made by `crates/monitor/tests/compat.rs` from what the program itself reads; do not edit it.

In general:

* What a client may ask for is told by `query-commands` and `query-qmp-schema`, which tell of nothing that is not here.
* The greeting and `query-version` say 10.0.0, with `diskfuse` and its version as the package: clients that decide by the version
  ask for nothing newer than what is here.
* Messages have QEMU's wording; a hint may follow in parentheses. The error classes are QEMU's. Where permissions conflict, users are
  called by their names (`export 'e'`), not `an unnamed block device`.
* A job without `job-id` is called like the node that it works on; QEMU refuses it, as nodes are no devices.
* Queries that only look (`query-version`, `query-commands`, `query-qmp-schema`, `query-chardev`, `query-chardev-backends`) may be
  given out of band; QEMU's daemon has no command that may.
* `--blockdev`, `--object` and `--export` also take `@FILE`, a file with JSON objects; `--log`, `--event-loop` and `--sandbox` are ours.
* An export is mounted as `fuse.diskfuse`.
* Jobs put no nodes into the graph that others can see.
* Persistent bitmaps of a qcow2 image are loaded when it is opened and stored when it is closed, or opened for reading only. They are
  marked as in use before the first change of the disk or of a bitmap, not when the image is opened, so an image that is only looked at
  stays as it is. What cannot be stored is told and stays marked.
* A file named `/dev/fdset/N` is a descriptor that a client has handed over with `add-fd`. It is opened with the access of the node:
  the set needs one that was opened for reading and writing, or for reading with `read-only=on`.
  When the last client has gone, sets that no node was opened by are closed.
* There is no `SHUTDOWN` event: QEMU's storage daemon has none either.
";

/// What stands below them.
pub const ONLY_HERE: &str = "\
* The members and words that the tables name as only here.
* Options of the command line: `--log`, `--event-loop`, `--sandbox`, and `@FILE` as an argument.
";

const FILTER: &str = "accepted; the job has no node of its own, so none of this name appears";
const PERSISTENT: &str =
    "refused for an image that is only read; QEMU takes it, and loses the bitmap";
const MASK: &str = "accepted; a base that is a plain file is always written down as `raw`";

/// Differences, by place.
pub const NOTES: &[(&str, &str)] = &[
    ("add-fd", "as in QEMU itself"),
    ("remove-fd", "as in QEMU itself"),
    ("query-fdsets", "as in QEMU itself"),
    (
        "getfd",
        "as in QEMU itself; nothing uses such a descriptor yet",
    ),
    ("closefd", "as in QEMU itself"),
    ("query-iothreads", "as in QEMU itself"),
    (
        "block_set_io_throttle",
        "as in QEMU itself, with `group` naming a throttle group",
    ),
    (
        "blockdev-add(file).aio",
        "`native` is `io_uring`, which is also what is used when nothing is said",
    ),
    ("blockdev-add(host_device).aio", "as for `file`"),
    (
        "blockdev-add(file).drop-cache",
        "accepted; there is no migration for it to be about",
    ),
    ("blockdev-add(host_device).drop-cache", "as for `file`"),
    (
        "blockdev-add(qcow2).l2-cache-entry-size",
        "checked; the cache has a size of its own for what it loads at once",
    ),
    (
        "blockdev-add(blkdebug).inject-error[].event",
        "events of the inside of a format (`l2_load`, `cluster_alloc`, …) are read and never happen; \
         `none`, `read_aio`, `write_aio`, `flush_to_disk` and the like do",
    ),
    (
        "blockdev-add(blkdebug).set-state[].event",
        "as for `inject-error`",
    ),
    (
        "block-export-add.fixed-iothread",
        "changes nothing: an export stays on its threads in any case, and every node serves every thread",
    ),
    ("block-export-add.threads", "threads of its own"),
    (
        "block-export-del.mode",
        "`safe` refuses while requests are in flight, not while the file is open",
    ),
    (
        "object-add(iothread).aio-max-batch",
        "kept and told; what is submitted at once is decided by the load",
    ),
    ("block-dirty-bitmap-add.persistent", PERSISTENT),
    (
        "transaction.actions[](block-dirty-bitmap-add).data.persistent",
        PERSISTENT,
    ),
    ("blockdev-backup.filter-node-name", FILTER),
    (
        "transaction.actions[](blockdev-backup).data.filter-node-name",
        FILTER,
    ),
    ("blockdev-mirror.filter-node-name", FILTER),
    ("block-commit.filter-node-name", FILTER),
    ("block-stream.filter-node-name", FILTER),
    ("block-commit.backing-mask-protocol", MASK),
    ("block-stream.backing-mask-protocol", MASK),
    (
        "blockdev-mirror.buf-size",
        "accepted; how much is copied at once is decided by the job",
    ),
    (
        "blockdev-mirror.target-is-zero",
        "accepted; zeroes are written all the same",
    ),
    (
        "blockdev-create.options(file).nocow",
        "accepted; the file system decides",
    ),
    (
        "blockdev-create.options(file).extent-size-hint",
        "accepted; the file system decides",
    ),
    (
        "blockdev-create.options(qcow2).file",
        "the name of a node only, not a node written inside",
    ),
    (
        "blockdev-create.options(qcow2).data-file",
        "the name of a node only, not a node written inside",
    ),
    (
        "blockdev-create.options(qcow2).backing-fmt",
        "written down as it is said; QEMU refuses names that it does not know",
    ),
    (
        "block_resize.device",
        "takes the name of a node; there are no devices",
    ),
    (
        "change-backing-file.device",
        "not looked at: `image-node-name` says which image is meant",
    ),
    (
        "qom-list.path",
        "there are `/`, `/objects` and what is in it; nothing else can be seen",
    ),
    (
        "blockdev-snapshot-sync.device",
        "takes the name of a node; there are no devices",
    ),
    (
        "blockdev-snapshot-sync.snapshot-file",
        "a file that a node here has open is refused, also with `locking=off`; it is removed again if the snapshot fails",
    ),
    (
        "blockdev-snapshot-sync.format",
        "`qcow2` only; QEMU makes other formats with backing files (`qed`, …) as well",
    ),
    (
        "blockdev-snapshot-sync.mode",
        "the path that `absolute-paths` writes down is absolute also if the node's is not",
    ),
    (
        "transaction.actions[](blockdev-snapshot-sync).data.device",
        "as for the command",
    ),
    (
        "transaction.actions[](blockdev-snapshot-sync).data.snapshot-file",
        "as for the command; made before anybody has to wait",
    ),
    (
        "transaction.actions[](blockdev-snapshot-sync).data.format",
        "as for the command",
    ),
    (
        "transaction.actions[](blockdev-snapshot-sync).data.mode",
        "as for the command",
    ),
    ("query-chardev-backends", "the kinds that are built"),
    (
        "query-blockstats.query-nodes",
        "without it the list is empty, as there are no devices",
    ),
    (
        "BLOCK_IO_ERROR",
        "sent for requests of exports that the disk failed, which QEMU's exports do not tell of: `action` is `report`, `qom-path` and \
         `device` are empty, and at most four come in a second for each export",
    ),
    (
        "BLOCK_IMAGE_CORRUPTED",
        "once for each image; an image that was opened by the header above it has no `node-name`. `offset` and `size` are left out: \
         `msg` says where",
    ),
    (
        "block-set-write-threshold",
        "refused for what stands right below a qcow2 image and is no file or host device, and for a file that the kernel writes by \
         itself (`passthrough`)",
    ),
    (
        "query-blockstats",
        "what exports have done is counted, for the node that each shows; `driver-specific` is left out",
    ),
    (
        "query-named-block-nodes",
        "nodes without a name of their own come first; the members of a name that is `json:{…}` have another order",
    ),
    (
        "blockdev-reopen",
        "a file that is opened for reading only takes the idle image above it along, which QEMU refuses; nodes below are named, not \
         written inside",
    ),
    (
        "blockdev-mirror",
        "also of a node that others stand on, which QEMU calls no root, if the target is none of them; a target of another size is refused at once, not by the job",
    ),
    (
        "block-commit",
        "also of a node that others stand on, which QEMU calls no root",
    ),
    (
        "blockdev-snapshot-internal-sync",
        "also in an image that others stand on, which QEMU calls no root",
    ),
    (
        "blockdev-snapshot-delete-internal-sync",
        "also in an image that others stand on, which QEMU calls no root",
    ),
    (
        "BLOCK_EXPORT_DELETED",
        "also comes at once for an export whose mount was taken away from outside, which `block-export-del` does not find any more then",
    ),
    (
        "JOB_STATUS_CHANGE",
        "none, to `paused` and back, for the moments in which a job stands still because its node is drained",
    ),
    (
        "block-dirty-bitmap-add",
        "what a disk grows by counts as written; QEMU takes it for clean",
    ),
];
