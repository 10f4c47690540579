//! The specification, read slowly: NetworkPolicy v1 and ClusterNetworkPolicy v1alpha2. It shares nothing with the code
//! under test but the objects' types.

use std::net::IpAddr;

use holdfast_net_core::objects::{
    ClusterAction, ClusterNetworkPolicy, ClusterPeer, ClusterPort, ClusterPorts, ClusterProtocol,
    ClusterTier, LabelSelector, Labels, NamespacedPods, NetworkPolicy, Operator, Peer, Pod, PolicyPort,
    PolicyType, PortNumberOrName, Protocol,
};
use holdfast_net_core::policy::{Direction, Subject};

use crate::world::World;

/// A connection seen from the subject.
struct Question<'a> {
    world: &'a World,
    direction: Direction,
    pod: &'a Pod,
    peer: IpAddr,
    peer_pod: Option<&'a Pod>,
    protocol: Protocol,
    port: u16,
}

impl Question<'_> {
    /// Whose container ports a name means.
    fn target(&self) -> Option<&Pod> {
        match self.direction {
            Direction::Ingress => Some(self.pod),
            Direction::Egress => self.peer_pod,
        }
    }
}

/// Whether the specification lets the connection pass in one direction.
pub fn oracle(
    world: &World,
    direction: Direction,
    subject: &Subject,
    peer: IpAddr,
    protocol: Protocol,
    port: u16,
) -> bool {
    let Some(name) = &subject.pod else { return true };
    let Some(pod) = world.live_pod(name, &subject.uid) else { return false };
    let peer_pod = world.owner(peer);
    let question = Question { world, direction, pod, peer, peer_pod, protocol, port };
    match cluster_tier(&question, ClusterTier::Admin) {
        Some(ClusterAction::Accept) => return true,
        Some(ClusterAction::Deny) => return false,
        Some(ClusterAction::Pass) | None => {}
    }
    if let Some(allowed) = network_policies(&question) {
        return allowed;
    }
    cluster_tier(&question, ClusterTier::Baseline) != Some(ClusterAction::Deny)
}

/// Action, peers, protocols.
type RuleParts<'a> = (ClusterAction, &'a Vec<ClusterPeer>, &'a Option<Vec<ClusterProtocol>>);

/// The first rule of a tier that matches, by priority, then by name (which the API leaves open).
fn cluster_tier(question: &Question<'_>, tier: ClusterTier) -> Option<ClusterAction> {
    let policies = question.world.objects.cluster_policies.values();
    let mut policies: Vec<&ClusterNetworkPolicy> =
        policies.filter(|policy| policy.spec.tier == tier && is_subject(question, policy)).collect();
    policies.sort_by_key(|policy| (policy.spec.priority, policy.metadata.name.clone()));
    for policy in policies {
        let spec = &policy.spec;
        let rules: Vec<RuleParts<'_>> = match question.direction {
            Direction::Ingress => spec.ingress.iter().map(|r| (r.action, &r.from, &r.protocols)).collect(),
            Direction::Egress => spec.egress.iter().map(|r| (r.action, &r.to, &r.protocols)).collect(),
        };
        for (action, peers, protocols) in rules {
            let unknown_peer = peers.iter().any(|peer| is_unknown_peer(question.direction, peer));
            let unknown_protocol = protocols.iter().flatten().any(is_unknown_protocol);
            if unknown_peer || unknown_protocol {
                match action {
                    ClusterAction::Accept => continue,
                    ClusterAction::Deny | ClusterAction::Pass => return Some(ClusterAction::Deny),
                }
            }
            let peer_ok = peers.iter().any(|peer| cluster_peer_matches(question, peer));
            let protocol_ok = match protocols {
                None => true,
                Some(list) => list.iter().any(|protocol| protocol_matches(question, protocol)),
            };
            if peer_ok && protocol_ok {
                return Some(action);
            }
        }
    }
    None
}

fn is_subject(question: &Question<'_>, policy: &ClusterNetworkPolicy) -> bool {
    let subject = &policy.spec.subject;
    if let Some(namespaces) = &subject.namespaces {
        return selects(namespaces, &namespace_labels(question.world, question.pod));
    }
    subject.pods.as_ref().is_some_and(|pods| both_select(question.world, pods, question.pod))
}

fn both_select(world: &World, pods: &NamespacedPods, pod: &Pod) -> bool {
    selects(&pods.namespace_selector, &namespace_labels(world, pod))
        && selects(&pods.pod_selector, &pod.metadata.labels)
}

fn is_unknown_peer(direction: Direction, peer: &ClusterPeer) -> bool {
    let pods = peer.namespaces.is_some() || peer.pods.is_some();
    let addresses = peer.nodes.is_some() || peer.networks.is_some();
    !(pods || (direction == Direction::Egress && addresses))
}

fn is_unknown_protocol(protocol: &ClusterProtocol) -> bool {
    protocol.tcp.is_none()
        && protocol.udp.is_none()
        && protocol.sctp.is_none()
        && protocol.destination_named_port.is_none()
}

fn cluster_peer_matches(question: &Question<'_>, peer: &ClusterPeer) -> bool {
    let world = question.world;
    if let Some(namespaces) = &peer.namespaces {
        return question.peer_pod.is_some_and(|pod| selects(namespaces, &namespace_labels(world, pod)));
    }
    if let Some(pods) = &peer.pods {
        return question.peer_pod.is_some_and(|pod| both_select(world, pods, pod));
    }
    if let Some(nodes) = &peer.nodes {
        return world.objects.nodes.values().any(|node| {
            let address = question.peer.to_string();
            selects(nodes, &node.metadata.labels)
                && node.status.addresses.iter().any(|entry| entry.address == address)
        });
    }
    peer.networks.iter().flatten().any(|cidr| cidr.contains(question.peer))
}

fn protocol_matches(question: &Question<'_>, protocol: &ClusterProtocol) -> bool {
    let given = match question.protocol {
        Protocol::Tcp => &protocol.tcp,
        Protocol::Udp => &protocol.udp,
        Protocol::Sctp => &protocol.sctp,
    };
    if let Some(ClusterPorts { destination_port }) = given {
        return match destination_port {
            None => true,
            Some(ClusterPort { number: Some(number), .. }) => *number == question.port,
            Some(ClusterPort { range: Some(range), .. }) => {
                range.start <= question.port && question.port <= range.end
            }
            Some(_) => false,
        };
    }
    let Some(name) = &protocol.destination_named_port else { return false };
    question.target().is_some_and(|pod| documents(pod, name, question.protocol, question.port))
}

fn documents(pod: &Pod, name: &str, protocol: Protocol, port: u16) -> bool {
    pod.spec.containers.iter().flat_map(|container| &container.ports).any(|documented| {
        documented.name.as_deref() == Some(name)
            && documented.protocol == protocol
            && documented.container_port == port
    })
}

/// What the NetworkPolicies say; `None` where none selects the pod.
fn network_policies(question: &Question<'_>) -> Option<bool> {
    let (world, pod, direction) = (question.world, question.pod, question.direction);
    let mut isolated = None;
    for policy in world.objects.policies.values() {
        let spec = &policy.spec;
        let applies = if spec.policy_types.is_empty() {
            direction == Direction::Ingress || !spec.egress.is_empty()
        } else {
            let wanted = match direction {
                Direction::Ingress => PolicyType::Ingress,
                Direction::Egress => PolicyType::Egress,
            };
            spec.policy_types.contains(&wanted)
        };
        if !applies
            || policy.metadata.namespace != pod.metadata.namespace
            || !selects(&spec.pod_selector, &pod.metadata.labels)
        {
            continue;
        }
        isolated = Some(false);
        let rules: Vec<(&Vec<Peer>, &Vec<PolicyPort>)> = match direction {
            Direction::Ingress => spec.ingress.iter().map(|rule| (&rule.from, &rule.ports)).collect(),
            Direction::Egress => spec.egress.iter().map(|rule| (&rule.to, &rule.ports)).collect(),
        };
        for (peers, ports) in rules {
            let peer_ok = peers.is_empty() || peers.iter().any(|entry| peer_matches(question, policy, entry));
            let port_ok = ports.is_empty() || ports.iter().any(|entry| port_matches(question, entry));
            if peer_ok && port_ok {
                return Some(true);
            }
        }
    }
    isolated
}

fn peer_matches(question: &Question<'_>, policy: &NetworkPolicy, entry: &Peer) -> bool {
    let address = question.peer;
    if let Some(block) = &entry.ip_block {
        return block.cidr.contains(address) && !block.except.iter().any(|except| except.contains(address));
    }
    let Some(pod) = question.peer_pod else { return false };
    let namespace = match &entry.namespace_selector {
        Some(selector) => selects(selector, &namespace_labels(question.world, pod)),
        None => pod.metadata.namespace == policy.metadata.namespace,
    };
    let labels = entry.pod_selector.as_ref().is_none_or(|selector| selects(selector, &pod.metadata.labels));
    namespace && labels
}

fn namespace_labels(world: &World, pod: &Pod) -> Labels {
    let mut labels = world.objects.namespaces.get(&pod.metadata.namespace).cloned().unwrap_or_default();
    labels.insert("kubernetes.io/metadata.name".into(), pod.metadata.namespace.clone());
    labels
}

fn port_matches(question: &Question<'_>, entry: &PolicyPort) -> bool {
    let (protocol, port) = (question.protocol, question.port);
    if entry.protocol != protocol {
        return false;
    }
    match (&entry.port, entry.end_port) {
        (None, _) => true,
        (Some(PortNumberOrName::Number(number)), None) => *number == port,
        (Some(PortNumberOrName::Number(number)), Some(end)) => *number <= port && port <= end,
        (Some(PortNumberOrName::Name(name)), _) => {
            question.target().is_some_and(|pod| documents(pod, name, protocol, port))
        }
    }
}

fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    for (key, value) in selector.match_labels.iter() {
        if labels.get(key) != Some(value) {
            return false;
        }
    }
    for requirement in &selector.match_expressions {
        let value = labels.get(&requirement.key);
        let listed = value.is_some_and(|value| requirement.values.iter().any(|own| own == value));
        let ok = match requirement.operator {
            Operator::In => listed,
            Operator::NotIn => !listed,
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        };
        if !ok {
            return false;
        }
    }
    true
}
