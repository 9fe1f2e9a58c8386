//! The Debian package, made by `scripts/build-deb` of the program under test and unpacked by dpkg: what is in it, and that it is
//! what Debian's tools take it for.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{Tool, diskfuse, once_within};

/// It may have to build the generator of the man pages.
const LIMIT: Duration = Duration::from_secs(300);

const FILES: [&str; 14] = [
    "usr/bin/diskfuse",
    "usr/share/man/man1/diskfuse.1.gz",
    "usr/share/man/man1/diskfuse-mount.1.gz",
    "usr/share/man/man1/diskfuse-qsd.1.gz",
    "usr/share/man/man7/diskfuse-formats.7.gz",
    "usr/share/bash-completion/completions/diskfuse",
    "usr/share/zsh/vendor-completions/_diskfuse",
    "usr/share/fish/vendor_completions.d/diskfuse.fish",
    "usr/lib/systemd/system/diskfuse@.service",
    "usr/share/doc/diskfuse/README.md",
    "usr/share/doc/diskfuse/COOKBOOK.md",
    "usr/share/doc/diskfuse/copyright",
    "usr/share/doc/diskfuse/LICENSE-APACHE",
    "usr/share/doc/diskfuse/examples/example.conf",
];

#[test]
fn the_package_has_everything_in_its_place_and_works() {
    once_within(LIMIT, |bed| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/build-deb");
        let program = format!("PROGRAM={}", diskfuse().display());
        let tool = Tool::new("env").arg(&program).arg(script).arg(bed.root());
        tool.limit(LIMIT).run();
        let deb = bed
            .names()
            .into_iter()
            .find(|name| name.strip_suffix(".deb").is_some());
        let deb = bed.path(&deb.expect("a package"));
        let fields = Tool::new("dpkg-deb").arg("--field").arg(&deb).run().stdout;
        for line in ["Package: diskfuse", "Recommends: fuse3", "Depends: libc6"] {
            assert!(fields.contains(line), "{line} in {fields}");
        }
        let root = bed.path("root");
        Tool::new("dpkg-deb")
            .arg("--extract")
            .args([&deb, &root])
            .run();
        for file in FILES {
            assert!(root.join(file).is_file(), "no {file}");
        }
        for name in ["mount.diskfuse", "mount.fuse.diskfuse"] {
            let target = root.join("usr/sbin").join(name).read_link().expect(name);
            assert_eq!(target, Path::new("../bin/diskfuse"));
        }
        let version = Tool::new(root.join("usr/bin/diskfuse"))
            .arg("--version")
            .run();
        assert!(version.stdout.starts_with("diskfuse "), "{version}");
        let bash = root.join("usr/share/bash-completion/completions/diskfuse");
        let script = format!(
            ". '{}'; COMP_WORDS=(diskfuse mou); COMP_CWORD=1; _diskfuse diskfuse mou diskfuse; echo ${{COMPREPLY[@]}}",
            bash.display()
        );
        let completed = Tool::new("bash").args(["-c", &script]).run();
        assert_eq!(completed.stdout, "mount\n");
    });
}
