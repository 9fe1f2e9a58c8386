//! The program under test. It is built by Cargo into the target directory that this test was built into, with the same
//! profile, once per test process; what is up to date costs a fraction of a second.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Names another program to test (a release build, say) instead of the one that is built here.
const OVERRIDE: &str = "DISKFUSE_E2E_BINARY";

/// The path of the program `diskfuse`, which is newer than its sources.
pub fn diskfuse() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| match std::env::var_os(OVERRIDE) {
        Some(path) => PathBuf::from(path),
        None => build(),
    })
}

fn build() -> PathBuf {
    let test = std::env::current_exe().expect("the path of the test itself");
    // TARGET/[TRIPLE/]PROFILE/deps/TEST-HASH
    let profile_folder = test.ancestors().nth(2).expect("a target directory");
    let profile = match profile_folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(other) => other,
    };
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(workspace)
        .args([
            "build",
            "--quiet",
            "--package",
            "diskfuse",
            "--profile",
            profile,
        ])
        .arg("--target-dir")
        .arg(profile_folder.parent().expect("a target directory"))
        .output()
        .expect("cargo is there, because it built this test");
    assert!(
        output.status.success(),
        "the program does not build:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    profile_folder.join("diskfuse")
}
