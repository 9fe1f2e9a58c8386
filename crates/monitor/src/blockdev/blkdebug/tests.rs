use super::super::{BlockdevOptions, ThrottleOptions};
use super::*;

fn read(argument: &str) -> BlkdebugOptions {
    match BlockdevOptions::parse(argument).unwrap().driver {
        BlockDriver::Blkdebug(blkdebug) => blkdebug,
        other => panic!("{other:?}"),
    }
}

fn message(argument: &str) -> String {
    BlockdevOptions::parse(argument).unwrap_err().to_string()
}

#[test]
fn rules_are_the_same_in_either_syntax() {
    let text = "blkdebug,node-name=b,image=n,align=4096,inject-error.0.event=read_aio,inject-error.0.errno=28,\
                inject-error.0.state=2,inject-error.0.iotype=write-zeroes,inject-error.0.sector=9,\
                inject-error.0.once=on,inject-error.0.immediately=on,inject-error.0.delay-ns=7,\
                inject-error.1.event=none,set-state.0.event=l2_load,set-state.0.new_state=3";
    let json = "{'driver':'blkdebug','node-name':'b','image':'n','align':4096,'inject-error':[\
                {'event':'read_aio','errno':28,'state':2,'iotype':'write-zeroes','sector':9,'once':true,\
                'immediately':true,'delay-ns':7},{'event':'none'}],\
                'set-state':[{'event':'l2_load','new_state':3}]}";
    let expected = BlkdebugOptions {
        image: BlockRef::Name("n".to_owned()),
        config: None,
        align: 4096,
        rules: BlkdebugRules {
            errors: vec![
                InjectErrorOptions {
                    event: "read_aio",
                    state: 2,
                    iotype: Some(BlkdebugIoType::WriteZeroes),
                    errno: 28,
                    delay_ns: 7,
                    sector: Some(9),
                    once: true,
                },
                InjectErrorOptions {
                    event: "none",
                    state: 0,
                    iotype: None,
                    errno: 5,
                    delay_ns: 0,
                    sector: None,
                    once: false,
                },
            ],
            changes: vec![SetStateOptions {
                event: "l2_load",
                state: 0,
                new_state: 3,
            }],
        },
    };
    assert_eq!(read(text), expected);
    assert_eq!(read(json), expected);
}

#[test]
fn mistakes_in_rules_say_which_one() {
    let json = |rules: &str| {
        message(&format!(
            "{{'driver':'blkdebug','node-name':'b','image':'n',{rules}}}"
        ))
    };
    let cases = [
        (
            "'inject-error':[{'errno':5}]",
            "Parameter 'inject-error[0].event' is missing",
        ),
        (
            "'inject-error':{}",
            "Invalid parameter type for 'inject-error', expected: array",
        ),
        (
            "'inject-error':[5]",
            "Invalid parameter type for 'inject-error[0]', expected: object",
        ),
        (
            "'inject-error':[{'event':'none'},{'event':'none','nope':5}]",
            "Parameter 'inject-error[1].nope' is unexpected",
        ),
        (
            "'set-state':[{'event':'none'}]",
            "Parameter 'set-state[0].new_state' is missing",
        ),
        (
            "'inject-error':[{'event':'none','errno':-5}]",
            "Value '-5' is out of range for parameter 'errno'",
        ),
        (
            "'inject-error':[{'event':'none','sector':-2}]",
            "Value '-2' is out of range for parameter 'sector'",
        ),
        (
            "'inject-error':[{'event':'none','iotype':'reed'}]",
            "Parameter 'iotype' does not accept value 'reed' (did you mean 'read'?)",
        ),
        ("'align':511", "Cannot meet constraints with align 511"),
        (
            "'align':512,'max-transfer':1000",
            "Cannot meet constraints with max-transfer 1000",
        ),
        (
            "'take-child-perms':[]",
            "parameter 'take-child-perms' is not built into this version yet",
        ),
    ];
    for (rules, expected) in cases {
        assert_eq!(json(rules), expected, "{rules}");
    }
    let many = vec!["{'event':'none'}"; MAX_RULES + 1].join(",");
    assert!(json(&format!("'inject-error':[{many}]")).contains("More than 1000"));
}

#[test]
fn rules_stand_in_a_file_as_well() {
    let text = "# a comment\n\n[set-state]\nevent = \"write_aio\"\nnew_state=\"2\"\n[inject-error]\n  event = \"read_aio\"\n\
                state = \"2\"\nonce = \"on\"\n";
    let rules = BlkdebugRules::parse(text).unwrap();
    assert_eq!(rules.changes.len(), 1);
    assert_eq!(rules.changes[0].new_state, 2);
    assert_eq!(rules.errors.len(), 1);
    assert!(rules.errors[0].once && rules.errors[0].state == 2);
    assert_eq!(BlkdebugRules::parse(""), Ok(BlkdebugRules::default()));
    let cases = [
        ("[inject-error]\nfoo = \"5\"\n", "line 2: "),
        ("[inject-error]\nevent = none\n", "line 2: expected"),
        ("event = \"none\"", "line 1: expected"),
        (
            "[nonsense]\n\n[inject-error]",
            "line 3: sections are called",
        ),
        (
            "[inject-error]\nevent = \"nope\"\n",
            "line 2: Parameter 'event'",
        ),
    ];
    for (text, expected) in cases {
        let error = BlkdebugRules::parse(text).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{text}: {error}");
    }
}

#[test]
fn a_throttle_node_names_its_group() {
    let node = BlockdevOptions::parse("throttle,node-name=t,throttle-group=g,file=n").unwrap();
    let expected = ThrottleOptions {
        throttle_group: "g".to_owned(),
        file: BlockRef::Name("n".to_owned()),
    };
    assert_eq!(node.driver, BlockDriver::Throttle(expected));
    assert_eq!(
        message("throttle,node-name=t,file=n"),
        "Parameter 'throttle-group' is missing"
    );
    assert_eq!(
        message("throttle,node-name=t,throttle-group=g"),
        "Parameter 'file' is missing"
    );
    assert_eq!(
        message("blkdebug,node-name=b"),
        "Parameter 'image' is missing"
    );
}
