//! What all policies of a class together say about a peer: the tiers in their order.
//!
//! ```text
//! Admin, by priority      Accept, Deny decide; Pass leaves the tier; the rest goes on
//! NetworkPolicy           where one selects the pod, all of them together decide; else the rest goes on
//! Baseline, by priority   Accept, Deny decide; Pass leaves the tier; the rest is allowed
//! ```

use super::compiler::{ClassKey, IdentityKey};
use super::lookup::Direction;
use super::reference::{PolicyRef, Tier};
use super::rules::{Action, PolicyRules, ResolvedPorts, Rule};
use crate::ports::{PortSet, Proto};

/// The policies of a class in the order in which they are asked.
pub(super) struct Tiers<'a> {
    policies: Vec<(&'a PolicyRef, &'a PolicyRules)>,
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
        Self { policies: class.policies.iter().filter_map(|name| Some((name, rules(name)?))).collect() }
    }

    /// What the peer may use.
    pub(super) fn allowed(&self, class: &ClassKey, peer: &IdentityKey) -> PortSet {
        let ports = target_ports(class, peer);
        let (mut allowed, open) = self.ordered(Tier::Admin, PortSet::all(), peer, ports);
        let mut isolated = false;
        for (_, policy) in self.of_tier(Tier::NetworkPolicy) {
            isolated = true;
            for rule in matching(policy, peer) {
                allowed = allowed.union(&rule.traffic(ports).intersection(&open));
            }
        }
        if isolated {
            return allowed;
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
