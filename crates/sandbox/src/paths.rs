//! Landlock: no file, no port and no foreign abstract socket by name. It never allows anything: what is used is open already.

use std::os::fd::OwnedFd;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetError, Scope};

/// The newest set of rights that is asked for; what the kernel lacks of it is left out.
const NEWEST: ABI = ABI::V6;

/// Rules that allow nothing, or `None` where there is no Landlock.
pub(crate) fn none() -> Result<Option<OwnedFd>, RulesetError> {
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    Ok(rules.into())
}
