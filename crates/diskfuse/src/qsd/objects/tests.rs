use diskfuse_block::drivers::{NullConfig, open_null, open_throttle};
use diskfuse_block::{Access, Extent, Node};
use serde_json::json;

use super::*;

fn objects(arguments: &[&str]) -> Objects {
    let all = Objects::new(Choice::Auto);
    for argument in arguments {
        add(&all, argument).unwrap();
    }
    all
}

fn add(all: &Objects, argument: &str) -> Result<()> {
    all.add(ObjectOptions::parse(argument).unwrap())
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("it worked"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn objects_share_their_ids_and_are_found_by_type() {
    let all = objects(&[
        "iothread,id=io0",
        "throttle-group,id=limits",
        "secret,id=s,data=x",
    ]);
    assert!(all.iothread("io0").is_ok() && all.throttle_group("limits").is_ok());
    for argument in [
        "iothread,id=io0",
        "throttle-group,id=io0",
        "secret,id=limits,data=y",
    ] {
        let said = message(add(&all, argument));
        assert!(
            said.starts_with("attempt to add duplicate property '"),
            "{said}"
        );
        assert!(said.ends_with("' to object (type 'container')"), "{said}");
    }
    assert_eq!(
        message(all.iothread("i0o")),
        "iothread \"i0o\" not found (did you mean 'io0'?)"
    );
    assert_eq!(
        message(all.iothread("limits")),
        "iothread \"limits\" not found"
    );
    assert_eq!(
        message(all.throttle_group("io0")),
        "Throttle group 'io0' does not exist"
    );
    let listed = [
        ("io0", "iothread"),
        ("limits", "throttle-group"),
        ("s", "secret"),
    ];
    assert_eq!(all.list(), listed.map(|(id, kind)| (id.to_owned(), kind)));
}

#[test]
fn what_is_used_stays_and_what_is_not_goes() {
    let all = objects(&["iothread,id=io", "throttle-group,id=t"]);
    let thread = all.iothread("io").unwrap();
    let node = open_throttle(
        open_null(&NullConfig::default()).unwrap(),
        &all.throttle_group("t").unwrap(),
        false,
    );
    let words = "object 'io' is in use, can not be deleted";
    assert_eq!(message(all.remove("io")), words);
    let words = "Cannot delete throttle group 't' with active references";
    assert_eq!(message(all.remove("t")), words);
    let number = thread.thread_id();
    let task = format!("/proc/self/task/{number}");
    assert!(Path::new(&task).exists());
    drop((thread, node));
    for id in ["io", "t"] {
        all.remove(id).unwrap();
        assert_eq!(message(all.remove(id)), format!("object '{id}' not found"));
    }
    assert!(!Path::new(&task).exists());
    add(&all, "throttle-group,id=io").unwrap();
}

#[test]
fn what_is_set_takes_effect() {
    let all = objects(&["iothread,id=io,poll-grow=3", "throttle-group,id=t"]);
    let child = open_null(&NullConfig::default()).unwrap();
    let node = open_throttle(child, &all.throttle_group("t").unwrap(), false);
    let is_free = || matches!(node.resolve(Access::Read, 0, 512), Extent::Void { .. });
    assert!(is_free());
    all.set("t", "limits", &json!({"iops-read": 10}))
        .unwrap()
        .unwrap();
    assert!(!is_free());
    let limits = all.property("t", "limits").unwrap().unwrap();
    assert_eq!(limits.value["iops-read"], 10);
    let refused = all.set("t", "limits", &json!({"iops-total": 10})).unwrap();
    assert!(message(refused).contains("cannot be used at the same time"));
    all.set("t", "limits", &json!({"iops-read": 0}))
        .unwrap()
        .unwrap();
    assert!(is_free());

    all.set("io", "poll-max-ns", &json!(77)).unwrap().unwrap();
    let (options, number) = all.iothreads().remove(0);
    assert_eq!((options.poll_max_ns, options.poll_grow), (77, 3));
    assert_eq!(number, all.iothread("io").unwrap().thread_id());
    assert_eq!(all.properties("io").unwrap().len(), 5);
    assert!(all.set("nobody", "x", &json!(1)).is_none());
    assert!(all.property("nobody", "x").is_none() && all.properties("nobody").is_none());
}

#[test]
fn a_secret_that_cannot_be_read_is_refused() {
    let all = objects(&[]);
    let said = message(add(&all, "secret,id=s,file=/no/such/secret"));
    assert!(
        said.starts_with("Unable to read /no/such/secret: "),
        "{said}"
    );
    assert!(said.ends_with("No such file or directory"), "{said}");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "not base64!").unwrap();
    let argument = format!("secret,id=s,file={},format=base64", file.path().display());
    assert_eq!(
        message(add(&all, &argument)),
        "Base64 data contains invalid characters"
    );
    std::fs::write(&file, "aGVsbG8=\n").unwrap();
    add(&all, &argument).unwrap();
    all.remove("s").unwrap();
}

#[test]
fn extreme_polling_is_bounded() {
    let ObjectOptions::Iothread(options) = ObjectOptions::parse(
        "iothread,id=a,poll-max-ns=9223372036854775807,poll-grow=9223372036854775807",
    )
    .unwrap() else {
        panic!("no iothread");
    };
    let polling = polling(&options);
    assert_eq!(polling.grow, 1 << 16);
    assert_eq!(polling.shrink, 0);
}
