//! What somebody does with a node, and what they let others do: the vocabulary of conflicts inside the graph and of
//! locks between processes. The bits are those of QEMU's image locks, so they must never be renumbered.

use std::fmt;
use std::ops::{BitAnd, BitOr, Not};

/// A set of permissions. Bit numbers as in QEMU's image locks (`include/block/block-common.h`, `BLK_PERM_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions(u8);

impl Permissions {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Reading, with the expectation that what is read makes sense.
    pub const CONSISTENT_READ: Self = Self(1);
    /// Changing what is read.
    pub const WRITE: Self = Self(1 << 1);
    /// Writing that does not change what is read.
    pub const WRITE_UNCHANGED: Self = Self(1 << 2);
    /// Changing the size.
    pub const RESIZE: Self = Self(1 << 3);
    /// Everything.
    pub const ALL: Self = Self(0b1111);

    /// What a reader does.
    pub const READER: Self = Self::CONSISTENT_READ;
    /// What a writer does: reads, writes, and may resize.
    pub const WRITER: Self = Self(0b1011);

    /// These and those.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are in it.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Each permission in it: its bit number and its name.
    pub(crate) fn bits(self) -> impl Iterator<Item = (u8, &'static str)> {
        let names = ["consistent read", "write", "write unchanged", "resize"];
        (0u8..)
            .zip(names)
            .filter(move |(bit, _)| self.0 & (1 << bit) != 0)
    }
}

impl BitOr for Permissions {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Permissions {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Not for Permissions {
    type Output = Self;
    fn not(self) -> Self {
        Self(!self.0 & Self::ALL.0)
    }
}

impl Permissions {
    /// Their names, in one word for messages.
    pub(crate) fn listed(self) -> String {
        let names: Vec<&str> = self.bits().map(|(_, name)| name).collect();
        names.join(", ")
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (_, name)) in self.bits().enumerate() {
            write!(f, "{}\"{name}\"", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_qemu() {
        let all: Vec<_> = Permissions::ALL.bits().collect();
        let expected = [
            (0, "consistent read"),
            (1, "write"),
            (2, "write unchanged"),
            (3, "resize"),
        ];
        assert_eq!(all, expected);
        assert_eq!((!Permissions::WRITER).to_string(), "\"write unchanged\"");
    }
}
