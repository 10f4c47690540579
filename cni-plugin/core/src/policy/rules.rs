//! Policies in the form that compiling and explaining share: interned peers, ports as they were written.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::lookup::Direction;
use super::numbering::Numbering;
use crate::objects::{
    IpBlock, LabelSelector, Labels, NetworkPolicy, ObjectName, Peer, PolicyPort, PolicyType,
    PortNumberOrName, Protocol,
};
use crate::ruleset::PortRule;

/// A peer that selects pods.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct PeerSelector {
    pub namespaces: NamespaceScope,
    pub pods: LabelSelector,
}

/// In which namespaces a [`PeerSelector`] looks.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum NamespaceScope {
    /// The policy's own: no namespaceSelector was written.
    Named(String),
    /// Those with matching labels.
    Matching(LabelSelector),
}

/// A port name with the protocol it is looked up for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct NamedPort {
    pub name: String,
    pub protocol: Protocol,
}

/// A peer by the number of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PeerRef {
    Selector(u32),
    Block(u32),
}

/// One rule of one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rule {
    /// `None` admits everybody.
    pub peers: Option<Vec<PeerRef>>,
    /// Empty admits all traffic.
    pub ports: Vec<PolicyPort>,
}

/// The rules of one policy in one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PolicyRules {
    pub name: ObjectName,
    pub rules: Vec<Rule>,
}

impl PeerSelector {
    pub(super) fn matches(&self, namespace: &str, namespace_labels: &Labels, pod_labels: &Labels) -> bool {
        let in_scope = match &self.namespaces {
            NamespaceScope::Named(name) => name == namespace,
            NamespaceScope::Matching(selector) => selector.matches(namespace_labels),
        };
        in_scope && self.pods.matches(pod_labels)
    }
}

/// Whether a policy isolates its subjects in a direction. Defaults of `policyTypes`: ingress always, egress where
/// egress rules exist.
pub(super) fn isolates(policy: &NetworkPolicy, direction: Direction) -> bool {
    let types = &policy.spec.policy_types;
    match direction {
        Direction::Ingress => types.is_empty() || types.contains(&PolicyType::Ingress),
        Direction::Egress if types.is_empty() => !policy.spec.egress.is_empty(),
        Direction::Egress => types.contains(&PolicyType::Egress),
    }
}

/// What the peers of a policy mean, collected while its rules are interned.
#[derive(Debug, Default)]
pub(super) struct Interned {
    pub selectors: BTreeMap<u32, PeerSelector>,
    pub blocks: BTreeMap<u32, IpBlock>,
}

impl Interned {
    pub(super) fn policy(
        &mut self,
        policy: &NetworkPolicy,
        direction: Direction,
        numbering: &mut Numbering,
    ) -> PolicyRules {
        let namespace = policy.object_name().namespace;
        let mut rule = |peers: &[Peer], ports: &[PolicyPort]| Rule {
            peers: (!peers.is_empty())
                .then(|| peers.iter().filter_map(|peer| self.peer(&namespace, peer, numbering)).collect()),
            ports: ports.to_vec(),
        };
        let rules = match direction {
            Direction::Ingress => policy.spec.ingress.iter().map(|r| rule(&r.from, &r.ports)).collect(),
            Direction::Egress => policy.spec.egress.iter().map(|r| rule(&r.to, &r.ports)).collect(),
        };
        PolicyRules { name: policy.object_name(), rules }
    }

    /// A peer without any selector matches nobody: the API refuses it, and admitting everybody would be a surprise.
    fn peer(&mut self, namespace: &str, peer: &Peer, numbering: &mut Numbering) -> Option<PeerRef> {
        if let Some(block) = &peer.ip_block {
            let number = numbering.block(block);
            self.blocks.insert(number, block.clone());
            return Some(PeerRef::Block(number));
        }
        let namespaces = match (&peer.namespace_selector, &peer.pod_selector) {
            (Some(selector), _) => NamespaceScope::Matching(selector.clone()),
            (None, Some(_)) => NamespaceScope::Named(namespace.to_owned()),
            (None, None) => return None,
        };
        let selector = PeerSelector { namespaces, pods: peer.pod_selector.clone().unwrap_or_default() };
        let number = numbering.selector(&selector);
        self.selectors.insert(number, selector);
        Some(PeerRef::Selector(number))
    }
}

impl Rule {
    /// Whether the rule admits a peer that matches these selectors and blocks (sorted).
    pub(super) fn admits(&self, selectors: &[u32], blocks: &[u32]) -> bool {
        self.peers.as_ref().is_none_or(|peers| {
            peers.iter().any(|peer| match peer {
                PeerRef::Selector(number) => selectors.binary_search(number).is_ok(),
                PeerRef::Block(number) => blocks.binary_search(number).is_ok(),
            })
        })
    }

    /// What the rule opens; `resolve` gives the numbers behind a port name for the target.
    pub(super) fn opened<'a>(
        &'a self,
        resolve: impl Fn(&NamedPort) -> Vec<u16> + 'a,
    ) -> Box<dyn Iterator<Item = PortRule> + 'a> {
        if self.ports.is_empty() {
            return Box::new(std::iter::once(PortRule::All));
        }
        Box::new(self.ports.iter().flat_map(move |port| opened_by(port, &resolve)))
    }

    /// The port names the rule uses.
    pub(super) fn named_ports(&self) -> impl Iterator<Item = NamedPort> + '_ {
        self.ports.iter().filter_map(named)
    }
}

fn named(port: &PolicyPort) -> Option<NamedPort> {
    match &port.port {
        Some(PortNumberOrName::Name(name)) => Some(NamedPort { name: name.clone(), protocol: port.protocol }),
        Some(PortNumberOrName::Number(_)) | None => None,
    }
}

fn opened_by(port: &PolicyPort, resolve: &impl Fn(&NamedPort) -> Vec<u16>) -> Vec<PortRule> {
    let proto = port.protocol.into();
    match &port.port {
        None => vec![PortRule::all_of(proto)],
        Some(PortNumberOrName::Number(first)) => {
            vec![PortRule::Ports { proto, first: *first, last: port.end_port.unwrap_or(*first) }]
        }
        Some(PortNumberOrName::Name(_)) => {
            let numbers = named(port).map(|port| resolve(&port)).unwrap_or_default();
            numbers.into_iter().map(|number| PortRule::port(proto, number)).collect()
        }
    }
}
