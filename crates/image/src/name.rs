//! Names of images as they stand in headers and on command lines: plain paths, `file:` names, and QEMU's `json:`
//! descriptions. It opens nothing; a name may come from a hostile image, so what is not understood is refused by name.

use std::path::{Path, PathBuf};

use diskfuse_block::{Error, Kind, Result};
use serde_json::{Map, Value};

use crate::format::Format;

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    /// The file or block device.
    pub filename: PathBuf,
    /// The format, if the name says it.
    pub format: Option<Format>,
    /// `offset` and `size` of a part of a raw file, in bytes.
    pub part: Option<Part>,
    /// What is below it.
    pub backing: NamedBacking,
}

/// A part of a raw file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its bytes; all that follow if not given.
    pub size: Option<u64>,
}

/// What a `json:` name says of the backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamedBacking {
    /// Nothing: it is the one in the header.
    AsInHeader,
    /// There is to be none.
    None,
    /// Another one.
    Instead(Box<Named>),
}

impl Named {
    /// A plain path.
    pub fn path(path: impl Into<PathBuf>) -> Self {
        Self {
            filename: path.into(),
            format: None,
            part: None,
            backing: NamedBacking::AsInHeader,
        }
    }
}

/// The protocol that a name begins with, if it does: letters, digits and `+-.` before a colon, with no slash in front.
/// (QEMU's `path_has_protocol` takes anything before a colon; so does this.)
pub fn protocol(name: &str) -> Option<&str> {
    let end = name.find([':', '/'])?;
    name.get(end..)?
        .starts_with(':')
        .then(|| name.get(..end))
        .flatten()
}

/// What a name stands for, by the rules for names in image headers.
///
/// # Errors
/// [`Kind::Unsupported`] for a protocol, driver or option that this version does not know, [`Kind::Invalid`] for a
/// `json:` name that is no description of an image.
pub fn parse(name: &str) -> Result<Named> {
    match protocol(name) {
        None => Ok(Named::path(name)),
        Some("json") => parse_json(name.get("json:".len()..).unwrap_or_default()),
        Some("file") => Ok(Named::path(after_file(name))),
        Some(protocol) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "'{name}': protocol '{protocol}' is not built into this version yet; it reads files and block devices \
                 (write './{name}' if it is a file of that name)"
            ),
        )),
    }
}

/// A name on a command line: a file of exactly that name is meant if there is one.
pub fn parse_argument(name: &Path) -> Result<Named> {
    match name.to_str() {
        Some(text) if name.symlink_metadata().is_err() => match protocol(text) {
            Some("json" | "file") => parse(text),
            // Probably a missing file; whoever opens it says so. A protocol has more than a colon.
            Some(_) if !text.contains("://") => Ok(Named::path(name)),
            _ => parse(text),
        },
        _ => Ok(Named::path(name)),
    }
}

/// A name from the header of the image `overlay`: a relative path begins at that image's folder. Names with a protocol
/// are left as they are, as in QEMU.
pub fn parse_beside(overlay: &Path, name: &str) -> Result<Named> {
    let mut named = parse(name)?;
    if protocol(name).is_none() {
        named.filename = beside(overlay, &named.filename);
    }
    Ok(named)
}

/// The path of a file that is named relative to the image `overlay`.
pub fn beside(overlay: &Path, path: &Path) -> PathBuf {
    match overlay.parent() {
        Some(folder) if path.is_relative() => folder.join(path),
        _ => path.to_owned(),
    }
}

/// The name of a backing file as a person would give it now: relative names resolved, others as they are.
pub fn full_name(overlay: &Path, name: &str) -> String {
    match protocol(name) {
        None => beside(overlay, Path::new(name)).display().to_string(),
        Some(_) => name.to_owned(),
    }
}

/// `file:path` and `file:///path`.
fn after_file(name: &str) -> &str {
    let rest = name.get("file:".len()..).unwrap_or_default();
    match rest.strip_prefix("//") {
        Some(path) if path.starts_with('/') => path,
        _ => rest,
    }
}

fn invalid(message: impl std::fmt::Display) -> Error {
    Error::new(
        Kind::Invalid,
        format!("the json: name of an image is wrong: {message}"),
    )
}

fn parse_json(text: &str) -> Result<Named> {
    let value: Value = serde_json::from_str(text).map_err(invalid)?;
    let Value::Object(fields) = value else {
        return Err(invalid("it is not an object"));
    };
    from_fields(nested(fields)?)
}

/// Most objects within objects that a description may have.
const DEEPEST: usize = 16;

/// `{"file.filename": x}` as `{"file": {"filename": x}}`.
fn nested(fields: Map<String, Value>) -> Result<Map<String, Value>> {
    let mut all = Map::new();
    for (key, value) in fields {
        let mut place = &mut all;
        let mut parts: Vec<&str> = key.split('.').collect();
        if parts.len() > DEEPEST {
            return Err(invalid(format_args!("'{key}' is nested too deeply")));
        }
        let last = parts.pop().unwrap_or_default();
        for part in parts {
            let inner = place
                .entry(part)
                .or_insert_with(|| Value::Object(Map::new()));
            place = inner
                .as_object_mut()
                .ok_or_else(|| invalid(format_args!("'{key}' contradicts '{part}'")))?;
        }
        if place.insert(last.to_owned(), value).is_some() {
            return Err(invalid(format_args!("'{key}' is given twice")));
        }
    }
    Ok(all)
}

/// A description of a format over a file, or of a file alone.
fn from_fields(mut fields: Map<String, Value>) -> Result<Named> {
    let driver = take_text(&mut fields, "driver")?;
    // Names of nodes and how they are used are the business of whoever opens the image.
    for ignored in ["node-name", "read-only", "auto-read-only"] {
        fields.remove(ignored);
    }
    let named = match (driver.as_deref(), fields.remove("file")) {
        (Some("file" | "host_device") | None, None) => {
            let mut named = Named::path(take_filename(&mut fields)?);
            named.format = driver.map(|_| Format::Raw);
            named
        }
        (driver, file) => {
            let format = driver.map(Format::parse).transpose()?;
            let file = match file {
                Some(file) => from_object(file, "file")?,
                // `{"driver": "qcow2", "filename": "x"}`, which QEMU takes as well.
                None => Named::path(take_filename(&mut fields)?),
            };
            Named {
                format,
                part: take_part(&mut fields, format)?,
                backing: take_backing(&mut fields)?,
                ..file
            }
        }
    };
    match fields.keys().next() {
        None => Ok(named),
        Some(key) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "option '{key}' in the json: name of an image is not built into this version yet"
            ),
        )),
    }
}

fn from_object(value: Value, key: &str) -> Result<Named> {
    match value {
        Value::Object(fields) => from_fields(nested(fields)?),
        Value::String(name) => Err(Error::new(
            Kind::Unsupported,
            format!(
                "'{key}' in the json: name of an image refers to the node '{name}'; describe the file instead"
            ),
        )),
        _ => Err(invalid(format_args!("'{key}' is not an object"))),
    }
}

fn take_filename(fields: &mut Map<String, Value>) -> Result<PathBuf> {
    match take_text(fields, "filename")? {
        Some(name) => Ok(PathBuf::from(name.strip_prefix("file:").unwrap_or(&name))),
        None => Err(invalid("it has no 'filename'")),
    }
}

fn take_part(fields: &mut Map<String, Value>, format: Option<Format>) -> Result<Option<Part>> {
    if format != Some(Format::Raw) {
        return Ok(None);
    }
    let offset = take_number(fields, "offset")?;
    let size = take_number(fields, "size")?;
    Ok((offset.is_some() || size.is_some()).then(|| Part {
        offset: offset.unwrap_or(0),
        size,
    }))
}

fn take_backing(fields: &mut Map<String, Value>) -> Result<NamedBacking> {
    match fields.remove("backing") {
        None => Ok(NamedBacking::AsInHeader),
        Some(Value::Null) => Ok(NamedBacking::None),
        Some(value) => Ok(NamedBacking::Instead(Box::new(from_object(
            value, "backing",
        )?))),
    }
}

fn take_text(fields: &mut Map<String, Value>, key: &str) -> Result<Option<String>> {
    match fields.remove(key) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(invalid(format_args!("'{key}' is not a text"))),
    }
}

/// QEMU takes numbers written as text as well.
fn take_number(fields: &mut Map<String, Value>, key: &str) -> Result<Option<u64>> {
    let number = match fields.remove(key) {
        None => return Ok(None),
        Some(Value::Number(number)) => number.as_u64(),
        Some(Value::String(text)) => text.parse().ok(),
        Some(_) => None,
    };
    number
        .map(Some)
        .ok_or_else(|| invalid(format_args!("'{key}' is not a number of bytes")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_name_begins_at_the_folder_of_the_overlay() {
        let of = |overlay: &str, name: &str| {
            parse_beside(Path::new(overlay), name)
                .unwrap()
                .filename
                .display()
                .to_string()
        };
        assert_eq!(of("/a/o.qcow2", "b/base"), "/a/b/base");
        assert_eq!(of("o.qcow2", "base"), "base");
        assert_eq!(of("/a/o.qcow2", "/c/base"), "/c/base");
        assert_eq!(of("/a/o.qcow2", "file:base"), "base");
        assert_eq!(of("/a/o.qcow2", "./x:y"), "/a/./x:y");
    }

    #[test]
    fn a_protocol_that_is_not_there_is_refused_by_name() {
        for name in ["nbd://host/export", "http://host/x", "rbd:pool/x", "x:y"] {
            let error = parse(name).unwrap_err();
            assert_eq!(error.kind(), Kind::Unsupported);
            let protocol = name.split(':').next().unwrap();
            assert!(
                error.to_string().contains(&format!("'{protocol}'")),
                "{error}"
            );
        }
    }

    #[test]
    fn descriptions_are_understood_nested_and_dotted() {
        let expected = Named {
            format: Some(Format::Qcow2),
            ..Named::path("/x")
        };
        for text in [
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/x"}}"#,
            r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"/x"}"#,
            r#"json:{"driver":"qcow2","file.filename":"/x","node-name":"n"}"#,
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
        let part = parse(r#"json:{"driver":"raw","offset":512,"size":"1024","file.filename":"d"}"#);
        assert_eq!(
            part.unwrap().part,
            Some(Part {
                offset: 512,
                size: Some(1024)
            })
        );
        let file = parse(r#"json:{"driver":"file","filename":"d"}"#).unwrap();
        assert_eq!(file.format, Some(Format::Raw));
        let none = parse(r#"json:{"driver":"qcow2","file.filename":"d","backing":null}"#).unwrap();
        assert_eq!(none.backing, NamedBacking::None);
    }

    #[test]
    fn a_wrong_description_is_refused_with_what_is_wrong() {
        let deep = format!("json:{{\"{}x\":1}}", "a.".repeat(100));
        let cases = [
            ("json:", "EOF"),
            ("json:[]", "not an object"),
            ("json:{}", "no 'filename'"),
            (r#"json:{"driver":"vmdk","file.filename":"x"}"#, "'vmdk'"),
            (r#"json:{"driver":"nbd","host":"x"}"#, "'nbd'"),
            (r#"json:{"driver":1,"file.filename":"x"}"#, "'driver'"),
            (
                r#"json:{"driver":"qcow2","file.filename":"x","magic":1}"#,
                "'magic'",
            ),
            (r#"json:{"driver":"qcow2","file":"node"}"#, "node 'node'"),
            (
                r#"json:{"file":{"filename":"x"},"file.filename":"y"}"#,
                "twice",
            ),
            (&deep, "too deeply"),
        ];
        for (text, words) in cases {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
