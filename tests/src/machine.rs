//! A machine of a test's own, as far as systemd can tell: the real one, as the first process of namespaces of its own, on a copy of
//! this machine's files that is thrown away. What units do in there nobody else sees. It must never run those of its units that
//! set up the kernel, which is everybody's.

use std::path::Path;
use std::time::Duration;

use crate::bed::Bed;
use crate::tool::{Output, Running, Tool};
use crate::user::elsewhere;
use crate::{binary, wait_until};

/// How long systemd may take to come up and to go.
const SOON: Duration = Duration::from_secs(30);

/// Services that change what all machines on this kernel share, and those that only take time.
const MASKED: &str = "systemd-sysctl systemd-modules-load systemd-udevd systemd-udev-trigger systemd-binfmt systemd-timesyncd \
    systemd-random-seed systemd-tmpfiles-setup-dev systemd-journal-flush systemd-update-utmp systemd-pstore \
    systemd-hwdb-update systemd-boot-system-token keyboard-setup console-setup apparmor ldconfig";

/// A cgroup of the machine's own, then the namespaces.
const OUTSIDE: &str = "
    mkdir own/cgroup
    mount -t cgroup2 none own/cgroup
    mkdir own/cgroup/$1
    echo $$ >own/cgroup/$1/cgroup.procs
    umount own/cgroup
    exec unshare --pid --fork --kill-child --mount --uts --ipc --cgroup sh -euc \"$2\" sh \"$3\" \"$4\" \"$5\"";

/// `$1` is the program, `$2` the unit file, `$3` what is masked.
const INSIDE: &str = "
    mkdir own/upper own/work own/root
    mount -t overlay none -o lowerdir=/,upperdir=own/upper,workdir=own/work own/root
    cd own/root
    mount -t proc proc proc
    mount -t sysfs sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mount -t tmpfs none dev
    for node in null zero full random urandom tty fuse autofs; do
        : >dev/$node
        mount --bind /dev/$node dev/$node
    done
    mkdir dev/pts dev/shm
    for folder in run tmp srv; do mount -t tmpfs none $folder; done
    units=etc/systemd/system
    for name in $3; do ln -sfn /dev/null $units/$name.service; done
    ln -sfn /dev/null $units/proc-sys-fs-binfmt_misc.automount
    : >etc/fstab
    cp \"$2\" $units
    : >usr/bin/diskfuse
    mount --bind \"$1\" usr/bin/diskfuse
    for name in mount.diskfuse umount.fuse.diskfuse; do ln -sf ../bin/diskfuse usr/sbin/$name; done
    mkdir -p etc/diskfuse
    pivot_root . mnt
    umount -l /mnt
    exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --unit=basic.target";

/// It runs. Dropping it ends everything in there.
pub struct Machine<'b> {
    bed: &'b Bed,
    cgroup: String,
    outside: Running,
    first: u32,
}

impl<'b> Machine<'b> {
    /// Starts systemd and waits until it is up: with this unit file, the program as /usr/bin/diskfuse and as mount(8)'s helper, an
    /// empty /etc/fstab, and empty /srv, /tmp and /run in memory. Boots once in a test's folder.
    #[track_caller]
    pub fn boot(bed: &'b Bed, unit: &Path) -> Self {
        let folder = bed.root().file_name().expect("a folder's name");
        let cgroup = format!("diskfuse-test-{}", folder.to_string_lossy());
        let program = binary::diskfuse().to_string_lossy().into_owned();
        let unit = unit.to_string_lossy().into_owned();
        let arguments = [&cgroup, INSIDE, &program, &unit, MASKED];
        let outside = elsewhere(bed, OUTSIDE, arguments).start();
        let mut machine = Self {
            bed,
            cgroup,
            outside,
            first: 0,
        };
        let end = std::time::Instant::now() + SOON;
        let up = || machine.try_first().is_some_and(is_up);
        while !up() {
            let alive = crate::process::is_alive(machine.outside.pid());
            let said = machine.outside.stderr();
            assert!(
                alive && std::time::Instant::now() < end,
                "systemd does not come up (apt-get install systemd): {said}"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        machine.first = machine.try_first().expect("it was there");
        machine
    }

    /// The process id of systemd, once it is there.
    fn try_first(&self) -> Option<u32> {
        let pid = self.outside.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// A shell script as root in there, with `-eu`.
    pub fn script(&self, script: &str) -> Tool {
        inside(self.first, ["sh", "-euc", script])
    }

    /// What such a script prints on standard output; fails unless it succeeds.
    #[track_caller]
    pub fn run(&self, script: &str) -> String {
        let Output { stdout, .. } = self.script(script).run();
        stdout
    }

    /// Waits until a script in there succeeds.
    #[track_caller]
    pub fn await_success(&self, what: &str, limit: Duration, script: &str) {
        wait_until(what, limit, || {
            self.script(script).output().status.success()
        });
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        self.outside.signal(rustix::process::Signal::KILL);
        let _ = self.outside.wait(SOON);
        // The last of its processes may be a moment behind.
        let script = "
            mkdir own/cgroup
            mount -t cgroup2 none own/cgroup
            for _ in $(seq 100); do
                find own/cgroup/$1 -depth -type d -exec rmdir {} + 2>/dev/null || true
                if [ ! -e own/cgroup/$1 ]; then exit; fi
                sleep 0.1
            done
            exit 1";
        let left = elsewhere(self.bed, script, [&self.cgroup]).output();
        let clean = left.status.success() || std::thread::panicking();
        assert!(clean, "the machine leaves its cgroup behind: {left}");
    }
}

/// A command in the namespaces of a process.
fn inside<'a>(first: u32, command: impl IntoIterator<Item = &'a str>) -> Tool {
    let target = first.to_string();
    let namespaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup"];
    let tool = Tool::new("nsenter").args(["--target", &target]);
    let environment = [
        "env",
        "-i",
        "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL=C",
    ];
    let tool = tool.args(namespaces).arg("--").args(environment);
    tool.args(command)
}

fn is_up(first: u32) -> bool {
    let output = inside(first, ["systemctl", "is-active", "basic.target"]).output();
    output.stdout.trim() == "active"
}
