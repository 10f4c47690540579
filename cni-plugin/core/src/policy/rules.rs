//! Policies of both kinds in the one form that compiling and explaining share: interned peers, rules with an action.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::lookup::Direction;
use super::numbering::Numbering;
use super::reference::{PolicyRef, Tier};
use crate::objects::{
    ClusterAction, ClusterNetworkPolicy, ClusterPeer, ClusterPort, ClusterPorts, ClusterProtocol, IpBlock,
    LabelSelector, Labels, NetworkPolicy, Peer, PolicyPort, PolicyType, PortNumberOrName, Protocol,
};
use crate::ports::{PortSet, Proto};

/// A peer that selects objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum PeerSelector {
    /// Pods.
    Pods { namespaces: NamespaceScope, pods: LabelSelector },
    /// The addresses of nodes.
    Nodes(LabelSelector),
}

/// In which namespaces a [`PeerSelector`] looks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum NamespaceScope {
    /// The policy's own: no namespaceSelector was written.
    Named(String),
    /// Those with matching labels.
    Matching(LabelSelector),
}

/// A port name with the protocol it is looked up for; `None`: of any protocol.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct NamedPort {
    pub name: String,
    pub protocol: Option<Protocol>,
}

/// Port names with what they stand for.
pub(super) type ResolvedPorts = Vec<(NamedPort, Vec<(Protocol, u16)>)>;

/// A peer by the number of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PeerRef {
    Selector(u32),
    Block(u32),
}

/// What a rule does with what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Accept,
    Deny,
    Pass,
}

/// Ports as they were written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PortMatch {
    Range(Proto, u16, u16),
    Named(NamedPort),
}

/// One rule of one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// What people call it; often empty.
    pub name: String,
    pub action: Action,
    /// `None` matches everybody.
    pub peers: Option<Vec<PeerRef>>,
    /// `None` matches all traffic.
    pub ports: Option<Vec<PortMatch>>,
}

/// The rules of one policy in one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PolicyRules {
    pub rules: Vec<Rule>,
}

impl PeerSelector {
    pub(super) fn matches_pod(
        &self,
        namespace: &str,
        namespace_labels: &Labels,
        pod_labels: &Labels,
    ) -> bool {
        let Self::Pods { namespaces, pods } = self else { return false };
        let in_scope = match namespaces {
            NamespaceScope::Named(name) => name == namespace,
            NamespaceScope::Matching(selector) => selector.matches(namespace_labels),
        };
        in_scope && pods.matches(pod_labels)
    }

    pub(super) fn matches_node(&self, labels: &Labels) -> bool {
        matches!(self, Self::Nodes(selector) if selector.matches(labels))
    }
}

/// Whether a NetworkPolicy isolates its subjects in a direction. Defaults of `policyTypes`: ingress always, egress where
/// egress rules exist.
pub(super) fn isolates(policy: &NetworkPolicy, direction: Direction) -> bool {
    let types = &policy.spec.policy_types;
    match direction {
        Direction::Ingress => types.is_empty() || types.contains(&PolicyType::Ingress),
        Direction::Egress if types.is_empty() => !policy.spec.egress.is_empty(),
        Direction::Egress => types.contains(&PolicyType::Egress),
    }
}

/// Whether a ClusterNetworkPolicy says anything about a direction.
pub(super) fn concerns(policy: &ClusterNetworkPolicy, direction: Direction) -> bool {
    match direction {
        Direction::Ingress => !policy.spec.ingress.is_empty(),
        Direction::Egress => !policy.spec.egress.is_empty(),
    }
}

/// How a ClusterNetworkPolicy is referred to.
pub(super) fn reference(policy: &ClusterNetworkPolicy) -> PolicyRef {
    PolicyRef::cluster(policy.spec.tier, policy.spec.priority, &policy.metadata.name)
}

/// What the peers of policies mean, collected while their rules are interned.
#[derive(Debug, Default)]
pub(super) struct Interned {
    pub selectors: BTreeMap<u32, PeerSelector>,
    pub blocks: BTreeMap<u32, IpBlock>,
}

impl Interned {
    /// The rules of a NetworkPolicy: all of them accept.
    pub(super) fn policy(
        &mut self,
        policy: &NetworkPolicy,
        direction: Direction,
        numbering: &mut Numbering,
    ) -> PolicyRules {
        let namespace = policy.object_name().namespace;
        let mut rule = |peers: &[Peer], ports: &[PolicyPort]| Rule {
            name: String::new(),
            action: Action::Accept,
            peers: (!peers.is_empty())
                .then(|| peers.iter().filter_map(|peer| self.peer(&namespace, peer, numbering)).collect()),
            ports: (!ports.is_empty()).then(|| ports.iter().map(port_match).collect()),
        };
        let rules = match direction {
            Direction::Ingress => policy.spec.ingress.iter().map(|r| rule(&r.from, &r.ports)).collect(),
            Direction::Egress => policy.spec.egress.iter().map(|r| rule(&r.to, &r.ports)).collect(),
        };
        PolicyRules { rules }
    }

    /// A peer without any selector matches nobody: the API refuses it, and admitting everybody would be a surprise.
    fn peer(&mut self, namespace: &str, peer: &Peer, numbering: &mut Numbering) -> Option<PeerRef> {
        if let Some(block) = &peer.ip_block {
            return Some(self.block(block.clone(), numbering));
        }
        let namespaces = match (&peer.namespace_selector, &peer.pod_selector) {
            (Some(selector), _) => NamespaceScope::Matching(selector.clone()),
            (None, Some(_)) => NamespaceScope::Named(namespace.to_owned()),
            (None, None) => return None,
        };
        let pods = peer.pod_selector.clone().unwrap_or_default();
        Some(self.selector(PeerSelector::Pods { namespaces, pods }, numbering))
    }

    /// The rules of a ClusterNetworkPolicy.
    pub(super) fn cluster_policy(
        &mut self,
        policy: &ClusterNetworkPolicy,
        direction: Direction,
        numbering: &mut Numbering,
    ) -> PolicyRules {
        let mut rule = |name: &String, action, peers: &[ClusterPeer], protocols: &Option<Vec<_>>| {
            let peers = self.cluster_peers(peers, direction, numbering);
            let ports = protocols.as_ref().map(|list| list.iter().map(protocol_match).collect::<Option<_>>());
            cluster_rule(name.clone(), action, peers, ports)
        };
        let rules = match direction {
            Direction::Ingress => {
                policy.spec.ingress.iter().map(|r| rule(&r.name, r.action, &r.from, &r.protocols)).collect()
            }
            Direction::Egress => {
                policy.spec.egress.iter().map(|r| rule(&r.name, r.action, &r.to, &r.protocols)).collect()
            }
        };
        PolicyRules { rules }
    }

    /// `None` where one of them is not known.
    fn cluster_peers(
        &mut self,
        peers: &[ClusterPeer],
        direction: Direction,
        numbering: &mut Numbering,
    ) -> Option<Vec<PeerRef>> {
        let mut found = Vec::new();
        for peer in peers {
            let selector = match (peer, direction) {
                (ClusterPeer { namespaces: Some(selector), .. }, _) => PeerSelector::Pods {
                    namespaces: NamespaceScope::Matching(selector.clone()),
                    pods: LabelSelector::default(),
                },
                (ClusterPeer { pods: Some(both), .. }, _) => PeerSelector::Pods {
                    namespaces: NamespaceScope::Matching(both.namespace_selector.clone()),
                    pods: both.pod_selector.clone(),
                },
                (ClusterPeer { nodes: Some(selector), .. }, Direction::Egress) => {
                    PeerSelector::Nodes(selector.clone())
                }
                (ClusterPeer { networks: Some(networks), .. }, Direction::Egress) => {
                    let block = |cidr: &ipnetwork::IpNetwork| IpBlock { cidr: *cidr, except: Vec::new() };
                    found.extend(networks.iter().map(|cidr| self.block(block(cidr), numbering)));
                    continue;
                }
                _ => return None,
            };
            found.push(self.selector(selector, numbering));
        }
        Some(found)
    }

    fn selector(&mut self, selector: PeerSelector, numbering: &mut Numbering) -> PeerRef {
        let number = numbering.selector(&selector);
        self.selectors.insert(number, selector);
        PeerRef::Selector(number)
    }

    fn block(&mut self, block: IpBlock, numbering: &mut Numbering) -> PeerRef {
        let number = numbering.block(&block);
        self.blocks.insert(number, block);
        PeerRef::Block(number)
    }
}

/// A rule with a part that this version does not know fails closed: Accept matches nothing, Deny and Pass deny everything
/// (API, "ClusterNetworkPolicyIngressPeer").
fn cluster_rule(
    name: String,
    action: ClusterAction,
    peers: Option<Vec<PeerRef>>,
    ports: Option<Option<Vec<PortMatch>>>,
) -> Rule {
    let unknown = peers.is_none() || ports == Some(None);
    match (unknown, action) {
        (true, ClusterAction::Accept) => {
            Rule { name, action: Action::Accept, peers: Some(Vec::new()), ports: None }
        }
        (true, ClusterAction::Deny | ClusterAction::Pass) => {
            Rule { name, action: Action::Deny, peers: None, ports: None }
        }
        (false, action) => {
            let action = match action {
                ClusterAction::Accept => Action::Accept,
                ClusterAction::Deny => Action::Deny,
                ClusterAction::Pass => Action::Pass,
            };
            Rule { name, action, peers, ports: ports.flatten() }
        }
    }
}

fn port_match(port: &PolicyPort) -> PortMatch {
    let proto = port.protocol.into();
    match &port.port {
        None => PortMatch::Range(proto, 0, u16::MAX),
        Some(PortNumberOrName::Number(first)) => {
            PortMatch::Range(proto, *first, port.end_port.unwrap_or(*first))
        }
        Some(PortNumberOrName::Name(name)) => {
            PortMatch::Named(NamedPort { name: name.clone(), protocol: Some(port.protocol) })
        }
    }
}

/// `None` where the protocol is not known.
fn protocol_match(protocol: &ClusterProtocol) -> Option<PortMatch> {
    let ports = |proto, ports: &ClusterPorts| match &ports.destination_port {
        None => Some(PortMatch::Range(proto, 0, u16::MAX)),
        Some(ClusterPort { number: Some(number), .. }) => Some(PortMatch::Range(proto, *number, *number)),
        Some(ClusterPort { range: Some(range), .. }) => Some(PortMatch::Range(proto, range.start, range.end)),
        Some(ClusterPort { number: None, range: None }) => None,
    };
    match protocol {
        ClusterProtocol { tcp: Some(tcp), .. } => ports(Proto::Tcp, tcp),
        ClusterProtocol { udp: Some(udp), .. } => ports(Proto::Udp, udp),
        ClusterProtocol { sctp: Some(sctp), .. } => ports(Proto::Sctp, sctp),
        ClusterProtocol { destination_named_port: Some(name), .. } => {
            Some(PortMatch::Named(NamedPort { name: name.clone(), protocol: None }))
        }
        _ => None,
    }
}

impl Rule {
    /// Whether the rule matches a peer with these selectors and blocks (sorted).
    pub(super) fn matches_peer(&self, selectors: &[u32], blocks: &[u32]) -> bool {
        self.peers.as_ref().is_none_or(|peers| {
            peers.iter().any(|peer| match peer {
                PeerRef::Selector(number) => selectors.binary_search(number).is_ok(),
                PeerRef::Block(number) => blocks.binary_search(number).is_ok(),
            })
        })
    }

    /// The traffic the rule matches; `ports` tells what the names stand for at the target.
    pub(super) fn traffic(&self, ports: &ResolvedPorts) -> PortSet {
        let Some(matches) = &self.ports else { return PortSet::all() };
        matches.iter().fold(PortSet::default(), |set, port| match port {
            PortMatch::Range(proto, first, last) => set.union(&PortSet::ports(*proto, *first, *last)),
            PortMatch::Named(named) => {
                let numbers = ports.iter().filter(|(name, _)| name == named).flat_map(|(_, numbers)| numbers);
                numbers.fold(set, |set, (protocol, number)| {
                    set.union(&PortSet::ports((*protocol).into(), *number, *number))
                })
            }
        })
    }

    /// The port names the rule uses.
    pub(super) fn named_ports(&self) -> impl Iterator<Item = &NamedPort> {
        self.ports.iter().flatten().filter_map(|port| match port {
            PortMatch::Named(named) => Some(named),
            PortMatch::Range(..) => None,
        })
    }
}

impl From<crate::objects::ClusterTier> for Tier {
    fn from(tier: crate::objects::ClusterTier) -> Self {
        match tier {
            crate::objects::ClusterTier::Admin => Self::Admin,
            crate::objects::ClusterTier::Baseline => Self::Baseline,
        }
    }
}
