use serde_json::{Value, json};

use super::{MAX_DEPTH, parse};
use crate::Error;

/// The problem that is reported, without its place.
fn problem(text: &str) -> String {
    match parse(text) {
        Err(Error::JsonSyntax { problem, .. }) => problem,
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn values_are_what_the_standard_says() {
    let text = r#" { "a" : [ 1, -2, 0, 1.5, 2e3, true, false, null ], "b": { } , "c": [ ] , "d": "é\u00e9\n\\\/" } "#;
    let value =
        json!({"a": [1, -2, 0, 1.5, 2000.0, true, false, null], "b": {}, "c": [], "d": "éé\n\\/"});
    assert_eq!(parse(text), Ok(value));
    assert_eq!(parse("18446744073709551615"), Ok(json!(u64::MAX)));
    assert_eq!(parse("-9223372036854775808"), Ok(json!(i64::MIN)));
    assert_eq!(parse("\"\\ud83d\\ude00\""), Ok(json!("😀")));
}

#[test]
fn single_quotes_are_quotes() {
    assert_eq!(
        parse(r#"{'a': 'it\'s "b"', "c": "it's"}"#),
        Ok(json!({"a": "it's \"b\"", "c": "it's"}))
    );
}

#[test]
fn mistakes_are_told_in_the_words_of_qemu() {
    let cases = [
        ("{", "premature EOI"),
        ("", "premature EOI"),
        ("{'a':'b", "premature EOI"),
        ("{'a':'b\\", "premature EOI"),
        ("{'a':1,'a':2}", "duplicate key"),
        ("{'a':1,}", "expecting value"),
        ("{'a':}", "expecting value"),
        ("[1,]", "expecting value"),
        ("[}", "expecting value"),
        ("{'a':1 'b'}", "expected separator in dict"),
        ("{'a':1]", "expected separator in dict"),
        ("[1 2]", "expected separator in list"),
        ("{'a'}", "missing : in object pair"),
        ("{1:2}", "key is not a string in object"),
        ("{a:1}", "invalid keyword 'a'"),
        ("nul", "invalid keyword 'nul'"),
        ("'\\x'", "invalid escape sequence in string"),
        ("01", "stray '01'"),
        ("1.", "stray '1.'"),
        ("-", "stray '-'"),
        ("%", "stray '%'"),
        ("'a\nb'", "control character in string"),
        ("'\\ud800b'", "\\ud800 is not a valid Unicode character"),
        ("'\\udc00'", "\\udc00 is not a valid Unicode character"),
        (
            "'\\ud83d\\u0041'",
            "\\ud83d is not a valid Unicode character",
        ),
        ("'\\u12'", "\\u12\\' is not a valid Unicode character"),
        ("'\\u0000'", "\\u0000 is not a valid Unicode character"),
        ("1e999", "number too large '1e999'"),
    ];
    for (text, expected) in cases {
        assert_eq!(problem(text), expected, "{text}");
    }
}

#[test]
fn only_one_value_is_read() {
    for text in ["{} x", "{}{}", "{}}", "1 2"] {
        assert_eq!(parse(text), Err(Error::JsonTrailing), "{text}");
    }
}

#[test]
fn depth_is_bounded_and_costs_no_stack() {
    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    assert!(parse(&nested(MAX_DEPTH)).is_ok());
    assert_eq!(parse(&nested(MAX_DEPTH + 1)), Err(Error::JsonDepth));
    assert_eq!(parse(&"{'a':".repeat(1_000_000)), Err(Error::JsonDepth));
}

#[test]
fn what_another_writer_writes_is_read_back() {
    let value: Value = json!({"a": "quote \" slash \\ tab \t é", "b": [1.25, -7, {"c": null}]});
    assert_eq!(parse(&value.to_string()), Ok(value));
}
