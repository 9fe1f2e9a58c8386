//! An ordinary user, made for a test or some and gone with them, and places where the machine looks different to those who are in them:
//! a mount namespace with other device nodes, configuration files and programs, which nobody outside sees.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::bed::Bed;
use crate::raw_io::pattern;
use crate::tool::Tool;
use crate::{binary, wait_until};

/// A name and a number in the system's lists. Dropping it removes them.
pub struct Account {
    name: String,
    /// The user's number, which is also that of his only group.
    id: u32,
}

/// An ordinary user with a home in a test's folder.
pub struct User {
    #[expect(dead_code, reason = "it goes with the last who has it")]
    account: Arc<Account>,
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

impl Account {
    /// A new one. Root opens `/dev/fuse` to all, as udev's rule has it.
    #[track_caller]
    pub fn create() -> Self {
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
        Self { name, id }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let remove = || change_users(|| Tool::new("userdel").arg(&self.name));
        let removed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(remove));
        if removed.is_err() {
            eprintln!("the user '{}' is left behind", self.name);
        }
    }
}

impl User {
    /// A new user with an account of his own, a home in the test's folder and nothing else.
    #[track_caller]
    pub fn new(bed: &Bed) -> Self {
        Self::of(&Arc::new(Account::create()), bed)
    }

    /// The same with an account that he may have had in other tests' folders before.
    #[track_caller]
    pub fn of(account: &Arc<Account>, bed: &Bed) -> Self {
        let home = bed.path(&account.name);
        let program = bed.path(&format!("{}-program", account.name));
        // By another process: a descriptor of ours that is open for writing would live on in what other tests start, and
        // nobody can start a file that is. Where it can be, it is the same file by another name, as it is large.
        let copy = r#"cp --link "$1" "$2" 2>/dev/null || cp "$1" "$2""#;
        let tool = Tool::new("sh").args(["-c", copy, "sh"]);
        tool.arg(binary::diskfuse()).arg(&program).run();
        let user = Self {
            account: Arc::clone(account),
            id: account.id,
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
        mount -t tmpfs -o mode=755 own own
        {script}"
    );
    let tool = Tool::new("unshare").args(["--mount", "--propagation", "private"]);
    let tool = tool.args(["sh", "-eu", "-c", &script, "sh"]);
    tool.args(arguments).current_dir(bed.root())
}

/// The same where the program is installed as `/usr/bin/diskfuse` and can be called by these names in `/usr/sbin`. What the script
/// changes in `/etc`, `/usr` and `/srv` nobody else sees; it must take away what it mounts there, or its daemons keep the place.
pub fn installed<A: AsRef<OsStr>>(
    bed: &Bed,
    helpers: &[&str],
    script: &str,
    arguments: impl IntoIterator<Item = A>,
) -> Tool {
    let program = binary::diskfuse().display();
    let helpers = helpers.join(" ");
    let script = format!(
        "for folder in etc usr; do
            mkdir -p own/upper/$folder own/work/$folder
            mount -t overlay none -o lowerdir=/$folder,upperdir=own/upper/$folder,workdir=own/work/$folder /$folder
        done
        mount -t tmpfs srv /srv
        ln -s {program} /usr/bin/diskfuse
        for name in {helpers}; do ln -s ../bin/diskfuse /usr/sbin/$name; done
        PATH=/usr/sbin:/usr/bin:/sbin:/bin; export PATH; unset XDG_RUNTIME_DIR
        {script}"
    );
    elsewhere(bed, &script, arguments)
}
