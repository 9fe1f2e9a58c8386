use super::*;
use crate::blockdev::{BlockdevOptions, Discard};

const FILE: &str = "qcow2,node-name=q,file=f";

fn read(argument: &str) -> Qcow2Options {
    match BlockdevOptions::parse(argument).map(|node| node.driver) {
        Ok(BlockDriver::Qcow2(qcow2)) => qcow2,
        other => panic!("{argument}: {other:?}"),
    }
}

fn message(argument: &str) -> String {
    BlockdevOptions::parse(argument).map_or_else(
        |error| error.to_string(),
        |node| panic!("{argument}: {node:?}"),
    )
}

fn inline(reference: &BlockRef) -> &BlockdevOptions {
    match reference {
        BlockRef::Inline(node) => node,
        BlockRef::Name(name) => panic!("only the name '{name}'"),
    }
}

#[test]
fn defaults_are_those_of_qemu() {
    let cached = Metadata::ALL
        .into_iter()
        .filter(|metadata| *metadata != Metadata::InactiveL2);
    assert_eq!(
        read(FILE),
        Qcow2Options {
            file: BlockRef::Name("f".to_owned()),
            backing: BackingRef::Image,
            data_file: None,
            lazy_refcounts: None,
            pass_discard_request: None,
            pass_discard_snapshot: true,
            pass_discard_other: false,
            discard_no_unref: false,
            overlap_check: cached.collect(),
            caches: CacheSizes::default(),
            cache_clean_interval: 600,
        }
    );
}

#[test]
fn every_parameter_arrives() {
    let qcow2 = read(
        "qcow2,node-name=q,file=f,backing=b,data-file=d,lazy-refcounts=off,pass-discard-request=on,\
         pass-discard-snapshot=off,pass-discard-other=on,discard-no-unref=on,overlap-check=none,\
         cache-size=8M,l2-cache-size=0x100000,l2-cache-entry-size=4k,cache-clean-interval=4294967295",
    );
    let named = |name: &str| BlockRef::Name(name.to_owned());
    assert_eq!(
        qcow2,
        Qcow2Options {
            file: named("f"),
            backing: BackingRef::Node(named("b")),
            data_file: Some(named("d")),
            lazy_refcounts: Some(false),
            pass_discard_request: Some(true),
            pass_discard_snapshot: false,
            pass_discard_other: true,
            discard_no_unref: true,
            overlap_check: Vec::new(),
            caches: CacheSizes {
                total: Some(8 << 20),
                l2: Some(1 << 20),
                refcounts: None,
                l2_entry: Some(4096),
            },
            cache_clean_interval: u32::MAX,
        }
    );
}

#[test]
fn a_backing_that_is_null_or_empty_is_none_and_one_not_mentioned_is_the_images() {
    let backing = |argument: &str| read(argument).backing;
    assert_eq!(backing(FILE), BackingRef::Image);
    assert_eq!(backing(&format!("{FILE},backing=")), BackingRef::Nothing);
    for nothing in ["null", "''"] {
        let json = format!("{{'driver':'qcow2','node-name':'q','file':'f','backing':{nothing}}}");
        assert_eq!(backing(&json), BackingRef::Nothing, "{nothing}");
    }
}

#[test]
fn a_backing_written_inside_is_read_only_and_what_holds_the_image_is_not() {
    let qcow2 = read(
        "qcow2,node-name=q,auto-read-only=on,cache.direct=on,file.driver=file,file.filename=f,\
         backing.driver=qcow2,backing.file.driver=file,backing.file.filename=b,\
         data-file.driver=file,data-file.filename=d",
    );
    let file = inline(&qcow2.file);
    assert!(!file.read_only && file.auto_read_only && file.cache.direct);
    assert_eq!(file.discard, Discard::Unmap);
    assert!(!inline(qcow2.data_file.as_ref().unwrap()).read_only);
    let BackingRef::Node(backing) = &qcow2.backing else {
        panic!("{:?}", qcow2.backing)
    };
    let backing = inline(backing);
    assert!(backing.read_only && !backing.auto_read_only && backing.cache.direct);
    let BlockDriver::Qcow2(below) = &backing.driver else {
        panic!("{backing:?}")
    };
    assert!(inline(&below.file).read_only);
    let own = "qcow2,node-name=q,file=f,backing.driver=null-co,backing.read-only=off";
    let BackingRef::Node(backing) = read(own).backing else {
        panic!("{own}")
    };
    assert!(!inline(&backing).read_only);
}

#[test]
fn the_overlap_check_is_a_template_or_a_template_with_exceptions() {
    let check = |more: &str| read(&format!("{FILE},{more}")).overlap_check;
    assert_eq!(check("overlap-check=all"), Metadata::ALL);
    assert_eq!(check("overlap-check.template=all"), Metadata::ALL);
    assert_eq!(check("overlap-check=none"), []);
    assert_eq!(
        check("overlap-check=constant"),
        [
            Metadata::MainHeader,
            Metadata::ActiveL1,
            Metadata::RefcountTable,
            Metadata::SnapshotTable,
            Metadata::BitmapDirectory
        ]
    );
    assert_eq!(
        check("overlap-check.template=none,overlap-check.active-l2=on"),
        [Metadata::ActiveL2]
    );
    let without = check("overlap-check.main-header=off");
    assert!(!without.contains(&Metadata::MainHeader) && without.len() == 7);
}

#[test]
fn sizes_that_contradict_each_other_are_refused() {
    for (sizes, problem) in [
        (
            "cache-size=3,l2-cache-size=1,refcount-cache-size=2",
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
        ),
        (
            "cache-size=1,l2-cache-size=2",
            "l2-cache-size may not exceed cache-size",
        ),
        (
            "cache-size=1,refcount-cache-size=2",
            "refcount-cache-size may not exceed cache-size",
        ),
        ("cache-clean-interval=-1", "Cache clean interval too big"),
    ] {
        assert_eq!(message(&format!("{FILE},{sizes}")), problem);
    }
}

#[test]
fn encryption_is_known_and_refused() {
    let message = |more: &str| message(&format!("{FILE},{more}"));
    assert_eq!(
        message("encrypt.format=luks,encrypt.key-secret=s"),
        "encryption (encrypt.format=luks) is not built into this version yet"
    );
    assert_eq!(
        message("encrypt.key-secret=s"),
        "Parameter 'encrypt.format' is missing"
    );
}
