//! What all policies of a class together say about a peer: the tiers in their order.
//!
//! ```text
//! Admin, by priority      Accept, Deny decide; Pass leaves the tier; the rest goes on
//! NetworkPolicy           where one selects the pod, all of them together decide; else the rest goes on
//! Baseline, by priority   Accept, Deny decide; Pass leaves the tier; the rest is allowed
//! ```

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};

use super::compiler::{ClassKey, IdentityKey};
use super::lookup::Direction;
use super::reference::{PolicyRef, Tier};
use super::rules::{Action, PeerRef, PolicyRules, PortMatch, ResolvedPorts, Rule};
use crate::ports::{PortSet, Proto};

/// The policies of a class in the order in which they are asked.
pub(super) struct Tiers<'a> {
    policies: Vec<(&'a PolicyRef, &'a PolicyRules)>,
    /// What all NetworkPolicies admit: their order means nothing, and there may be ten thousands of rules.
    admitting: OnceCell<Admitting<'a>>,
}

/// What some policies admit, by peer.
#[derive(Default)]
struct Admitting<'a> {
    everybody: Ports<'a>,
    by_peer: BTreeMap<PeerRef, Ports<'a>>,
}

/// What rules name, each port once.
#[derive(Default)]
struct Ports<'a> {
    /// One of them names no ports: all traffic.
    all: bool,
    matches: BTreeSet<&'a PortMatch>,
}

impl<'a> Ports<'a> {
    fn add(&mut self, rule: &'a Rule) {
        match &rule.ports {
            None => self.all = true,
            Some(ports) => self.matches.extend(ports),
        }
    }
}

impl<'a> Admitting<'a> {
    fn of(policies: impl Iterator<Item = &'a PolicyRules>) -> Self {
        let mut admitting = Self::default();
        for rule in policies.flat_map(|policy| &policy.rules) {
            match &rule.peers {
                None => admitting.everybody.add(rule),
                Some(peers) => {
                    for peer in peers {
                        admitting.by_peer.entry(*peer).or_default().add(rule);
                    }
                }
            }
        }
        admitting
    }

    fn allowed(&self, peer: &IdentityKey, ports: &ResolvedPorts) -> PortSet {
        let selectors = peer.selectors.iter().map(|number| PeerRef::Selector(*number));
        let named = selectors.chain(peer.blocks.iter().map(|number| PeerRef::Block(*number)));
        let of_peer: Vec<&Ports<'_>> = named.filter_map(|peer| self.by_peer.get(&peer)).collect();
        let admitted = || of_peer.iter().copied().chain([&self.everybody]);
        if admitted().any(|ports| ports.all) {
            return PortSet::all();
        }
        PortSet::of_ranges(admitted().flat_map(|ports| &ports.matches).flat_map(|port| port.ranges(ports)))
    }
}

/// Who decides about one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decider<'a> {
    /// A rule, counted from 1.
    Rule { policy: &'a PolicyRef, number: usize, rule: &'a Rule },
    /// NetworkPolicies select the pod and none of their rules matches.
    Isolation,
    /// No rule matches: what no policy forbids is allowed.
    Default,
}

impl<'a> Tiers<'a> {
    /// The policies that `rules` gives for the names of a class, whose order is that of the tiers.
    pub(super) fn of(class: &'a ClassKey, rules: impl Fn(&PolicyRef) -> Option<&'a PolicyRules>) -> Self {
        let policies = class.policies.iter().filter_map(|name| Some((&**name, rules(name)?))).collect();
        Self { policies, admitting: OnceCell::new() }
    }

    /// What the peer may use.
    pub(super) fn allowed(&self, class: &ClassKey, peer: &IdentityKey) -> PortSet {
        let ports = target_ports(class, peer);
        let (allowed, open) = self.ordered(Tier::Admin, PortSet::all(), peer, ports);
        if self.of_tier(Tier::NetworkPolicy).next().is_some() {
            let policies = || self.of_tier(Tier::NetworkPolicy).map(|(_, policy)| policy);
            let admitting = self.admitting.get_or_init(|| Admitting::of(policies()));
            return allowed.union(&admitting.allowed(peer, ports).intersection(&open));
        }
        let (accepted, open) = self.ordered(Tier::Baseline, open, peer, ports);
        allowed.union(&accepted).union(&open)
    }

    /// What a tier of ordered rules accepts of `traffic`, and what it leaves to the next tier.
    fn ordered(
        &self,
        tier: Tier,
        mut traffic: PortSet,
        peer: &IdentityKey,
        ports: &ResolvedPorts,
    ) -> (PortSet, PortSet) {
        let (mut accepted, mut passed) = (PortSet::default(), PortSet::default());
        for (_, policy) in self.of_tier(tier) {
            for rule in matching(policy, peer) {
                let matched = rule.traffic(ports).intersection(&traffic);
                traffic = traffic.difference(&matched);
                match rule.action {
                    Action::Accept => accepted = accepted.union(&matched),
                    Action::Pass => passed = passed.union(&matched),
                    Action::Deny => {}
                }
            }
        }
        (accepted, traffic.union(&passed))
    }

    /// Who decides about one port.
    pub(super) fn decider(
        &self,
        class: &ClassKey,
        peer: &IdentityKey,
        proto: Proto,
        port: u16,
    ) -> Decider<'a> {
        let ports = target_ports(class, peer);
        for tier in [Tier::Admin, Tier::NetworkPolicy, Tier::Baseline] {
            let found = self.of_tier(tier).find_map(|(name, policy)| {
                let rules = (1..).zip(&policy.rules);
                let mut matching = rules.filter(|(_, rule)| {
                    rule.matches_peer(&peer.selectors, &peer.blocks)
                        && rule.traffic(ports).contains(proto, port)
                });
                matching.next().map(|(number, rule)| Decider::Rule { policy: name, number, rule })
            });
            match found {
                Some(Decider::Rule { rule: Rule { action: Action::Pass, .. }, .. }) => {}
                Some(found) => return found,
                None if tier == Tier::NetworkPolicy && self.of_tier(tier).next().is_some() => {
                    return Decider::Isolation;
                }
                None => {}
            }
        }
        Decider::Default
    }

    fn of_tier(&self, tier: Tier) -> impl Iterator<Item = (&'a PolicyRef, &'a PolicyRules)> + '_ {
        self.policies.iter().copied().filter(move |(name, _)| name.tier == tier)
    }
}

fn matching<'a>(policy: &'a PolicyRules, peer: &'a IdentityKey) -> impl Iterator<Item = &'a Rule> {
    policy.rules.iter().filter(|rule| rule.matches_peer(&peer.selectors, &peer.blocks))
}

/// A port name is resolved for the target: the subject itself for ingress, the peer for egress.
fn target_ports<'a>(class: &'a ClassKey, peer: &'a IdentityKey) -> &'a ResolvedPorts {
    match class.direction {
        Direction::Ingress => &class.ports,
        Direction::Egress => &peer.ports,
    }
}
