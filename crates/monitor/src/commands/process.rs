//! Arguments and answers of the commands about the process itself: version, capabilities, descriptors, chardevs.

use serde_json::{Map, Value};

use super::kind::{Kind, record, words};
use super::shape::{Definition, MemberShape, Shape};

record! {
    /// What `query-version` answers (`VersionInfo` in QEMU's `qapi/control.json`).
    struct VersionInfo {
        /// The version of QEMU whose interface this is.
        "qemu" qemu: VersionTriple,
        /// The program and its own version.
        "package" package: String,
    }
}

record! {
    /// Three numbers of a version.
    struct VersionTriple {
        /// The last one.
        "micro" micro: i64,
        /// The middle one.
        "minor" minor: i64,
        /// The first one.
        "major" major: i64,
    }
}

record! {
    /// One of what `query-commands` answers.
    struct CommandInfo {
        /// The command's name.
        "name" name: String,
    }
}

/// What `query-qmp-schema` answers: a list of `SchemaInfo` (QEMU's `qapi/introspect.json`), which is described here as
/// any objects, as nobody reads the schema of the schema.
#[derive(Debug, Clone, PartialEq)]
pub struct SchemaInfo(pub Map<String, Value>);

impl Kind for SchemaInfo {
    fn shape() -> Shape {
        Shape::Named("SchemaInfo", || {
            let text = |name| MemberShape {
                name,
                optional: false,
                shape: Shape::Builtin("str"),
            };
            Definition::object(vec![text("name"), text("meta-type")])
        })
    }

    fn to_value(&self) -> Value {
        Value::Object(self.0.clone())
    }
}

words! {
    /// What a client may switch on (`QMPCapability` in QEMU's `qapi/control.json`).
    enum Capability {
        /// Commands that overtake others (`exec-oob`).
        OutOfBand = "oob",
    }
}

record! {
    /// `qmp_capabilities`.
    args struct QmpCapabilities {
        /// What to switch on.
        "enable" enable: Option<Vec<Capability>>,
    }
}

record! {
    /// `getfd` and `closefd`.
    args struct FdName {
        /// The name of the descriptor.
        "fdname" fdname: String,
    }
}

record! {
    /// `add-fd`.
    args struct AddFd {
        /// The set to add it to, which is made if there is none; by default a new one.
        "fdset-id" fdset_id: Option<i64>,
        /// Words for `query-fdsets`.
        "opaque" opaque: Option<String>,
    }
}

record! {
    /// What `add-fd` answers.
    struct AddfdInfo {
        /// The set: `/dev/fdset/ID` opens what is in it.
        "fdset-id" fdset_id: i64,
        /// The number of the descriptor in this process.
        "fd" fd: i64,
    }
}

record! {
    /// `remove-fd`.
    args struct RemoveFd {
        /// The set.
        "fdset-id" fdset_id: i64,
        /// One descriptor of it; by default all.
        "fd" fd: Option<i64>,
    }
}

record! {
    /// One descriptor of a set.
    struct FdsetFdInfo {
        /// Its number in this process.
        "fd" fd: i64,
        /// The words that it was added with.
        "opaque" opaque: Option<String>,
    }
}

record! {
    /// One of what `query-fdsets` answers.
    struct FdsetInfo {
        /// The set.
        "fdset-id" fdset_id: i64,
        /// What is in it.
        "fds" fds: Vec<FdsetFdInfo>,
    }
}

record! {
    /// One of what `query-chardev` answers.
    struct ChardevInfo {
        /// The id that it was given.
        "label" label: String,
        /// Where it leads, in QEMU's words.
        "filename" filename: String,
        /// Whether a monitor uses it.
        "frontend-open" frontend_open: bool,
    }
}

record! {
    /// One of what `query-chardev-backends` answers.
    struct ChardevBackendInfo {
        /// The kind's name.
        "name" name: String,
    }
}

record! {
    /// A command about one thing that has an id.
    args struct Id {
        /// It.
        "id" id: String,
    }
}
