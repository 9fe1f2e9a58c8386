//! The filters of the storage daemon on real mounts: `blkdebug` fails what it is told to and nothing else, `throttle`
//! keeps to its limits and holds nobody up who wants to leave.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use diskfuse_e2e::{Bed, Daemon, Fio, Qmp, Tool, everywhere, fio_report, once, pattern};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

fn export(id: &str, node: &str, mountpoint: &Path) -> String {
    let at = mountpoint.display();
    format!("fuse,id={id},node-name={node},mountpoint={at},writable=on")
}

/// A daemon with one export, of `node`, made by these options.
fn serve(bed: &Bed, options: &[&str], node: &str) -> Daemon {
    let mountpoint = bed.mountpoint("m");
    let export = export("e", node, &mountpoint);
    let arguments = [options, &["--export", &export]].concat();
    bed.qsd(&arguments, &[&mountpoint])
}

#[track_caller]
fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

/// Ends it; it must have had nothing to say.
#[track_caller]
fn stop_silently(daemon: Daemon) {
    let ended = daemon.stop();
    let said = (ended.output.stdout, ended.output.stderr);
    assert_eq!(said, (String::new(), String::new()));
}

#[test]
fn every_request_fails_with_eio_and_the_end_is_silent() {
    everywhere(|bed| {
        let null = json!({"driver": "null-co", "node-name": "null", "size": SIZE});
        let debug = json!({
            "driver": "blkdebug", "node-name": "bad", "image": "null",
            "inject-error": [{"event": "none"}],
        });
        let options = [
            "--blockdev",
            &null.to_string(),
            "--blockdev",
            &debug.to_string(),
        ];
        let daemon = serve(bed, &options, "bad");
        let file = daemon.open();
        let mut buf = [0; 4096];
        for _ in 0..3 {
            assert_eq!(errno(file.read_at(&mut buf, 0)), 5);
            assert_eq!(errno(file.write_at(&buf, 4096)), 5);
            assert_eq!(errno(file.sync_all()), 5);
        }
        // The file is there all the same.
        assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
        drop(file);
        stop_silently(daemon);
    });
}

#[test]
fn an_error_is_for_the_request_that_meets_it_alone() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let node = format!(
            "blkdebug,node-name=bad,image.driver=file,image.filename={},inject-error.0.event=read_aio,\
             inject-error.0.sector=16,inject-error.0.once=on,inject-error.0.errno=61,\
             set-state.0.event=write_aio,set-state.0.state=1,set-state.0.new_state=2,inject-error.1.event=write_aio,\
             inject-error.1.state=2,inject-error.1.iotype=write,inject-error.1.once=on,inject-error.1.errno=28",
            image.display()
        );
        let daemon = serve(bed, &["--blockdev", &node], "bad");
        let file = daemon.open();
        let mut buf = vec![0; 4096];
        file.read_exact_at(&mut buf, 4096).unwrap();
        assert_eq!(errno(file.read_at(&mut buf, 8192)), 61);
        file.read_exact_at(&mut buf, 8192).unwrap();
        assert!(buf == pattern(SIZE, 1)[8192..12_288]);
        file.write_all_at(&[1; 4096], 0).unwrap();
        assert_eq!(errno(file.write_at(&[2; 4096], 0)), 28);
        file.sync_all().unwrap();
        file.read_exact_at(&mut buf, 0).unwrap();
        assert!(buf == [1; 4096]);
        drop(file);
        stop_silently(daemon);
        assert!(std::fs::read(&image).unwrap()[..4096] == [1; 4096]);
    });
}

#[test]
fn rules_may_stand_in_a_file() {
    once(|bed| {
        let rules = bed.path("rules");
        std::fs::write(
            &rules,
            "[inject-error]\nevent = \"read_aio\"\nerrno = \"28\"\n",
        )
        .unwrap();
        let node = |config: &Path| {
            let config = config.display();
            format!("blkdebug,node-name=bad,image.driver=null-co,config={config}")
        };
        let daemon = serve(bed, &["--blockdev", &node(&rules)], "bad");
        assert_eq!(errno(daemon.open().read_at(&mut [0; 512], 0)), 28);
        stop_silently(daemon);
        let missing = bed.diskfuse(["qsd", "--blockdev", &node(Path::new("/no/such"))]);
        let said = "Could not read blkdebug config file: No such file or directory";
        assert!(missing.stderr.contains(said), "{missing}");
        std::fs::write(&rules, "[inject-error]\nevent = \"nothing\"\n").unwrap();
        let wrong = bed.diskfuse(["qsd", "--blockdev", &node(&rules)]);
        assert!(
            wrong.stderr.contains("does not accept value 'nothing'"),
            "{wrong}"
        );
    });
}

#[test]
fn rules_that_are_too_many_to_read_are_refused_whole() {
    once(|bed| {
        let rules = bed.path("rules");
        let rest = "#".repeat(1 << 20);
        let text = format!("[inject-error]\nevent = \"read_aio\"\n{rest}\n[nonsense]\n");
        std::fs::write(&rules, text).unwrap();
        let config = rules.display();
        let node = format!("blkdebug,node-name=bad,image.driver=null-co,config={config}");
        let refused = bed.diskfuse(["qsd", "--blockdev", &node]);
        assert!(refused.stderr.contains("more than 1 MiB"), "{refused}");
    });
}

/// What an image says of its ranges.
fn mapped(image: &Path) -> Vec<Value> {
    let map = Tool::new("qemu-img").args(["map", "-U", "--output=json", "-f", "qcow2"]);
    serde_json::from_str(&map.arg(image).run().stdout).unwrap()
}

/// Bytes of data that an image itself holds.
fn held(image: &Path) -> u64 {
    let ranges = mapped(image);
    let held = ranges
        .iter()
        .filter(|range| range["depth"] == 0 && range["data"] == true);
    held.map(|range| range["length"].as_u64().unwrap()).sum()
}

#[test]
fn jobs_see_through_filters_what_the_image_below_holds() {
    once(|bed| {
        let (own, size) = (64 << 10, 16 << 20);
        let base = bed.image("base", 4 << 20);
        for kind in ["throttle", "blkdebug", "raw"] {
            let (top, target) = (bed.path(kind), bed.path(&format!("{kind}-target")));
            let qemu_img = |arguments: &[&str]| Tool::new("qemu-img").args(arguments).run();
            let (top_name, base_name) = (top.to_str().unwrap(), base.to_str().unwrap());
            let bytes = size.to_string();
            let create = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_name];
            qemu_img(&[&create[..], &[top_name, &bytes]].concat());
            let write = ["-f", "qcow2", "-c", "write 1M 64k", top_name];
            Tool::new("qemu-io").args(write).run();
            let socket = bed.path(&format!("{kind}-qmp"));
            let listen = format!("socket,id=c,path={},server=on,wait=off", socket.display());
            let daemon = bed.qsd(&["--chardev", &listen, "--monitor", "c"], &[]);
            let mut qmp = Qmp::connect(&socket);
            qmp.run(
                "object-add",
                json!({"qom-type": "throttle-group", "id": "g"}),
            );
            let file = json!({"driver": "file", "filename": top});
            qmp.run(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "top", "file": file}),
            );
            let mut filter = match kind {
                "throttle" => json!({"file": "top", "throttle-group": "g"}),
                "blkdebug" => json!({"image": "top"}),
                _ => json!({"file": "top"}),
            };
            filter["driver"] = json!(kind);
            filter["node-name"] = json!("filter");
            qmp.run("blockdev-add", filter);
            for job in ["blockdev-backup", "blockdev-mirror"] {
                let target_name = target.to_str().unwrap();
                qemu_img(&["create", "-q", "-f", "qcow2", target_name, &bytes]);
                let file = json!({"driver": "file", "filename": target});
                let node = json!({"driver": "qcow2", "node-name": "target", "file": file});
                qmp.run("blockdev-add", node);
                qmp.run(
                    job,
                    json!({"job-id": "j", "device": "filter", "target": "target", "sync": "top"}),
                );
                if job == "blockdev-mirror" {
                    qmp.job_is("j", "ready");
                    qmp.run("job-cancel", json!({"id": "j"}));
                }
                qmp.job_is("j", "null");
                qmp.run("blockdev-del", json!({"node-name": "target"}));
                assert_eq!(held(&target), own, "{job} of {kind}");
            }
            // Squeezed by the image below, which only a throttle passes on.
            if kind == "throttle" {
                let target_name = target.to_str().unwrap();
                qemu_img(&["create", "-q", "-f", "qcow2", target_name, &bytes]);
                let file = json!({"driver": "file", "filename": target});
                let node = json!({
                    "driver": "throttle", "node-name": "target", "throttle-group": "g",
                    "file": {"driver": "qcow2", "file": file},
                });
                qmp.run("blockdev-add", node);
                qmp.run(
                    "blockdev-backup",
                    json!({
                        "job-id": "j", "device": "filter", "target": "target", "sync": "full",
                        "compress": true,
                    }),
                );
                qmp.job_is("j", "null");
                qmp.run("blockdev-del", json!({"node-name": "target"}));
                let compare = ["compare", "-U", "-q", "-f", "qcow2", "-F", "qcow2"];
                qemu_img(&[&compare[..], &[top_name, target_name]].concat());
                assert!(
                    mapped(&target)
                        .iter()
                        .any(|range| range["compressed"] == true)
                );
            }
            stop_silently(daemon);
        }
    });
}

#[test]
fn a_group_that_is_not_there_is_named() {
    once(|bed| {
        let arguments = [
            "qsd",
            "--object",
            "throttle-group,id=slow",
            "--blockdev",
            "throttle,node-name=t,throttle-group=sloww,file.driver=null-co",
        ];
        let output = bed.diskfuse(arguments);
        assert_eq!(output.status.code(), Some(1));
        let said = "Throttle group 'sloww' does not exist (did you mean 'slow'?)";
        assert!(output.stderr.contains(said), "{output}");
    });
}

/// Bytes a second that fio reads, and writes, in two seconds.
fn rates(file: &Path, kind: &str) -> (u64, u64) {
    let rw = format!("--rw={kind}");
    let options = ["--bs=64k", "--direct=1", "--ioengine=libaio", "--iodepth=8"];
    let time = ["--time_based", "--runtime=2", "--ramp_time=1", "--size=1m"];
    let options = [&options[..], &time, &[&rw]].concat();
    let report = fio_report(&Fio::new("rate", file, &options).run());
    let of = |way: &str| report[way]["bw_bytes"].as_u64().unwrap();
    (of("read"), of("write"))
}

/// The limit is what is promised; how near to it fio comes depends on what else the machine does.
#[track_caller]
fn near(what: &str, rate: u64, expected: u64) {
    let (low, high) = (expected * 60 / 100, expected * 115 / 100);
    assert!(
        (low..=high).contains(&rate),
        "{what}: {rate}, not {expected}"
    );
}

#[test]
fn reads_and_writes_keep_to_the_limits_of_the_group() {
    everywhere(|bed| {
        let image = bed.image("i", SIZE);
        let options = [
            "--object",
            "throttle-group,id=slow,x-bps-read=4194304,limits.iops-write=32",
            "--blockdev",
            &format!("file,node-name=file,filename={}", image.display()),
            "--blockdev",
            "throttle,node-name=t,throttle-group=slow,file=file",
        ];
        let daemon = serve(bed, &options, "t");
        near("reads", rates(daemon.file(), "read").0, 4 << 20);
        near("writes", rates(daemon.file(), "write").1, 32 << 16);
        stop_silently(daemon);
    });
}

#[test]
fn what_waits_for_its_turn_does_not_hold_up_the_end() {
    everywhere(|bed| {
        let options = [
            "--object",
            "throttle-group,id=slow,x-bps-write=100",
            "--blockdev",
            "null-co,node-name=null,size=16M,read-zeroes=on",
            "--blockdev",
            "throttle,node-name=t,throttle-group=slow,file=null",
        ];
        let daemon = serve(bed, &options, "t");
        // The first one passes, and uses up the bytes of 40 seconds.
        let file = daemon.open();
        file.write_all_at(&[1; 4096], 0).unwrap();
        let writers: Vec<_> = (1..4)
            .map(|n| {
                let file = file.try_clone().unwrap();
                std::thread::spawn(move || file.write_at(&[1; 4096], n * 4096))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(300));
        assert!(writers.iter().all(|writer| !writer.is_finished()));
        let start = Instant::now();
        let ended = daemon.stop();
        assert!(start.elapsed() < Duration::from_secs(5), "{ended:?}");
        let answers = writers.into_iter().map(|writer| writer.join().unwrap());
        // What was in the daemon is done; what came too late was told so.
        assert!(answers.flatten().count() > 0);
    });
}
