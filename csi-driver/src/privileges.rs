//! Gives up what a role does not need of root's powers.

use anyhow::Context;
use caps::{CapSet, Capability, CapsHashSet};

/// Keeps `needed`, as far as this process has it, and drops everything else from every set, so that no child gets it
/// back. A capability that is missing is not an error here: whoever needs it says so, with what failed.
pub fn keep_only(needed: &[Capability]) -> anyhow::Result<()> {
    let permitted = caps::read(None, CapSet::Permitted).context("the capabilities cannot be read")?;
    let kept: CapsHashSet = needed.iter().copied().filter(|cap| permitted.contains(cap)).collect();
    let missing: Vec<String> =
        needed.iter().filter(|cap| !kept.contains(*cap)).map(ToString::to_string).collect();
    if !missing.is_empty() {
        tracing::info!(missing = missing.join(","), "running without some capabilities");
    }
    // Taking from the bounding set needs CAP_SETPCAP; without it children cannot gain anything the set below lacks
    // unless they run a file with capabilities of its own.
    if permitted.contains(&Capability::CAP_SETPCAP) {
        let bounding = caps::read(None, CapSet::Bounding).context("the bounding set cannot be read")?;
        for cap in bounding.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *cap).with_context(|| format!("{cap} cannot be given up"))?;
        }
    }
    caps::clear(None, CapSet::Ambient).context("the ambient set cannot be cleared")?;
    caps::set(None, CapSet::Effective, &kept).context("the effective set cannot be narrowed")?;
    caps::set(None, CapSet::Permitted, &kept).context("the permitted set cannot be narrowed")?;
    caps::set(None, CapSet::Inheritable, &CapsHashSet::new())
        .context("the inheritable set cannot be cleared")?;
    Ok(())
}
