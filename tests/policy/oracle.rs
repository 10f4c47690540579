//! Who may reach whom, read from the specification as literally as possible: slow, without any index, and with nothing of
//! the product in it.
//!
//! Sources: the API reference of `networking.k8s.io/v1` NetworkPolicy and of `policy.networking.k8s.io/v1alpha2`
//! ClusterNetworkPolicy. A connection passes when the sender's egress and the receiver's ingress both let it.
//!
//! ```text
//! subject's tier Admin --(Pass, or no rule matches)--> NetworkPolicy --(selected by none)--> tier Baseline --> allowed
//!         |                                                  |                                    |
//!   Accept: allowed, Deny: dropped               allowed if one admits it            Accept: allowed, Deny: dropped
//! ```

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use k8s_openapi::api::networking::v1::{NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::cluster_policy::{Action, NamespacedPod, Peer, PortMatch, ProtocolMatch, Rule, Tier};
use crate::world::{Labels, Pod, PodName, Protocol, World};

/// One end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum End {
    /// A pod.
    Pod(PodName),
    /// A node itself; only ever a target here.
    Node(String),
}

/// A connection in question.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// Who asks for it.
    pub source: &'a PodName,
    /// To whom.
    pub target: &'a End,
    /// The target's address that is used.
    pub target_address: IpAddr,
    /// The source's address that is used.
    pub source_address: IpAddr,
    /// Transport.
    pub protocol: Protocol,
    /// Port of the target.
    pub port: u16,
}

/// A rule of a namespaced policy, of either direction.
type PeersAndPorts = (Vec<NetworkPolicyPeer>, Vec<NetworkPolicyPort>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Ingress,
    Egress,
}

/// Whether the connection is let through.
///
/// # Panics
/// The question names a pod that does not exist.
#[must_use]
pub fn allows(world: &World, question: &Question<'_>) -> bool {
    let client = End::Pod(question.source.clone());
    egress(world, question).allows() && ingress_allows(world, question, client, question.source_address)
}

/// The same where the client's node puts its own address in the client's place, and the server is on another node: that
/// one sees the client's node.
///
/// # Panics
/// The question names a pod that does not exist.
#[must_use]
pub fn allows_behind(world: &World, question: &Question<'_>, node: &str, node_address: IpAddr) -> bool {
    let client = End::Node(node.to_owned());
    egress(world, question).allows() && ingress_allows(world, question, client, node_address)
}

fn egress<'a>(world: &'a World, question: &'a Question<'a>) -> Case<'a> {
    Case {
        world,
        direction: Direction::Egress,
        subject: question.source,
        peer: question.target.clone(),
        peer_address: question.target_address,
        question,
    }
}

fn ingress_allows(world: &World, question: &Question<'_>, client: End, client_address: IpAddr) -> bool {
    let End::Pod(target) = question.target else {
        // Connections to a node are no pod's ingress.
        return true;
    };
    let direction = Direction::Ingress;
    Case { world, direction, subject: target, peer: client, peer_address: client_address, question }.allows()
}

/// One direction of a question: `subject` is the pod whose policies decide.
struct Case<'a> {
    world: &'a World,
    direction: Direction,
    subject: &'a PodName,
    peer: End,
    peer_address: IpAddr,
    question: &'a Question<'a>,
}

impl Case<'_> {
    fn allows(&self) -> bool {
        if self.subject_pod().completed {
            // Its address is not its own any more.
            return false;
        }
        self.tier(Tier::Admin)
            .or_else(|| self.network_policies())
            .or_else(|| self.tier(Tier::Baseline))
            .unwrap_or(true)
    }

    fn subject_pod(&self) -> &Pod {
        &self.world.pods[self.subject]
    }

    /// The peer, where it is a pod that policies may select.
    fn peer_pod(&self) -> Option<(&PodName, &Pod)> {
        match &self.peer {
            End::Pod(name) => Some((name, &self.world.pods[name])).filter(|(_, pod)| !pod.completed),
            End::Node(_) => None,
        }
    }

    /// The pod whose port names count.
    fn target_pod(&self) -> Option<&Pod> {
        match self.direction {
            Direction::Ingress => Some(self.subject_pod()),
            Direction::Egress => self.peer_pod().map(|(_, pod)| pod),
        }
    }

    // ---- ClusterNetworkPolicy ----

    /// What a tier decides; none if it passes or matches nothing.
    fn tier(&self, tier: Tier) -> Option<bool> {
        let mut policies: Vec<_> = self.world.cluster_policies.values().map(|policy| &policy.spec).collect();
        policies.retain(|spec| spec.tier == tier);
        policies.sort_by_key(|spec| spec.priority);
        for spec in policies {
            let subject = &spec.subject;
            let namespaces = subject.namespaces.as_ref().is_some_and(|selector| {
                selects(selector, &self.world.namespace_labels(&self.subject.namespace))
            });
            let pods = subject
                .pods
                .as_ref()
                .is_some_and(|pods| self.selects_pod(pods, self.subject, &self.subject_pod().labels));
            if !namespaces && !pods {
                continue;
            }
            let rules = match self.direction {
                Direction::Ingress => &spec.ingress,
                Direction::Egress => &spec.egress,
            };
            for rule in rules {
                match self.rule(rule) {
                    Some(Action::Accept) => return Some(true),
                    Some(Action::Deny) => return Some(false),
                    Some(Action::Pass) => return None,
                    None => {}
                }
            }
        }
        None
    }

    /// What a rule says about this connection; none if it does not match.
    fn rule(&self, rule: &Rule) -> Option<Action> {
        let peers = match self.direction {
            Direction::Ingress => &rule.from,
            Direction::Egress => &rule.to,
        };
        if peers.iter().any(is_unknown) {
            // Fail closed: Accept matches nothing, Deny and Pass become a deny of everything.
            return match rule.action {
                Action::Accept => None,
                Action::Deny | Action::Pass => Some(Action::Deny),
            };
        }
        let peer = peers.iter().any(|peer| self.cluster_peer(peer));
        let protocol =
            rule.protocols.as_ref().is_none_or(|list| list.iter().any(|entry| self.cluster_protocol(entry)));
        (peer && protocol).then_some(rule.action)
    }

    fn cluster_peer(&self, peer: &Peer) -> bool {
        if let Some(selector) = &peer.namespaces {
            return self
                .peer_pod()
                .is_some_and(|(name, _)| selects(selector, &self.world.namespace_labels(&name.namespace)));
        }
        if let Some(pods) = &peer.pods {
            return self.peer_pod().is_some_and(|(name, pod)| self.selects_pod(pods, name, &pod.labels));
        }
        if let Some(selector) = &peer.nodes {
            // Nodes are peers by their addresses.
            let mut chosen = self.world.nodes.values().filter(|node| selects(selector, &node.labels));
            return chosen.any(|node| node.addresses.contains(&self.peer_address));
        }
        peer.networks.as_ref().is_some_and(|list| list.iter().any(|range| range.contains(self.peer_address)))
    }

    fn selects_pod(&self, pods: &NamespacedPod, name: &PodName, labels: &Labels) -> bool {
        selects(&pods.namespace_selector, &self.world.namespace_labels(&name.namespace))
            && selects(&pods.pod_selector, labels)
    }

    fn cluster_protocol(&self, entry: &ProtocolMatch) -> bool {
        let port = |chosen: &Option<PortMatch>, protocol: Protocol| {
            let Some(chosen) = chosen else { return false };
            let number = self.question.port;
            let fits = chosen.destination_port.as_ref().is_none_or(|port| {
                port.number == Some(number)
                    || port.range.as_ref().is_some_and(|range| range.start <= number && number <= range.end)
            });
            protocol == self.question.protocol && fits
        };
        let named = entry.destination_named_port.as_ref().is_some_and(|name| self.is_named(name));
        port(&entry.tcp, Protocol::Tcp)
            || port(&entry.udp, Protocol::Udp)
            || port(&entry.sctp, Protocol::Sctp)
            || named
    }

    /// Whether the target pod calls this port and protocol by that name.
    fn is_named(&self, name: &str) -> bool {
        let (protocol, number) = (self.question.protocol, self.question.port);
        self.target_pod().is_some_and(|pod| {
            pod.ports
                .iter()
                .any(|port| port.name == name && port.protocol == protocol && port.number == number)
        })
    }

    // ---- NetworkPolicy ----

    /// What the namespaced policies decide; none where none of them selects the subject.
    fn network_policies(&self) -> Option<bool> {
        let mut selected = false;
        for (name, policy) in &self.world.policies {
            let Some(spec) = &policy.spec else { continue };
            let everybody = LabelSelector::default();
            let subjects = spec.pod_selector.as_ref().unwrap_or(&everybody);
            if name.namespace != self.subject.namespace
                || !selects(subjects, &self.subject_pod().labels)
                || !self.is_about_direction(spec)
            {
                continue;
            }
            selected = true;
            if self.rules_of(spec).iter().any(|(peers, ports)| self.admits(&name.namespace, peers, ports)) {
                return Some(true);
            }
        }
        selected.then_some(false)
    }

    /// Without `policyTypes`: ingress always, egress where there is an egress rule.
    fn is_about_direction(&self, spec: &NetworkPolicySpec) -> bool {
        let types = spec.policy_types.clone().unwrap_or_default();
        let word = match self.direction {
            Direction::Ingress => "Ingress",
            Direction::Egress => "Egress",
        };
        if types.is_empty() {
            return self.direction == Direction::Ingress
                || spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
        }
        types.iter().any(|kind| kind == word)
    }

    fn rules_of(&self, spec: &NetworkPolicySpec) -> Vec<PeersAndPorts> {
        match self.direction {
            Direction::Ingress => {
                let rules = spec.ingress.clone().unwrap_or_default().into_iter();
                rules.map(|rule| (rule.from.unwrap_or_default(), rule.ports.unwrap_or_default())).collect()
            }
            Direction::Egress => {
                let rules = spec.egress.clone().unwrap_or_default().into_iter();
                rules.map(|rule| (rule.to.unwrap_or_default(), rule.ports.unwrap_or_default())).collect()
            }
        }
    }

    fn admits(&self, namespace: &str, peers: &[NetworkPolicyPeer], ports: &[NetworkPolicyPort]) -> bool {
        let peer = peers.is_empty() || peers.iter().any(|peer| self.policy_peer(namespace, peer));
        let port = ports.is_empty() || ports.iter().any(|port| self.policy_port(port));
        peer && port
    }

    fn policy_peer(&self, policy_namespace: &str, peer: &NetworkPolicyPeer) -> bool {
        if let Some(block) = &peer.ip_block {
            let contains = |text: &str| {
                let range: IpNetwork = text.parse().expect("the tables' ranges are valid");
                range.contains(self.peer_address)
            };
            let excepted = block.except.iter().flatten().any(|text| contains(text));
            return contains(&block.cidr) && !excepted;
        }
        let Some((name, pod)) = self.peer_pod() else { return false };
        let namespace = match &peer.namespace_selector {
            Some(selector) => selects(selector, &self.world.namespace_labels(&name.namespace)),
            None => name.namespace == policy_namespace,
        };
        namespace && peer.pod_selector.as_ref().is_none_or(|selector| selects(selector, &pod.labels))
    }

    fn policy_port(&self, entry: &NetworkPolicyPort) -> bool {
        if entry.protocol.as_deref().unwrap_or("TCP") != self.question.protocol.word() {
            return false;
        }
        let number = i32::from(self.question.port);
        match &entry.port {
            None => true,
            Some(IntOrString::Int(first)) => (*first..=entry.end_port.unwrap_or(*first)).contains(&number),
            Some(IntOrString::String(name)) => self.is_named(name),
        }
    }
}

fn is_unknown(peer: &Peer) -> bool {
    peer.namespaces.is_none() && peer.pods.is_none() && peer.nodes.is_none() && peer.networks.is_none()
}

fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    for (key, value) in selector.match_labels.iter().flatten() {
        if labels.get(key) != Some(value) {
            return false;
        }
    }
    for requirement in selector.match_expressions.iter().flatten() {
        let value = labels.get(&requirement.key);
        let listed =
            value.is_some_and(|value| requirement.values.iter().flatten().any(|entry| entry == value));
        let holds = match requirement.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            "Exists" => value.is_some(),
            "DoesNotExist" => value.is_none(),
            other => panic!("{other} is no operator"),
        };
        if !holds {
            return false;
        }
    }
    true
}
