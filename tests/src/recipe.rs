//! Examples of the documentation, run for real. A block marked `console` holds commands behind the prompts `$ ` (anybody) and
//! `# ` (root), each with what it answers; `…` stands for anything. What stands in a comment `<!-- setup … -->` is run first.
//! A recipe runs by `sh -e` in a folder of its own with the images of `tests/scripts/make-images`: as an ordinary user unless
//! one of its prompts is root's.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use crate::bed::Bed;
use crate::tool::{Output, Tool};
use crate::user::User;
use crate::{binary, mounts, wait_until};

const LIMIT: Duration = Duration::from_secs(50);
/// Ends what a command prints. No tool prints it.
const END: char = '\u{1e}';

/// What is run as one.
#[derive(Debug, Default)]
pub struct Recipe {
    /// The heading that it stands under, or the command that it shows.
    pub title: String,
    setup: String,
    steps: Vec<Step>,
    is_for_root: bool,
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
    pub fn run(&self, bed: &Bed) {
        let output = if self.is_for_root {
            let folder = bed.path("work");
            std::fs::create_dir(&folder).expect("our own folder");
            let tool = Tool::new("env").args(self.words(bed, binary::diskfuse()));
            tool.current_dir(folder).limit(LIMIT).output()
        } else {
            let user = User::new(bed);
            let words = self.words(bed, user.program());
            let words = std::iter::once("env".to_owned()).chain(words);
            let output = user.run(words).limit(LIMIT).output();
            if !output.status.success() {
                mounts::sweep(bed.root());
            }
            // He may only go when his daemons have gone.
            self.await_end(bed);
            output
        };
        assert!(output.status.success(), "'{}': {output}", self.title);
        self.compare(&output);
        self.await_end(bed);
    }

    #[track_caller]
    fn await_end(&self, bed: &Bed) {
        let what = format!("'{}' has nothing mounted any more", self.title);
        let gone = || mounts::below(bed.root()).is_empty();
        wait_until(&what, Duration::from_secs(10), gone);
    }

    /// The arguments of env(1) that run it in the current folder.
    fn words(&self, bed: &Bed, program: &Path) -> Vec<String> {
        let bin = bed.path("bin");
        std::fs::create_dir(&bin).expect("our own folder");
        std::os::unix::fs::symlink(program, bin.join("diskfuse")).expect("our own folder");
        let make_images = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/make-images");
        let make_images = std::fs::read_to_string(make_images).expect("our own script");
        let mut script = format!("(\n{make_images}\n)\n{}\nexec 2>&1\n", self.setup);
        for step in &self.steps {
            let _ = write!(script, "printf '{END}\\n'\n{}\n", step.command);
        }
        let path = format!(
            "PATH={}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            bin.display()
        );
        let words = [path.as_str(), "sh", "-e", "-c", &script];
        words.into_iter().map(str::to_owned).collect()
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
        for lines in [
            "# false",
            "# echo a\nb",
            "# echo a\na\na",
            "# echo \\\na\nb",
        ] {
            let recipe = block(lines);
            let run = || once(|bed| recipe.run(bed));
            assert!(std::panic::catch_unwind(run).is_err(), "{lines}");
        }
        once(|bed| block("# echo \\\na\na\n# id -u\n0").run(bed));
        once(|bed| block("$ test $(id -u) != 0").run(bed));
    }
}
