//! What the documentation shows is run as it stands there: the cookbook, the man pages, the README and the examples of
//! `--help`.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use diskfuse_e2e::{Kitchen, LoopDevice, Recipe, Tool, diskfuse, once, once_within};

/// How long all recipes of a page may take together; each has a limit of its own.
const LIMIT: Duration = Duration::from_secs(600);

fn page(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Runs all of them, at least `least`, and then says which have failed.
fn all_work(recipes: &[Recipe], least: usize) {
    assert!(recipes.len() >= least, "only {} are found", recipes.len());
    once_within(LIMIT, |bed| {
        let kitchen = Kitchen::new(bed);
        let works = |recipe: &&Recipe| {
            let run = || once(|bed| recipe.run(bed, &kitchen));
            catch_unwind(AssertUnwindSafe(run)).is_ok()
        };
        let failed = recipes.iter().filter(|recipe| !works(recipe));
        let failed: Vec<&str> = failed.map(|recipe| recipe.title.trim()).collect();
        assert!(failed.is_empty(), "these do not work: {failed:#?}");
    });
}

#[test]
fn the_recipes_of_the_cookbook_work() {
    all_work(&Recipe::by_section(&page("docs/COOKBOOK.md")), 12);
}

#[test]
fn the_examples_of_the_man_pages_work() {
    for (name, least) in [
        ("docs/man/diskfuse.1.md", 3),
        ("docs/man/diskfuse-qsd.1.md", 2),
        ("docs/man/diskfuse-formats.7.md", 3),
        ("docs/man/mount.diskfuse.8.md", 1),
    ] {
        all_work(&Recipe::by_block(&page(name)), least);
    }
}

#[test]
fn the_examples_of_the_readme_work() {
    all_work(&Recipe::by_block(&page("README.md")), 2);
}

/// The commands under "Examples:" in the help of a command, without what is said about them.
fn examples(command: &[&str]) -> Vec<String> {
    let help = Tool::new(diskfuse())
        .args(command)
        .arg("--help")
        .run()
        .stdout;
    let (_, examples) = help.split_once("\nExamples:\n").expect("examples");
    let lines = examples.lines().take_while(|line| !line.is_empty());
    lines
        .filter_map(|line| line.strip_prefix("  diskfuse "))
        .map(|line| format!("diskfuse {}", line.split("   ").next().unwrap().trim()))
        .map(|line| line.split("  ").next().unwrap().to_owned())
        .collect()
}

#[test]
fn the_examples_of_help_work() {
    let commands = [
        "mount",
        "umount",
        "list",
        "create",
        "info",
        "check",
        "snapshot",
        "map",
        "resize",
        "convert",
        "commit",
        "discard",
        "rebase",
        "completions",
    ];
    let mut recipes = Vec::new();
    for command in commands {
        let examples = examples(&[command]);
        assert!(!examples.is_empty(), "{command}");
        for example in examples
            .iter()
            .filter(|example| !example.contains("/dev/sdb"))
        {
            recipes.push(Recipe::of_command(&alone(example)));
        }
    }
    all_work(&recipes, 30);
}

/// An example with what has to be there before and what has to be done after it.
fn alone(example: &str) -> String {
    let words: Vec<&str> = example.split(' ').collect();
    match words[1] {
        // Until Ctrl-C, and that soon.
        "mount" if words.contains(&"-f") => {
            format!(
                "{example} & until grep -q diskfuse /proc/mounts && test -s d; do sleep 0.1; done; kill -INT $!; wait $!"
            )
        }
        "mount" => {
            let shown =
                "$(sed -n \"s|^[^ ]* \\($PWD/[^ ]*\\) fuse.diskfuse .*|\\1|p\" /proc/mounts)";
            format!("{example}; for m in {shown}; do diskfuse umount $m; done")
        }
        "info" if words.contains(&"disk") => {
            format!("diskfuse mount vm.qcow2 disk; {example}; diskfuse umount disk")
        }
        "umount" => format!("diskfuse mount vm.qcow2 disk; {example}"),
        "create" => format!("rm -f vm.qcow2 vm.img; {example}"),
        _ => example.to_owned(),
    }
}

#[test]
fn the_example_with_a_block_device_works() {
    once(|bed| {
        let device = LoopDevice::over(&bed.sparse("d", 1 << 20));
        let examples = examples(&["mount"]);
        let example = examples.iter().find(|example| example.contains("/dev/sdb"));
        let device = device.path().to_str().unwrap();
        let line = example.expect("one").replace("/dev/sdb", device);
        let words = line.split(' ').skip(1).map(str::to_owned);
        Tool::new(diskfuse())
            .args(words)
            .current_dir(bed.root())
            .run();
        assert_eq!(bed.path("sdb").metadata().unwrap().len(), 1 << 20);
        bed.diskfuse(["umount".as_ref(), bed.path("sdb").as_os_str()]);
        bed.nothing_mounted();
    });
}
