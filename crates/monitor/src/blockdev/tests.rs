use super::*;
use crate::OnOffAuto;

fn read(argument: &str) -> BlockdevOptions {
    BlockdevOptions::parse(argument).unwrap_or_else(|error| panic!("{argument}: {error}"))
}

fn message(argument: &str) -> String {
    BlockdevOptions::parse(argument).map_or_else(
        |error| error.to_string(),
        |node| panic!("{argument}: {node:?}"),
    )
}

fn inner(node: BlockdevOptions) -> BlockdevOptions {
    match node.driver {
        BlockDriver::Raw(RawOptions {
            file: BlockRef::Inline(inner),
            ..
        }) => *inner,
        other => panic!("no inner node: {other:?}"),
    }
}

#[test]
fn defaults_are_those_of_qemu() {
    let node = read("null-co,node-name=n");
    let null = NullOptions {
        size: 1 << 30,
        latency_ns: 0,
        read_zeroes: false,
    };
    assert_eq!(
        node,
        BlockdevOptions {
            driver: BlockDriver::NullCo(null),
            node_name: Some("n".to_owned()),
            discard: Discard::Ignore,
            detect_zeroes: DetectZeroes::Off,
            cache: CacheOptions {
                direct: false,
                no_flush: false
            },
            read_only: false,
            auto_read_only: false,
            force_share: false,
        }
    );
}

#[test]
fn every_parameter_arrives() {
    let node = read(
        "driver=host_device,node-name=d,filename=/dev/a,,b,aio=native,locking=off,drop-cache=no,discard=unmap,\
         detect-zeroes=unmap,cache.direct=yes,cache.no-flush=true,read-only=y,auto-read-only=on,force-share=on",
    );
    let file = FileOptions {
        filename: "/dev/a,b".into(),
        aio: Some(Aio::Native),
        locking: OnOffAuto::Off,
        drop_cache: false,
    };
    assert_eq!(
        node,
        BlockdevOptions {
            driver: BlockDriver::HostDevice(file),
            node_name: Some("d".to_owned()),
            discard: Discard::Unmap,
            detect_zeroes: DetectZeroes::Unmap,
            cache: CacheOptions {
                direct: true,
                no_flush: true
            },
            read_only: true,
            auto_read_only: true,
            force_share: true,
        }
    );
}

#[test]
fn sizes_are_bytes_or_have_a_suffix() {
    for (text, bytes) in [
        ("4096", 4096),
        ("0x1000", 4096),
        ("4k", 4096),
        ("1.5G", 3 << 29),
        ("0", 0),
    ] {
        match read(&format!("null-aio,node-name=n,size={text}")).driver {
            BlockDriver::NullAio(null) => assert_eq!(null.size, bytes, "{text}"),
            other => panic!("{other:?}"),
        }
    }
    for argument in ["null-co,size=-1", "raw,file.driver=null-co,file.size=-1"] {
        let expected = "Value '-1' is out of range for parameter 'size'";
        assert_eq!(message(argument), expected, "{argument}");
    }
    let hint = "(of bytes, or with a suffix k, M, G, T, P or E)";
    for text in ["", "1X", "1.5", "8E", "9223372036854775808"] {
        assert_eq!(
            message(&format!("null-co,size={text}")),
            format!("Parameter 'size' expects integer {hint}")
        );
    }
}

#[test]
fn a_reference_is_a_name_or_a_node() {
    let raw = |driver| match driver {
        BlockDriver::Raw(raw) => raw,
        other => panic!("{other:?}"),
    };
    let window = raw(read("raw,node-name=r,file=below,offset=1M,size=2M").driver);
    assert_eq!(
        window,
        RawOptions {
            offset: 1 << 20,
            size: Some(2 << 20),
            file: BlockRef::Name("below".to_owned())
        }
    );
    let node = inner(read("raw,node-name=r,file.driver=file,file.filename=x"));
    assert_eq!(node.node_name, None);
    assert!(matches!(node.driver, BlockDriver::File(file) if file.filename.as_os_str() == "x"));
}

#[test]
fn a_node_inside_takes_over_caching_and_access_but_unmaps() {
    let outer = "raw,node-name=r,read-only=on,auto-read-only=on,force-share=on,cache.direct=on,cache.no-flush=on,\
                 detect-zeroes=on";
    let node = inner(read(&format!("{outer},file.driver=null-co")));
    assert!(
        node.read_only
            && node.auto_read_only
            && node.force_share
            && node.cache.direct
            && node.cache.no_flush
    );
    assert_eq!(
        (node.discard, node.detect_zeroes),
        (Discard::Unmap, DetectZeroes::Off)
    );

    let own = "file.read-only=off,file.cache.direct=off,file.discard=ignore";
    let node = inner(read(&format!("{outer},file.driver=null-co,{own}")));
    assert!(!node.read_only && !node.cache.direct && node.cache.no_flush);
    assert_eq!(node.discard, Discard::Ignore);
}

#[test]
fn json_says_the_same_as_text() {
    let json = "{'driver': 'raw', 'node-name': 'r', 'size': 1024, 'cache': {'direct': true}, \
                'file': {'driver': 'null-co', 'read-zeroes': true, 'latency-ns': 5}}";
    let text = "raw,node-name=r,size=1k,cache.direct=on,file.driver=null-co,file.read-zeroes=on,file.latency-ns=5";
    assert_eq!(read(json), read(text));
}

#[test]
fn json_values_must_have_their_type() {
    let wrong =
        |name: &str, kind: &str| format!("Invalid parameter type for '{name}', expected: {kind}");
    assert_eq!(
        message("{'driver':'null-co','size':'1k'}"),
        wrong("size", "integer")
    );
    assert_eq!(
        message("{'driver':'null-co','size':1.5}"),
        wrong("size", "integer")
    );
    assert_eq!(
        message("{'driver':'null-co','read-only':'on'}"),
        wrong("read-only", "boolean")
    );
    assert_eq!(
        message("{'driver':'null-co','cache':[]}"),
        wrong("cache", "object")
    );
    assert_eq!(
        message("{'driver':'raw','file':null}"),
        wrong("file", "BlockdevRef")
    );
    assert_eq!(message("{'driver':1}"), wrong("driver", "string"));
}

#[test]
fn a_near_name_is_offered() {
    assert_eq!(
        message("qcwo2"),
        "Parameter 'driver' does not accept value 'qcwo2' (did you mean 'qcow2'?)"
    );
    assert_eq!(
        message("elephant"),
        "Parameter 'driver' does not accept value 'elephant'"
    );
    assert_eq!(
        message("file,node-name=n,file-name=x,filename=y"),
        "Parameter 'file-name' is unexpected (did you mean 'filename'?)"
    );
    assert_eq!(
        message("raw,file.driver=null-co,file.sizes=1"),
        "Parameter 'file.sizes' is unexpected (did you mean 'size'?)"
    );
}

#[test]
fn what_only_qemu_has_is_told_apart_from_what_nobody_has() {
    for driver in ["qcow", "quorum", "blkverify", "nbd"] {
        assert_eq!(
            message(driver),
            format!("driver '{driver}' is not built into this version yet")
        );
    }
    assert_eq!(
        message("file,node-name=f,filename=x,pr-manager=p"),
        "parameter 'pr-manager' is not built into this version yet"
    );
}

#[test]
fn every_served_driver_is_known_to_qemu() {
    for (name, _) in DRIVERS.iter().copied().flatten() {
        assert!(KNOWN_TO_QEMU.contains(name), "{name}");
    }
}

#[test]
fn the_nest_of_nodes_is_bounded() {
    let nest = |depth: usize| {
        let inner: String = (1..depth).map(|_| "'file':{'driver':'raw',").collect();
        format!(
            "{{'driver':'raw','node-name':'r',{inner}'file':'x'{}",
            "}".repeat(depth)
        )
    };
    assert!(BlockdevOptions::parse(&nest(MAX_NESTING)).is_ok());
    assert_eq!(
        message(&nest(MAX_NESTING + 1)),
        format!("Nodes nested more than {MAX_NESTING} deep")
    );
    assert_eq!(
        message(&nest(500)),
        format!("Nodes nested more than {MAX_NESTING} deep")
    );
}
