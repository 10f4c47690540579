//! Policies of both kinds in the one form that compiling and explaining share: interned peers, rules with an action.

use super::compiler::Peers;
use super::lookup::Direction;
use super::reference::{PolicyRef, Tier};
use crate::objects::{
    ClusterAction, ClusterNetworkPolicy, ClusterPeer, ClusterPort, ClusterPorts, ClusterProtocol, IpBlock,
    LabelSelector, Labels, NetworkPolicy, Peer, PolicyPort, PolicyType, PortNumberOrName, Protocol,
};
use crate::ports::{PortSet, Proto};

/// A peer that selects objects.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PeerSelector {
    /// Pods.
    Pods { namespaces: NamespaceScope, pods: LabelSelector },
    /// The addresses of nodes.
    Nodes(LabelSelector),
}

/// In which namespaces a [`PeerSelector`] looks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum NamespaceScope {
    /// The policy's own: no namespaceSelector was written.
    Named(String),
    /// Those with matching labels.
    Matching(LabelSelector),
}

/// A port name with the protocol it is looked up for; `None`: of any protocol.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct NamedPort {
    pub name: String,
    pub protocol: Option<Protocol>,
}

/// Port names with what they stand for.
pub(super) type ResolvedPorts = Vec<(NamedPort, Vec<(Protocol, u16)>)>;

/// A peer by the number of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
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

impl PolicyRules {
    /// Every peer that a rule names, as often as it does.
    pub(super) fn peers(&self) -> impl Iterator<Item = PeerRef> {
        self.rules.iter().flat_map(|rule| rule.peers.iter().flatten().copied())
    }

    /// The port names that the rules use.
    pub(super) fn named_ports(&self) -> impl Iterator<Item = &NamedPort> {
        self.rules.iter().flat_map(Rule::named_ports)
    }
}

impl PeerSelector {
    pub(super) fn matches_node(&self, labels: &Labels) -> bool {
        matches!(self, Self::Nodes(selector) if selector.matches(labels))
    }

    pub(super) fn is_of_nodes(&self) -> bool {
        matches!(self, Self::Nodes(_))
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

/// The rules of a NetworkPolicy: all of them accept. Each peer counts as used once more.
pub(super) fn of_policy(policy: &NetworkPolicy, direction: Direction, peers: &mut Peers) -> PolicyRules {
    let namespace = policy.object_name().namespace;
    let mut rule = |named: &[Peer], ports: &[PolicyPort]| Rule {
        name: String::new(),
        action: Action::Accept,
        peers: (!named.is_empty())
            .then(|| named.iter().filter_map(|peer| peer_of(&namespace, peer, peers)).collect()),
        ports: (!ports.is_empty()).then(|| ports.iter().map(port_match).collect()),
    };
    let rules = match direction {
        Direction::Ingress => policy.spec.ingress.iter().map(|r| rule(&r.from, &r.ports)).collect(),
        Direction::Egress => policy.spec.egress.iter().map(|r| rule(&r.to, &r.ports)).collect(),
    };
    PolicyRules { rules }
}

/// A peer without any selector matches nobody: the API refuses it, and admitting everybody would be a surprise.
fn peer_of(namespace: &str, peer: &Peer, peers: &mut Peers) -> Option<PeerRef> {
    if let Some(block) = &peer.ip_block {
        return Some(peers.block(block.clone()));
    }
    let namespaces = match (&peer.namespace_selector, &peer.pod_selector) {
        (Some(selector), _) => NamespaceScope::Matching(selector.clone()),
        (None, Some(_)) => NamespaceScope::Named(namespace.to_owned()),
        (None, None) => return None,
    };
    let pods = peer.pod_selector.clone().unwrap_or_default();
    Some(peers.selector(PeerSelector::Pods { namespaces, pods }))
}

/// The rules of a ClusterNetworkPolicy. Each peer counts as used once more.
pub(super) fn of_cluster_policy(
    policy: &ClusterNetworkPolicy,
    direction: Direction,
    peers: &mut Peers,
) -> PolicyRules {
    let mut rule = |name: &String, action, named: &[ClusterPeer], protocols: &Option<Vec<_>>| {
        let known = named.iter().all(|peer| is_known(peer, direction));
        let named = known.then(|| named.iter().flat_map(|peer| cluster_peer(peer, peers)).collect());
        let ports = protocols.as_ref().map(|list| list.iter().map(protocol_match).collect::<Option<_>>());
        cluster_rule(name.clone(), action, named, ports, peers)
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

fn is_known(peer: &ClusterPeer, direction: Direction) -> bool {
    let pods = peer.namespaces.is_some() || peer.pods.is_some();
    let addresses = peer.nodes.is_some() || peer.networks.is_some();
    pods || (direction == Direction::Egress && addresses)
}

fn cluster_peer(peer: &ClusterPeer, peers: &mut Peers) -> Vec<PeerRef> {
    let pods = |namespaces: &LabelSelector, pods: LabelSelector| PeerSelector::Pods {
        namespaces: NamespaceScope::Matching(namespaces.clone()),
        pods,
    };
    if let Some(namespaces) = &peer.namespaces {
        return vec![peers.selector(pods(namespaces, LabelSelector::default()))];
    }
    if let Some(both) = &peer.pods {
        return vec![peers.selector(pods(&both.namespace_selector, both.pod_selector.clone()))];
    }
    if let Some(nodes) = &peer.nodes {
        return vec![peers.selector(PeerSelector::Nodes(nodes.clone()))];
    }
    let networks = peer.networks.iter().flatten();
    networks.map(|cidr| peers.block(IpBlock { cidr: *cidr, except: Vec::new() })).collect()
}

/// A rule with a part that this version does not know fails closed: Accept matches nothing, Deny and Pass deny everything
/// (API, "ClusterNetworkPolicyIngressPeer").
fn cluster_rule(
    name: String,
    action: ClusterAction,
    peers: Option<Vec<PeerRef>>,
    ports: Option<Option<Vec<PortMatch>>>,
    all: &mut Peers,
) -> Rule {
    let unknown = peers.is_none() || ports == Some(None);
    if unknown {
        peers.iter().flatten().for_each(|peer| all.release(*peer));
    }
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

impl PortMatch {
    /// The ports it stands for; `ports` tells what names stand for at the target.
    pub(super) fn ranges(&self, ports: &ResolvedPorts) -> Vec<(Proto, u16, u16)> {
        match self {
            Self::Range(proto, first, last) => vec![(*proto, *first, *last)],
            Self::Named(named) => {
                let numbers = ports.iter().filter(|(name, _)| name == named).flat_map(|(_, numbers)| numbers);
                numbers.map(|(protocol, number)| ((*protocol).into(), *number, *number)).collect()
            }
        }
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
        PortSet::of_ranges(matches.iter().flat_map(|port| port.ranges(ports)))
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
