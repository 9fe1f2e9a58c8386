//! JSON as QEMU writes it, for the eyes and the patterns that are used to it: `"key": value, `, characters that are not
//! ASCII as `\uXXXX`, and if wanted a line for each member.

use std::fmt::Write;

use serde_json::Value;

/// The text of a message with the end of its line, as it goes over the wire.
pub fn to_text(value: &Value, pretty: bool) -> String {
    let mut text = String::new();
    write_value(value, pretty.then_some(0), &mut text);
    if pretty {
        text = text.replace('\n', "\r\n");
    }
    text.push_str("\r\n");
    text
}

/// Writes a value; `depth` is how many values are around it, if each member gets a line.
///
/// Recursion: what is written was read with bounded depth, or made here.
fn write_value(value: &Value, depth: Option<usize>, text: &mut String) {
    match value {
        Value::Null => text.push_str("null"),
        Value::Bool(true) => text.push_str("true"),
        Value::Bool(false) => text.push_str("false"),
        Value::Number(number) => text.push_str(&number.to_string()),
        Value::String(string) => write_string(string, text),
        Value::Array(list) => {
            text.push('[');
            for (index, element) in list.iter().enumerate() {
                separate(index, depth, text);
                write_value(element, depth.map(|depth| depth + 1), text);
            }
            end_line(depth, text);
            text.push(']');
        }
        Value::Object(members) => {
            text.push('{');
            for (index, (key, value)) in members.iter().enumerate() {
                separate(index, depth, text);
                write_string(key, text);
                text.push_str(": ");
                write_value(value, depth.map(|depth| depth + 1), text);
            }
            end_line(depth, text);
            text.push('}');
        }
    }
}

/// What stands in front of an element.
fn separate(index: usize, depth: Option<usize>, text: &mut String) {
    match depth {
        None if index > 0 => text.push_str(", "),
        None => {}
        Some(_) => {
            if index > 0 {
                text.push(',');
            }
            end_line(depth.map(|depth| depth + 1), text);
        }
    }
}

fn end_line(depth: Option<usize>, text: &mut String) {
    if let Some(depth) = depth {
        text.push('\n');
        text.extend(std::iter::repeat_n("    ", depth));
    }
}

fn write_string(string: &str, text: &mut String) {
    text.push('"');
    for letter in string.chars() {
        match letter {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\x08' => text.push_str("\\b"),
            '\x0c' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(letter),
            _ => {
                for unit in letter.encode_utf16(&mut [0; 2]) {
                    // Writing to a string cannot fail.
                    let _ = write!(text, "\\u{unit:04X}");
                }
            }
        }
    }
    text.push('"');
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::to_text;

    /// As `qemu-storage-daemon` 10.0.2 writes them.
    #[test]
    fn texts_look_as_in_qemu() {
        let value = json!({"return": [{"a": 1, "b": [true, null]}, {}, []], "id": "x\u{1}\u{7f}é😀\"\\/\n"});
        assert_eq!(
            to_text(&value, false),
            "{\"return\": [{\"a\": 1, \"b\": [true, null]}, {}, []], \
             \"id\": \"x\\u0001\\u007F\\u00E9\\uD83D\\uDE00\\\"\\\\/\\n\"}\r\n"
        );
        let value = json!({"return": {}, "list": [], "QMP": {"capabilities": ["oob"]}});
        let lines = [
            "{",
            "    \"return\": {",
            "    },",
            "    \"list\": [",
            "    ],",
            "    \"QMP\": {",
            "        \"capabilities\": [",
            "            \"oob\"",
            "        ]",
            "    }",
            "}",
            "",
        ];
        assert_eq!(to_text(&value, true), lines.join("\r\n"));
    }
}
