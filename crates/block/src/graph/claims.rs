//! What everyone above a node does with it: how permissions flow from a user down through the nodes, and which of them
//! do not go together. Pure bookkeeping: it holds no lock and asks no node for anything but whether it can be written.

use std::sync::Arc;

use super::busy;
use crate::error::Result;
use crate::permissions::Permissions;

/// What a node needs the node below it for, and so what its own users do to that one. The rules are those of QEMU
/// (`bdrv_default_perms` in its `block.c`), but for [`ChildRole::Backing`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChildRole {
    /// It shows what is there, or a part of it: what its users do is done to the node below, no more and no less.
    Filtered,
    /// It keeps its tables there, and perhaps its data: it reads them, writes them and lets the file grow whenever it
    /// may be written at all, also without a user; and never lets anybody else change them.
    File,
    /// It keeps data there and nothing else: its users' writes go there, and may let the file grow, which it lets
    /// nobody else do.
    Data,
    /// It reads there what it does not have itself. Whoever writes to it only reads here, and so may others; while it
    /// is used nobody may change what is read. (QEMU lets those change it whom the users would let change the disk.)
    Backing,
}

impl ChildRole {
    /// From what is done above (`used`, and what is let happen beside it, `shared`) to what that means below.
    fn flow(
        self,
        read_only: bool,
        used: Permissions,
        shared: Permissions,
    ) -> (Permissions, Permissions) {
        let change = Permissions::WRITE | Permissions::RESIZE;
        match self {
            Self::Filtered => (used, shared),
            Self::File if read_only => (used | Permissions::CONSISTENT_READ, shared & !change),
            Self::File => (used | Permissions::WRITER, shared & !change),
            Self::Data if used.contains(Permissions::WRITE) => {
                (used | Permissions::RESIZE, shared & !Permissions::RESIZE)
            }
            Self::Data => (used, shared & !Permissions::RESIZE),
            Self::Backing if used.is_empty() => (Permissions::NONE, Permissions::ALL),
            Self::Backing => (used & Permissions::CONSISTENT_READ, !change),
        }
    }
}

/// Whose claim it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Holder {
    /// A user, by its number; it reaches a node from above as what it is.
    User(u64),
    /// A node above, by its name, which stands for its own users, and the number of its child.
    Node(Arc<str>, usize),
}

/// What somebody does with a node, and what they let others do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) holder: Holder,
    /// For messages.
    pub(super) who: Arc<str>,
    pub(super) perm: Permissions,
    pub(super) shared: Permissions,
    /// Nodes that may read what this one does not let anybody else see; `None` if everybody may.
    pub(super) readers: Option<Arc<[String]>>,
}

/// Everybody's claims on some nodes of the graph, which all whom they concern belong to.
#[derive(Clone)]
pub(super) struct Claims {
    /// The nodes by their indices in the graph, ascending.
    pub(super) indices: Vec<usize>,
    /// Those on each of them.
    pub(super) all: Vec<Vec<Claim>>,
}

impl Claims {
    /// The nodes with the claims on them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (usize, &[Claim])> {
        let claims = self.all.iter().map(Vec::as_slice);
        self.indices.iter().copied().zip(claims)
    }

    /// Those on one node.
    pub(super) fn on(&self, index: usize) -> &[Claim] {
        let at = self.indices.binary_search(&index).ok();
        at.map_or(&[], |at| &self.all[at])
    }

    /// The node of this index is about to be taken out: those behind it move up.
    pub(super) fn forget(&mut self, index: usize) {
        if let Ok(at) = self.indices.binary_search(&index) {
            self.indices.remove(at);
            self.all.remove(at);
        }
        for behind in self.indices.iter_mut().filter(|there| **there > index) {
            *behind -= 1;
        }
    }
}

/// Everybody's claims on a node, as one.
pub(super) fn fold(claims: &[Claim]) -> (Permissions, Permissions) {
    let nobody = (Permissions::NONE, Permissions::ALL);
    claims.iter().fold(nobody, |(used, shared), claim| {
        (used | claim.perm, shared & claim.shared)
    })
}

/// A node above another, as far as claims flow through it.
pub(super) struct Above<'n> {
    pub(super) name: &'n Arc<str>,
    pub(super) read_only: bool,
    /// What it reads below is put into it before somebody changes it ([`Change::Fleece`](super::Change::Fleece)).
    pub(super) fleeces: bool,
}

/// What the claims on a node mean for its child number `child`, in `role`.
pub(super) fn below(
    above: &[Claim],
    node: &Above<'_>,
    child: usize,
    role: ChildRole,
) -> Vec<Claim> {
    if role == ChildRole::Filtered {
        return above.to_vec();
    }
    let (used, shared) = fold(above);
    let (perm, mut shared) = role.flow(node.read_only, used, shared);
    if node.fleeces && role == ChildRole::Backing {
        shared = shared | Permissions::WRITE;
    }
    vec![Claim {
        holder: Holder::Node(Arc::clone(node.name), child),
        who: format!("node '{}'", node.name).into(),
        perm,
        shared,
        readers: None,
    }]
}

/// [`Kind::Busy`](crate::Kind::Busy), with both parties named, if one of `new` does not go together with another claim
/// on `node`.
pub(super) fn check(node: &str, all: &[Claim], is_new: impl Fn(&Claim) -> bool) -> Result<()> {
    for new in all.iter().filter(|claim| is_new(claim)) {
        for other in all.iter().filter(|claim| claim.holder != new.holder) {
            conflict(node, new, other)?;
        }
    }
    Ok(())
}

fn conflict(node: &str, new: &Claim, old: &Claim) -> Result<()> {
    let (new_who, old_who) = (&new.who, &old.who);
    let refused = new.perm & !old.lets(new);
    if !refused.is_empty() {
        return Err(busy(format!(
            "Permission conflict on node '{node}': permissions '{}' are both required by {new_who} and unshared by {old_who}",
            refused.listed()
        )));
    }
    let denied = old.perm & !new.lets(old);
    if !denied.is_empty() {
        return Err(busy(format!(
            "Permission conflict on node '{node}': permissions '{}' are both required by {old_who} and unshared by {new_who}",
            denied.listed()
        )));
    }
    Ok(())
}

impl Claim {
    /// What it lets the other one do.
    fn lets(&self, other: &Self) -> Permissions {
        let Some(readers) = &self.readers else {
            return self.shared;
        };
        let reads = match &other.holder {
            Holder::User(_) => false,
            Holder::Node(name, _) => readers.iter().any(|reader| **reader == **name),
        };
        match reads {
            true => self.shared,
            false => self.shared & !Permissions::CONSISTENT_READ,
        }
    }
}
