//! What a row of the store holds.

use std::net::IpAddr;

use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::plan::EndpointPlan;
use holdfast_net_core::policy::Subject;
use serde::{Deserialize, Serialize};

/// Names an attachment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttachmentKey {
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
}

impl std::fmt::Display for AttachmentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

/// One lease: everything that is needed to rebuild, check or remove the attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The attachment.
    pub key: AttachmentKey,
    /// Rises with every lease; the search for free addresses goes on after the newest.
    pub sequence: u64,
    /// Name of the network configuration.
    pub network: String,
    /// Path of the sandbox when it was attached.
    pub netns: String,
    /// Pod that was named, with its uid.
    pub pod: Option<ObjectName>,
    /// K8S_POD_UID; may be empty.
    pub pod_uid: String,
    /// The attachment is complete, and the lease durable. A start undoes every one without it.
    pub attached: bool,
    /// The kernel's id of the boot in which it was attached; empty in leases of before this was kept.
    #[serde(default)]
    pub boot_id: String,
    /// Device and inode of the sandbox's network namespace when it was attached.
    #[serde(default)]
    pub sandbox: Option<(u64, u64)>,
    /// The MTU that the runtime was told; 0 in leases of before this was kept, whose plan has it. The plan's follows the uplink's.
    #[serde(default)]
    pub told_mtu: u32,
    /// What somebody lowered the MTU of the pod's end to, if the uplink's was followed since; 0: nobody did.
    #[serde(default)]
    pub lowered_mtu: u32,
    /// Interfaces and addresses.
    pub plan: EndpointPlan,
}

impl Lease {
    /// The MTU that the pod's end must not exceed.
    #[must_use]
    pub fn mtu_limit(&self) -> u32 {
        if self.lowered_mtu == 0 { u32::MAX } else { self.lowered_mtu }
    }

    /// It has this MTU now, and the pod's end has that limit.
    pub(crate) fn follow_mtu(&mut self, mtu: u32, limit: u32) {
        if self.told_mtu == 0 {
            self.told_mtu = self.plan.mtu;
        }
        self.plan.mtu = mtu;
        self.lowered_mtu = if limit == u32::MAX { 0 } else { limit };
    }

    /// The endpoint as the policy compiler sees it.
    #[must_use]
    pub fn subject(&self) -> Subject {
        Subject { pod: self.pod.clone(), uid: self.pod_uid.clone(), addresses: self.plan.addresses.clone() }
    }
}

pub(super) fn row_of(lease: &Lease) -> Vec<u8> {
    // Plain strings, numbers and lists are always representable.
    serde_json::to_vec(lease).expect("a lease is representable as JSON")
}

const FREED: &str = "/freed/";

pub(super) fn freed_key(address: IpAddr) -> String {
    format!("{FREED}{address}")
}

pub(super) fn freed_address(key: &[u8]) -> Option<IpAddr> {
    std::str::from_utf8(key).ok()?.strip_prefix(FREED)?.parse().ok()
}

pub(super) fn row_key(key: &AttachmentKey) -> String {
    // Neither part can contain a slash (CNI env checks).
    format!("{}/{}", key.container_id, key.ifname)
}
