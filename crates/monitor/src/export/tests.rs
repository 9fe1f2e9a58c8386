use super::*;

const START: &str = "fuse,id=e,node-name=n,mountpoint=/m";

fn read(more: &str) -> ExportOptions {
    ExportOptions::parse(&format!("{START}{more}"))
        .unwrap_or_else(|error| panic!("{more}: {error}"))
}

fn message(argument: &str) -> String {
    ExportOptions::parse(argument).map_or_else(
        |error| error.to_string(),
        |export| panic!("{argument}: {export:?}"),
    )
}

#[test]
fn defaults_are_those_of_qemu() {
    let fuse = FuseExportOptions {
        mountpoint: "/m".into(),
        growable: false,
        allow_other: OnOffAuto::Auto,
        max_background: None,
        transport: TransportOptions::default(),
    };
    assert_eq!(
        read(""),
        ExportOptions {
            id: "e".to_owned(),
            node_name: "n".to_owned(),
            writable: false,
            threads: ExportThreads::Node,
            fixed_iothread: false,
            kind: ExportKind::Fuse(fuse),
        }
    );
}

#[test]
fn every_parameter_arrives() {
    let export =
        read(",writable=on,growable=on,allow-other=off,fixed-iothread=on,max-background=65535");
    let ExportKind::Fuse(fuse) = export.kind;
    assert!(export.writable && export.fixed_iothread && fuse.growable);
    assert_eq!(
        (fuse.allow_other, fuse.max_background),
        (OnOffAuto::Off, NonZeroU16::new(65535))
    );
}

#[test]
fn threads_are_iothreads_or_its_own() {
    let names = |names: &[&str]| {
        names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        read(",iothread=a").threads,
        ExportThreads::Iothread("a".to_owned())
    );
    assert_eq!(
        read(",iothread.1=b,iothread.0=a").threads,
        ExportThreads::Iothreads(names(&["a", "b"]))
    );
    assert_eq!(
        read(",iothread.0=a").threads,
        ExportThreads::Iothreads(names(&["a"]))
    );
    assert_eq!(
        read(",threads=64").threads,
        ExportThreads::Own(NonZeroU8::new(64).unwrap())
    );
    let json = "{'type':'fuse','id':'e','node-name':'n','mountpoint':'/m','iothread':['a','b']}";
    assert_eq!(
        ExportOptions::parse(json).unwrap().threads,
        ExportThreads::Iothreads(names(&["a", "b"]))
    );
    assert_eq!(
        message(&format!("{START},iothread=a,threads=1")),
        "Parameters 'iothread' and 'threads' cannot be used together: \
         an export is served by iothreads, or by threads of its own"
    );
}

#[test]
fn numbers_out_of_range_are_refused_with_the_range() {
    for number in ["0", "-1", "65", "256", "10000", "4294967297"] {
        assert_eq!(
            message(&format!("{START},threads={number}")),
            "Parameter 'threads' expects a number from 1 to 64"
        );
    }
    for number in ["0", "65536", "-1"] {
        assert_eq!(
            message(&format!("{START},max-background={number}")),
            "Parameter 'max-background' expects a number from 1 to 65535"
        );
    }
    let many: Vec<String> = (0..=MAX_QUEUES)
        .map(|index| format!("iothread.{index}=a"))
        .collect();
    assert_eq!(
        message(&format!("{START},{}", many.join(","))),
        "Parameter 'iothread' expects 1 to 64 names"
    );
}

/// The words of `qemu-storage-daemon` 11.1; 10 knows no lists.
#[test]
fn lists_of_iothreads_hold_names() {
    let json = |list: &str| {
        format!("{{'type':'fuse','id':'e','node-name':'n','mountpoint':'m','iothread':{list}}}")
    };
    assert_eq!(
        message(&json("1")),
        "Invalid parameter type for 'iothread', expected: BlockExportIothreads"
    );
    assert_eq!(
        message(&json("['a',{}]")),
        "Invalid parameter type for 'iothread[1]', expected: string"
    );
    assert_eq!(
        message(&json("[]")),
        "The set of I/O threads must not be empty"
    );
    assert_eq!(
        message(&format!("{START},iothread.a=1")),
        "Invalid parameter type for 'iothread', expected: BlockExportIothreads"
    );
    assert_eq!(
        message(&format!("{START},iothread.0.a=1")),
        "Parameters 'iothread.0.*' are unexpected"
    );
}

#[test]
fn what_only_qemu_has_is_told_apart_from_what_nobody_has() {
    assert_eq!(
        message("nbd,id=a,node-name=n"),
        "export type 'nbd' is not built into this version yet"
    );
    assert_eq!(
        message(&format!("{START},writethrough=on")),
        "parameter 'writethrough' is not built into this version yet"
    );
    assert_eq!(
        message(&format!("{START},writeable=on")),
        "Parameter 'writeable' is unexpected (did you mean 'writable'?)"
    );
    assert_eq!(
        message("fus"),
        "Parameter 'type' does not accept value 'fus' (did you mean 'fuse'?)"
    );
}

#[test]
fn the_way_of_requests_is_read() {
    let way = |text: &str| {
        let ExportKind::Fuse(fuse) = read(text).kind;
        fuse.transport
    };
    assert_eq!(
        way(",transport=uring,depth=8,max-payload=1M,cpus=1-2,passthrough=auto"),
        TransportOptions {
            transport: Transport::Uring,
            depth: NonZeroU16::new(8),
            max_payload: Some(1 << 20),
            placement: Placement::Cpus(vec![1, 2]),
            passthrough: OnOffAuto::Auto,
        }
    );
    assert_eq!(way(",placement=spread").placement, Placement::Spread);
    assert_eq!(
        way(",cpus.0=3,cpus.1=0-1").placement,
        Placement::Cpus(vec![3, 0, 1])
    );
    for wrong in [
        "transport=io_uring",
        "depth=0",
        "depth=70000",
        "max-payload=4G",
        "placement=near",
        "cpus=3-1",
        "cpus=a",
        "placement=free,cpus=1",
        "passthrough=maybe",
    ] {
        let said = message(&format!("{START},{wrong}"));
        let name = wrong.split_once('=').unwrap().0;
        assert!(said.contains(name), "{wrong}: {said}");
    }
}
