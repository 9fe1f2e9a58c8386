//! The texts of `--help`, `--object help`, `--chardev help` and `--trace help`. Never printed from here.

use std::fmt::Write;

use super::HelpTopic;
use crate::object::{DEFAULT_POLL_MAX_NS, throttle_group_property_names};

/// `{name}` stands for the word the program was called by.
const PROGRAM: &str = "\
Usage: {name} OPTION...
Show disk images as plain files. Understands the command line of qemu-storage-daemon.

A node is a disk: `--blockdev` makes one and names it. An export shows a node: `--export` mounts it over a file. The
options are carried out in the order given, so a node stands in front of whatever uses it. The program runs until it
gets SIGTERM or SIGINT; then it writes everything back, unmounts and ends.

Arguments are KEY=VALUE lists (`a=b,c.d=e,list.0=x,list.1=y`; `,,` is a comma inside a value) or JSON objects
(`{\"a\": \"b\"}`). `--blockdev @FILE`, `--object @FILE` and `--export @FILE` take such objects, one or a list of them, from
a file.

Nodes
  --blockdev [driver=]DRIVER,node-name=NAME[,KEY=VALUE...]
      For every driver:
        read-only=on|off             refuse writes (off)
        auto-read-only=on|off        fall back to read-only where writing is not possible (off)
        cache.direct=on|off          go around the page cache (off)
        cache.no-flush=on|off        never flush: fast, and loses data in a crash (off)
        discard=ignore|unmap         give the space of discarded ranges back (ignore)
        detect-zeroes=off|on|unmap   turn writes of zeroes into write-zeroes requests (off)
        force-share=on|off           bear with others who write to the image (off)
      Drivers:
        file, host_device            filename=PATH [,aio=threads|native|io_uring] [,locking=auto|on|off]
                                     [,drop-cache=on|off]
        raw                          file=NODE or file.driver=...,file.KEY=... [,offset=BYTES] [,size=BYTES]
        qcow2                        file=NODE or file.driver=...,file.KEY=...
                                     [,backing=NODE or ,backing.driver=...,backing.KEY=..., or empty for none]
                                     [,data-file=NODE or ,data-file.driver=...,data-file.KEY=...]
                                     [,cache-size=BYTES] [,l2-cache-size=BYTES] [,refcount-cache-size=BYTES]
                                     [,l2-cache-entry-size=BYTES] [,cache-clean-interval=SECONDS]
                                     [,lazy-refcounts=on|off] [,discard-no-unref=on|off]
                                     [,pass-discard-request=on|off] [,pass-discard-snapshot=on|off]
                                     [,pass-discard-other=on|off]
                                     [,overlap-check=none|constant|cached|all or ,overlap-check.KEY=...]
                                     backing and data-file are what the image says unless given
        throttle                     throttle-group=ID,file=NODE or ,file.driver=...,file.KEY=...
        blkdebug                     image=NODE or image.driver=...,image.KEY=...  [,config=FILE] [,align=BYTES]
                                     [,inject-error.0.event=none|read_aio|...,inject-error.0.KEY=...]
                                     [,set-state.0.event=...,set-state.0.new_state=N]: fails requests, for tests
        null-co, null-aio            [size=BYTES] [,latency-ns=N] [,read-zeroes=on|off]
      BYTES may end in k, M, G, T, P or E.

Exports
  --export [type=]fuse,id=ID,node-name=NAME,mountpoint=FILE[,KEY=VALUE...]
        writable=on|off              let others write (off)
        growable=on|off              let writes past the end make the disk larger (off)
        allow-other=auto|on|off      let other users open the file (auto: if the system allows it)
        threads=N                    serve with N threads of its own, 1 to 64, one queue each
        iothread=ID                  serve from this iothread
        iothread.0=ID,iothread.1=ID  serve from each of these, one queue each
        fixed-iothread=on|off        fail if the node cannot move to the iothread (off)
        max-background=N             asynchronous requests that the kernel may have waiting, 1 to 65535
        transport=auto|device|uring  how requests come: through /dev/fuse, or by FUSE over io_uring (auto: if it is there)
        depth=N                      with uring: requests that each CPU's queue hands out at once, 1 to 1024
        max-payload=BYTES            the largest request (what the kernel allows, up to 4M)
        placement=auto|free|pinned|spread
                                     with uring: threads run anywhere, on the CPUs that they serve, or on others
        cpus=CPU or cpus=FIRST-LAST  with uring: one thread after the other runs on these
        passthrough=off|auto|on      let the kernel read and write a raw image file itself (off)

Helpers
  --object [qom-type=]iothread,id=ID[,KEY=VALUE...]
                                     a thread that exports can share; `--object iothread,help` lists its keys
  --object [qom-type=]throttle-group,id=ID[,limits.KEY=N...]
                                     limits that nodes of the driver throttle share; `--object throttle-group,help`
  --object [qom-type=]secret,id=ID,data=TEXT or ,file=FILE
                                     something not to be seen; `--object secret,help`

The monitor
  --chardev [backend=]socket,id=ID,path=PATH[,server=on][,wait=off]
                                     a stream of bytes; `--chardev help` lists the others and their keys
  --monitor [chardev=]ID[,pretty=on] take commands there (QMP, as in QEMU)

The process
  --daemonize                        return once everything is up, and go on in the background
  --pidfile PATH                     write the process id there once everything is up
  --log LEVEL                        what to say on stderr: error, warn, info, debug or trace
  --metrics HOST:PORT|unix:PATH      show what is counted there, for Prometheus (HTTP, /metrics)
  --trace [enable=]PATTERN[,events=FILE][,file=FILE]
                                     say more about one part of the program; `--trace help` lists them
  --event-loop auto|io_uring|epoll   what to wait for events with (auto: io_uring where the kernel allows it)
  --sandbox on|off                   give up what serving does not take; with a monitor, only what its clients cannot ask for
  -h, --help                         show this and end
  -V, --version                      show the version and end

Examples
  Show an image, read-only, until Ctrl-C:
    touch /tmp/disk
    {name} --blockdev file,filename=disk.img,node-name=disk,read-only=on \\
        --export fuse,id=show,node-name=disk,mountpoint=/tmp/disk
  The second partition alone, writable, on four threads, in the background:
    {name} --daemonize --pidfile /run/disk.pid \\
        --blockdev raw,node-name=part,offset=1G,size=20G,file.driver=file,file.filename=disk.img,cache.direct=on \\
        --export fuse,id=part,node-name=part,mountpoint=/tmp/part,writable=on,threads=4
  A qcow2 image with what it is backed by, writable, four queues:
    {name} --blockdev qcow2,node-name=vm,discard=unmap,file.driver=file,file.filename=vm.qcow2 \\
        --export fuse,id=vm,node-name=vm,mountpoint=/tmp/vm,writable=on,threads=4
  Two exports that share one thread, the node in JSON:
    {name} --object iothread,id=io \\
        --blockdev '{\"driver\": \"null-co\", \"node-name\": \"zero\", \"size\": 1048576, \"read-zeroes\": true}' \\
        --export fuse,id=a,node-name=zero,mountpoint=/tmp/a,iothread=io \\
        --export fuse,id=b,node-name=zero,mountpoint=/tmp/b,iothread=io
";

const CHARDEVS: &str = "\
Available chardev backend types:
  file     path=PATH [,input-path=PATH] [,append=on|off]
  null
  pipe     path=PATH                   named pipes PATH.in and PATH.out, or PATH for both
  pty      [path=LINK]                 a new terminal, whose name is printed
  socket   path=PATH [,abstract=on|off] or host=HOST,port=PORT or fd=NUMBER
           with server=on [,wait=on|off], or as a client [,reconnect=SECONDS or ,reconnect-ms=N]
  stdio
";

const TRACE: &str = "\
Trace events of QEMU do not exist here. Their names say whose messages are shown:
  fuse*                                 exports
  qcow2*                                qcow2 images
  bdrv*, blk*, block*, file*            nodes and host files
  luring*, aio*, run_poll*              event loops
  monitor*, handle_qmp*, qmp*, job*     the monitor and jobs
  *                                     everything
";

const OBJECTS: &str = "\
Objects that can be made:
  iothread
  secret
  throttle-group
";

const SECRET: &str = "\
secret options:
  data=<string>       the secret itself
  file=<string>       the file that it is in; one of the two
  format=raw|base64   how it is written (raw)
Nothing in this version asks for a secret yet.
";

impl HelpTopic {
    /// The text for standard output, with a newline at its end. `name` is the word the program was called by.
    pub fn text(self, name: &str) -> String {
        match self {
            Self::Program => PROGRAM.replace("{name}", name),
            Self::Objects => OBJECTS.to_owned(),
            Self::Iothread => iothread(),
            Self::Chardevs => CHARDEVS.to_owned(),
            Self::Trace => TRACE.to_owned(),
            Self::ThrottleGroup => throttle_group(),
            Self::Secret => SECRET.to_owned(),
        }
    }
}

fn throttle_group() -> String {
    let mut text =
        "throttle-group options:\n  limits.KEY=<int>          KEY is one of these without x-; \
                    limits can be changed later\n"
            .to_owned();
    for name in throttle_group_property_names() {
        let meaning = match name.strip_prefix("x-").unwrap_or(name) {
            "iops-size" => "operations longer than this count several times; 0: once (0)",
            name if name.ends_with("-max-length") => "seconds that a burst may last (1)",
            name if name.ends_with("-max") => "the same during a burst; 0: no bursts (0)",
            name if name.starts_with("bps") => "bytes a second; 0: no limit (0)",
            _ => "operations a second; 0: no limit (0)",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {:<30}{meaning}", format!("{name}=<int>"));
    }
    text
}

fn iothread() -> String {
    let properties = [
        (
            "aio-max-batch",
            "requests handed to the kernel at once at most; 0: the event loop chooses",
            0,
        ),
        (
            "poll-grow",
            "factor by which a busy wait that was too short grows; 0: the event loop chooses",
            0,
        ),
        (
            "poll-max-ns",
            "longest busy wait before the thread sleeps, in nanoseconds; 0: none",
            DEFAULT_POLL_MAX_NS,
        ),
        (
            "poll-shrink",
            "divisor of a busy wait that was too long; 0: it ends",
            0,
        ),
    ];
    let mut text = "iothread options:\n".to_owned();
    for (name, meaning, default) in properties {
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "  {:<20}{meaning} ({default})",
            format!("{name}=<int>")
        );
    }
    text
}
