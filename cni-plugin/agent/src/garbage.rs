//! Garbage collection: on a runtime's word (GC), and by the agent itself where an attachment is certainly dead.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_net_core::cni::{CniError, code};
use holdfast_net_core::garbage::{Boot, Claim, Facts, Judgement, Sandbox, judge};
use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::plan::host_ifname;
use tracing::{info, warn};

use crate::attach::Attacher;
use crate::engine::sentence;
use crate::leases::{AttachmentKey, Lease};

/// At least so often, and four times within the waiting time, dead attachments are looked for.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(15);
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(100);

/// The kernel's id of this boot; empty if it does not tell.
pub(crate) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Device and inode of the namespace at a path.
pub(crate) fn sandbox_id(netns: &str) -> Option<(u64, u64)> {
    std::fs::metadata(netns).ok().map(|found| (found.dev(), found.ino()))
}

/// Collects until the agent ends. `after`: how long an attachment must look dead; zero never collects.
pub(crate) async fn run(attacher: Arc<Attacher>, after: Duration) {
    if after.is_zero() {
        return;
    }
    let mut suspects = BTreeMap::new();
    loop {
        tokio::time::sleep((after / 4).clamp(LOOK_INTERVAL_MIN, LOOK_INTERVAL_MAX)).await;
        if let Err(error) = attacher.collect_dead(&mut suspects, after).await {
            warn!(%error, "dead attachments could not be looked for");
        }
    }
}

impl Attacher {
    /// Frees all attachments of `network` that are not valid any more, and whatever of ours belongs to no attachment. Goes on
    /// after errors; all of them are reported.
    pub(crate) async fn collect(
        &self,
        network: &str,
        valid: &BTreeSet<AttachmentKey>,
    ) -> Result<u32, CniError> {
        let _gc = self.gc.write().await;
        let mut freed = 0;
        let mut failures = Vec::new();
        for lease in self.leases.all().await {
            if lease.network != network || valid.contains(&lease.key) {
                continue;
            }
            match self.remove(&lease.key).await {
                Ok(()) => freed += 1,
                Err(error) => failures.push(format!("{}: {error}", lease.key)),
            }
        }
        if let Err(error) = self.remove_strays(valid).await {
            failures.push(format!("interfaces, routes and neighbours without a lease: {error}"));
        }
        if failures.is_empty() {
            return Ok(freed);
        }
        let msg = format!("{freed} attachments were freed, {} things could not be", failures.len());
        Err(CniError::new(code::INTERNAL, msg).details(failures.join("; ")))
    }

    /// Removes interfaces of ours that have no lease, and routes and neighbours of pods to addresses that nobody has. An interface
    /// of an attachment that a runtime calls valid stays. Nobody may be attaching meanwhile.
    pub(crate) async fn remove_strays(&self, valid: &BTreeSet<AttachmentKey>) -> Result<(), String> {
        let leases = self.leases.all().await;
        let keys: BTreeSet<&AttachmentKey> = leases.iter().map(|lease| &lease.key).chain(valid).collect();
        let names: BTreeSet<String> =
            keys.iter().map(|key| host_ifname(&key.container_id, &key.ifname)).collect();
        let mut kept_stray = false;
        for found in self.dataplane.list_endpoints().await.map_err(|error| sentence(&error))? {
            let of = found.attachment.map(|(container_id, ifname)| AttachmentKey { container_id, ifname });
            if names.contains(&found.host_ifname) || of.as_ref().is_some_and(|of| keys.contains(of)) {
                kept_stray |= !leases.iter().any(|lease| lease.plan.host_ifname == found.host_ifname);
                continue;
            }
            info!(interface = found.host_ifname, "an interface of ours has no lease; it is removed");
            self.dataplane.detach(&found.host_ifname).await.map_err(|error| sentence(&error))?;
        }
        let limits = self.dataplane.sweep_limits(&names).await.map_err(|error| sentence(&error))?;
        if limits > 0 {
            info!(limits, "interfaces that limited the rate of pods that are gone were removed");
        }
        if kept_stray {
            // Its addresses are not known here.
            return Ok(());
        }
        let addresses: BTreeSet<IpAddr> =
            leases.iter().flat_map(|lease| lease.plan.addresses.iter().copied()).collect();
        let swept = self.dataplane.sweep_addresses(&addresses).await.map_err(|error| sentence(&error))?;
        if swept > 0 {
            info!(swept, "routes and neighbours of addresses that no pod has were removed");
        }
        Ok(())
    }

    /// Frees attachments that are certainly dead ([`holdfast_net_core::garbage`]). `suspects`: since when which one has looked dead.
    pub(crate) async fn collect_dead(
        &self,
        suspects: &mut BTreeMap<AttachmentKey, Instant>,
        after: Duration,
    ) -> Result<(), String> {
        let leases = self.leases.all().await;
        let judged = self.judge_all(&leases).await?;
        suspects.retain(|key, _| judged.contains_key(key));
        for (key, judgement) in judged {
            let since = *suspects.entry(key.clone()).or_insert_with(Instant::now);
            if judgement == Judgement::Suspect && since.elapsed() < after {
                continue;
            }
            let _gc = self.gc.read().await;
            let _busy = self.lock(&key).await;
            // Once more with nobody attaching or detaching it.
            let Some(lease) = self.leases.get(&key).await else { continue };
            if !self.judge_all(&[lease]).await?.contains_key(&key) {
                suspects.remove(&key);
                continue;
            }
            match self.remove(&key).await {
                Ok(()) => {
                    info!(attachment = %key, "its pod is gone and the runtime did not delete it; it is freed")
                }
                Err(error) => warn!(attachment = %key, %error, "a dead attachment could not be freed"),
            }
            suspects.remove(&key);
        }
        Ok(())
    }

    /// Those that are not to be kept.
    async fn judge_all(&self, leases: &[Lease]) -> Result<BTreeMap<AttachmentKey, Judgement>, String> {
        let ends = self.dataplane.list_endpoints().await.map_err(|error| sentence(&error))?;
        let names: BTreeSet<&str> = ends.iter().map(|end| end.host_ifname.as_str()).collect();
        let aliases: BTreeSet<(&str, &str)> = ends
            .iter()
            .filter_map(|end| end.attachment.as_ref())
            .map(|(container_id, ifname)| (container_id.as_str(), ifname.as_str()))
            .collect();
        let has_host_end = |lease: &Lease| {
            names.contains(lease.plan.host_ifname.as_str())
                || aliases.contains(&(lease.key.container_id.as_str(), lease.key.ifname.as_str()))
        };
        let gone: Vec<&Lease> =
            leases.iter().filter(|lease| lease.attached && !has_host_end(lease)).collect();
        if gone.is_empty() {
            return Ok(BTreeMap::new());
        }
        let endpoints = gone.iter().map(|lease| lease.plan.host_ifname.clone()).collect();
        let claimed = self.engine.claimed(endpoints).await?;
        let newest = self.newest_of_pods().await;
        let boot_id = boot_id();
        let judge = |lease: &&Lease| {
            let facts = Facts {
                host_end: false,
                boot: boot_of(lease, &boot_id),
                sandbox: sandbox_of(lease),
                claim: claim_of(lease, claimed.as_ref(), &newest),
            };
            let judgement = judge(facts);
            (judgement != Judgement::Keep).then(|| (lease.key.clone(), judgement))
        };
        Ok(gone.iter().filter_map(judge).collect())
    }

    /// The newest complete attachment of each interface of each pod.
    async fn newest_of_pods(&self) -> Newest {
        let mut newest = BTreeMap::new();
        for lease in self.leases.all().await.into_iter().filter(|lease| lease.attached) {
            if let Some(pod) = lease.pod {
                let known = newest.entry((pod, lease.key.ifname)).or_insert(0);
                *known = lease.sequence.max(*known);
            }
        }
        newest
    }
}

/// Sequences of leases by pod and interface.
type Newest = BTreeMap<(ObjectName, String), u64>;

fn boot_of(lease: &Lease, boot_id: &str) -> Boot {
    match (lease.boot_id.as_str(), boot_id) {
        ("", _) | (_, "") => Boot::Unknown,
        (then, now) if then == now => Boot::Same,
        _ => Boot::Earlier,
    }
}

fn sandbox_of(lease: &Lease) -> Sandbox {
    match (std::fs::metadata(Path::new(&lease.netns)), lease.sandbox) {
        (Ok(found), Some(known)) if (found.dev(), found.ino()) == known => Sandbox::Same,
        (Ok(_), Some(_)) => Sandbox::Other,
        (Err(error), _) if error.kind() == std::io::ErrorKind::NotFound => Sandbox::Missing,
        _ => Sandbox::Unknown,
    }
}

/// `claimed`: the endpoints whose pods' objects are there; `None` while objects cannot be read.
fn claim_of(lease: &Lease, claimed: Option<&BTreeSet<String>>, newest: &Newest) -> Claim {
    let Some(claimed) = claimed else { return Claim::Unknown };
    let Some(pod) = &lease.pod else { return Claim::Unnamed };
    if !claimed.contains(&lease.plan.host_ifname) {
        return Claim::Unclaimed;
    }
    let is_newest = newest
        .get(&(pod.clone(), lease.key.ifname.clone()))
        .is_none_or(|sequence| *sequence <= lease.sequence);
    if is_newest { Claim::Claimed } else { Claim::Superseded }
}
