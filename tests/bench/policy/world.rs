//! The cluster that is measured, as plain data: policies, the pods they select here, and their peers elsewhere. Our agent
//! reads it as objects; the peers' rule sets are written from the same data.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Kubernetes namespace of the pods on the node and their policies.
pub const NAMESPACE: &str = "bench";
/// Port on which the client may reach the server.
pub const OPEN_PORT: u16 = 5000;
/// Port that no policy opens to the client.
pub const CLOSED_PORT: u16 = 6000;
/// Slot of the server; the other pods on the node have the slots after it.
pub const SERVER_SLOT: usize = 0;
/// Policies open ports from here on.
const FIRST_PORT: u16 = 8000;
/// Different ports.
const PORTS: usize = 50;
/// Namespaces of the peers.
const PEER_NAMESPACES: usize = 50;
/// First address of the peers.
const FIRST_PEER: Ipv4Addr = Ipv4Addr::new(10, 128, 0, 1);
/// Objects of one file; a file has at most 4 MiB.
const OBJECTS_PER_FILE: usize = 4000;

/// How large it is.
#[derive(Debug, Clone, Copy)]
pub struct World {
    /// Policies; each selects the pod of one slot.
    pub policies: usize,
    /// Pods on other nodes. Each is in one group; a policy admits two groups.
    pub peers: usize,
    /// Slots: pods on this node beside the client.
    pub slots: usize,
    /// How many of the policies select the server, the first ones.
    pub on_server: usize,
}

impl World {
    /// The same with the first policies only, and the peers that they admit.
    pub fn first(self, policies: usize) -> Self {
        let peers = self.peers * policies / self.policies.max(1);
        Self { policies, peers, on_server: self.on_server.min(policies), ..self }
    }

    /// The slot that a policy selects: the first ones the server, the rest take turns.
    pub fn slot_of(&self, policy: usize) -> usize {
        match policy.checked_sub(self.on_server) {
            Some(rest) if self.slots > 1 => 1 + rest % (self.slots - 1),
            Some(_) | None => SERVER_SLOT,
        }
    }

    /// The policy that admits the client to the server: the middle one of the server's.
    pub fn admitting(&self) -> usize {
        self.on_server.min(self.policies) / 2
    }

    /// The port that a policy opens to its groups.
    pub fn port_of(policy: usize) -> u16 {
        FIRST_PORT + u16::try_from(policy % PORTS).unwrap_or(0)
    }

    /// The two groups that a policy admits.
    pub fn groups_of(&self, policy: usize) -> [usize; 2] {
        [policy, (policy + 1) % self.policies]
    }

    /// Addresses of a group.
    pub fn group(&self, group: usize) -> impl Iterator<Item = Ipv4Addr> {
        (group..self.peers).step_by(self.policies.max(1)).map(peer_address)
    }

    /// Writes nodes, pods and policies into a folder, as `v1` Lists; the pods on the node have no address yet.
    pub fn write(&self, folder: &Path, node: &str, node_address: Ipv4Addr) -> Result<()> {
        let mut local = vec![node_object(node, node_address, "10.244.0.0/22"), namespace_object(NAMESPACE)];
        local.extend((0..PEER_NAMESPACES).map(|number| namespace_object(&peer_namespace(number))));
        local.push(self.local_pod(CLIENT, None, node));
        local.extend((0..self.slots).map(|slot| self.local_pod(&slot_pod(slot), Some(slot), node)));
        put_list(folder, "a-local", &local)?;
        let policies: Vec<Value> = (0..self.policies).map(|policy| self.policy(policy)).collect();
        for (number, part) in policies.chunks(OBJECTS_PER_FILE).enumerate() {
            put_list(folder, &format!("policies-{number}"), part)?;
        }
        let peers: Vec<usize> = (0..self.peers).collect();
        for (number, part) in peers.chunks(OBJECTS_PER_FILE).enumerate() {
            let pods: Vec<Value> = part.iter().map(|peer| self.peer(*peer)).collect();
            put_list(folder, &format!("peers-{number}"), &pods)?;
        }
        Ok(())
    }

    fn policy(&self, policy: usize) -> Value {
        let mut ingress = vec![json!({
            "from": [from_groups(&self.groups_of(policy))],
            "ports": [{"protocol": "TCP", "port": Self::port_of(policy)}],
        })];
        if policy == self.admitting() {
            ingress.push(json!({
                "from": [{"podSelector": {"matchLabels": {"role": CLIENT}}}],
                "ports": [{"protocol": "TCP", "port": OPEN_PORT}],
            }));
        }
        policy_object(&format!("policy-{policy}"), self.slot_of(policy), &ingress)
    }

    fn peer(&self, peer: usize) -> Value {
        peer_object(&format!("peer-{peer}"), peer % self.policies, peer_address(peer))
    }

    fn local_pod(&self, name: &str, slot: Option<usize>, node: &str) -> Value {
        let labels = match slot {
            Some(slot) => BTreeMap::from([("slot".to_owned(), slot_label(slot))]),
            None => BTreeMap::from([("role".to_owned(), name.to_owned())]),
        };
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": NAMESPACE, "uid": name, "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "main", "image": "none"}]},
            "status": {"phase": "Pending"},
        })
    }
}

/// Name of the pod that connects, and of its role.
pub const CLIENT: &str = "client";

/// Name of the pod in a slot.
pub fn slot_pod(slot: usize) -> String {
    format!("slot-{slot}")
}

/// A pod on another node.
pub fn peer_object(name: &str, group: usize, address: Ipv4Addr) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": peer_namespace(group % PEER_NAMESPACES), "uid": name,
            "labels": {"group": group_label(group)},
        },
        "spec": {"nodeName": "elsewhere"},
        "status": {"phase": "Running", "podIP": address.to_string(), "podIPs": [{"ip": address.to_string()}]},
    })
}

/// A policy for the pod of a slot.
pub fn policy_object(name: &str, slot: usize, ingress: &[Value]) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "podSelector": {"matchLabels": {"slot": slot_label(slot)}}, "policyTypes": ["Ingress"],
            "ingress": ingress,
        },
    })
}

/// Peers of a rule: the pods of some groups, in every namespace.
pub fn from_groups(groups: &[usize]) -> Value {
    let labels: Vec<String> = groups.iter().map(|group| group_label(*group)).collect();
    let selector = json!({"matchExpressions": [{"key": "group", "operator": "In", "values": labels}]});
    json!({"namespaceSelector": {}, "podSelector": selector})
}

/// Writes one object as a file of its own, by rename.
pub fn put(folder: &Path, name: &str, object: &Value) -> Result<()> {
    let (temporary, path) = (folder.join(format!(".{name}.new")), folder.join(format!("{name}.json")));
    fs::write(&temporary, serde_json::to_vec(object)?)
        .and_then(|()| fs::rename(&temporary, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn put_list(folder: &Path, name: &str, items: &[Value]) -> Result<()> {
    put(folder, name, &json!({"apiVersion": "v1", "kind": "List", "items": items}))
}

fn node_object(name: &str, address: Ipv4Addr, pod_cidr: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
        "spec": {"podCIDR": pod_cidr, "podCIDRs": [pod_cidr]},
        "status": {"addresses": [{"type": "InternalIP", "address": address.to_string()}]},
    })
}

fn namespace_object(name: &str) -> Value {
    let labels = json!({"kubernetes.io/metadata.name": name});
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

fn peer_namespace(number: usize) -> String {
    format!("peers-{number}")
}

fn peer_address(peer: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(FIRST_PEER) + u32::try_from(peer).unwrap_or(0))
}

fn group_label(group: usize) -> String {
    format!("g{group}")
}

fn slot_label(slot: usize) -> String {
    format!("s{slot}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: World = World { policies: 10_000, peers: 100_000, slots: 100, on_server: 100 };

    #[test]
    fn a_hundred_policies_are_on_the_server_and_as_many_on_every_other_pod() {
        let mut on_slot = vec![0; FULL.slots];
        for policy in 0..FULL.policies {
            on_slot[FULL.slot_of(policy)] += 1;
        }
        assert_eq!(on_slot[SERVER_SLOT], 100);
        assert!(on_slot.iter().all(|count| *count == 100), "{on_slot:?}");
    }

    #[test]
    fn fewer_policies_keep_those_of_the_server_and_each_admits_as_many_peers() {
        let fewer = FULL.first(4000);
        assert_eq!((0..4000).filter(|policy| fewer.slot_of(*policy) == SERVER_SLOT).count(), 100);
        for policy in [0, 50, 3999] {
            let [one, other] = fewer.groups_of(policy);
            assert_eq!(fewer.group(one).chain(fewer.group(other)).count(), 20);
        }
        let one = FULL.first(1);
        assert_eq!((one.admitting(), one.slot_of(0)), (0, SERVER_SLOT));
    }

    #[test]
    fn every_peer_is_in_the_group_of_its_label() {
        let last = FULL.peers - 1;
        assert!(FULL.group(last % FULL.policies).any(|address| address == peer_address(last)));
        let total: usize = (0..FULL.policies).map(|group| FULL.group(group).count()).sum();
        assert_eq!(total, FULL.peers);
    }
}
