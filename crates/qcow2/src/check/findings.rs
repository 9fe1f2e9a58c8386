//! What a check has found: numbers under the names that `qemu-img check --output=json` uses, and sentences.

use serde::Serialize;

/// Sentences that are kept; the rest is counted.
const MOST_MESSAGES: usize = 1000;

/// What a check found, and what a repair did. Serializes with the keys of `qemu-img check --output=json`, those that
/// are zero left out where it leaves them out.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckResult {
    /// Where the last cluster in use ends, in bytes.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub total_clusters: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Things that are wrong and endanger data, still.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Clusters that are kept allocated for nothing, still.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Corruptions that the repair has ended.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Leaks that the repair has ended.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// Clusters of the guest's disk that the image holds itself.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// Those that do not lie behind their neighbour.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    /// A sentence for each finding, the first 1000.
    #[serde(skip)]
    pub messages: Vec<String>,
    /// How many more there were.
    #[serde(skip)]
    pub messages_left_out: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl CheckResult {
    /// Whether nothing is wrong, not even a leak.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    /// Something is wrong and endangers data.
    pub(super) fn corruption(&mut self, message: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.say(message);
    }

    /// Something is kept for nothing.
    pub(super) fn leak(&mut self, message: impl FnOnce() -> String) {
        self.leaks += 1;
        self.say(message);
    }

    /// Something is worth saying.
    pub(super) fn say(&mut self, message: impl FnOnce() -> String) {
        if self.messages.len() < MOST_MESSAGES {
            self.messages.push(message());
        } else {
            self.messages_left_out += 1;
        }
    }

    /// Takes over the sentences of an earlier look at the image: they come first.
    pub(super) fn after(mut self, earlier: Self) -> Self {
        let later = std::mem::replace(&mut self.messages, earlier.messages);
        self.messages_left_out += earlier.messages_left_out;
        for message in later {
            self.say(|| message);
        }
        self.corruptions_fixed = earlier.corruptions.saturating_sub(self.corruptions);
        self.leaks_fixed = earlier.leaks.saturating_sub(self.leaks);
        self
    }
}
