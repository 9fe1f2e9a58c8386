//! The unit file and `/etc/fstab` under the real systemd, which is the first process of a machine of the test's own.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{Machine, once_within};

const LIMIT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(20);

#[track_caller]
fn in_a_machine(test: impl Fn(&Machine<'_>)) {
    let packaging = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging");
    let unit = packaging.join("systemd/diskfuse@.service");
    once_within(LIMIT, |bed| test(&Machine::boot(bed, &unit)));
}

/// An image and the service that shows it as `/srv/vm.disk`.
const SERVICE: &str = "
    qemu-img create -q -f qcow2 /srv/vm.qcow2 64M
    cat >/etc/diskfuse/vm.conf <<END
IMAGE=/srv/vm.qcow2
MOUNTPOINT=/srv/vm.disk
OPTIONS=--writable --allow-other --mode 640
END
    systemctl start diskfuse@vm
    cd /srv
    pid() { systemctl show --property MainPID --value diskfuse@vm; }";

#[test]
fn a_service_is_ready_when_its_file_is_and_stopped_when_all_is_written() {
    in_a_machine(|machine| {
        let script = "stat -c '%a %s' vm.disk
            systemctl show --property StatusText diskfuse@vm
            mkfs.ext4 -q vm.disk
            systemctl stop diskfuse@vm
            test ! -e vm.disk
            qemu-img check -q vm.qcow2
            qemu-img convert -O raw vm.qcow2 out
            fsck.ext4 -nf out >/dev/null
            systemctl is-failed diskfuse@vm || true";
        let said = machine.run(&format!("{SERVICE}\n{script}"));
        let expected = "640 67108864\nStatusText=Showing /srv/vm.qcow2 as /srv/vm.disk\ninactive\n";
        assert_eq!(said, expected);
    });
}

#[test]
fn a_service_that_dies_or_hangs_is_started_again() {
    in_a_machine(|machine| {
        let impatient = "mkdir /etc/systemd/system/diskfuse@.service.d
            printf '[Service]\\nWatchdogSec=4\\n' >/etc/systemd/system/diskfuse@.service.d/impatient.conf
            systemctl daemon-reload";
        machine.run(&format!(
            "{impatient}\n{SERVICE}\nmkfs.ext4 -q vm.disk; pid >old"
        ));
        for signal in ["KILL", "STOP"] {
            machine.run(&format!("kill -{signal} $(cat /srv/old)"));
            let again = "cd /srv
                pid=$(systemctl show --property MainPID --value diskfuse@vm)
                test $pid != 0; test $pid != $(cat old); systemctl is-active diskfuse@vm
                timeout 5 fsck.ext4 -nf vm.disk; echo $pid >old";
            machine.await_success("the service is back", SOON, again);
        }
        // It answers the watchdog as long as it works.
        let calm = "sleep 6; cd /srv; test $(systemctl show --property MainPID --value diskfuse@vm) = $(cat old)
            systemctl stop diskfuse@vm
            qemu-img check -q -r leaks vm.qcow2";
        // What was killed may leak clusters, and nothing worse.
        machine.run(calm);
    });
}

/// As in a container whose own filter refuses io_uring and what a process shuts itself in with.
#[test]
fn a_service_that_may_not_shut_itself_in_says_so_and_serves() {
    in_a_machine(|machine| {
        let confined = "mkdir /etc/systemd/system/diskfuse@.service.d
            cat >/etc/systemd/system/diskfuse@.service.d/confined.conf <<END
[Service]
SystemCallFilter=~io_uring_setup seccomp landlock_create_ruleset landlock_restrict_self
SystemCallErrorNumber=EPERM
END
            systemctl daemon-reload";
        let script = "mkfs.ext4 -q vm.disk
            fsck.ext4 -nf vm.disk >/dev/null
            systemctl stop diskfuse@vm
            qemu-img check -q vm.qcow2
            journalctl --sync
            journalctl --unit diskfuse@vm --output cat";
        let said = machine.run(&format!("{confined}\n{SERVICE}\n{script}"));
        for words in [
            "io_uring is refused; using epoll and worker threads",
            "no Landlock here",
            "system calls are not filtered",
        ] {
            assert!(said.contains(words), "no {words:?} in {said}");
        }
    });
}

#[test]
fn a_service_that_cannot_start_says_why() {
    in_a_machine(|machine| {
        let script = "echo no image >/srv/vm.qcow2
            printf 'IMAGE=/srv/none\\nMOUNTPOINT=/srv/vm.disk\\nOPTIONS=\\n' >/etc/diskfuse/vm.conf
            mkdir /etc/systemd/system/diskfuse@.service.d
            printf '[Service]\\nRestart=no\\n' >/etc/systemd/system/diskfuse@.service.d/once.conf
            systemctl daemon-reload
            if systemctl start diskfuse@vm; then exit 9; fi
            journalctl --sync
            journalctl --unit diskfuse@vm --output cat
            systemctl start diskfuse@unknown
            systemctl is-active diskfuse@unknown || true";
        let said = machine.run(script);
        assert!(said.contains("/srv/none"), "{said}");
        assert!(said.ends_with("inactive\n"), "{said}");
    });
}

#[test]
fn fstab_is_mounted_by_systemd_and_on_demand() {
    in_a_machine(|machine| {
        let script = "cd /srv
            truncate -s 1M i; printf hello >tail; dd if=tail of=i conv=notrunc status=none
            qemu-img create -q -f qcow2 two.qcow2 64M
            mkdir d; touch f
            cat >/etc/fstab <<END
/srv/i /srv/f diskfuse rw,nofail,mode=600 0 0
/srv/two.qcow2 /srv/d diskfuse rw,dir,nofail,_netdev,x-systemd.automount,x-systemd.idle-timeout=5s 0 0
END
            systemctl daemon-reload
            systemctl start srv-f.mount srv-d.automount
            head -c 5 f; echo
            systemctl is-active srv-d.mount || true
            stat -c %s d/disk
            systemctl is-active srv-d.mount
            mkfs.ext4 -q d/disk";
        let said = machine.run(script);
        assert_eq!(said, "hello\ninactive\n67108864\nactive\n");
        let idle = "test \"$(systemctl is-active srv-d.mount)\" = inactive";
        machine.await_success("the idle one is gone", SOON, idle);
        let script = "cd /srv
            qemu-img check -q two.qcow2
            fsck.ext4 -nf d/disk >/dev/null
            diskfuse umount d
            fsck.ext4 -nf d/disk >/dev/null
            systemctl stop srv-d.automount srv-d.mount srv-f.mount
            grep -c ' /srv/[df] ' /proc/self/mounts || true
            systemctl --failed --no-legend";
        assert_eq!(machine.run(script), "0\n");
    });
}
