//! ClusterNetworkPolicy, `policy.networking.k8s.io/v1alpha2`.
//!
//! A field of a peer or a protocol that this version does not know leaves it without any known field: such a rule fails
//! closed, as the API asks, and is not refused.

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::{LabelSelector, Meta, null_default};

/// A policy of the whole cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterNetworkPolicy {
    /// Its name; it has no namespace.
    #[serde(default)]
    pub metadata: Meta,
    /// What it says.
    pub spec: ClusterNetworkPolicySpec,
}

/// `spec` of a ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterNetworkPolicySpec {
    /// Before or after the NetworkPolicies.
    pub tier: ClusterTier,
    /// 0 to 1000; lower is asked first.
    pub priority: i32,
    /// The pods it applies to.
    pub subject: ClusterSubject,
    /// Rules for connections to the pods, in order; none leaves the direction alone.
    #[serde(default, deserialize_with = "null_default")]
    pub ingress: Vec<ClusterIngressRule>,
    /// Rules for connections from the pods, in order; none leaves the direction alone.
    #[serde(default, deserialize_with = "null_default")]
    pub egress: Vec<ClusterEgressRule>,
}

/// When a ClusterNetworkPolicy is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ClusterTier {
    /// Before the NetworkPolicies, which cannot override it.
    Admin,
    /// After them, for pods that none selects.
    Baseline,
}

/// Pods by namespace, or by namespace and pod. Exactly one field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterSubject {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// These pods of these namespaces.
    pub pods: Option<NamespacedPods>,
}

/// Both selectors must match.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NamespacedPods {
    /// Empty: all namespaces.
    #[serde(deserialize_with = "null_default")]
    pub namespace_selector: LabelSelector,
    /// Empty: all pods.
    #[serde(deserialize_with = "null_default")]
    pub pod_selector: LabelSelector,
}

/// What a rule does with the traffic it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ClusterAction {
    /// Let it through; nothing else is asked.
    Accept,
    /// Drop it; nothing else is asked.
    Deny,
    /// Ask the next tier.
    Pass,
}

/// A rule for connections to the subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterIngressRule {
    /// For people.
    #[serde(default, deserialize_with = "null_default")]
    pub name: String,
    /// What it does.
    pub action: ClusterAction,
    /// Any of these.
    #[serde(default, deserialize_with = "null_default")]
    pub from: Vec<ClusterPeer>,
    /// Any of these; absent means all traffic.
    #[serde(default)]
    pub protocols: Option<Vec<ClusterProtocol>>,
}

/// A rule for connections from the subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterEgressRule {
    /// For people.
    #[serde(default, deserialize_with = "null_default")]
    pub name: String,
    /// What it does.
    pub action: ClusterAction,
    /// Any of these.
    #[serde(default, deserialize_with = "null_default")]
    pub to: Vec<ClusterPeer>,
    /// Any of these; absent means all traffic.
    #[serde(default)]
    pub protocols: Option<Vec<ClusterProtocol>>,
}

/// A peer: exactly one field. An ingress rule knows only the first two.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterPeer {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// These pods of these namespaces.
    pub pods: Option<NamespacedPods>,
    /// The addresses of these nodes.
    pub nodes: Option<LabelSelector>,
    /// Ranges of addresses; pods inside them are meant too.
    pub networks: Option<Vec<IpNetwork>>,
    /// Names: not supported, so a rule with them fails closed.
    pub domain_names: Option<Vec<String>>,
}

/// A protocol: exactly one field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterProtocol {
    /// TCP.
    pub tcp: Option<ClusterPorts>,
    /// UDP.
    pub udp: Option<ClusterPorts>,
    /// SCTP.
    pub sctp: Option<ClusterPorts>,
    /// A container port's name, of whatever protocol that has.
    pub destination_named_port: Option<String>,
}

/// Ports of a protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ClusterPorts {
    /// Absent: all of them.
    pub destination_port: Option<ClusterPort>,
}

/// A number or a range: exactly one field.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterPort {
    /// One port.
    pub number: Option<u16>,
    /// Several.
    pub range: Option<ClusterPortRange>,
}

/// Ports `start..=end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterPortRange {
    /// Lowest.
    pub start: u16,
    /// Highest.
    pub end: u16,
}
