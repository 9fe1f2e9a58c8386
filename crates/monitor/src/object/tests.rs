use super::*;

fn message(argument: &str) -> String {
    ObjectOptions::parse(argument).map_or_else(
        |error| error.to_string(),
        |object| panic!("{argument}: {object:?}"),
    )
}

#[test]
fn defaults_are_those_of_qemu() {
    let ObjectOptions::Iothread(iothread) = ObjectOptions::parse("iothread,id=io").unwrap();
    let defaults = IothreadOptions {
        id: "io".to_owned(),
        poll_max_ns: 32_768,
        poll_grow: 0,
        poll_shrink: 0,
        aio_max_batch: 0,
    };
    assert_eq!(iothread, defaults);
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
        message("throttle-group,id=t"),
        "object type 'throttle-group' is not built into this version yet"
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
    assert!(matches!(Request::parse("help"), Ok(Request::Help)));
    assert!(matches!(
        Request::parse("iothread,help"),
        Ok(Request::IothreadHelp)
    ));
    assert!(matches!(Request::parse("nonsense,?"), Ok(Request::Help)));
    assert_eq!(
        ObjectOptions::parse("iothread,id=a,help"),
        Err(Error::NoHelp)
    );
}
