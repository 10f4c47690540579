//! The objects of one moment: what is written to the agents' folder and what the oracle reads.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use anyhow::{Context, Result};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use serde_json::{Value, json};

use crate::cluster_policy::ClusterNetworkPolicy;

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// Transport of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// A SYN.
    Tcp,
    /// A datagram.
    Udp,
    /// An INIT.
    Sctp,
}

impl Protocol {
    /// All that policies know.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// IANA's number.
    #[must_use]
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// As Kubernetes writes it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// Namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodName {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl PodName {
    /// Reads `namespace/name`.
    ///
    /// # Panics
    /// There is no slash: a mistake of a table.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let (namespace, name) =
            text.split_once('/').unwrap_or_else(|| panic!("{text:?} is no namespace/name"));
        Self { namespace: namespace.to_owned(), name: name.to_owned() }
    }
}

impl fmt::Display for PodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A port that a pod documents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub number: u16,
}

/// A pod.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its labels.
    pub labels: Labels,
    /// Its documented ports.
    pub ports: Vec<NamedPort>,
    /// Its node.
    pub node: String,
    /// Its addresses, IPv4 first; none before it is attached.
    pub addresses: Vec<IpAddr>,
    /// It has ended: neither subject nor peer, and denied everything until it is gone.
    pub completed: bool,
}

/// A node as policies see it.
#[derive(Debug, Clone)]
pub struct Node {
    /// Its labels.
    pub labels: Labels,
    /// Its addresses, IPv4 first.
    pub addresses: [IpAddr; 2],
}

/// Everything.
#[derive(Debug, Clone, Default)]
pub struct World {
    /// Labels of namespaces.
    pub namespaces: BTreeMap<String, Labels>,
    /// Pods.
    pub pods: BTreeMap<PodName, Pod>,
    /// Nodes; their objects are written once, not with the rest.
    pub nodes: BTreeMap<String, Node>,
    /// Namespaced policies by namespace/name.
    pub policies: BTreeMap<PodName, NetworkPolicy>,
    /// Cluster-scoped policies by name.
    pub cluster_policies: BTreeMap<String, ClusterNetworkPolicy>,
}

/// Labels from `key=value` pairs parted by commas.
///
/// # Panics
/// A pair has no `=`: a mistake of a table.
#[must_use]
pub fn labels(text: &str) -> Labels {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    let parted = pairs.map(|pair| pair.split_once('=').unwrap_or_else(|| panic!("{pair:?} is no label")));
    parted.map(|(key, value)| (key.trim().to_owned(), value.to_owned())).collect()
}

/// The ports that a pod of the tables documents: `serve-80-tcp` and so on.
#[must_use]
pub fn usual_ports() -> Vec<NamedPort> {
    let mut ports = Vec::new();
    for number in [80, 81] {
        for protocol in Protocol::ALL {
            let name = format!("serve-{number}-{}", protocol.word().to_lowercase());
            ports.push(NamedPort { name, protocol, number });
        }
    }
    ports
}

impl World {
    /// Adds or replaces a namespaced policy whose spec is YAML.
    ///
    /// # Errors
    /// The spec is none.
    pub fn put_policy(&mut self, name: &PodName, spec: &str) -> Result<()> {
        let spec: Value = serde_norway::from_str(spec).with_context(|| format!("policy {name}: {spec}"))?;
        let object = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name.name, "namespace": name.namespace}, "spec": spec,
        });
        let policy = serde_json::from_value(object).with_context(|| format!("policy {name}"))?;
        self.policies.insert(name.clone(), policy);
        Ok(())
    }

    /// Adds or replaces a cluster-scoped policy whose spec is YAML.
    ///
    /// # Errors
    /// The spec is none.
    pub fn put_cluster_policy(&mut self, name: &str, spec: &str) -> Result<()> {
        let spec = serde_norway::from_str(spec).with_context(|| format!("policy {name}: {spec}"))?;
        self.cluster_policies.insert(name.to_owned(), ClusterNetworkPolicy::new(name, spec));
        Ok(())
    }

    /// All objects but nodes, as one file: a reader sees all of a step or nothing of it.
    ///
    /// # Errors
    /// An object cannot be written.
    pub fn yaml(&self) -> Result<String> {
        let mut text = String::new();
        let mut add = |object: &Value| -> Result<()> {
            text.push_str("---\n");
            text.push_str(&serde_norway::to_string(object)?);
            Ok(())
        };
        for (name, labels) in &self.namespaces {
            add(
                &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
            )?;
        }
        for (name, pod) in &self.pods {
            add(&pod_object(name, pod))?;
        }
        for policy in self.policies.values() {
            add(&serde_json::to_value(policy)?)?;
        }
        for policy in self.cluster_policies.values() {
            add(&serde_json::to_value(policy)?)?;
        }
        Ok(text)
    }

    /// Only the policies, for messages.
    ///
    /// # Errors
    /// An object cannot be written.
    pub fn policies_yaml(&self) -> Result<String> {
        let only = Self {
            policies: self.policies.clone(),
            cluster_policies: self.cluster_policies.clone(),
            ..Self::default()
        };
        only.yaml()
    }

    /// Labels of a namespace with the one that Kubernetes adds.
    #[must_use]
    pub fn namespace_labels(&self, name: &str) -> Labels {
        let mut labels = self.namespaces.get(name).cloned().unwrap_or_default();
        labels.insert("kubernetes.io/metadata.name".to_owned(), name.to_owned());
        labels
    }

    /// Namespaces that hold pods.
    #[must_use]
    pub fn used_namespaces(&self) -> BTreeSet<&str> {
        self.pods.keys().map(|name| name.namespace.as_str()).collect()
    }
}

fn pod_object(name: &PodName, pod: &Pod) -> Value {
    let ports: Vec<Value> = pod
        .ports
        .iter()
        .map(
            |port| json!({"name": port.name, "containerPort": port.number, "protocol": port.protocol.word()}),
        )
        .collect();
    let mut status = json!({"phase": "Pending"});
    if let Some(first) = pod.addresses.first() {
        let all: Vec<Value> =
            pod.addresses.iter().map(|address| json!({"ip": address.to_string()})).collect();
        let phase = if pod.completed { "Succeeded" } else { "Running" };
        status = json!({"phase": phase, "podIP": first.to_string(), "podIPs": all});
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name.name, "namespace": name.namespace, "labels": pod.labels},
        "spec": {"nodeName": pod.node, "containers": [{"name": "main", "image": "none", "ports": ports}]},
        "status": status,
    })
}
