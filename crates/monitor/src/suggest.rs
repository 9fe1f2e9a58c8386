//! The valid name that a user probably meant. Only ever a hint: nothing is accepted because it is near.

use strsim::damerau_levenshtein;

/// Longer words get no hint, which also bounds the work.
const LONGEST: usize = 64;

/// The candidate nearest to `word`, when it is near: about one slip for every three letters. Case does not count.
pub(crate) fn nearest<'c>(
    word: &str,
    candidates: impl IntoIterator<Item = &'c str>,
) -> Option<String> {
    if word.len() > LONGEST {
        return None;
    }
    let word = word.to_lowercase();
    let distance = |candidate: &'c str| {
        (
            damerau_levenshtein(&word, &candidate.to_lowercase()),
            candidate,
        )
    };
    let (slips, best) = candidates
        .into_iter()
        .map(distance)
        .min_by_key(|(slips, _)| *slips)?;
    (slips <= best.len().max(3) / 3).then(|| best.to_owned())
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn a_slip_finds_its_word() {
        let words = ["qcow2", "raw", "null-co", "node-name"];
        assert_eq!(nearest("qcwo2", words).as_deref(), Some("qcow2"));
        assert_eq!(nearest("nodename", words).as_deref(), Some("node-name"));
        assert_eq!(nearest("NULL_CO", words).as_deref(), Some("null-co"));
    }

    #[test]
    fn a_different_word_finds_none() {
        assert_eq!(nearest("file", ["qcow2", "raw"]), None);
        assert_eq!(nearest("", ["qcow2", "raw"]), None);
        assert_eq!(nearest(&"q".repeat(100_000), ["qcow2"]), None);
        assert_eq!(nearest("x", []), None);
    }
}
