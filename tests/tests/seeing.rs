//! Seeing what goes on: `top`, `--metrics` and `info` of a mountpoint, with real load, real clients and a real terminal. Numbers
//! are compared with those that fio says.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{
    Bed, Daemon, Fio, Tool, await_listed, everywhere, fio_report, once, process, wait_until,
};
use rustix::process::Signal;
use serde_json::Value;

const MIB: usize = 1 << 20;

/// Exactly so many reads of 4 KiB; returns how many fio counts.
fn reads(file: &Path, number: u64) -> u64 {
    let number = format!("--number_ios={number}");
    let options = [
        "--rw=randread",
        "--bs=4k",
        "--direct=1",
        "--size=8m",
        "--ioengine=psync",
        &number,
    ];
    fio_report(&Fio::new("reads", file, &options).run())["read"]["total_ios"]
        .as_u64()
        .unwrap()
}

/// A port that nobody has at the moment.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn curl(arguments: &[&str]) -> String {
    let tool = Tool::new("curl").args(["--silent", "--show-error", "--fail", "--max-time", "10"]);
    tool.args(arguments).run().stdout
}

/// The samples of a page in the text format 0.0.4, by name and labels as written. Fails on whatever the format does not allow, and
/// on families that are not told in one piece with their HELP and TYPE in front.
///
/// Source: Prometheus' "Exposition formats", "Text format details".
fn parse(page: &str) -> BTreeMap<String, f64> {
    assert!(page.ends_with('\n'), "the last line must end");
    let (mut samples, mut kinds) = (BTreeMap::new(), BTreeMap::new());
    let (mut family, mut helped) = (String::new(), String::new());
    for line in page.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, _) = help.split_once(' ').expect("a help text");
            name.clone_into(&mut helped);
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            assert_eq!(name, helped, "HELP and TYPE of one family stand together");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            let before = kinds.insert(name.to_owned(), kind.to_owned());
            assert!(before.is_none(), "{name} comes twice");
            name.clone_into(&mut family);
            continue;
        }
        let (series, value) = line.rsplit_once(' ').expect("a value");
        let name = series.split('{').next().unwrap();
        let kind = &*kinds[&family];
        let ending = name
            .strip_prefix(&*family)
            .unwrap_or_else(|| panic!("{line} is not of {family}"));
        match kind {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&ending), "{line}"),
            "counter" => assert!(ending.is_empty() && name.ends_with("_total"), "{line}"),
            _ => assert!(ending.is_empty(), "{line}"),
        }
        let value: f64 = value
            .parse()
            .unwrap_or_else(|_| panic!("no number: {line}"));
        assert!(kind == "gauge" || value >= 0.0, "{line}");
        assert!(
            samples.insert(series.to_owned(), value).is_none(),
            "{series} comes twice"
        );
    }
    samples
}

/// The sum of all samples of a name with these labels.
fn sum(samples: &BTreeMap<String, f64>, name: &str, labels: &[&str]) -> u64 {
    let fits = |series: &str| {
        series.split('{').next() == Some(name) && labels.iter().all(|label| series.contains(label))
    };
    let all: Vec<f64> = samples
        .iter()
        .filter(|(series, _)| fits(series))
        .map(|(_, &value)| value)
        .collect();
    assert!(!all.is_empty(), "no {name} with {labels:?}");
    let sum: f64 = all.iter().sum();
    // Counts of a test are far below what floating point can hold.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "small whole numbers"
    )]
    let whole = sum.round() as u64;
    whole
}

/// Buckets never fall, and the last one holds all.
fn check_histogram(samples: &BTreeMap<String, f64>, name: &str, label: &str) {
    let buckets = samples.iter().filter(|(series, _)| {
        series.starts_with(&format!("{name}_bucket")) && series.contains(label)
    });
    let mut buckets: Vec<(f64, f64)> = buckets
        .map(|(series, &count)| {
            let limit = series
                .split("le=\"")
                .nth(1)
                .unwrap()
                .split('"')
                .next()
                .unwrap();
            (limit.parse().unwrap(), count)
        })
        .collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    assert!(
        buckets.len() > 10 && buckets.last().unwrap().0.is_infinite(),
        "{buckets:?}"
    );
    assert!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{buckets:?}");
    let count = sum(samples, &format!("{name}_count"), &[label]);
    assert!((buckets.last().unwrap().1 - f64::from(u32::try_from(count).unwrap())).abs() < 0.5);
}

#[test]
fn metrics_agree_with_fio_over_tcp_and_unix_sockets() {
    everywhere(|bed| {
        let image = bed.image("disk.img", 8 * MIB);
        let address = format!("127.0.0.1:{}", port());
        let daemon = bed.mount(&image, &["--metrics", &address]);
        await_listed(bed, daemon.file());
        let number = reads(daemon.file(), 1000);
        assert_eq!(number, 1000);
        let url = format!("http://{address}/metrics");
        let page = curl(&[&url]);
        let samples = parse(&page);
        let read = ["operation=\"read\""];
        assert_eq!(sum(&samples, "diskfuse_requests_total", &read), number);
        assert_eq!(
            sum(&samples, "diskfuse_request_duration_seconds_count", &read),
            number
        );
        assert_eq!(
            sum(&samples, "diskfuse_read_bytes_total", &[]),
            number * 4096
        );
        assert_eq!(sum(&samples, "diskfuse_request_errors_total", &[]), 0);
        check_histogram(&samples, "diskfuse_request_duration_seconds", read[0]);
        let headers = curl(&["--head", &url]);
        assert!(
            headers.contains("Content-Type: text/plain; version=0.0.4"),
            "{headers}"
        );
        let lost = Tool::new("curl")
            .args(["--silent", "--fail", &format!("http://{address}/")])
            .output();
        assert_eq!(lost.status.code(), Some(22), "{lost}");
        daemon.stop();
        assert!(TcpStream::connect(&address).is_err());

        let socket = bed.path("metrics.sock");
        let odd = bed.mountpoint("m\"\\");
        let export = format!("fuse,id=e,node-name=n,mountpoint={}", odd.display());
        let qsd = bed.qsd(
            &[
                "--blockdev",
                "null-co,node-name=n,size=8M,read-zeroes=on",
                "--export",
                &export,
                "--metrics",
                &format!("unix:{}", socket.display()),
            ],
            &[&odd],
        );
        reads(&odd, 500);
        let page = curl(&[
            "--unix-socket",
            socket.to_str().unwrap(),
            "http://x/metrics",
        ]);
        assert_eq!(sum(&parse(&page), "diskfuse_requests_total", &read), 500);
        assert!(page.contains(r#"/m\"\\",operation="read""#), "{page}");
        qsd.stop();
        assert!(!socket.exists());
    });
}

#[test]
fn clients_that_are_slow_or_mad_hold_nothing() {
    once(|bed| {
        let image = bed.image("disk.img", MIB);
        let socket = bed.path("metrics.sock");
        let daemon = bed.mount(
            &image,
            &["--metrics", &format!("unix:{}", socket.display())],
        );
        await_listed(bed, daemon.file());
        let page = || {
            curl(&[
                "--unix-socket",
                socket.to_str().unwrap(),
                "http://x/metrics",
            ])
        };
        let idle: Vec<UnixStream> = (0..8)
            .map(|_| UnixStream::connect(&socket).unwrap())
            .collect();
        let mut mad = UnixStream::connect(&socket).unwrap();
        // It is cut off before all of it is taken.
        let _ = mad.write_all(&vec![b'x'; MIB]);
        parse(&page());
        // More than are served at a time: the last ones are turned away, and after the time that each has there is room again.
        let many: Vec<UnixStream> = (0..32)
            .map(|_| UnixStream::connect(&socket).unwrap())
            .collect();
        let mut last = many.last().unwrap();
        last.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        assert_eq!(last.read(&mut [0; 1]).unwrap(), 0);
        let limit = Duration::from_secs(15);
        let request = [
            "--silent",
            "--fail",
            "--unix-socket",
            socket.to_str().unwrap(),
            "http://x/metrics",
        ];
        wait_until("there is room again", limit, || {
            Tool::new("curl").args(request).output().status.success()
        });
        drop((idle, many));
        daemon.stop();
    });
}

#[test]
fn an_address_that_cannot_be_had_is_refused_before_anything_is_mounted() {
    once(|bed| {
        let image = bed.image("disk.img", MIB);
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let (file, live) = (bed.mountpoint("file"), bed.path("live.sock"));
        let _live = UnixListener::bind(&live).unwrap();
        let refused = [
            (address, "in use"),
            (format!("unix:{}", file.display()), "in use"),
            (format!("unix:{}", live.display()), "in use"),
            ("9100".to_owned(), "not an address"),
        ];
        for (address, why) in refused {
            let arguments = ["mount", "--metrics", &address];
            let output = bed.tool(arguments).arg(&image).arg(bed.path("m")).output();
            assert_eq!(output.status.code(), Some(1), "{output}");
            assert!(
                output.stderr.contains(why) && output.stderr.contains(&address),
                "{output}"
            );
            bed.nothing_mounted();
            assert!(!bed.path("m").exists());
        }
        assert!(file.exists() && live.exists());
        // One that a dead process has left is taken.
        let dead = bed.path("dead.sock");
        drop(UnixListener::bind(&dead).unwrap());
        let daemon = bed.mount(&image, &["--metrics", &format!("unix:{}", dead.display())]);
        daemon.stop();
    });
}

/// The cells of a line of `top --batch`, if there is one for this mountpoint.
fn cells(text: &str, mountpoint: &Path) -> Option<Vec<String>> {
    let name = mountpoint.to_str().unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    Some(line?.split_whitespace().map(str::to_owned).collect())
}

fn load(daemon: &Daemon) -> diskfuse_e2e::Fio {
    let options = [
        "--rw=randread",
        "--bs=4k",
        "--direct=1",
        "--size=8m",
        "--ioengine=libaio",
        "--iodepth=8",
        "--time_based",
        "--runtime=30",
    ];
    Fio::new("load", daemon.file(), &options)
}

#[test]
fn top_shows_the_load_as_text_and_in_a_terminal() {
    everywhere(|bed| {
        let image = bed.path("disk.qcow2");
        let made =
            Tool::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-o", "preallocation=full"]);
        made.arg(&image).arg("8M").run();
        let daemon = bed.mount(&image, &[]);
        await_listed(bed, daemon.file());
        let mut fio = load(&daemon).start();
        // fio needs a while before its first request, on a busy machine longer than the table looks.
        wait_until("the load is there", Duration::from_secs(20), || {
            await_listed(bed, daemon.file()).number("reads") > 0
        });
        let text = bed.diskfuse(["top", "--batch", "-n", "2", "--interval", "1", "--queues"]);
        assert!(text.status.success(), "{text}");
        let second = text.stdout.split("\n\n").nth(1).expect("two tables");
        let cells = cells(second, daemon.file()).unwrap_or_else(|| panic!("{text}"));
        assert_ne!(cells[0], "0.0", "{text}");
        assert!(
            cells[4].ends_with(['µ', 'm']) && cells[7].ends_with('%'),
            "{text}"
        );
        assert!(second.contains("\n  queue 0 "), "{text}");
        in_a_terminal(bed, &daemon);
        fio.signal(Signal::INT);
        fio.finish(Duration::from_secs(10));
        daemon.stop();
    });
}

/// The live view on a terminal of 80 × 24: it shows requests, hears keys, and leaves the terminal with `q`.
fn in_a_terminal(bed: &Bed, daemon: &Daemon) {
    let screen = bed.path("screen");
    let command = format!(
        "stty rows 24 cols 80; {} top -i 0.3",
        diskfuse_e2e::diskfuse().display()
    );
    let typed = "sleep 2; printf e; sleep 1; printf q";
    let shell = format!(
        "({typed}) | TERM=xterm timeout 20 script -qec '{command}' {} >/dev/null",
        screen.display()
    );
    let ended = Tool::new("sh")
        .args(["-c", &shell])
        .limit(Duration::from_secs(25))
        .output();
    assert!(ended.status.success(), "{ended}");
    let shown = String::from_utf8_lossy(&std::fs::read(&screen).unwrap()).into_owned();
    let name = daemon.file().file_name().unwrap().to_str().unwrap();
    assert!(
        shown.contains("\u{1b}[?1049h") && shown.contains("\u{1b}[?1049l"),
        "{shown:?}"
    );
    assert!(
        shown.contains("diskfuse top") && shown.contains("requests/s"),
        "{shown:?}"
    );
    assert!(
        shown.contains(&format!("/{name}")) && shown.contains("queue"),
        "{shown:?}"
    );
    // There are latencies only of requests; the title and a row are drawn piece by piece, where something has changed.
    assert!(shown.contains('µ'), "{shown:?}");
}

#[test]
fn a_daemon_that_does_not_answer_does_not_stop_the_view() {
    once(|bed| {
        let image = bed.image("disk.img", 8 * MIB);
        let daemon = bed.mount(&image, &[]);
        let (second, stuck) = (bed.image("second.img", MIB), bed.path("stuck"));
        let mut stuck = bed.mount_on(&second, &stuck, &[]);
        await_listed(bed, daemon.file());
        await_listed(bed, stuck.file());
        stuck.signal(Signal::STOP);
        let top = bed.diskfuse(["top", "--batch", "-n", "2", "--interval", "0.5"]);
        stuck.signal(Signal::CONT);
        assert!(top.status.success(), "{top}");
        assert!(cells(&top.stdout, daemon.file()).is_some(), "{top}");
        assert!(
            top.stderr.contains(&format!("process id {}", stuck.pid())),
            "{top}"
        );
        stuck.stop();
        daemon.stop();
    });
}

#[test]
fn info_of_a_mountpoint_tells_the_image_and_who_shows_it() {
    everywhere(|bed| {
        let image = bed.path("disk.qcow2");
        Tool::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&image)
            .arg("8M")
            .run();
        let daemon = bed.mount(&image, &["-w"]);
        await_listed(bed, daemon.file());
        reads(daemon.file(), 100);
        let text = bed.tool(["info"]).arg(daemon.file()).run().stdout;
        for line in [
            "file format: qcow2",
            "virtual size: 8 MiB",
            "    access: read and write",
            " in 100 requests",
            "    latency of read: half in ",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        assert!(
            text.contains(&format!("    process: {}\n", daemon.pid())),
            "{text}"
        );
        // As of the image, and one thing more.
        let told = |words: &[&str], path| {
            let json = bed.tool(words).arg(path).run().stdout;
            serde_json::from_str::<Value>(&json).unwrap()
        };
        let mut said = told(&["info", "--json"], daemon.file());
        let chain = told(&["info", "--json", "--chain"], daemon.file());
        let export = said.as_object_mut().unwrap().remove("export").unwrap();
        assert_eq!(said, told(&["info", "--json", "-U"], &image));
        assert_eq!(chain[0]["export"]["id"], export["id"]);
        assert_eq!(chain[0]["filename"], said["filename"]);
        assert_eq!(export["pid"], daemon.pid());
        assert_eq!(export["writable"], true);
        assert!(
            export["per_queue"][0]["requests"]["read"]["sum_ns"].is_u64(),
            "{export}"
        );
        // The daemon goes on writing, and holds its locks as before.
        daemon.open().write_all(&[7; 4096]).unwrap();
        let other = bed.tool(["info"]).arg(&image).output();
        assert!(
            !other.status.success() && other.stderr.contains("lock"),
            "{other}"
        );
        daemon.stop();

        let folder = bed.path("d");
        let arguments = ["mount", "--dir", "--transport", bed.ground.transport.name()];
        bed.tool(arguments).arg(&image).arg(&folder).run();
        bed.adopt(u32::try_from(await_listed(bed, &folder).number("pid")).unwrap());
        let text = bed.tool(["info"]).arg(&folder).run().stdout;
        assert!(
            text.contains("virtual size: 8 MiB") && text.contains("    access: read only"),
            "{text}"
        );
        bed.tool(["umount"]).arg(&folder).run();

        let raw = bed.image("raw.img", MIB);
        let over = bed.mount_on(&raw, &raw, &[]);
        await_listed(bed, over.file());
        let text = bed.tool(["info"]).arg(&raw).run().stdout;
        assert!(text.contains("hidden by what is mounted over it"), "{text}");
        let json = bed.tool(["info", "--json"]).arg(&raw).run().stdout;
        let said: Value = serde_json::from_str(&json).unwrap();
        assert!(said["image-unknown"].is_string() && said["export"].is_object());
        over.stop();
    });
}

#[test]
fn looking_is_cheap() {
    once(|bed| {
        let image = bed.image("disk.img", 8 * MIB);
        let daemon = bed.mount(&image, &[]);
        await_listed(bed, daemon.file());
        let mut top = bed.tool(["top", "--batch"]).start();
        std::thread::sleep(Duration::from_secs(2));
        let share = process::cpu_share(top.pid(), Duration::from_secs(5));
        println!(
            "top at 1 Hz: {:.2} % of a CPU (of a program built for tests)",
            share * 100.0
        );
        top.signal(Signal::INT);
        top.finish(Duration::from_secs(5));
        assert!(share < 0.05, "{share}");
        daemon.stop();
    });
}
