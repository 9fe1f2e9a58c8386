//! Load by fio, whose data it can verify itself.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::tool::{Output, Running, Tool};

/// A run of fio on one file.
pub struct Fio(Tool);

impl Fio {
    /// Job `name` on `file`, with further options as the command line has them.
    pub fn new(name: &str, file: &Path, options: &[&str]) -> Self {
        let tool = Tool::new("fio")
            // Jobs are threads: as processes they would outlive a fio that is killed.
            .args(["--output-format=json", "--group_reporting", "--thread"])
            .arg(format!("--name={name}"))
            .arg(format!("--filename={}", file.display()))
            // A job must not make or enlarge the file that is there, nor leave state files around.
            .args(["--allow_file_create=0", "--verify_state_save=0"])
            .current_dir(std::env::temp_dir())
            .args(options);
        Self(tool.limit(Duration::from_secs(60)))
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn output(self) -> Output {
        self.0.output()
    }

    /// Runs it to its end and fails unless it is content.
    #[track_caller]
    pub fn run(self) -> Output {
        self.0.run()
    }

    /// Starts it.
    pub fn start(self) -> Running {
        self.0.start()
    }
}

/// The first job of fio's JSON report: what was asked for with `--output-format=json`.
pub fn fio_report(output: &Output) -> Value {
    // fio may print warnings in front.
    let json = output.stdout.find('{').map(|start| &output.stdout[start..]);
    let report: Value = serde_json::from_str(json.unwrap_or_default())
        .unwrap_or_else(|error| panic!("no JSON from fio ({error}): {output}"));
    report["jobs"][0].clone()
}
