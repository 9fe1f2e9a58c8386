use std::os::unix::ffi::OsStringExt;

use super::*;
use crate::object::IothreadOptions;

fn read(words: &[&str]) -> Result<Vec<Directive>, Error> {
    parse(words.iter().map(OsString::from))
}

fn message(words: &[&str]) -> String {
    read(words).map_or_else(
        |error| error.to_string(),
        |directives| panic!("{words:?}: {directives:?}"),
    )
}

#[test]
fn directives_keep_the_order_of_the_command_line() {
    let directives = read(&[
        "--object",
        "iothread,id=a",
        "--daemonize",
        "--blockdev=null-co,node-name=n",
        "--pidfile",
        "/p",
        "--export",
        "fuse,id=e,node-name=n,mountpoint=m",
        "--log=debug",
        "--object=iothread,id=b",
        "--event-loop",
        "epoll",
    ])
    .unwrap();
    let id = |directive: &Directive| match directive {
        Directive::Object(ObjectOptions::Iothread(IothreadOptions { id, .. })) => id.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(id(&directives[0]), "a");
    assert_eq!(directives[1], Directive::Daemonize);
    assert!(
        matches!(&directives[2], Directive::Blockdev(node) if node.node_name.as_deref() == Some("n"))
    );
    assert_eq!(directives[3], Directive::PidFile("/p".into()));
    assert!(matches!(&directives[4], Directive::Export(export) if export.id == "e"));
    assert_eq!(directives[5], Directive::Log("debug".to_owned()));
    assert_eq!(id(&directives[6]), "b");
    assert_eq!(directives[7], Directive::EventLoop(EventLoop::Epoll));
    assert_eq!(directives.len(), 8);
    assert_eq!(read(&[]), Ok(Vec::new()));
}

#[test]
fn abbreviations_that_qemu_understands_keep_their_meaning() {
    assert_eq!(read(&["--d"]), Ok(vec![Directive::Daemonize]));
    assert_eq!(read(&["--pid=x"]), Ok(vec![Directive::PidFile("x".into())]));
    assert_eq!(
        read(&["--l", "info"]),
        Ok(vec![Directive::Log("info".to_owned())])
    );
    assert!(message(&["--e", "fuse"]).starts_with("--e fuse: Parameter 'id' is missing"));
    assert_eq!(
        read(&["--ev", "auto"]),
        Ok(vec![Directive::EventLoop(EventLoop::Auto)])
    );
    assert!(matches!(
        read(&["--=x"]),
        Err(Error::AmbiguousOption { .. })
    ));
}

#[test]
fn help_and_version_win_over_what_follows_and_over_bad_arguments() {
    for words in [
        ["--help", "--nope"],
        ["-h", "--nope"],
        ["-hV", "x"],
        ["--blockdev=nope", "--help"],
    ] {
        assert_eq!(
            read(&words),
            Ok(vec![Directive::Help(HelpTopic::Program)]),
            "{words:?}"
        );
    }
    assert_eq!(read(&["-V"]), Ok(vec![Directive::Version]));
    assert_eq!(
        read(&["--object", "help"]),
        Ok(vec![Directive::Help(HelpTopic::Objects)])
    );
    assert_eq!(
        read(&["--object", "iothread,help"]),
        Ok(vec![Directive::Help(HelpTopic::Iothread)])
    );
    assert_eq!(
        message(&["--nope", "--help"]),
        "unrecognized option '--nope'"
    );
}

#[test]
fn errors_repeat_the_words_of_the_user() {
    let unexpected = "Parameter 'foo' is unexpected";
    assert_eq!(
        message(&["--b", "null-co,foo=1"]),
        format!("--b null-co,foo=1: {unexpected}")
    );
    assert_eq!(
        message(&["--blockdev=null-co,foo=1"]),
        format!("--blockdev=null-co,foo=1: {unexpected}")
    );
    assert_eq!(
        message(&["--sandbox", "offf"]),
        "--sandbox offf: Parameter 'sandbox' does not accept value 'offf' (did you mean 'off'?)"
    );
    assert_eq!(
        message(&["--event-loop", "epol"]),
        "--event-loop epol: Parameter 'event-loop' does not accept value 'epol' (did you mean 'epoll'?)"
    );
}

#[test]
fn a_message_never_carries_control_characters_or_all_of_a_huge_argument() {
    let shown = message(&["--blockdev", "\x1b[31m\n"]);
    assert!(!shown.contains(char::is_control), "{shown:?}");
    assert!(message(&["--blockdev", &"x".repeat(1_000_000)]).len() < 5_000);
}

#[test]
fn unknown_options_come_with_the_nearest() {
    assert_eq!(
        message(&["--bockdev", "x"]),
        "unrecognized option '--bockdev' (did you mean '--blockdev'?)"
    );
    assert_eq!(
        message(&["-blockdev", "x"]),
        "invalid option -- 'b' (did you mean '--blockdev'?)"
    );
    assert_eq!(message(&["-x"]), "invalid option -- 'x'");
    assert_eq!(message(&["disk.img"]), "disk.img: Unexpected argument");
    assert_eq!(message(&["-"]), "-: Unexpected argument");
    assert_eq!(message(&["--", "x"]), "x: Unexpected argument");
    assert_eq!(read(&["--"]), Ok(Vec::new()));
}

#[test]
fn options_that_only_qemu_has_say_so() {
    assert_eq!(
        message(&["--nbd-server", "addr.type=unix,addr.path=/s"]),
        "`--nbd-server` is not built into this version yet"
    );
}

#[test]
fn the_monitor_is_asked_for_in_the_order_of_the_command_line() {
    let directives = read(&["--chardev", "stdio,id=c", "--monitor", "c", "-Tfuse_*"]).unwrap();
    assert!(
        matches!(
            directives.as_slice(),
            [
                Directive::Chardev(_),
                Directive::Monitor(_),
                Directive::Trace(_)
            ]
        ),
        "{directives:?}"
    );
    assert_eq!(read(&["-T", "x"]), read(&["-Tx"]));
    assert_eq!(
        read(&["--chardev", "help"]),
        Ok(vec![Directive::Help(HelpTopic::Chardevs)])
    );
}

#[test]
fn arguments_may_be_in_a_file() {
    assert_eq!(
        read(&["--blockdev", "@/nodes.json"]),
        Ok(vec![Directive::File(
            FileOption::Blockdev,
            PathBuf::from("/nodes.json")
        )])
    );
    let one = r#"{"driver": "null-co", "node-name": "a"}"#;
    assert_eq!(read_file(FileOption::Blockdev, one).unwrap().len(), 1);
    let two = format!("[{one}, {one}]\n");
    assert_eq!(read_file(FileOption::Blockdev, &two).unwrap().len(), 2);
    let cases = [
        ("[1]", "expected a JSON object"),
        ("[", "JSON parse error"),
        (r#"{"driver": "null-co"}"#, "'node-name' must be specified"),
    ];
    for (text, words) in cases {
        let error = read_file(FileOption::Blockdev, text).unwrap_err();
        assert!(error.to_string().starts_with(words), "{text}: {error}");
    }
    let many = format!("[{}]", vec!["{}"; 1025].join(","));
    let error = read_file(FileOption::Blockdev, &many).unwrap_err();
    assert_eq!(error.to_string(), "More than 1024 arguments in one file");
}

#[test]
fn an_argument_that_is_not_text_is_named() {
    let words = [
        OsString::from("--blockdev"),
        OsString::from_vec(b"file,filename=\xff".to_vec()),
    ];
    let error = parse(words.into_iter()).unwrap_err();
    assert_eq!(
        error.to_string(),
        r"argument 2 is not valid UTF-8: file,filename=\xff"
    );
}

#[test]
fn the_examples_of_the_help_are_valid() {
    let help = HelpTopic::Program.text("diskfuse");
    let (_, examples) = help.split_once("Examples\n").unwrap();
    let joined = examples.replace("\\\n", " ");
    let commands: Vec<&str> = joined
        .lines()
        .filter_map(|line| line.trim().strip_prefix("diskfuse "))
        .collect();
    assert_eq!(commands.len(), 4);
    for command in commands {
        let quoted: Vec<&str> = command.split('\'').collect();
        let words = quoted.iter().enumerate().flat_map(|(place, part)| {
            if place % 2 == 1 {
                vec![*part]
            } else {
                part.split_whitespace().collect()
            }
        });
        let words: Vec<&str> = words.collect();
        assert!(
            read(&words).is_ok_and(|directives| directives.len() >= 2),
            "{words:?}: {:?}",
            read(&words)
        );
    }
}

#[test]
fn the_help_names_every_property_of_an_iothread() {
    let help = HelpTopic::Iothread.text("diskfuse");
    for property in ["poll-max-ns", "poll-grow", "poll-shrink", "aio-max-batch"] {
        assert!(help.contains(property), "{property}");
    }
    let objects = HelpTopic::Objects.text("diskfuse");
    for kind in ["iothread", "throttle-group", "secret"] {
        assert!(objects.contains(kind), "{kind}");
    }
}

#[test]
fn the_help_names_every_limit_of_a_throttle_group() {
    let help = HelpTopic::ThrottleGroup.text("diskfuse");
    let names = help.lines().filter(|line| line.contains("  x-"));
    assert_eq!(names.count(), 19, "{help}");
    for property in [
        "limits.",
        "x-bps-total=",
        "x-iops-write-max-length=",
        "x-iops-size=",
    ] {
        assert!(help.contains(property), "{property}");
    }
}
