//! What `diskfuse list --json` says.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::bed::Bed;
use crate::wait_until;

/// One export as it is listed.
#[derive(Debug)]
pub struct Listed(pub Value);

impl Listed {
    /// A number.
    pub fn number(&self, key: &str) -> u64 {
        self.0[key]
            .as_u64()
            .unwrap_or_else(|| panic!("no number '{key}' in {}", self.0))
    }

    /// A text.
    pub fn text(&self, key: &str) -> &str {
        self.0[key]
            .as_str()
            .unwrap_or_else(|| panic!("no text '{key}' in {}", self.0))
    }

    /// Yes or no.
    pub fn flag(&self, key: &str) -> bool {
        self.0[key]
            .as_bool()
            .unwrap_or_else(|| panic!("no flag '{key}' in {}", self.0))
    }
}

/// The export on `mountpoint`, if it is listed. Other tests' exports are listed too.
pub fn listed(bed: &Bed, mountpoint: &Path) -> Option<Listed> {
    let output = bed.diskfuse(["list", "--json"]);
    assert!(output.status.success(), "{output}");
    let all: Vec<Value> = serde_json::from_str(&output.stdout).expect("a JSON array");
    let is_it = |export: &Value| export["mountpoint"].as_str() == mountpoint.to_str();
    all.into_iter().find(is_it).map(Listed)
}

/// The export on `mountpoint`. A daemon in the foreground is mounted a moment before it can be asked.
pub fn await_listed(bed: &Bed, mountpoint: &Path) -> Listed {
    let mut found = None;
    wait_until("the export is listed", Duration::from_secs(20), || {
        found = listed(bed, mountpoint);
        found.is_some()
    });
    found.expect("waited for it")
}
