//! Names of nodes: which are well-formed, and which one a person probably meant. A hint is never acted on.

use strsim::damerau_levenshtein;

use crate::error::{Error, Kind, Result};

/// Characters of the longest name (QEMU: 32 bytes with the final NUL).
const LONGEST: usize = 31;

/// A letter, then letters, digits, `-`, `.` and `_`.
pub(super) fn check(name: &str) -> Result<()> {
    let mut chars = name.chars();
    let well_formed = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if well_formed && name.len() <= LONGEST {
        return Ok(());
    }
    let rule =
        format!("a letter, then letters, digits, '-', '.' and '_', {LONGEST} characters at most");
    let shown: String = name.chars().take(2 * LONGEST).collect();
    Err(Error::new(
        Kind::Invalid,
        format!("Invalid node-name: '{}' (use {rule})", shown.escape_debug()),
    ))
}

/// The answer to a name that no node has.
pub(super) fn not_found<'n>(name: &str, there: impl Iterator<Item = &'n str>) -> Error {
    let mut message = format!("Failed to find node with node-name='{name}'");
    if let Some(near) = nearest(name, there) {
        message = format!("{message} (did you mean '{near}'?)");
    }
    Error::new(Kind::NotFound, message)
}

/// The candidate that is about one slip for every three letters away.
fn nearest<'n>(name: &str, there: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    if name.len() > 2 * LONGEST {
        return None;
    }
    let (slips, best) = there
        .map(|n| (damerau_levenshtein(name, n), n))
        .min_by_key(|(slips, _)| *slips)?;
    (slips <= best.len().max(3) / 3).then_some(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_names_pass_and_others_do_not() {
        for good in ["a", "disk0", "Node-1.b_c", &"x".repeat(31)] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "0a", "-a", "#block1", "a b", "ä", &"x".repeat(32)] {
            assert_eq!(check(bad).unwrap_err().kind(), Kind::Invalid, "{bad}");
        }
    }

    #[test]
    fn a_slip_gets_a_hint_and_a_stranger_does_not() {
        let there = || ["disk0", "swap"].into_iter();
        let message = not_found("dsik0", there()).to_string();
        let expected = "Failed to find node with node-name='dsik0' (did you mean 'disk0'?)";
        assert_eq!(message, expected);
        let message = not_found("cdrom", there()).to_string();
        assert_eq!(message, "Failed to find node with node-name='cdrom'");
    }
}
