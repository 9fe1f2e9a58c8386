//! Arguments and answers of the commands about objects (`qapi/qom.json`).

use serde_json::Value;

use super::kind::record;

record! {
    /// `qom-list`.
    args struct QomList {
        /// Where: `/objects`, `/objects/ID`.
        "path" path: String,
    }
}

record! {
    /// One property: what `qom-list` answers.
    struct ObjectPropertyInfo {
        /// Its name.
        "name" name: String,
        /// Its type: `int`, `child<iothread>`.
        "type" kind: String,
    }
}

record! {
    /// `qom-get`.
    args struct QomGet {
        /// The object.
        "path" path: String,
        /// Which of its properties.
        "property" property: String,
    }
}

record! {
    /// `qom-set`.
    args struct QomSet {
        /// The object.
        "path" path: String,
        /// Which of its properties.
        "property" property: String,
        /// The new value.
        "value" value: Value,
    }
}

record! {
    /// One of what `query-iothreads` answers (`IOThreadInfo` in QEMU's `qapi/misc.json`).
    struct IothreadInfo {
        /// The iothread.
        "id" id: String,
        /// The kernel's number of the thread.
        "thread-id" thread_id: i64,
        /// The longest busy wait, in nanoseconds.
        "poll-max-ns" poll_max_ns: i64,
        /// By what a busy wait grows; 0: the program decides.
        "poll-grow" poll_grow: i64,
        /// By what it shrinks.
        "poll-shrink" poll_shrink: i64,
        /// Requests in one batch at most; 0: the program decides.
        "aio-max-batch" aio_max_batch: i64,
    }
}
