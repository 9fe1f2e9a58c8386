//! QEMU's key=value syntax: `a=b,c.d=e,list.0=x`. Knows no option by name.
//!
//! The grammar (probed on `qemu-storage-daemon` 10.0 and 11.1; QEMU describes it in `util/keyval.c`):
//!
//! - An argument is a list of parameters between commas; one comma may end it.
//! - A parameter is `KEY=VALUE`. In a value, `,,` stands for one comma.
//! - The first may be a value alone when the option has an implied key; commas cannot be escaped in it.
//! - `help` or `?` alone asks for help.
//! - A key is made of dotted parts. Parts are names, or numbers that make a list; the first is a name. A name is a
//!   letter, then letters, digits, `-` and `_`; in front of it may stand a vendor's domain, `__DOMAIN_`.
//! - Of two parameters with the same key the later one counts.

use serde_json::{Map, Value};

use crate::error::Error;

/// How many parts a key may have.
pub const MAX_DEPTH: usize = 256;

/// How many parameters one argument may have.
pub const MAX_PARAMETERS: usize = 10_000;

/// The longest part of a key, in bytes (as in QEMU).
pub const MAX_FRAGMENT: usize = 127;

/// What an argument says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeyVal {
    /// The parameters, as nested objects and arrays; every scalar is a string. In the order of their first mention.
    pub members: Map<String, Value>,
    /// Whether help was asked for.
    pub help: bool,
}

/// Reads an argument. `implied` is the key of a first parameter that has none.
///
/// # Errors
/// The first mistake, in the words of `qemu-storage-daemon`.
pub fn parse(text: &str, implied: Option<&str>) -> Result<KeyVal, Error> {
    let mut result = KeyVal::default();
    let mut rest = text;
    let mut count = 0;
    while !rest.is_empty() {
        count += 1;
        if count > MAX_PARAMETERS {
            return Err(Error::TooMany {
                limit: MAX_PARAMETERS,
            });
        }
        let implied = implied.filter(|_| count == 1);
        rest = parameter(rest, implied, &mut result)?;
    }
    for (name, member) in &mut result.members {
        make_lists(member, &mut vec![name.clone()])?;
    }
    Ok(result)
}

/// Reads the first parameter of `text` into `result`. Gives what follows it.
fn parameter<'t>(
    text: &'t str,
    implied: Option<&str>,
    result: &mut KeyVal,
) -> Result<&'t str, Error> {
    let end = text.find(['=', ',']).unwrap_or(text.len());
    let (key, rest) = text.split_at(end);
    if let Some(rest) = rest.strip_prefix('=') {
        let (group, name) = find_group(&mut result.members, key)?;
        let (value, rest) = value(rest);
        insert(group, name, key, value)?;
        return Ok(rest);
    }
    let rest = rest.strip_prefix(',').unwrap_or(rest);
    if matches!(key, "help" | "?") {
        result.help = true;
        return Ok(rest);
    }
    if let Some(implied) = implied.filter(|_| !key.is_empty()) {
        insert(&mut result.members, implied, implied, key.to_owned())?;
        return Ok(rest);
    }
    find_group(&mut result.members, key)?;
    Err(Error::ExpectedEquals {
        key: key.to_owned(),
    })
}

/// Splits `text` behind the value that it begins with: at the first comma that is not doubled.
fn value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some((run, behind)) = rest.split_once(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(run);
        match behind.strip_prefix(',') {
            Some(behind) => {
                value.push(',');
                rest = behind;
            }
            None => return (value, behind),
        }
    }
}

/// Finds the group that the last part of a key belongs to, making the groups on the way. Gives also the last part.
///
/// Checks each part before it enters the group in front of it: QEMU finds mistakes in this order.
fn find_group<'m, 'k>(
    members: &'m mut Map<String, Value>,
    key: &'k str,
) -> Result<(&'m mut Map<String, Value>, &'k str), Error> {
    let mut group = members;
    let mut part = part_at(key, 0)?;
    let mut end = part.len();
    let mut depth = 1;
    while end < key.len() {
        if depth == MAX_DEPTH {
            return Err(Error::TooDeep {
                what: "Parameters",
                limit: MAX_DEPTH,
            });
        }
        let next = part_at(key, end + 1)?;
        let member = group
            .entry(canonical(part))
            .or_insert_with(|| Value::Object(Map::new()));
        let Value::Object(inner) = member else {
            return Err(Error::Inconsistent {
                prefix: key[..end].to_owned(),
            });
        };
        group = inner;
        part = next;
        end += 1 + part.len();
        depth += 1;
    }
    Ok((group, part))
}

/// The part of a key that begins at `start` and ends in front of a dot or with the key.
fn part_at(key: &str, start: usize) -> Result<&str, Error> {
    let invalid = || Error::InvalidKey {
        key: key.to_owned(),
    };
    let rest = &key[start..];
    let length = part_length(rest, start == 0).ok_or_else(invalid)?;
    let (part, behind) = rest.split_at(length);
    if !behind.is_empty() && !behind.starts_with('.') {
        return Err(invalid());
    }
    if length > MAX_FRAGMENT {
        return Err(Error::KeyTooLong {
            fragment: part.to_owned(),
            whole: part == key,
        });
    }
    Ok(part)
}

/// The length of the name or number that `text` begins with, in bytes.
fn part_length(text: &str, is_first: bool) -> Option<usize> {
    let run = |from: usize, accepts: fn(u8) -> bool| {
        text.as_bytes()[from..]
            .iter()
            .position(|b| !accepts(*b))
            .map_or(text.len(), |length| from + length)
    };
    let digits = run(0, |b| b.is_ascii_digit());
    if digits > 0 {
        return (!is_first).then_some(digits);
    }
    let mut start = 0;
    if text.starts_with("__") {
        let domain = run(2, |b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.'));
        if text.as_bytes().get(domain) != Some(&b'_') {
            return None;
        }
        start = domain + 1;
    }
    text.as_bytes()
        .get(start)
        .filter(|b| b.is_ascii_alphabetic())?;
    Some(run(start, |b| {
        b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')
    }))
}

/// Puts a value into the group that its key's last part belongs to.
fn insert(
    group: &mut Map<String, Value>,
    name: &str,
    key: &str,
    value: String,
) -> Result<(), Error> {
    match group.entry(canonical(name)).or_insert(Value::Null) {
        Value::Object(_) => {
            return Err(Error::Inconsistent {
                prefix: key.to_owned(),
            });
        }
        place => *place = Value::String(value),
    }
    Ok(())
}

/// The one spelling of a part: `007` and `7` are the same index.
fn canonical(part: &str) -> &str {
    match part.trim_start_matches('0') {
        "" => "0",
        trimmed if part.starts_with('0') => trimmed,
        _ => part,
    }
}

/// Turns groups whose parts are all numbers into lists, from the inside out. Recurses at most [`MAX_DEPTH`] deep.
fn make_lists(value: &mut Value, path: &mut Vec<String>) -> Result<(), Error> {
    let Value::Object(members) = value else {
        return Ok(());
    };
    for (name, member) in members.iter_mut() {
        path.push(name.clone());
        make_lists(member, path)?;
        path.pop();
    }
    let indices = members
        .keys()
        .filter(|name| name.starts_with(|first: char| first.is_ascii_digit()))
        .count();
    if indices == 0 {
        return Ok(());
    }
    if indices < members.len() {
        return Err(Error::Inconsistent {
            prefix: path.join("."),
        });
    }
    let mut list = Vec::with_capacity(indices);
    for index in 0..indices {
        let element = members.remove(&index.to_string());
        list.push(element.ok_or_else(|| Error::MissingElement {
            name: format!("{}.{index}", path.join(".")),
        })?);
    }
    *value = Value::Array(list);
    Ok(())
}

#[cfg(test)]
mod tests;
