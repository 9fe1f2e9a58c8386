use serde_json::{Value, json};

use super::*;

fn message(argument: &str) -> String {
    ObjectOptions::parse(argument).map_or_else(
        |error| error.to_string(),
        |object| panic!("{argument}: {object:?}"),
    )
}

#[test]
fn defaults_are_those_of_qemu() {
    let iothread = ObjectOptions::parse("iothread,id=io").unwrap();
    let defaults = IothreadOptions {
        id: "io".to_owned(),
        poll_max_ns: 32_768,
        poll_grow: 0,
        poll_shrink: 0,
        aio_max_batch: 0,
    };
    assert_eq!(iothread, ObjectOptions::Iothread(defaults));
}

#[test]
fn every_property_arrives_in_either_syntax() {
    let all = IothreadOptions {
        id: "io".to_owned(),
        poll_max_ns: 0,
        poll_grow: 2,
        poll_shrink: 3,
        aio_max_batch: 4,
    };
    let text = "iothread,id=io,poll-max-ns=0,poll-grow=2,poll-shrink=3,aio-max-batch=4";
    let json = r#"{"qom-type":"iothread","id":"io","poll-max-ns":0,"poll-grow":2,"poll-shrink":3,"aio-max-batch":4}"#;
    for argument in [text, json] {
        assert_eq!(
            ObjectOptions::parse(argument),
            Ok(ObjectOptions::Iothread(all.clone())),
            "{argument}"
        );
    }
}

#[test]
fn what_only_qemu_has_is_told_apart_from_what_nobody_has() {
    assert_eq!(
        message("main-loop,id=t"),
        "object type 'main-loop' is not built into this version yet"
    );
    assert_eq!(
        message("thread-context,id=t"),
        "object type 'thread-context' is not built into this version yet"
    );
    assert_eq!(
        message("secret,id=t,data=x,keyid=y"),
        "parameter 'keyid' is not built into this version yet"
    );
    assert_eq!(
        message("iothread,id=t,thread-pool-max=4"),
        "parameter 'thread-pool-max' is not built into this version yet"
    );
    assert_eq!(
        message("iothreads,id=t"),
        "Parameter 'qom-type' does not accept value 'iothreads' (did you mean 'iothread'?)"
    );
}

#[test]
fn help_is_told_apart_from_objects() {
    let cases = [
        ("help", HelpTopic::Objects),
        ("nonsense,?", HelpTopic::Objects),
        ("iothread,help", HelpTopic::Iothread),
        ("throttle-group,help", HelpTopic::ThrottleGroup),
        ("secret,id=a,help", HelpTopic::Secret),
    ];
    for (argument, expected) in cases {
        assert!(
            matches!(Request::parse(argument), Ok(Request::Help(topic)) if topic == expected),
            "{argument}"
        );
    }
    assert_eq!(
        ObjectOptions::parse("iothread,id=a,help"),
        Err(Error::NoHelp)
    );
}

fn group(argument: &str) -> ThrottleLimits {
    match ObjectOptions::parse(argument).unwrap() {
        ObjectOptions::ThrottleGroup(group) => group.limits,
        other => panic!("{other:?}"),
    }
}

#[test]
fn limits_have_three_spellings() {
    let rate = |average, max, max_length| ThrottleRate {
        average,
        max,
        max_length,
    };
    let expected = ThrottleLimits {
        bps_total: rate(1000, 2000, 3),
        iops_read: rate(10, 0, 1),
        iops_size: 4096,
        ..ThrottleLimits::default()
    };
    let single = "throttle-group,id=t,x-bps-total=1000,x-bps-total-max=2000,x-bps-total-max-length=3,x-iops-read=10,\
                  x-iops-size=4096";
    let limits = "throttle-group,id=t,limits.bps-total=1000,limits.bps-total-max=2000,\
                  limits.bps-total-max-length=3,limits.iops-read=10,limits.iops-size=4096";
    let json = "{'qom-type':'throttle-group','id':'t','limits':{'bps-total':1000,'bps-total-max':2000,\
                'bps-total-max-length':3,'iops-read':10,'iops-size':4096}}";
    for argument in [single, limits, json] {
        assert_eq!(group(argument), expected, "{argument}");
    }
    let both = group("throttle-group,id=t,x-bps-total=5,x-iops-total=1,limits.iops-total=6");
    assert_eq!((both.bps_total.average, both.iops_total.average), (5, 6));
    assert_eq!(group("throttle-group,id=t"), ThrottleLimits::default());
}

#[test]
fn limits_that_do_not_go_together_are_refused_in_the_words_of_qemu() {
    let cases = [
        (
            "limits.bps-total=1,limits.bps-read=2",
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        (
            "x-iops-size=4096",
            "iops size requires an iops value to be set",
        ),
        ("x-bps-total=-1", "Property values cannot be negative"),
        (
            "limits.bps-total=-1",
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        (
            "x-iops-read=1000000000000001",
            "bps/iops/max values must be within [0, 1000000000000000]",
        ),
        ("x-bps-total-max-length=0", "the burst length cannot be 0"),
        (
            "x-bps-total-max-length=2",
            "burst length set without burst rate",
        ),
        (
            "limits.bps-total=1,limits.bps-total-max=1000000,limits.bps-total-max-length=4294967295",
            "burst length too high for this burst rate",
        ),
        (
            "limits.bps-total=1,limits.bps-total-max=1,limits.bps-total-max-length=4294967296",
            "bps-total-max-length value must be in the range [0, 4294967295]",
        ),
        (
            "x-iops-total-max=4",
            "bps_max/iops_max require corresponding bps/iops values",
        ),
        (
            "x-iops-total=5,x-iops-total-max=4",
            "bps_max/iops_max cannot be lower than bps/iops",
        ),
        ("limits.nope=1", "Parameter 'limits.nope' is unexpected"),
        (
            "limits.bps-total=1k",
            "Parameter 'limits.bps-total' expects integer",
        ),
    ];
    for (argument, expected) in cases {
        assert_eq!(
            message(&format!("throttle-group,id=t,{argument}")),
            expected
        );
    }
}

#[test]
fn a_secret_is_checked_and_never_shown() {
    let secret = ObjectOptions::parse("secret,id=s,data=aGVsbG8=,format=base64").unwrap();
    assert_eq!(secret.property("data").unwrap().value, "aGVsbG8=");
    assert!(!format!("{secret:?}").contains("aGVs"));
    let file = ObjectOptions::parse("secret,id=s,file=/etc/key").unwrap();
    assert_eq!(file.property("file").unwrap().value, "/etc/key");
    let cases = [
        ("id=s", "Either 'file' or 'data' must be provided"),
        (
            "id=s,data=x,file=y",
            "'file' and 'data' are mutually exclusive",
        ),
        (
            "id=s,data=##,format=base64",
            "Base64 data contains invalid characters",
        ),
        (
            "id=s,data=x,format=no",
            "Parameter 'format' does not accept value 'no'",
        ),
        ("data=x", "Parameter 'id' is missing"),
    ];
    for (argument, expected) in cases {
        assert_eq!(message(&format!("secret,{argument}")), expected);
    }
}

#[test]
fn properties_can_be_listed_got_and_set() {
    let mut iothread = ObjectOptions::parse("iothread,id=io,poll-grow=2").unwrap();
    let listed: Vec<_> = iothread
        .properties()
        .into_iter()
        .map(|property| (property.name, property.kind))
        .collect();
    let expected = [
        ("type", "string"),
        ("poll-max-ns", "int"),
        ("poll-grow", "int"),
        ("poll-shrink", "int"),
        ("aio-max-batch", "int"),
    ];
    assert_eq!(listed, expected);
    iothread.set("poll-max-ns", &5.into()).unwrap();
    assert_eq!(iothread.property("poll-max-ns").unwrap().value, 5);
    assert_eq!(iothread.property("poll-grow").unwrap().value, 2);
    let before = iothread.clone();
    let cases = [
        (
            "poll-max-ns",
            Value::from(-5),
            "poll-max-ns value must be in range [0, 9223372036854775807]",
        ),
        (
            "poll-max-ns",
            "x".into(),
            "Invalid parameter type for 'poll-max-ns', expected: integer",
        ),
        ("id", "x".into(), "Property 'iothread.id' not found"),
        (
            "type",
            "x".into(),
            "Property 'iothread.type' is not writable",
        ),
    ];
    for (name, value, expected) in cases {
        let error = iothread.set(name, &value).unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert_eq!(iothread, before);
    }
}

#[test]
fn limits_that_are_not_set_stay() {
    let mut group = ObjectOptions::parse("throttle-group,id=t,limits.bps-total=1000").unwrap();
    assert_eq!(group.property("x-bps-total").unwrap().value, 1000);
    group.set("limits", &json!({"iops-total": 10})).unwrap();
    let limits = group.property("limits").unwrap().value;
    assert_eq!(limits.as_object().unwrap().len(), 19);
    assert_eq!(
        (&limits["bps-total"], &limits["iops-total"]),
        (&json!(1000), &json!(10))
    );
    assert_eq!(limits["bps-read-max-length"], 1);
    let before = group.clone();
    let cases = [
        (
            "limits",
            json!({"iops-read": 5}),
            "bps/iops/max total values and read/write values cannot be used at the same time",
        ),
        (
            "limits",
            json!({"nope": 5}),
            "Parameter 'limits.nope' is unexpected",
        ),
        (
            "limits",
            json!(5),
            "Invalid parameter type for 'limits', expected: object",
        ),
        (
            "x-bps-total",
            json!(5),
            "Property cannot be set after initialization",
        ),
        ("nope", json!(5), "Property 'throttle-group.nope' not found"),
    ];
    for (name, value, expected) in cases {
        assert_eq!(group.set(name, &value).unwrap_err().to_string(), expected);
        assert_eq!(group, before);
    }
    // Total limits give way to others when they are taken away in the same breath.
    group
        .set("limits", &json!({"iops-total": 0, "iops-read": 5}))
        .unwrap();
}
