//! File names made of what somebody wrote on a disk. They never lead out of their directory, whatever was written.

use std::fmt::Write;

/// The longest file name, in bytes.
const LONGEST: usize = 255;

/// A file name that shows `label`, any bytes; `None` if there is nothing to show or it would be too long. What could do harm
/// in a path or on a terminal is written as udev does it in `/dev/disk/by-label`: `\x` and two digits.
pub fn file_name(label: &[u8]) -> Option<String> {
    let mut name = String::new();
    for chunk in label.utf8_chunks() {
        for character in chunk.valid().chars() {
            let is_plain = match character.is_ascii() {
                true => character.is_ascii_alphanumeric() || "#+-.:=@_".contains(character),
                false => character.is_alphanumeric(),
            };
            match is_plain {
                true => name.push(character),
                false => escape(character.encode_utf8(&mut [0; 4]).as_bytes(), &mut name),
            }
        }
        escape(chunk.invalid(), &mut name);
    }
    // Not a name of its own, and not a hidden one.
    if name.starts_with('.') {
        name.replace_range(..1, "\\x2e");
    }
    (!name.is_empty() && name.len() <= LONGEST).then_some(name)
}

fn escape(bytes: &[u8], name: &mut String) {
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(name, "\\x{byte:02x}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_harmless_stays_and_the_rest_is_spelled_out() {
        let cases: [(&[u8], Option<&str>); 9] = [
            (b"root", Some("root")),
            ("Daten-ü_1".as_bytes(), Some("Daten-ü_1")),
            (
                b"EFI system partition",
                Some("EFI\\x20system\\x20partition"),
            ),
            (b"..", Some("\\x2e.")),
            (b".", Some("\\x2e")),
            (b"a/../b", Some("a\\x2f..\\x2fb")),
            (b"a\nb\x1b[0m", Some("a\\x0ab\\x1b\\x5b0m")),
            (b"\xff\\", Some("\\xff\\x5c")),
            (b"", None),
        ];
        for (label, name) in cases {
            assert_eq!(file_name(label).as_deref(), name, "{label:?}");
        }
        assert_eq!(file_name(&[b' '; 64]), None);
        assert!(file_name(&[b'a'; 255]).is_some());
    }

    proptest! {
        #[test]
        fn every_name_is_one_name(label in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Some(name) = file_name(&label) {
                prop_assert!(!name.contains('/') && name != "." && name != "..");
                prop_assert!(!name.chars().any(char::is_control));
                prop_assert!(name.len() <= 255);
            }
        }
    }
}
