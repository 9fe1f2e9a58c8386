//! From the command line to the contenders: builds our binary, finds the peers, makes the work directory.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::{env, fs};

use serde::Serialize;
use tempfile::TempDir;

use crate::cli::{Select, Transport};
use crate::contender::{Contender, Program, Role};
use crate::error::{At, Error, Result};
use crate::plan::word;
use crate::qsd11::Chroot;

/// The root of the workspace.
pub fn tree() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_path_buf()
}

/// Cargo's target directory.
fn target() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| tree().join("target"), PathBuf::from)
}

/// The directory of the reports, made if missing.
pub fn out(select: &Select) -> Result<PathBuf> {
    let out = select.out.clone().unwrap_or_else(|| target().join("bench"));
    fs::create_dir_all(&out).at("create", &out)?;
    Ok(out)
}

/// Writes a report into the directory of the reports, and says where.
pub fn write(out: &Path, name: &str, document: &impl Serialize) -> Result<()> {
    let path = out.join(name);
    let json = serde_json::to_string_pretty(document)
        .map_err(|error| Error::Usage(format!("the report is not JSON: {error}")))?;
    fs::write(&path, json).at("write", &path)?;
    println!("written: {}", path.display());
    Ok(())
}

/// The work directory; it is removed with this value.
pub fn work(select: &Select) -> Result<TempDir> {
    let parent = select.work.clone().unwrap_or_else(target);
    fs::create_dir_all(&parent).at("create", &parent)?;
    // Absolute, because daemons in a chroot and mount tables see it.
    let parent = parent.canonicalize().at("find", &parent)?;
    tempfile::Builder::new()
        .prefix("bench-")
        .tempdir_in(&parent)
        .at("create a directory in", &parent)
}

/// Builds our binary and returns its path.
pub fn build() -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    eprintln!("building diskfuse");
    let status = Command::new(&cargo)
        .args(["build", "--release", "--quiet", "--package", "diskfuse"])
        .current_dir(tree())
        .status()
        .at("run", Path::new(&cargo))?;
    if !status.success() {
        return Err(Error::Usage(
            "diskfuse does not build; --no-ours measures the peers alone".to_owned(),
        ));
    }
    let binary = target().join("release/diskfuse");
    binary.canonicalize().at("find", &binary)
}

/// Everyone but the bare file, ours first. `queues` are the numbers of queues wanted, `async_dio` the ways in which QEMU 11
/// takes part.
pub fn contenders(
    select: &Select,
    queues: &[u32],
    async_dio: &[bool],
    work: &Path,
) -> Result<Vec<Contender>> {
    let mut queues = queues.to_vec();
    queues.sort_unstable();
    queues.dedup();
    let mut all = ours(select, &queues)?;
    for peer in &select.peer {
        let binary = binary(&peer.path)?;
        let program = Program::Compatible { binary };
        all.extend(configurations(&peer.name, Role::Peer, &queues, &program));
    }
    if let Some(chroot) = qemu_11(select, work)? {
        let chroot = Rc::new(chroot);
        let queues: Vec<u32> = queues
            .into_iter()
            .filter(|queues| matches!(queues, 1 | 4))
            .collect();
        for &async_dio in async_dio {
            let name = if async_dio { "qemu11+dio" } else { "qemu11" };
            let program = Program::Chroot {
                chroot: Rc::clone(&chroot),
                async_dio,
            };
            all.extend(configurations(name, Role::Peer, &queues, &program));
        }
    }
    Ok(all)
}

fn ours(select: &Select, queues: &[u32]) -> Result<Vec<Contender>> {
    let needs_build =
        !select.no_ours || select.variant.iter().any(|variant| variant.path.is_none());
    let built = if needs_build { Some(build()?) } else { None };
    let mut all = Vec::new();
    if let (false, Some(binary)) = (select.no_ours, &built) {
        let program = Program::Ours {
            binary: binary.clone(),
            extra: select.ours.clone(),
        };
        all.extend(configurations("diskfuse", Role::Ours, queues, &program));
    }
    for variant in &select.variant {
        let binary = match (&variant.path, &built) {
            (Some(path), _) => binary(path)?,
            (None, Some(built)) => built.clone(),
            (None, None) => continue,
        };
        let program = Program::Ours {
            binary,
            extra: variant.extra.clone(),
        };
        all.extend(configurations(&variant.name, Role::Ours, queues, &program));
    }
    Ok(all)
}

/// The bare servers, with the same numbers of queues as everyone. They are this program.
pub fn floor(queues: &[u32]) -> Result<Vec<Contender>> {
    let binary = env::current_exe().at("find", Path::new("this program"))?;
    let mut queues = queues.to_vec();
    queues.sort_unstable();
    queues.dedup();
    let of = |transport| {
        let program = Program::Floor {
            binary: binary.clone(),
            transport,
        };
        let family = format!("bare-{}", word(transport));
        configurations(&family, Role::Floor, &queues, &program)
    };
    Ok([of(Transport::Device), of(Transport::Uring)].concat())
}

fn configurations(family: &str, role: Role, queues: &[u32], program: &Program) -> Vec<Contender> {
    let one = |queues: &u32| Contender {
        family: family.to_owned(),
        role,
        queues: *queues,
        program: program.clone(),
    };
    queues.iter().map(one).collect()
}

/// A bare name is left to the search path.
fn binary(path: &Path) -> Result<PathBuf> {
    if path.components().count() > 1 {
        path.canonicalize().at("find", path)
    } else {
        Ok(path.to_path_buf())
    }
}

fn qemu_11(select: &Select, work: &Path) -> Result<Option<Chroot>> {
    if select.no_qsd11 {
        return Ok(None);
    }
    let script = select
        .qsd11
        .clone()
        .unwrap_or_else(|| tree().join("../shared/peers/qsd11"));
    if select.qsd11.is_none() && !script.exists() {
        println!("skipped qemu11: no script at {}", script.display());
        return Ok(None);
    }
    match Chroot::enter(&script, work) {
        Ok(chroot) => Ok(Some(chroot)),
        // Asked for by name it must take part; else the others go on without it.
        Err(error) if select.qsd11.is_some() => Err(error),
        Err(error) => {
            println!("skipped qemu11: {error}");
            Ok(None)
        }
    }
}
