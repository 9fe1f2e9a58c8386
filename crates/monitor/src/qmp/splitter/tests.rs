//! Streams that clients send, and those that nobody should.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{MAX_MESSAGE, Splitter};
use crate::error::Error;

/// The messages of a stream that comes in pieces of this many bytes.
fn split(stream: &[u8], piece: usize) -> Vec<Result<Value, Error>> {
    let mut splitter = Splitter::default();
    let mut messages = Vec::new();
    for mut input in stream.chunks(piece) {
        while let Some(message) = splitter.next(&mut input) {
            messages.push(message);
        }
        assert!(input.is_empty(), "all is taken");
        assert!(splitter.message.capacity() <= 4 * MAX_MESSAGE);
    }
    messages.extend(splitter.finish());
    messages
}

fn shown(stream: &[u8]) -> Vec<String> {
    let whole = split(stream, stream.len().max(1));
    for piece in [1, 2, 3, 7] {
        assert_eq!(split(stream, piece), whole, "in pieces of {piece}");
    }
    let show = |message: Result<Value, Error>| match message {
        Ok(value) => value.to_string(),
        Err(error) => format!("! {error}"),
    };
    whole.into_iter().map(show).collect()
}

#[test]
fn values_are_found_however_they_are_written() {
    assert_eq!(
        shown(b"{\"a\":1}{'b':\n\n2} [3]\n\"x\"'y' 12 true\r\n\r\nnull"),
        [
            "{\"a\":1}",
            "{\"b\":2}",
            "[3]",
            "\"x\"",
            "\"y\"",
            "12",
            "true",
            "null"
        ]
    );
    assert_eq!(
        shown(br#"{"a}]\"": '{"\''} {}"#),
        [r#"{"a}]\"":"{\"'"}"#, "{}"]
    );
    assert_eq!(shown(b" \n\t \n"), [""; 0]);
    assert_eq!(shown(b"{\"unfinished\": [1, "), [""; 0]);
}

#[test]
fn a_mistake_inside_a_balanced_message_costs_that_message_only() {
    let messages = shown(b"{\"a\",1} {\"a\":1,\"a\":2} nul [1] \"\x80\" 7");
    assert_eq!(messages.len(), 6, "{messages:?}");
    assert!(messages[0].starts_with("! JSON parse error, missing : in object pair"));
    assert!(messages[1].starts_with("! JSON parse error, duplicate key"));
    assert!(messages[2].starts_with("! JSON parse error, invalid keyword 'nul'"));
    assert_eq!(messages[3], "[1]");
    assert_eq!(messages[4], "! JSON parse error, stray '\\uFFFD'");
    assert_eq!(messages[5], "7");
}

#[test]
fn what_hides_the_next_message_costs_the_line_and_one_error() {
    for bad in [
        "}}}}",
        "@ {} {}",
        "\"never closed",
        "%d",
        "\u{ff}\u{fe}",
        "\u{e9} {}",
        ", :",
    ] {
        let messages = shown(format!("{bad}\n[1]").as_bytes());
        assert_eq!(messages.len(), 2, "{bad}: {messages:?}");
        assert!(
            messages[0].starts_with("! JSON parse error"),
            "{messages:?}"
        );
        assert_eq!(messages[1], "[1]");
    }
    // Clients that lost their place send one of these, and what follows is understood.
    for stray in [
        &b"\x1b"[..],
        b"\xff",
        b"\xfe",
        b"\"broken\x1b",
        b"{\"a\": \"\xff",
    ] {
        let messages = shown(&[stray, b"{\"a\":1}"].concat());
        assert_eq!(messages.len(), 2, "{messages:?}");
        assert_eq!(messages[1], "{\"a\":1}");
    }
    let behind = shown(b"{\"a\":1}} {\"b\":2}");
    assert_eq!((behind.len(), &*behind[2]), (3, "{\"b\":2}"));
    assert_eq!(
        shown(b"{\"a\": \"\n{}"),
        ["! JSON parse error, stray '\\n'", "{}"]
    );
}

#[test]
fn depth_is_bounded() {
    let deep = "[".repeat(1024) + &"]".repeat(1024);
    assert_eq!(shown(deep.as_bytes()), [deep]);
    let message = "[".repeat(10_000) + "\n{}";
    assert_eq!(
        shown(message.as_bytes()),
        ["! JSON nesting depth limit exceeded", "{}"]
    );
}

#[test]
fn size_is_bounded() {
    let long = format!("[\"{}\"]", "x".repeat(MAX_MESSAGE - 4));
    assert_eq!(
        split(long.as_bytes(), 4096),
        [Ok(json!(["x".repeat(MAX_MESSAGE - 4)]))]
    );
    let mut longer = format!("[\"{}\"]", "x".repeat(64 << 20)).into_bytes();
    longer.extend(b"\n{}");
    let messages = split(&longer, 65536);
    assert_eq!(messages, [Err(Error::MessageTooLong), Ok(json!({}))]);
}

proptest! {
    #[test]
    fn nothing_makes_it_panic_or_forget_the_next_line(noise in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut stream = noise;
        // The second line ends whatever string the noise has left open; brackets that it has left open it may keep.
        stream.extend(b"\n\n");
        let messages = split(&stream, stream.len());
        prop_assert!(messages.len() <= stream.len());
        prop_assert_eq!(split(&stream, 1), messages);
    }

    #[test]
    fn values_come_through_whatever_stands_between_them(numbers in prop::collection::vec(any::<i64>(), 0..20), blank in "[ \n\t\r]{1,3}") {
        let texts: Vec<String> = numbers.iter().map(|number| format!("{number}{blank}")).collect();
        let stream = texts.concat();
        let values: Vec<_> = numbers.into_iter().map(|number| Ok(json!(number))).collect();
        prop_assert_eq!(split(stream.as_bytes(), 5), values);
    }
}
