//! Numbers written as text in key=value options. JSON has its own.

/// Reads a whole number as C's `strtoll` does with base 0, which QEMU uses: leading blanks, a sign, `0x` for
/// hexadecimal, `0` for octal; nothing may follow. `None` when it is not one, or does not fit.
pub(crate) fn integer(text: &str) -> Option<i64> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (base, digits) = match digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"))
    {
        Some(hexadecimal) => (16, hexadecimal),
        None if digits.starts_with('0') => (8, digits),
        None => (10, digits),
    };
    // `from_str_radix` would take another sign.
    if !digits.chars().all(|digit| digit.is_digit(base)) {
        return None;
    }
    let magnitude = i128::from(u64::from_str_radix(digits, base).ok()?);
    i64::try_from(if negative { -magnitude } else { magnitude }).ok()
}

/// Reads a number of bytes with a suffix: decimal, a fraction allowed where the result is whole, then one of
/// `b k M G T P E` in either case (powers of 1024). `None` when it is not one, or exceeds `i64::MAX`.
pub(crate) fn with_suffix(text: &str) -> Option<i64> {
    let shift = match text.bytes().last()?.to_ascii_lowercase() {
        b'b' => 0,
        b'k' => 10,
        b'm' => 20,
        b'g' => 30,
        b't' => 40,
        b'p' => 50,
        b'e' => 60,
        _ => return None,
    };
    let number = text.get(..text.len() - 1)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let is_decimal =
        |part: &str| !part.is_empty() && part.bytes().all(|digit| digit.is_ascii_digit());
    if !is_decimal(whole) || !is_decimal(fraction) {
        return None;
    }
    let fraction = fraction.trim_end_matches('0');
    let places = u32::try_from(fraction.len())
        .ok()
        .filter(|places| *places <= 18)?;
    let fraction: u64 = if places == 0 {
        0
    } else {
        fraction.parse().ok()?
    };
    // At most 10^18 × 2^60, which fits.
    let scaled = u128::from(fraction) << shift;
    let parts = 10_u128.pow(places);
    if scaled % parts != 0 {
        return None;
    }
    let bytes = (u128::from(whole.parse::<u64>().ok()?) << shift) + scaled / parts;
    i64::try_from(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::{integer, with_suffix};

    #[test]
    fn integers_are_read_as_c_reads_them() {
        let cases = [
            ("0", 0),
            ("42", 42),
            ("-42", -42),
            ("+42", 42),
            (" \t42", 42),
            ("0x2A", 42),
            ("-0X2a", -42),
            ("052", 42),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775808", i64::MIN),
        ];
        for (text, value) in cases {
            assert_eq!(integer(text), Some(value), "{text}");
        }
    }

    #[test]
    fn what_is_no_integer_is_refused() {
        for text in [
            "",
            " ",
            "-",
            "+-4",
            "0x",
            "0x+4",
            "08",
            "4 ",
            "4k",
            "1.5",
            "1e3",
            "9223372036854775808",
            "٣",
        ] {
            assert_eq!(integer(text), None, "{text}");
        }
    }

    #[test]
    fn suffixes_are_powers_of_1024() {
        let cases = [
            ("512b", 512),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("64M", 64 << 20),
            ("1.5G", 3 << 29),
            ("2.50T", 5 << 39),
            ("3p", 3 << 50),
            ("7E", 7 << 60),
            ("0.5k", 512),
        ];
        for (text, value) in cases {
            assert_eq!(with_suffix(text), Some(value), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "",
            "k",
            "1",
            "1.5",
            "1X",
            "8E",
            "-1k",
            ".5k",
            "1.k",
            "1.0001k",
            "1e3k",
            "1kb",
            "99999999999999999999k",
            "1é",
        ] {
            assert_eq!(with_suffix(text), None, "{text}");
        }
    }
}
