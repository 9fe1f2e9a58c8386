//! Our messages against those of the `qemu-storage-daemon` that is installed: scripts match them.
//!
//! Ours may add a hint in parentheses, nothing else.

#![allow(clippy::unwrap_used, reason = "a test says that it failed by a panic")]

use std::ffi::OsString;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use diskfuse_monitor::parse_command_line;
use proptest::prelude::*;

const NAME: &str = "qemu-storage-daemon";

/// How long the real daemon may take to refuse a command line.
const LIMIT: Duration = Duration::from_secs(20);

/// A child that does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The first line that the real daemon prints when it refuses these words.
fn real_message(words: &[String]) -> String {
    let command = Command::new(NAME)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let mut daemon = Running(command.unwrap_or_else(|error| {
        panic!(
            "cannot run {NAME}: {error}; install qemu-utils (on Debian: apt-get install qemu-utils)"
        )
    }));
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = daemon.0.try_wait().unwrap() {
            break status;
        }
        assert!(
            Instant::now() < deadline,
            "{NAME} {words:?} did not refuse within {LIMIT:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(status.code(), Some(1), "{NAME} {words:?}");
    let mut output = Vec::new();
    daemon
        .0
        .stderr
        .take()
        .unwrap()
        .read_to_end(&mut output)
        .unwrap();
    // It may cut a character in two.
    String::from_utf8_lossy(&output)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

fn our_message(words: &[String]) -> String {
    match parse_command_line(words.iter().map(OsString::from)) {
        Err(error) => format!("{NAME}: {error}"),
        Ok(directives) => panic!("{words:?} was read as {directives:?}"),
    }
}

/// Checks that both refuse `words`, and that ours says what the real one says, then at most a hint.
fn same(words: &[&str]) {
    let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    let (real, ours) = (real_message(&words), our_message(&words));
    let hint = ours
        .strip_prefix(&real)
        .unwrap_or_else(|| panic!("\n real: {real}\n ours: {ours}"));
    assert!(
        hint.is_empty() || (hint.starts_with(" (") && hint.ends_with(')')),
        "{ours}"
    );
}

#[test]
fn mistakes_in_key_value_text_have_the_words_of_qemu() {
    let long = format!("raw,{}=x", "a".repeat(128));
    let long_part = format!("raw,b.{}.c=x", "a".repeat(128));
    for argument in [
        "null-co,,b",
        ",driver=null-co",
        ",",
        "=b",
        "null-co,b",
        "null-co,a!b",
        "null-co,9a=b",
        "null-co,a.9a=b",
        "null-co,a..b=b",
        "null-co,a.=b",
        "null-co,0=d",
        "null-co,_foo=d",
        "null-co,__org.foo=d",
        "null-co,__org.foo_bar=d",
        "null-co,a=b,a.c=d",
        "null-co,a.c=d,a=b",
        "null-co,x.y.a.c=d,x.y.a.0=b",
        "null-co,a.0=b,a.2=d",
        "null-co,a.99999999999999999999=d",
        "null-co,help",
        &long,
        &long_part,
    ] {
        same(&["--blockdev", argument]);
    }
}

#[test]
fn mistakes_in_json_have_the_words_of_qemu() {
    for argument in [
        "{",
        "{}",
        "{} x",
        "{'driver':'raw','driver':'raw'}",
        "{'driver':'null-co',}",
        "{'driver':'null-co' 'a'}",
        "{'driver'}",
        "{1:2}",
        "{'a':[1 2]}",
        "{'a':[}",
        "{'driver':nul}",
        "{'driver':'a\\x'}",
        "{'driver':'a\\ud800b'}",
        "{'driver':01}",
        "{'driver':'raw','file':null}",
        "{'driver':'null-co','node-name':1}",
        "{'driver':'null-co','size':'1k'}",
        "{'driver':'null-co','size':1.5}",
        "{'driver':'null-co','read-only':'on'}",
        "{'driver':'null-co','cache':{'direct':1}}",
        "{'driver':'null-co','cache':{'x.y':['b']}}",
    ] {
        same(&["--blockdev", argument]);
    }
}

/// Ours does not repeat all of a long argument, so only what stands behind it is compared.
#[test]
fn json_nested_too_deep_has_the_words_of_qemu() {
    let deep = format!("{{'a':{}{}}}", "[".repeat(1024), "]".repeat(1024));
    let words = ["--blockdev".to_owned(), deep];
    let behind = |message: String| message.rsplit(": ").next().map(str::to_owned);
    assert_eq!(behind(our_message(&words)), behind(real_message(&words)));
}

#[test]
fn mistakes_about_nodes_have_the_words_of_qemu() {
    for argument in [
        "foo=bar",
        "null-co",
        "qcwo2",
        "null-co,node-name=a,size=1X",
        "null-co,node-name=a,size=1.5",
        "null-co,node-name=a,latency-ns=1k",
        "null-co,node-name=a,latency-ns=-1",
        "null-co,node-name=a,read-only=maybe",
        "null-co,node-name=a,read-only=ON",
        "null-co,read-only=y,foo=1",
        "null-co,discard=foo",
        "null-co,cache=1",
        "null-co,cache.foo=1",
        "null-co,node-name.a=a",
        "null-co,node-name=1a",
        "null-co,node-name=aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "null-co,node-name=a,detect-zeroes=unmap",
        "raw,node-name=a",
        "raw,file.0=file",
        "raw,file.driver=file",
        "raw,file.filename=x",
        "raw,node-name=r,file.driver=null-co,file.x=1",
        "raw,node-name=r,file.driver=null-co,offset=-1",
        "raw,node-name=r,file.driver=nul-co",
        "raw,node-name=r,file.driver=null-co,file.discard=x",
        "raw,node-name=r,file.driver=null-co,file.latency-ns=-1",
        "file,filename=x,aio=foo",
        "file,filename=x,locking=ON",
        "file,filename=x,drop-cache=foo",
    ] {
        same(&["--blockdev", argument]);
    }
}

/// An empty image, in a folder that goes with it.
fn an_image() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("i.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&path)
        .arg("1M")
        .status();
    let made = made.unwrap_or_else(|error| {
        panic!("cannot run qemu-img: {error}; install qemu-utils (on Debian: apt-get install qemu-utils)")
    });
    assert!(made.success());
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

#[test]
fn mistakes_about_qcow2_nodes_have_the_words_of_qemu() {
    let (_folder, image) = an_image();
    let node = format!("qcow2,node-name=q,file.driver=file,file.filename={image}");
    for more in [
        "file=x",
        "foo=1",
        "lazy-refcounts=x",
        "pass-discard-request=x",
        "pass-discard-snapshot=1",
        "pass-discard-other=x",
        "discard-no-unref=x",
        "overlap-check=x",
        "overlap-check.template=x",
        "overlap-check.template.x=x",
        "overlap-check.active-l1=x",
        "overlap-check.foo=on",
        "overlap-check=none,overlap-check.template=none",
        "cache-size=x",
        "cache-size=-1",
        "l2-cache-size=-5",
        "refcount-cache-size=-1",
        "l2-cache-entry-size=1X",
        "cache-size=3,l2-cache-size=1,refcount-cache-size=2",
        "cache-size=1,l2-cache-size=2",
        "cache-size=1,refcount-cache-size=2",
        "cache-clean-interval=x",
        "cache-clean-interval=-1",
        "cache-clean-interval=4294967296",
        "encrypt=x",
        "encrypt.foo=luks",
        "encrypt.format=x",
        "encrypt.format=luks,encrypt.x=1",
        "encrypt.format=aes,encrypt.key-secret.x=1",
        "data-file.driver=file",
        "backing.driver=file",
        "backing.driver=fil",
        // Of several mistakes the same one is told.
        "data-file.driver=x,encrypt=x,cache-size=x,overlap-check=x",
        "discard-no-unref=x,pass-discard-other=x",
        "l2-cache-entry-size=x,refcount-cache-size=x",
    ] {
        same(&["--blockdev", &format!("{node},{more}")]);
    }
    for argument in [
        "qcow2",
        "qcow2,node-name=q",
        "raw,node-name=r,file.driver=qcow2,file.cache-size=x",
        "{'driver':'qcow2','node-name':'q','file':null}",
        "{'driver':'qcow2','node-name':'q','file':'f','backing':1}",
        "{'driver':'qcow2','node-name':'q','file':'f','data-file':null}",
        "{'driver':'qcow2','node-name':'q','file':'f','overlap-check':null}",
        "{'driver':'qcow2','node-name':'q','file':'f','overlap-check':[]}",
        "{'driver':'qcow2','node-name':'q','file':'f','encrypt':null}",
        "{'driver':'qcow2','node-name':'q','file':'f','cache-size':'1'}",
    ] {
        same(&["--blockdev", argument]);
    }
}

#[test]
fn mistakes_about_exports_have_the_words_of_qemu() {
    for argument in [
        "fus",
        "id=a",
        "fuse",
        "fuse,id=a",
        "fuse,id=a,node-name=n",
        "fuse,id=a,node-name=n,mountpoint=m,writable=foo",
        "fuse,id=a,node-name=n,mountpoint=m,allow-other=foo",
        "fuse,id=a,node-name=n,mountpoint=m,fixed-iothread=foo",
        "fuse,id=a,node-name=n,mountpoint=m,nope=foo",
        "fuse,id=1a,node-name=n,mountpoint=m",
        "fuse,id=,node-name=n,mountpoint=m",
        "fuse,id=a+,node-name=n,mountpoint=m",
        "fuse,help",
    ] {
        same(&["--export", argument]);
    }
}

#[test]
fn mistakes_about_filters_have_the_words_of_qemu() {
    for argument in [
        "throttle,node-name=t,file=n",
        "throttle,node-name=t,throttle-group=g",
        "throttle,node-name=t,throttle-group=g,file=n,zz=1",
        "blkdebug,node-name=b",
        "blkdebug,node-name=b,image.driver=null-co,zz=1",
        "blkdebug,node-name=b,image.driver=null-co,align=511",
        "blkdebug,node-name=b,image.driver=null-co,align=-1",
        "blkdebug,node-name=b,image.driver=null-co,inject-error=none",
        "blkdebug,node-name=b,image.driver=null-co,inject-error.0=none",
        "blkdebug,node-name=b,image.driver=null-co,inject-error.0.errno=5",
        "blkdebug,node-name=b,image.driver=null-co,inject-error.0.event=zz",
        "blkdebug,node-name=b,image.driver=null-co,inject-error.0.event=none,inject-error.0.zz=1",
        "blkdebug,node-name=b,image.driver=null-co,inject-error.0.event=none,inject-error.0.iotype=zz",
        "blkdebug,node-name=b,image.driver=null-co,set-state.0.event=none",
        "{'driver':'blkdebug','node-name':'b','image':{'driver':'null-co'},'set-state':[{'event':'none'}]}",
    ] {
        same(&["--blockdev", argument]);
    }
}

#[test]
fn mistakes_about_objects_have_the_words_of_qemu() {
    for argument in [
        "id=a",
        "foo",
        "iothread",
        "iothread,id=a,poll-max-ns=-1",
        "iothread,id=a,poll-max-ns=1k",
        "iothread,id=a,poll-grow=-1",
        "iothread,id=a,zz=1",
        "iothread,help,zz",
        "throttle-group,x-bps-total=1",
        "throttle-group,id=a,x-bps-total=1k",
        "throttle-group,id=a,x-bps-total=-1",
        "throttle-group,id=a,x-zz=1",
        "throttle-group,id=a,limits.zz=1",
        "throttle-group,id=a,limits=1",
        "throttle-group,id=a,limits.bps-total=-1",
        "throttle-group,id=a,limits.bps-total=1,limits.bps-read=1",
        "throttle-group,id=a,limits.iops-total-max=1",
        "throttle-group,id=a,limits.iops-total=2,limits.iops-total-max=1",
        "throttle-group,id=a,limits.iops-total=1,limits.iops-total-max-length=2",
        "throttle-group,id=a,limits.iops-total=1,limits.iops-total-max-length=0",
        "throttle-group,id=a,limits.iops-size=1",
        "secret,id=a",
        "secret,data=a",
        "secret,id=a,data=x,file=y",
        "secret,id=a,data=##,format=base64",
        "secret,id=a,data=x,format=zz",
        "secret,id=a,zz=1",
        "{'qom-type':'iothread','id':'a','poll-max-ns':'1'}",
    ] {
        same(&["--object", argument]);
    }
    same(&["--object", "iothread,id=1a"]);
}

#[test]
fn mistakes_of_the_command_line_have_the_words_of_qemu() {
    for words in [
        &["--nope"][..],
        &["--blockdev"],
        &["--pid"],
        &["--daemonize=x"],
        &["--version=x"],
        &["-x"],
        &["-blockdev", "x"],
        &["foo"],
        &["--b", "null-co,foo=1"],
        &["--blockdev=null-co,foo=1"],
        &["--b=null-co,foo=1"],
        &["--blockdev", "null-co,foo=1", "--nope"],
    ] {
        same(words);
    }
}

/// The real daemon carries the options out in their order, so its complaint about the last one shows that it took those
/// in front of it.
#[test]
fn what_is_accepted_here_is_accepted_by_qemu() {
    let (_folder, image) = an_image();
    let qcow2 = format!("qcow2,node-name=n,file.driver=file,file.filename={image}");
    let file = std::env::current_exe().unwrap();
    let file = format!("filename={},read-only=on", file.display());
    let valid = [
        (
            "--object",
            "iothread,id=a,poll-max-ns=0x10,poll-grow=2,poll-shrink=1,aio-max-batch=4".to_owned(),
        ),
        (
            "--object",
            "{'qom-type':'iothread','id':'a','poll-max-ns':1}".to_owned(),
        ),
        (
            "--object",
            "throttle-group,id=t,x-bps-total=100,x-bps-total-max=200,limits.iops-read=5,\
             limits.iops-size=4096"
                .to_owned(),
        ),
        (
            "--object",
            "{'qom-type':'throttle-group','id':'t','limits':{'bps-read':1,'bps-write':2}}".to_owned(),
        ),
        ("--object", "secret,id=s,data=aGVsbG8=,format=base64".to_owned()),
        (
            "--blockdev",
            "blkdebug,node-name=n,image.driver=null-co,align=4096,max-transfer=65536,inject-error.0.event=none,\
             inject-error.0.iotype=block-status,inject-error.0.sector=-1,inject-error.0.once=on,\
             inject-error.0.immediately=on,inject-error.0.errno=28,set-state.0.event=l2_load,set-state.0.new_state=2"
                .to_owned(),
        ),
        (
            "--blockdev",
            "null-co,node-name=n,size=010,read-zeroes=yes,latency-ns= +5".to_owned(),
        ),
        (
            "--blockdev",
            "null-aio,node-name=n,discard=unmap,detect-zeroes=unmap,force-share=n".to_owned(),
        ),
        (
            "--blockdev",
            format!(
                "file,node-name=n,{file},aio=threads,locking=off,drop-cache=false,auto-read-only=y"
            ),
        ),
        (
            "--blockdev",
            format!(
                "file,node-name=n,{file},aio=io_uring,locking=auto,cache.direct=true,cache.no-flush=on"
            ),
        ),
        (
            "--blockdev",
            format!("file,node-name=n,{file},aio=native,locking=on,cache.direct=on,driver=file,"),
        ),
        (
            "--blockdev",
            "raw,node-name=n,offset=512,size=1024,file.driver=null-co,file.node-name=inner"
                .to_owned(),
        ),
        (
            "--blockdev",
            "{'driver':'raw','node-name':'n','file':{'driver':'null-co','size':4096}}".to_owned(),
        ),
        ("--blockdev", qcow2.clone()),
        (
            "--blockdev",
            format!(
                "{qcow2},lazy-refcounts=on,discard-no-unref=on,pass-discard-request=off,pass-discard-snapshot=on,\
                 pass-discard-other=on,cache-size=1048576,l2-cache-size=65536,l2-cache-entry-size=4096,\
                 cache-clean-interval=0,discard=unmap,detect-zeroes=unmap"
            ),
        ),
        (
            "--blockdev",
            format!(
                "{qcow2},backing.driver=null-co,overlap-check.template=cached,overlap-check.inactive-l2=on,\
                 overlap-check.main-header=off,read-only=on"
            ),
        ),
        (
            "--blockdev",
            format!(
                "{{'driver':'qcow2','node-name':'n','file':{{'driver':'file','filename':'{image}'}},'backing':null,\
                 'overlap-check':'all','l2-cache-size':4096}}"
            ),
        ),
    ];
    for (option, argument) in valid {
        let last = ["--export".to_owned(), "nonsense".to_owned()];
        let words = [vec![option.to_owned(), argument], last.to_vec()].concat();
        let complaint =
            format!("{NAME}: --export nonsense: Parameter 'type' does not accept value 'nonsense'");
        assert_eq!(real_message(&words), complaint, "{words:?}");
        assert_eq!(our_message(&words), complaint, "{words:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// The driver `x` does not exist, so the real daemon refuses each of these, one way or another.
    #[test]
    fn any_key_value_text_is_read_as_qemu_reads_it(more in "([ab0_.]{0,5}(=[a,]{0,3})?,?){0,3}") {
        same(&["--blockdev", &format!("x,{more}")]);
    }

    /// No driver is named, so the real daemon refuses each of these: as JSON, or for lack of a driver.
    #[test]
    fn any_json_is_json_for_both_or_for_neither(members in json_members()) {
        let words = ["--blockdev".to_owned(), format!("{{{members}")];
        let (real, ours) = (real_message(&words), our_message(&words));
        let is_json = |message: &str| message.ends_with(": Parameter 'driver' is missing");
        prop_assert_eq!(is_json(&real), is_json(&ours), "\n real: {}\n ours: {}", real, ours);
    }
}

/// What could stand behind the first brace; about half of it is right.
fn json_members() -> impl Strategy<Value = String> {
    let sign = prop::sample::select(vec!["{", "}", "[", "]", ":", ",", " ", "\t"]);
    let scalar = prop::sample::select(vec![
        "'a'",
        "\"b\"",
        "'\\''",
        "'\\u00e9'",
        "'\\ud83d\\ude00'",
        "'\\ude00'",
        "'\\ud83d'",
        "'\\u12'",
        "'\\x'",
        "'\n'",
        "'",
        "true",
        "nul",
        "0",
        "-1",
        "01",
        "1.5",
        "1.",
        ".5",
        "1e9",
        "1e",
        "-",
        "+1",
        "é",
        "\u{7f}",
        "%d",
    ]);
    let value = scalar
        .clone()
        .prop_map(str::to_owned)
        .prop_recursive(3, 10, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3)
                    .prop_map(|list| format!("[{}]", list.join(" , "))),
                inner.prop_map(|value| format!("{{'k':{value}}}")),
            ]
        });
    let mess =
        prop::collection::vec(prop_oneof![sign, scalar], 0..8).prop_map(|pieces| pieces.concat());
    let member = ("[a-c]", value).prop_map(|(key, value)| format!("\"{key}\":{value}"));
    let members =
        prop::collection::vec(member, 0..3).prop_map(|members| format!("{}}}", members.join(",")));
    prop_oneof![1 => mess, 3 => members]
}
