//! Who decides about a connection: the compiled model names the tier, the policy and the rule.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::compiler::{ClassKey, Compiler, IdentityKey};
use super::lookup::Direction;
use super::reference::{PolicyRef, Tier};
use super::rules::{Action, NamedPort, PeerRef, PolicyRules};
use super::tiers::{Decider, Tiers};
use crate::objects::ObjectName;
use crate::ports::Proto;

/// One end of a connection that is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// The pod; `None` for an address outside the cluster.
    pub pod: Option<ObjectName>,
    /// Its address.
    pub address: IpAddr,
}

/// The rule that decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Its policy, with the tier.
    pub policy: PolicyRef,
    /// Its place among the policy's rules of that direction, from 1.
    pub rule: usize,
    /// What its policy calls it; often empty.
    pub rule_name: String,
}

/// The answer for one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectionAnswer {
    /// Whether this direction lets the connection pass.
    pub allowed: bool,
    /// The rule that decides; `None` where no rule matches.
    pub decided_by: Option<Decision>,
    /// Why, as a sentence.
    pub reason: String,
}

/// The answer for a connection: both directions must allow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// At the client.
    pub egress: DirectionAnswer,
    /// At the server.
    pub ingress: DirectionAnswer,
}

impl Explanation {
    /// Whether the connection is let through.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.egress.allowed && self.ingress.allowed
    }
}

/// A port of a connection.
#[derive(Debug, Clone, Copy)]
struct Target {
    proto: Proto,
    port: u16,
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} port {}", self.proto, self.port)
    }
}

impl Compiler {
    /// Explains a connection from `from` to `port` of `to`. Both ends are looked at as if they ran here, so any node's agent
    /// gives the same answer. Endpoints of this node decide about their addresses.
    #[must_use]
    pub fn explain(&self, from: &Party, to: &Party, proto: Proto, port: u16) -> Explanation {
        let target = Target { proto, port };
        if from.address == to.address {
            let reason = "the connection stays inside the pod and never reaches a policy".to_owned();
            let answer = DirectionAnswer { allowed: true, decided_by: None, reason };
            return Explanation { egress: answer.clone(), ingress: answer };
        }
        Explanation {
            egress: self.answer(Direction::Egress, from, to, target),
            ingress: self.answer(Direction::Ingress, to, from, target),
        }
    }

    /// The pod that has an address: an endpoint's of this node, else the one whose status names it.
    #[must_use]
    pub fn pod_at(&self, address: IpAddr) -> Option<ObjectName> {
        self.owner(address).map(|id| self.cluster.object_name(id))
    }

    /// Addresses of a pod: leased ones of this node, else those of its status. Empty for one that is not known.
    #[must_use]
    pub fn addresses_of(&self, pod: &ObjectName) -> Vec<IpAddr> {
        let leased = self.locals.values().find(|local| local.subject.pod.as_ref() == Some(pod));
        match leased {
            Some(local) => local.subject.addresses.clone(),
            None => {
                self.cluster.find(pod).map_or_else(Vec::new, |id| self.cluster.pods[id].addresses().collect())
            }
        }
    }

    fn answer(&self, direction: Direction, subject: &Party, peer: &Party, target: Target) -> DirectionAnswer {
        let open = |reason| DirectionAnswer { allowed: true, decided_by: None, reason };
        let nothing_selects = || open(format!("no policy selects {} for {direction}", name(subject)));
        let local = self.endpoint_at(subject.address).and_then(|endpoint| self.locals.get(endpoint));
        let pod = match local {
            Some(local) if local.subject.pod.is_some() => {
                let Some(pod) = self.pod_of(&local.subject) else {
                    let reason = format!(
                        "{} is attached but its Pod object is not known, so it is denied everything",
                        name(subject)
                    );
                    return DirectionAnswer { allowed: false, decided_by: None, reason };
                };
                Some(pod)
            }
            Some(_) => None,
            None => subject.pod.as_ref().and_then(|name| self.cluster.find(name)),
        };
        let concerned = pod.filter(|pod| self.cluster.pods[*pod].concerned);
        let Some(class) = concerned.and_then(|pod| self.class_key(pod, direction)) else {
            return nothing_selects();
        };
        self.decide(&class, subject, peer, target)
    }

    fn decide(&self, class: &ClassKey, subject: &Party, peer: &Party, target: Target) -> DirectionAnswer {
        let direction = class.direction;
        let rules = || class.policies.iter().filter_map(|name| self.policies.get(name)?.rules(direction));
        let identity = self.identity_for(rules().collect(), peer.address);
        let tiers = Tiers::of(class, |name| self.policies.get(name)?.rules(direction));
        let (subject_name, peer_name) = (name(subject), name(peer));
        match tiers.decider(class, &identity, target.proto, target.port) {
            Decider::Rule { policy, number, rule } => {
                let allowed = rule.action == Action::Accept;
                let verb = if allowed { "admits" } else { "denies" };
                let quoted = if rule.name.is_empty() { String::new() } else { format!(" \"{}\"", rule.name) };
                let reason = format!(
                    "policy {policy}, {direction} rule {number}{quoted}, {verb} {peer_name} on {target}"
                );
                let decision =
                    Decision { policy: policy.clone(), rule: number, rule_name: rule.name.clone() };
                DirectionAnswer { allowed, decided_by: Some(decision), reason }
            }
            Decider::Isolation => {
                let isolating = class.policies.iter().filter(|policy| policy.tier == Tier::NetworkPolicy);
                let names: Vec<String> = isolating.map(ToString::to_string).collect();
                let reason = format!(
                    "{subject_name} is isolated for {direction} by {} and no rule admits {peer_name} on {target}",
                    names.join(", ")
                );
                DirectionAnswer { allowed: false, decided_by: None, reason }
            }
            Decider::Default => {
                let reason = format!(
                    "no {direction} rule of the policies that select {subject_name} matches {peer_name} on {target}"
                );
                DirectionAnswer { allowed: true, decided_by: None, reason }
            }
        }
    }

    /// What an address is to these rules, whether they are in force here or not.
    fn identity_for(&self, rules: Vec<&PolicyRules>, address: IpAddr) -> IdentityKey {
        let owner = self.owner(address);
        let matches = |peer: &PeerRef| match *peer {
            PeerRef::Block(number) => self.peers.blocks.get(number).is_some_and(|entry| {
                let block = &entry.content;
                block.cidr.contains(address) && !block.except.iter().any(|except| except.contains(address))
            }),
            PeerRef::Selector(number) => self.peers.selectors.get(number).is_some_and(|entry| match owner {
                Some(pod) => {
                    let group = self.cluster.group_of(pod);
                    group.is_matched(&entry.content, &self.cluster.namespace_labels(&group.namespace))
                }
                None => self.cluster.nodes.values().any(|node| {
                    node.addresses.contains(&address) && entry.content.matches_node(&node.labels)
                }),
            }),
        };
        let peers: BTreeSet<PeerRef> = rules.iter().flat_map(|rules| rules.peers()).collect();
        let mut identity = IdentityKey::default();
        for peer in peers.into_iter().filter(matches) {
            match peer {
                PeerRef::Selector(number) => identity.selectors.push(number),
                PeerRef::Block(number) => identity.blocks.push(number),
            }
        }
        let names: BTreeSet<&NamedPort> = rules.iter().flat_map(|rules| rules.named_ports()).collect();
        if let Some(pod) = owner {
            identity.ports = self.cluster.pods[pod].resolve(names.into_iter());
        }
        identity
    }
}

fn name(party: &Party) -> String {
    party.pod.as_ref().map_or_else(|| party.address.to_string(), ToString::to_string)
}
