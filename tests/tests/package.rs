//! The Debian package, made by `scripts/build-deb` of the program under test: lintian finds no error in it, dpkg installs
//! it where `/etc`, `/usr`, `/var` and `/run` are the test's own, everything in it works there, and nothing is left when it is removed.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use diskfuse_e2e::{Bed, Tool, diskfuse, elsewhere, once_within};

/// It may have to build the generator of the man pages.
const LIMIT: Duration = Duration::from_secs(300);

/// Makes the package in the test's folder. `who` answers for it. One at a time, as the parts are gathered in one place.
fn build(bed: &Bed, who: &[&str]) -> PathBuf {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/build-deb");
    let program = format!("PROGRAM={}", diskfuse().display());
    let tool = Tool::new("env")
        .args(["-u", "DEBEMAIL", "-u", "DEBFULLNAME"])
        .args(who);
    tool.arg(&program)
        .arg(script)
        .arg(bed.root())
        .limit(LIMIT)
        .run();
    let mut names = bed.names().into_iter();
    let deb = names.find(|name| name.strip_suffix(".deb").is_some());
    bed.path(&deb.expect("a package"))
}

fn fields(deb: &Path) -> String {
    Tool::new("dpkg-deb").arg("--field").arg(deb).run().stdout
}

#[test]
fn the_package_is_as_debian_wants_it() {
    once_within(LIMIT, |bed| {
        let who = ["DEBFULLNAME=A & B", "DEBEMAIL=someone@debian.org"];
        let deb = build(bed, &who);
        let fields = fields(&deb);
        for line in [
            "Package: diskfuse\n",
            "Recommends: fuse3\n",
            "Depends: libc6",
            "Maintainer: A & B <someone@debian.org>\n",
            // In one line, or its end becomes a sentence of the description.
            "Description: Show disk images (raw, qcow2) as plain files over FUSE\n A storage daemon",
        ] {
            assert!(fields.contains(line), "{line} in {fields}");
        }
        // Which warnings there are differs from one Debian to the next. It does not like to be root.
        let lintian = Tool::new("lintian").args(["--fail-on", "error", "--allow-root"]);
        let said = lintian.arg(&deb).limit(LIMIT).run();
        assert!(!said.stdout.contains("E: "), "{said}");
    });
}

/// `$1` is the package. `systemctl` and `deb-systemd-invoke` only write down what they are to do.
const LIFE: &str = r#"
for folder in etc usr var; do
    mkdir -p own/upper/$folder own/work/$folder
    mount -t overlay none -o lowerdir=/$folder,upperdir=own/upper/$folder,workdir=own/work/$folder /$folder
done
mount -t tmpfs run /run
mkdir -p /run/systemd/system
for name in systemctl deb-systemd-invoke; do
    rm -f /usr/bin/$name
    printf '#!/bin/sh\necho "%s $*" >>/run/asked\n' $name >/usr/bin/$name
    chmod 755 /usr/bin/$name
done
PATH=/usr/sbin:/usr/bin:/sbin:/bin; export PATH
unset XDG_RUNTIME_DIR MANPATH
for folder in etc usr; do (cd own/upper/$folder; find . ! -type d | sort) >own/before-$folder; done

dpkg --install "$1"
echo "state: $(dpkg-query --show --showformat '${Status}' diskfuse)"
cat /run/asked; rm /run/asked

test "$(command -v diskfuse)" = /usr/bin/diskfuse
diskfuse --version
for page in diskfuse diskfuse-mount diskfuse-qsd 'mount.diskfuse' mount.fuse.diskfuse umount.fuse.diskfuse diskfuse-formats; do
    echo "page: $(man -w $page)"
    man $page >own/page
    grep -q SYNOPSIS own/page || grep -q DESCRIPTION own/page
done
for file in README.md COOKBOOK.md copyright examples/example.conf; do test -s /usr/share/doc/diskfuse/$file; done
test -s /usr/share/zsh/vendor-completions/_diskfuse
test -s /usr/share/fish/vendor_completions.d/diskfuse.fish
bash -c '. /usr/share/bash-completion/completions/diskfuse
    COMP_WORDS=(diskfuse mou); COMP_CWORD=1; _diskfuse diskfuse mou diskfuse; echo "completed: ${COMPREPLY[@]}"'
systemd-analyze verify --man=yes /usr/lib/systemd/system/diskfuse@.service

truncate -s 1M own/i
trap 'umount -l own/m 2>/dev/null || true' EXIT
mount -t diskfuse own/i own/m
test $(stat -c %s own/m) = 1048576
umount own/m
# umount(8) has waited: the daemon is gone.
test -z "$(diskfuse list | tail -n +2)"

dpkg --purge diskfuse
cat /run/asked
if dpkg-query --show diskfuse 2>/dev/null; then exit 7; fi
for folder in etc usr; do (cd own/upper/$folder; find . ! -type d | sort) | diff own/before-$folder -; done
for folder in etc usr var; do
    find own/upper/$folder -name '*diskfuse*' ! -type c ! -path '*/var/lib/dpkg/*' ! -path '*/var/log/*' ! -path '*/var/cache/man/*' | sed 's/^/left: /'
done
"#;

#[test]
fn the_installed_package_works_and_leaves_nothing_when_it_is_removed() {
    once_within(LIMIT, |bed| {
        let deb = build(bed, &[]);
        let lived = elsewhere(bed, LIFE, [&deb]).limit(LIMIT).run();
        let said = &lived.stdout;
        for line in [
            "state: install ok installed",
            "page: /usr/share/man/man1/diskfuse.1.gz",
            "page: /usr/share/man/man1/diskfuse-mount.1.gz",
            "page: /usr/share/man/man7/diskfuse-formats.7.gz",
            "page: /usr/share/man/man8/mount.diskfuse.8.gz",
            "completed: mount",
        ] {
            assert!(said.lines().any(|said| said == line), "{line}: {lived}");
        }
        // Nothing is enabled or started; what runs is stopped before its unit goes.
        let asked = said
            .lines()
            .filter(|line| line.starts_with("systemctl ") || line.starts_with("deb-systemd-"));
        let asked: Vec<&str> = asked.collect();
        let reload = "systemctl --system daemon-reload";
        let stop = "deb-systemd-invoke stop diskfuse@*.service";
        assert_eq!(asked, [reload, stop, reload], "{lived}");
        assert!(!said.contains("left: "), "{lived}");
    });
}
