//! The parts of Kubernetes objects that networking reads. Unknown fields are ignored; a missing field that
//! Kubernetes defaults has its default here. Field shapes: `core/v1`,
//! `networking.k8s.io/v1` and `policy.networking.k8s.io/v1alpha2`.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::pod_ranges::PodRange;
use crate::ports::Proto;

mod cluster_policy;
mod labels;

pub use cluster_policy::{
    ClusterAction, ClusterEgressRule, ClusterIngressRule, ClusterNetworkPolicy, ClusterNetworkPolicySpec,
    ClusterPeer, ClusterPort, ClusterPortRange, ClusterPorts, ClusterProtocol, ClusterSubject, ClusterTier,
    NamespacedPods,
};
pub use labels::Labels;

/// `metadata` of any object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Meta {
    /// Name of the object.
    pub name: String,
    /// Namespace; empty means `default` for namespaced kinds.
    pub namespace: String,
    /// Tells two objects of one name apart.
    pub uid: String,
    /// `metadata.generation`: rises with every change of the object's spec.
    #[serde(rename = "generation")]
    pub metadata_generation: i64,
    /// Labels that selectors match.
    #[serde(deserialize_with = "null_default")]
    pub labels: Labels,
    /// Present while the object is being deleted.
    pub deletion_timestamp: Option<String>,
    /// The one annotation that matters.
    #[serde(deserialize_with = "null_default", skip_serializing)]
    pub annotations: Annotations,
}

/// Of `metadata.annotations`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Annotations {
    /// Of a pod that stands for one of kubelet's own files: the uid that kubelet runs it under, which is not the object's.
    #[serde(rename = "kubernetes.io/config.mirror")]
    pub mirror_of: Option<String>,
}

/// Name of an object within its kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ObjectName {
    /// Namespace of the object.
    pub namespace: String,
    /// Name within the namespace.
    pub name: String,
}

impl ObjectName {
    /// The name from its parts; an empty namespace is `default`, as kubectl reads it.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        let namespace = if namespace.is_empty() { "default" } else { namespace };
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl std::fmt::Display for ObjectName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A change of one object; `None`: it is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectChange {
    /// A node, by name.
    Node(String, Option<Box<Node>>),
    /// A namespace's labels, by its name. [`NAMESPACE_NAME_LABEL`] may be left out.
    Namespace(String, Option<Labels>),
    /// A pod.
    Pod(ObjectName, Option<Box<Pod>>),
    /// A NetworkPolicy.
    Policy(ObjectName, Option<Box<NetworkPolicy>>),
    /// A ClusterNetworkPolicy, by name.
    ClusterPolicy(String, Option<Box<ClusterNetworkPolicy>>),
    /// A PodRange, by name.
    PodRange(String, Option<Box<PodRange>>),
}

/// Label that Kubernetes puts on every namespace.
pub const NAMESPACE_NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A node of the cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Node {
    /// Name and labels.
    pub metadata: Meta,
    /// Address ranges for pods.
    pub spec: NodeSpec,
    /// Addresses of the node.
    pub status: NodeStatus,
    /// Ranges that it has claimed from a cluster range; none of the object.
    #[serde(skip)]
    pub claimed: Vec<IpNetwork>,
}

/// `spec` of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// First range, kept for old writers.
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<IpNetwork>,
    /// All ranges, at most one per family.
    #[serde(rename = "podCIDRs", deserialize_with = "null_default")]
    pub pod_cidrs: Vec<IpNetwork>,
}

/// `status` of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Addresses with their type.
    #[serde(deserialize_with = "null_default")]
    pub addresses: Vec<NodeAddress>,
}

/// One address of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `Hostname` and others.
    #[serde(rename = "type")]
    pub kind: String,
    /// The address as text: a host name for some kinds.
    pub address: String,
}

impl Node {
    /// `spec.podCIDRs`, or `spec.podCIDR` where the list is missing, or what it has claimed where both are.
    #[must_use]
    pub fn pod_cidrs(&self) -> Vec<IpNetwork> {
        let given = self.given_cidrs();
        if given.is_empty() { self.claimed.clone() } else { given }
    }

    /// The ranges that the object itself names.
    #[must_use]
    pub fn given_cidrs(&self) -> Vec<IpNetwork> {
        if self.spec.pod_cidrs.is_empty() {
            self.spec.pod_cidr.into_iter().collect()
        } else {
            self.spec.pod_cidrs.clone()
        }
    }

    /// All addresses that are addresses and not host names.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.status.addresses.iter().filter_map(|address| address.address.parse().ok())
    }

    /// All addresses of type `InternalIP`, in the object's order.
    #[must_use]
    pub fn internal_addresses(&self) -> Vec<IpAddr> {
        let internal = self.status.addresses.iter().filter(|address| address.kind == "InternalIP");
        internal.filter_map(|address| address.address.parse().ok()).collect()
    }
}

/// A namespace: only its labels matter.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// Name and labels.
    pub metadata: Meta,
}

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pod {
    /// Name, namespace, uid and labels.
    pub metadata: Meta,
    /// Where it runs and its named ports.
    pub spec: PodSpec,
    /// Phase and addresses.
    pub status: PodStatus,
}

/// `spec` of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodSpec {
    /// Node it was scheduled to.
    pub node_name: String,
    /// Shares the node's network: no subject and no peer of policies.
    pub host_network: bool,
    /// Their ports may be named by policies.
    #[serde(deserialize_with = "null_default")]
    pub containers: Vec<Container>,
    /// Init containers; those that keep running (sidecars) may name ports too.
    #[serde(deserialize_with = "null_default")]
    pub init_containers: Vec<Container>,
}

/// A container of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Container {
    /// Ports it documents; only named ones matter here.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<ContainerPort>,
    /// `Always` marks an init container that keeps running.
    pub restart_policy: Option<String>,
}

/// A port that a container documents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ContainerPort {
    /// Name that policies may use.
    pub name: Option<String>,
    /// The number behind the name.
    pub container_port: u16,
    /// TCP where missing.
    pub protocol: Protocol,
}

/// `status` of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`, `Unknown`.
    pub phase: String,
    /// First address.
    #[serde(rename = "podIP", deserialize_with = "empty_is_none")]
    pub pod_ip: Option<IpAddr>,
    /// All addresses, at most one per family.
    #[serde(rename = "podIPs", deserialize_with = "null_default")]
    pub pod_ips: Vec<PodIp>,
}

/// One entry of `status.podIPs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodIp {
    /// The address.
    pub ip: IpAddr,
}

impl Pod {
    /// Namespace and name.
    #[must_use]
    pub fn object_name(&self) -> ObjectName {
        ObjectName::new(&self.metadata.namespace, &self.metadata.name)
    }

    /// The uid under which kubelet runs it, which a runtime passes as `K8S_POD_UID`.
    #[must_use]
    pub fn running_uid(&self) -> &str {
        self.metadata.annotations.mirror_of.as_deref().unwrap_or(&self.metadata.uid)
    }

    /// A completed pod has given its address back: it is no subject and no peer from that moment on.
    #[must_use]
    pub fn is_completed(&self) -> bool {
        self.status.phase == "Succeeded" || self.status.phase == "Failed"
    }

    /// Whether policies concern this pod at all.
    #[must_use]
    pub fn is_policy_pod(&self) -> bool {
        !self.spec.host_network && !self.is_completed()
    }

    /// All addresses of the status, without repetition.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = self.status.pod_ip.into_iter().collect();
        for entry in &self.status.pod_ips {
            if !addresses.contains(&entry.ip) {
                addresses.push(entry.ip);
            }
        }
        addresses
    }

    /// The named ports of all containers that keep running.
    pub fn all_named_ports(&self) -> impl Iterator<Item = (&str, Protocol, u16)> {
        let sidecars =
            self.spec.init_containers.iter().filter(|c| c.restart_policy.as_deref() == Some("Always"));
        let ports = self.spec.containers.iter().chain(sidecars).flat_map(|container| &container.ports);
        ports.filter_map(|port| Some((port.name.as_deref()?, port.protocol, port.container_port)))
    }
}

/// Transport protocols that policies may name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// The default.
    #[default]
    Tcp,
    /// User datagrams.
    Udp,
    /// Stream control.
    Sctp,
}

impl From<Protocol> for Proto {
    fn from(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Tcp => Self::Tcp,
            Protocol::Udp => Self::Udp,
            Protocol::Sctp => Self::Sctp,
        }
    }
}

impl std::str::FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.to_ascii_lowercase().as_str() {
            "tcp" | "" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            "sctp" => Ok(Self::Sctp),
            _ => Err(format!("\"{text}\" is no protocol that policies know; write tcp, udp or sctp")),
        }
    }
}

/// A NetworkPolicy of `networking.k8s.io/v1`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkPolicy {
    /// Name and namespace.
    pub metadata: Meta,
    /// What it says.
    pub spec: NetworkPolicySpec,
}

impl NetworkPolicy {
    /// Namespace and name.
    #[must_use]
    pub fn object_name(&self) -> ObjectName {
        ObjectName::new(&self.metadata.namespace, &self.metadata.name)
    }
}

/// `spec` of a NetworkPolicy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NetworkPolicySpec {
    /// Subjects within the policy's namespace; empty selects all pods.
    #[serde(deserialize_with = "null_default")]
    pub pod_selector: LabelSelector,
    /// Directions it isolates. Absent: ingress, and egress only where an egress section with rules exists.
    #[serde(deserialize_with = "null_default")]
    pub policy_types: Vec<PolicyType>,
    /// Ingress rules; none admits nothing.
    #[serde(deserialize_with = "null_default")]
    pub ingress: Vec<IngressRule>,
    /// Egress rules; none admits nothing.
    #[serde(deserialize_with = "null_default")]
    pub egress: Vec<EgressRule>,
}

/// A direction that a policy isolates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PolicyType {
    /// Connections to the pod.
    Ingress,
    /// Connections from the pod.
    Egress,
}

/// One ingress rule: all of `from` may reach all of `ports`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IngressRule {
    /// Peers; none means everybody.
    #[serde(deserialize_with = "null_default")]
    pub from: Vec<Peer>,
    /// Ports; none means all traffic.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<PolicyPort>,
}

/// One egress rule: the pod may reach all of `ports` at all of `to`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EgressRule {
    /// Peers; none means everybody.
    #[serde(deserialize_with = "null_default")]
    pub to: Vec<Peer>,
    /// Ports; none means all traffic.
    #[serde(deserialize_with = "null_default")]
    pub ports: Vec<PolicyPort>,
}

/// One peer. Selectors in one peer are ANDed; an absent selector differs from an empty one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Peer {
    /// Pods, in the policy's namespace unless `namespace_selector` is present.
    pub pod_selector: Option<LabelSelector>,
    /// Namespaces; present and empty means all of them.
    pub namespace_selector: Option<LabelSelector>,
    /// Addresses; excludes the selectors.
    pub ip_block: Option<IpBlock>,
}

/// A range of addresses without some ranges inside it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct IpBlock {
    /// The range.
    pub cidr: IpNetwork,
    /// Subtracted from this block only; another rule may admit them.
    #[serde(default, deserialize_with = "null_default")]
    pub except: Vec<IpNetwork>,
}

/// A port, a range of ports, or all ports of a protocol.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PolicyPort {
    /// TCP where missing.
    #[serde(deserialize_with = "null_default")]
    pub protocol: Protocol,
    /// Number or name; missing means all ports of the protocol.
    pub port: Option<PortNumberOrName>,
    /// Last port of a range that starts at the number.
    pub end_port: Option<u16>,
}

/// A port's number, or a name that is resolved for each target pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PortNumberOrName {
    /// A number.
    Number(u16),
    /// A container port's name.
    Name(String),
}

/// Selects objects by labels; all requirements must hold, none means every object.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct LabelSelector {
    /// Labels with their exact values.
    #[serde(deserialize_with = "null_default")]
    pub match_labels: Labels,
    /// Further requirements.
    #[serde(deserialize_with = "null_default")]
    pub match_expressions: Vec<Requirement>,
}

/// One requirement of a selector.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Requirement {
    /// Label that is looked at.
    pub key: String,
    /// How it is compared.
    pub operator: Operator,
    /// Values; used by `In` and `NotIn`.
    #[serde(default, deserialize_with = "null_default")]
    pub values: Vec<String>,
}

/// How a requirement compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Operator {
    /// The label exists with one of the values.
    In,
    /// The label does not exist, or has none of the values.
    NotIn,
    /// The label exists.
    Exists,
    /// The label does not exist.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether the labels meet every requirement.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.matches_by(|key| labels.get(key))
    }

    /// The same for labels that `value_of` looks up.
    pub fn matches_by<'a>(&self, value_of: impl Fn(&str) -> Option<&'a str>) -> bool {
        let exact = self.match_labels.iter().all(|(key, value)| value_of(key) == Some(value));
        exact
            && self
                .match_expressions
                .iter()
                .all(|requirement| requirement.matches(value_of(&requirement.key)))
    }
}

impl Requirement {
    fn matches(&self, value: Option<&str>) -> bool {
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.iter().any(|own| own == value)),
            Operator::NotIn => value.is_none_or(|value| self.values.iter().all(|own| own != value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// YAML writes an empty list, map or object as `key:` (null); Kubernetes reads that as absent.
fn null_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

fn empty_is_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(serde::de::Error::custom)
}
