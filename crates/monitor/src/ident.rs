//! QEMU's rule for the names that users give to things.

/// Whether `id` is an identifier: an ASCII letter, then ASCII letters, digits, `-`, `.` and `_`
/// (`id_wellformed` in QEMU).
pub(crate) fn well_formed(id: &str) -> bool {
    id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}

#[cfg(test)]
mod tests {
    use super::well_formed;

    #[test]
    fn names_begin_with_a_letter_and_hold_few_signs() {
        for good in ["a", "A1", "disk-0.b_c"] {
            assert!(well_formed(good), "{good}");
        }
        for bad in ["", "1a", "-a", "#block0", "a b", "a+", "ä", "aä"] {
            assert!(!well_formed(bad), "{bad}");
        }
    }
}
