//! The name that somebody probably meant. Only ever a hint in a message.

use strsim::damerau_levenshtein;

/// Longer words get no hint, which also bounds the work.
const LONGEST: usize = 64;

/// ` (did you mean 'X'?)` for the nearest of `there` that is about one slip for every three letters away; else
/// nothing.
pub fn hint<'n>(word: &str, there: impl IntoIterator<Item = &'n str>) -> String {
    if word.len() > LONGEST {
        return String::new();
    }
    there
        .into_iter()
        .map(|name| (damerau_levenshtein(word, name), name))
        .min_by_key(|(slips, _)| *slips)
        .filter(|(slips, name)| *slips <= name.len().max(3) / 3)
        .map_or(String::new(), |(_, name)| {
            format!(" (did you mean '{name}'?)")
        })
}

#[cfg(test)]
mod tests {
    use super::hint;

    #[test]
    fn a_slip_gets_a_hint_and_a_stranger_does_not() {
        let there = ["disk0", "swap"];
        assert_eq!(hint("dsik0", there), " (did you mean 'disk0'?)");
        assert_eq!(hint("other", there), "");
        assert_eq!(hint("x", []), "");
        assert_eq!(hint(&"d".repeat(1000), there), "");
    }
}
