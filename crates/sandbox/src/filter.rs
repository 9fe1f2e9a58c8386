//! The filter of system calls. What is forbidden answers EPERM and is not punished by death: a call that a library makes on some
//! system and nobody thought of must not cost the data that the process has not written yet, and whoever took the process over
//! gains nothing by an errno.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCondition as Condition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::Extent;
use crate::calls::{NEVER, NEVER_HERE, NEVER_X32, SERVING, SERVING_HERE, X32};

/// `TCGETS` and `FIONBIO` of `include/uapi/asm-generic/ioctls.h`, `BLKSSZGET` of `include/uapi/linux/fs.h`: whether it is a
/// terminal, non-blocking sockets, the sectors of a disk.
const REQUESTS: [u64; 3] = [0x5401, 0x5421, 0x1268];

/// `PR_SET_VMA`, by which the C library names its memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;
type Result<T> = std::result::Result<T, BackendError>;

/// The programs for an extent, to be installed in this order: each forbids what it forbids.
pub(crate) fn programs(extent: Extent) -> Result<Vec<BpfProgram>> {
    let main = match extent {
        Extent::Helped => return Ok(Vec::new()),
        Extent::Sealed => filter(
            serving()?,
            SeccompAction::Errno(libc::EPERM as u32),
            SeccompAction::Allow,
        )?,
        Extent::Open => filter(
            never()?,
            SeccompAction::Allow,
            SeccompAction::Errno(libc::EPERM as u32),
        )?,
    };
    // Its flags lie in memory, which a filter cannot read; told that there is none, the C library takes clone(2).
    let mut clone3 = any(&[&[libc::SYS_clone3]]);
    if let Some(bit) = X32 {
        clone3.extend(any(&[&[libc::SYS_clone3 | bit]]));
    }
    let no_clone3 = filter(
        clone3,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    Ok(vec![no_clone3, main])
}

/// `matched` is done with calls that a rule fits, `other` with the rest.
fn filter(rules: Rules, other: SeccompAction, matched: SeccompAction) -> Result<BpfProgram> {
    let arch: TargetArch = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, other, matched, arch)?.try_into()
}

fn any(calls: &[&[c_long]]) -> Rules {
    calls
        .concat()
        .into_iter()
        .map(|call| (call, Vec::new()))
        .collect()
}

/// One rule for each of the conditions, of which one must hold.
fn one_of(conditions: impl IntoIterator<Item = Result<Condition>>) -> Result<Vec<SeccompRule>> {
    conditions
        .into_iter()
        .map(|condition| SeccompRule::new(vec![condition?]))
        .collect()
}

fn serving() -> Result<Rules> {
    let mut rules = any(&[SERVING, SERVING_HERE]);
    let no_code = || {
        one_of([Condition::new(
            2,
            Dword,
            MaskedEq(libc::PROT_EXEC as u64),
            0,
        )])
    };
    rules.insert(libc::SYS_mmap, no_code()?);
    rules.insert(libc::SYS_mprotect, no_code()?);
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(
        libc::SYS_clone,
        one_of([Condition::new(0, Qword, MaskedEq(thread), thread)])?,
    );
    // To whom a socket is connected, and nobody else.
    rules.insert(libc::SYS_sendto, one_of([Condition::new(4, Qword, Eq, 0)])?);
    // Signals to itself, for abort(3).
    let process = u64::from(std::process::id());
    rules.insert(
        libc::SYS_tgkill,
        one_of([Condition::new(0, Dword, Eq, process)])?,
    );
    // Limits are looked at, not set.
    rules.insert(
        libc::SYS_prlimit64,
        one_of([Condition::new(2, Qword, Eq, 0)])?,
    );
    let names = [libc::PR_SET_NAME as u64, PR_SET_VMA];
    rules.insert(
        libc::SYS_prctl,
        one_of(names.map(|name| Condition::new(0, Dword, Eq, name)))?,
    );
    rules.insert(
        libc::SYS_ioctl,
        one_of(REQUESTS.map(|request| Condition::new(1, Dword, Eq, request)))?,
    );
    Ok(rules)
}

fn never() -> Result<Rules> {
    let mut rules = any(&[NEVER, NEVER_HERE]);
    let mut clones = vec![libc::SYS_clone];
    if let Some(bit) = X32 {
        let there = [NEVER, NEVER_HERE, NEVER_X32].concat();
        rules.extend(there.into_iter().map(|call| (call | bit, Vec::new())));
        clones.push(libc::SYS_clone | bit);
    }
    let thread = libc::CLONE_THREAD as u64;
    for clone in clones {
        rules.insert(
            clone,
            one_of([Condition::new(0, Qword, MaskedEq(thread), 0)])?,
        );
    }
    Ok(rules)
}
