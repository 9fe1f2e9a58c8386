//! Examples of the documentation, run for real. A block marked `console` holds commands behind the prompts `$ ` (anybody) and
//! `# ` (root), each with what it answers; `…` stands for anything. What stands in a comment `<!-- setup … -->` is run first.
//! A recipe runs by `sh -e` in a folder of its own with the images of `tests/scripts/make-images`: as an ordinary user unless
//! one of its prompts is root's. With `<!-- installed -->` in it, it runs where the program, its mount helpers and the service are
//! installed, and `/etc`, `/usr` and `/srv` are its own; `tests/scripts/systemctl` stands there for systemd, which needs the whole machine.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;

use crate::bed::Bed;
use crate::tool::{Output, Tool};
use crate::user::{Account, User, installed};
use crate::{binary, mounts, wait_until};

const LIMIT: Duration = Duration::from_secs(50);
/// Ends what a command prints. No tool prints it.
const END: char = '\u{1e}';

/// Makes a place as the package and systemd make it, goes to the recipe's folder and takes away what is left mounted at the end. `$1` is
/// the unit, `$2` what stands for systemctl(1).
const INSTALLATION: &str = r#"
cp "$1" /usr/lib/systemd/system/
cp "$2" /usr/bin/systemctl
mkdir work
cd work
trap 'cd /; umount -R -l /srv' EXIT
"#;

/// The place goes with its last process, and nobody outside can see what is left there.
const NOTHING_MOUNTED: &str = "if grep ' fuse.diskfuse ' /proc/self/mounts; then exit 8; fi";

/// What is run as one.
#[derive(Debug, Default)]
pub struct Recipe {
    /// The heading that it stands under, or the command that it shows.
    pub title: String,
    setup: String,
    steps: Vec<Step>,
    is_for_root: bool,
    needs_installation: bool,
}

/// What the recipes of a run have in common: the images, which each gets copies of, and the account of the ordinary user.
pub struct Kitchen {
    account: Arc<Account>,
    images: TempDir,
}

impl Kitchen {
    /// Makes the images, as the user.
    #[track_caller]
    pub fn new(bed: &Bed) -> Self {
        let account = Arc::new(Account::create());
        let images = tempfile::tempdir_in(bed.root()).expect("our own folder");
        let user = User::of(&account, bed);
        user.give(images.path());
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/make-images");
        let script = std::fs::read_to_string(script).expect("our own script");
        let tool = user.run(["sh", "-c", &script]);
        tool.current_dir(images.path()).limit(LIMIT).run();
        let readable = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(images.path(), readable).expect("our own folder");
        Self { account, images }
    }
}

/// A command, and what it is to print.
#[derive(Debug)]
struct Step {
    command: String,
    answer: Vec<String>,
}

impl Recipe {
    /// One command that answers whatever it likes, by root.
    pub fn of_command(command: &str) -> Self {
        let answer = Vec::new();
        let command = command.to_owned();
        Self {
            title: command.clone(),
            steps: vec![Step { command, answer }],
            is_for_root: true,
            ..Self::default()
        }
    }

    /// The recipes of a page in Markdown: one for each section that has console blocks.
    pub fn by_section(page: &str) -> Vec<Self> {
        let sections = page.split("\n## ").map(Self::read);
        sections.filter(|recipe| !recipe.steps.is_empty()).collect()
    }

    /// The same, but each block stands alone.
    pub fn by_block(page: &str) -> Vec<Self> {
        let blocks = page.split_inclusive("\n```\n").map(Self::read);
        blocks.filter(|recipe| !recipe.steps.is_empty()).collect()
    }

    fn read(section: &str) -> Self {
        let mut recipe = Self {
            title: section.lines().next().unwrap_or_default().to_owned(),
            ..Self::default()
        };
        let mut lines = section.lines();
        while let Some(line) = lines.next() {
            match line {
                "<!-- setup" => {
                    for line in lines.by_ref().take_while(|&line| line != "-->") {
                        let _ = writeln!(recipe.setup, "{line}");
                    }
                }
                "<!-- installed -->" => recipe.needs_installation = true,
                "```console" => recipe.read_block(lines.by_ref().take_while(|&line| line != "```")),
                _ => {}
            }
        }
        recipe
    }

    fn read_block<'a>(&mut self, lines: impl Iterator<Item = &'a str>) {
        let mut goes_on = false;
        for line in lines {
            let as_root = line.strip_prefix("# ");
            let command = as_root.or_else(|| line.strip_prefix("$ "));
            match (goes_on, command, self.steps.last_mut()) {
                (true, _, Some(step)) => {
                    let _ = write!(step.command, "\n{line}");
                }
                (_, Some(command), _) => {
                    self.is_for_root |= as_root.is_some();
                    let (command, answer) = (command.to_owned(), Vec::new());
                    self.steps.push(Step { command, answer });
                }
                (_, None, Some(step)) => {
                    step.answer.push(line.to_owned());
                    continue;
                }
                (_, None, None) => panic!("'{}' begins with an answer: {line}", self.title),
            }
            goes_on = line.ends_with('\\');
        }
    }

    /// Runs it, and fails unless every command succeeds and answers what is written, and nothing is left mounted.
    #[track_caller]
    pub fn run(&self, bed: &Bed, kitchen: &Kitchen) {
        let script = self.script(kitchen);
        let output = if self.needs_installation {
            let helpers = [
                "mount.diskfuse",
                "mount.fuse.diskfuse",
                "umount.fuse.diskfuse",
            ];
            let script = format!("{INSTALLATION}{script}\n{NOTHING_MOUNTED}");
            let unit = concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../packaging/systemd/diskfuse@.service"
            );
            let systemctl = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/systemctl");
            let tool = installed(bed, &helpers, &script, [unit, systemctl]);
            tool.limit(LIMIT).output()
        } else if self.is_for_root {
            let folder = bed.path("work");
            std::fs::create_dir(&folder).expect("our own folder");
            let tool = Tool::new("env").args(words(bed, binary::diskfuse(), script));
            tool.current_dir(folder).limit(LIMIT).output()
        } else {
            let user = User::of(&kitchen.account, bed);
            let output = user.run(std::iter::once("env".to_owned()).chain(words(
                bed,
                user.program(),
                script,
            )));
            let output = output.limit(LIMIT).output();
            if !output.status.success() {
                mounts::sweep(bed.root());
            }
            output
        };
        assert!(output.status.success(), "'{}': {output}", self.title);
        self.compare(&output);
        let what = format!("'{}' has nothing mounted any more", self.title);
        let gone = || mounts::below(bed.root()).is_empty();
        wait_until(&what, Duration::from_secs(10), gone);
    }

    /// What the shell is to run in the recipe's own folder.
    fn script(&self, kitchen: &Kitchen) -> String {
        let images = kitchen.images.path().display();
        let mut script = format!("cp -R {images}/. .\n{}\nexec 2>&1\n", self.setup);
        for step in &self.steps {
            let _ = write!(script, "printf '{END}\\n'\n{}\n", step.command);
        }
        script
    }

    #[track_caller]
    fn compare(&self, output: &Output) {
        let end = format!("{END}\n");
        let printed = output.stdout.split(&end).skip(1);
        for (step, printed) in self.steps.iter().zip(printed) {
            let mut lines = printed.lines();
            for expected in step.answer.iter().filter(|&line| line != "…") {
                assert!(
                    lines.any(|line| is_like(line, expected)),
                    "'{}': `{}` is to answer `{expected}`, in this place; it said:\n{printed}",
                    self.title,
                    step.command
                );
            }
        }
    }
}

/// The arguments of env(1) that run a script in the current folder, with the program in the PATH.
fn words(bed: &Bed, program: &Path, script: String) -> Vec<String> {
    let bin = bed.path("bin");
    std::fs::create_dir(&bin).expect("our own folder");
    std::os::unix::fs::symlink(program, bin.join("diskfuse")).expect("our own folder");
    let bin = bin.display();
    let path = format!("PATH={bin}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
    let words = [path.as_str(), "sh", "-e", "-c"].map(str::to_owned);
    words.into_iter().chain([script]).collect()
}

/// Whether a line is what is expected, in which `…` stands for anything.
fn is_like(line: &str, expected: &str) -> bool {
    let Some((first, rest)) = expected.split_once('…') else {
        return line == expected;
    };
    let Some(left) = line.strip_prefix(first) else {
        return false;
    };
    let mut ends = left.char_indices().map(|(at, _)| at).chain([left.len()]);
    ends.any(|at| is_like(&left[at..], rest))
}

#[cfg(test)]
mod tests {
    use std::panic::AssertUnwindSafe;

    use super::*;
    use crate::bed::once;

    #[test]
    fn an_ellipsis_stands_for_anything() {
        for (line, expected) in [("a b c", "a … c"), ("a", "a…"), ("abc", "…b…"), ("é", "…")]
        {
            assert!(is_like(line, expected), "{line} {expected}");
        }
        for (line, expected) in [("a b", "a … c"), ("b", "a…"), ("ab", "a"), ("abcd", "…c")] {
            assert!(!is_like(line, expected), "{line} {expected}");
        }
    }

    #[test]
    fn a_recipe_fails_when_a_command_does_or_answers_something_else() {
        let block = |lines: &str| Recipe::read(&format!("t\n```console\n{lines}\n```\n"));
        once(|bed| {
            let kitchen = Kitchen::new(bed);
            let run = |lines| once(|bed| block(lines).run(bed, &kitchen));
            for lines in [
                "# false",
                "# echo a\nb",
                "# echo a\na\na",
                "# echo \\\na\nb",
                "$ false",
            ] {
                assert!(
                    std::panic::catch_unwind(AssertUnwindSafe(|| run(lines))).is_err(),
                    "{lines}"
                );
            }
            run("# echo \\\na\na\n# id -u\n0");
            run("$ test $(id -u) != 0");
        });
    }

    #[test]
    fn what_an_installed_recipe_leaves_mounted_is_a_failure_and_gone() {
        let page = |lines: &str| format!("t\n<!-- installed -->\n```console\n{lines}\n```\n");
        once(|bed| {
            let kitchen = Kitchen::new(bed);
            let run = |lines| once(|bed| Recipe::read(&page(lines)).run(bed, &kitchen));
            let mount = "# cp vm.img /srv/i\n# mount -t diskfuse /srv/i /srv/m\n# test -s /srv/m";
            assert!(std::panic::catch_unwind(AssertUnwindSafe(|| run(mount))).is_err());
            run(&format!("{mount}\n# diskfuse umount /srv/m"));
        });
    }
}
