//! ClusterNetworkPolicy of `policy.networking.k8s.io/v1alpha2`, as a user writes it; Kubernetes' own types lack it.

use ipnetwork::IpNetwork;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The whole object.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterNetworkPolicy {
    api_version: String,
    kind: String,
    metadata: Metadata,
    /// What it says.
    pub spec: Spec,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Metadata {
    name: String,
}

/// `spec`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// Before or after the namespaced policies.
    pub tier: Tier,
    /// Lower comes first.
    pub priority: u32,
    /// Whom it is about.
    pub subject: Subject,
    /// Rules for connections to the subject.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ingress: Vec<Rule>,
    /// Rules for connections from the subject.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub egress: Vec<Rule>,
}

/// `spec.tier`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Tier {
    /// Before the namespaced policies.
    Admin,
    /// After them, for pods that none of them selects.
    Baseline,
}

/// `spec.subject`: one of the two.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Subject {
    /// All pods of namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Some pods of namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPod>,
}

/// Both selectors must match.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NamespacedPod {
    /// The namespace.
    pub namespace_selector: LabelSelector,
    /// The pod.
    pub pod_selector: LabelSelector,
}

/// One rule of either direction.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Rule {
    /// What becomes of what it matches.
    pub action: Action,
    /// Peers of an ingress rule.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub from: Vec<Peer>,
    /// Peers of an egress rule.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<Peer>,
    /// Only these; absent: all traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocols: Option<Vec<ProtocolMatch>>,
}

/// `action` of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Let it through.
    Accept,
    /// Drop it.
    Deny,
    /// Leave it to the next tier.
    Pass,
}

/// One peer: one field of these, or one that this version does not know.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// All pods of namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Some pods of namespaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPod>,
    /// Addresses of nodes (egress).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nodes: Option<LabelSelector>,
    /// Address ranges (egress).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<IpNetwork>>,
    /// Everything else.
    #[serde(flatten)]
    pub unknown: Map<String, Value>,
}

/// One entry of `protocols`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProtocolMatch {
    /// TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp: Option<PortMatch>,
    /// UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub udp: Option<PortMatch>,
    /// SCTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sctp: Option<PortMatch>,
    /// A port that the target pod documents, with its protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_named_port: Option<String>,
}

/// Ports of one protocol.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMatch {
    /// Absent: every port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<Port>,
}

/// A number or a range.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Port {
    /// One port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub number: Option<u16>,
    /// Several ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<PortRange>,
}

/// Ports from `start` to `end`, both in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PortRange {
    /// First.
    pub start: u16,
    /// Last.
    pub end: u16,
}

impl ClusterNetworkPolicy {
    /// The object around a spec.
    #[must_use]
    pub fn new(name: &str, spec: Spec) -> Self {
        Self {
            api_version: "policy.networking.k8s.io/v1alpha2".to_owned(),
            kind: "ClusterNetworkPolicy".to_owned(),
            metadata: Metadata { name: name.to_owned() },
            spec,
        }
    }
}
