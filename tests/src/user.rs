//! An ordinary user, made for a test and gone with it, and places where the machine looks different to those who are in them:
//! a mount namespace with other device nodes, configuration files and programs, which nobody outside sees.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::bed::Bed;
use crate::raw_io::pattern;
use crate::tool::Tool;
use crate::{binary, wait_until};

/// A user of the system. Dropping it removes him.
pub struct User {
    name: String,
    /// His number, which is also that of his only group.
    pub id: u32,
    home: PathBuf,
    program: PathBuf,
}

/// useradd(8) and userdel(8) refuse to run at the same time.
static USERS: Mutex<()> = Mutex::new(());
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Runs a tool that changes the list of users; another test run may be at it just now.
fn change_users(tool: impl Fn() -> Tool) {
    let _guard = USERS.lock().unwrap_or_else(PoisonError::into_inner);
    wait_until(
        "the list of users can be changed",
        std::time::Duration::from_secs(20),
        || tool().output().status.success(),
    );
}

impl User {
    /// A new user with a home in the test's folder and nothing else. Root opens `/dev/fuse` to all, as udev's rule has it.
    #[track_caller]
    pub fn new(bed: &Bed) -> Self {
        let all = std::fs::Permissions::from_mode(0o666);
        std::fs::set_permissions("/dev/fuse", all).expect("root, and a kernel with FUSE");
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("diskfuse-{}-{count}", std::process::id());
        change_users(|| {
            let tool = Tool::new("useradd").args(["--system", "--user-group", "--no-create-home"]);
            tool.arg(&name)
        });
        let said = Tool::new("id").args(["-u", &name]).run().stdout;
        let id = said.trim().parse().expect("a number");
        let home = bed.path(&name);
        let program = bed.path(&format!("{name}-program"));
        // By another process: a descriptor of ours that is open for writing would live on in what other tests start, and
        // nobody can start a file that is.
        Tool::new("cp").arg(binary::diskfuse()).arg(&program).run();
        let user = Self {
            name,
            id,
            home,
            program,
        };
        std::fs::create_dir(&user.home).expect("room");
        std::fs::create_dir(user.path("run")).expect("room");
        for (folder, mode) in [(&user.home, 0o755), (&user.path("run"), 0o700)] {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(folder, mode).expect("our own folder");
            user.give(folder);
        }
        user
    }

    /// A path in his home.
    pub fn path(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    /// Makes a file his.
    pub fn give(&self, path: &Path) {
        std::os::unix::fs::chown(path, Some(self.id), Some(self.id)).expect("root");
    }

    /// An image of his; see [`pattern`].
    pub fn image(&self, name: &str, size: usize) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, pattern(size, 1)).expect("room for an image");
        self.give(&path);
        path
    }

    /// The program where he may start it.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// What makes a command his: to be put in front of it.
    pub fn words(&self) -> Vec<String> {
        let id = self.id.to_string();
        let ids = [
            "setpriv",
            "--reuid",
            &id,
            "--regid",
            &id,
            "--clear-groups",
            "--",
        ];
        let home = self.home.display();
        let environment = [
            "env".to_owned(),
            format!("HOME={home}"),
            format!("XDG_RUNTIME_DIR={home}/run"),
        ];
        ids.into_iter()
            .map(str::to_owned)
            .chain(environment)
            .collect()
    }

    /// Any command of his, in his home.
    pub fn run<A: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = A>) -> Tool {
        let words = self.words();
        let (first, rest) = words.split_first().expect("setpriv");
        let tool = Tool::new(first).args(rest).args(command);
        tool.current_dir(&self.home)
    }

    /// `diskfuse` with these arguments, by him.
    pub fn tool<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Tool {
        self.run([&self.program]).args(arguments)
    }
}

impl Drop for User {
    fn drop(&mut self) {
        let remove = || change_users(|| Tool::new("userdel").arg(&self.name));
        let removed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(remove));
        if removed.is_err() {
            eprintln!("the user '{}' is left behind", self.name);
        }
    }
}

/// Runs a shell script as root in a mount namespace of its own, in the test's folder, with `arguments` as `$1` and so on.
/// What it mounts nobody else sees, and it is gone with the last process in there. A file system in memory is mounted on
/// `own` in the test's folder, with room for device nodes.
pub fn elsewhere<A: AsRef<OsStr>>(
    bed: &Bed,
    script: &str,
    arguments: impl IntoIterator<Item = A>,
) -> Tool {
    let own = bed.path("own");
    std::fs::create_dir_all(&own).expect("our own folder");
    // Copies of other tests' mounts would keep those in use.
    let script = format!(
        "while read -r _ there kind _; do
            if [ $kind = fuse.diskfuse ]; then umount -l \"$there\" || true; fi
        done </proc/self/mounts
        mount -t tmpfs own own
        {script}"
    );
    let tool = Tool::new("unshare").args(["--mount", "--propagation", "private"]);
    let tool = tool.args(["sh", "-eu", "-c", &script, "sh"]);
    tool.args(arguments).current_dir(bed.root())
}
