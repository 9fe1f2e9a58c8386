use serde_json::json;

use super::{MAX_DEPTH, MAX_FRAGMENT, MAX_PARAMETERS, parse};
use crate::Error;

fn members(text: &str) -> serde_json::Value {
    parse(text, Some("driver")).map_or_else(
        |error| panic!("{text}: {error}"),
        |read| read.members.into(),
    )
}

fn error(text: &str) -> Error {
    parse(text, Some("driver"))
        .map_or_else(|error| error, |read| panic!("{text} was read as {read:?}"))
}

#[test]
fn dots_make_groups_and_numbers_make_lists() {
    assert_eq!(
        members("a=b,c.d=e,c.f=g"),
        json!({"a": "b", "c": {"d": "e", "f": "g"}})
    );
    assert_eq!(members("list.1=y,list.0=x"), json!({"list": ["x", "y"]}));
    assert_eq!(
        members("l.0.a=1,l.1.b.0=2"),
        json!({"l": [{"a": "1"}, {"b": ["2"]}]})
    );
    let many: Vec<String> = (0..12).map(|index| format!("l.{index}={index}")).collect();
    assert_eq!(members(&many.join(","))["l"][11], "11");
}

#[test]
fn a_doubled_comma_is_one_comma_of_a_value() {
    assert_eq!(
        members("a=x,,y,b=,,,c=,,"),
        json!({"a": "x,y", "b": ",", "c": ","})
    );
    assert_eq!(members("a=,b=x=y"), json!({"a": "", "b": "x=y"}));
}

#[test]
fn one_comma_may_end_the_argument() {
    assert_eq!(members(""), json!({}));
    assert_eq!(members("raw,"), json!({"driver": "raw"}));
    assert_eq!(members("a=b,"), json!({"a": "b"}));
    assert_eq!(
        error("a=b, "),
        Error::InvalidKey {
            key: " ".to_owned()
        }
    );
}

#[test]
fn only_the_first_parameter_may_lack_its_key() {
    assert_eq!(members("raw,size=1"), json!({"driver": "raw", "size": "1"}));
    assert_eq!(members("a!b"), json!({"driver": "a!b"}));
    assert_eq!(
        error("size=1,raw"),
        Error::ExpectedEquals {
            key: "raw".to_owned()
        }
    );
    assert_eq!(error("raw,,x"), Error::InvalidKey { key: String::new() });
    assert_eq!(
        parse("raw", None),
        Err(Error::ExpectedEquals {
            key: "raw".to_owned()
        })
    );
}

#[test]
fn help_is_noticed_anywhere() {
    for text in ["help", "?", "raw,help", "a=b,?,c=d"] {
        assert!(
            parse(text, Some("driver")).is_ok_and(|read| read.help),
            "{text}"
        );
    }
    assert_eq!(members("help=me"), json!({"help": "me"}));
    assert!(!parse("help=me", None).is_ok_and(|read| read.help));
}

#[test]
fn the_later_of_two_equal_keys_counts() {
    assert_eq!(
        members("raw,driver=file,driver=null-co"),
        json!({"driver": "null-co"})
    );
    assert_eq!(members("l.0=a,l.00=b"), json!({"l": ["b"]}));
}

#[test]
fn keys_that_are_no_names_are_refused() {
    for key in [
        "",
        "0",
        "9a",
        "a.9a",
        "a..b",
        ".a",
        "a.",
        "a!b",
        "_a",
        "__a",
        "__org.foo",
        "__o_",
        "ä",
        "a.ä",
        "a b",
    ] {
        assert_eq!(
            error(&format!("x=y,{key}=z")),
            Error::InvalidKey {
                key: key.to_owned()
            }
        );
    }
    assert_eq!(
        members("__org.qemu_a-b.c=d"),
        json!({"__org.qemu_a-b": {"c": "d"}})
    );
    assert_eq!(members("a_B-9=c"), json!({"a_B-9": "c"}));
}

#[test]
fn contradictions_are_refused_with_the_group_named() {
    let inconsistent = |prefix: &str| Error::Inconsistent {
        prefix: prefix.to_owned(),
    };
    assert_eq!(error("a=b,a.c=d"), inconsistent("a"));
    assert_eq!(error("a.c=d,a=b"), inconsistent("a"));
    assert_eq!(error("a.b=c,a.0=d"), inconsistent("a"));
    assert_eq!(error("x.y.a.c=d,x.y.a.0=b"), inconsistent("x.y.a"));
    assert_eq!(error("x.y=1,x.y.a.c=d"), inconsistent("x.y"));
    // Before the missing `=` is noticed.
    assert_eq!(error("b=,b.a"), inconsistent("b"));
}

#[test]
fn lists_have_no_holes() {
    let missing = |name: &str| Error::MissingElement {
        name: name.to_owned(),
    };
    assert_eq!(error("a.0=b,a.2=c"), missing("a.1"));
    assert_eq!(error("x.y.1=d"), missing("x.y.0"));
    assert_eq!(error("a.99999999999999999999=d"), missing("a.0"));
}

#[test]
fn depth_count_and_length_are_bounded() {
    let deep = |depth: usize| format!("{}=x", vec!["a"; depth].join("."));
    assert!(parse(&deep(MAX_DEPTH), None).is_ok());
    assert!(matches!(error(&deep(MAX_DEPTH + 1)), Error::TooDeep { .. }));
    assert!(matches!(error(&deep(1_000_000)), Error::TooDeep { .. }));

    assert!(parse(&"a=,".repeat(MAX_PARAMETERS), None).is_ok());
    assert!(matches!(
        error(&"a=,".repeat(MAX_PARAMETERS + 1)),
        Error::TooMany { .. }
    ));

    let long = "a".repeat(MAX_FRAGMENT + 1);
    assert!(parse(&format!("{}=x", &long[1..]), None).is_ok());
    assert_eq!(
        error(&format!("{long}=x")).to_string(),
        format!("Parameter '{long}' is too long")
    );
    assert_eq!(
        error(&format!("b.{long}=x")).to_string(),
        format!("Parameter fragment '{long}' is too long")
    );
}
