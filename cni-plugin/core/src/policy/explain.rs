//! Who decides about a connection: the compiled model names the tier, the policy and the rule.

use std::net::IpAddr;

use super::lookup::{Direction, allows};
use super::model::{Model, Subject};
use super::numbering::Numbering;
use super::reference::PolicyRef;
use super::rules::Action;
use super::tiers::{Decider, Tiers};
use crate::objects::{ObjectName, Objects};
use crate::ports::Proto;
use crate::ruleset::ClassId;

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

/// Explains a connection from `from` to `port` of `to`. Both ends are compiled as if they ran here, so any node's agent
/// gives the same answer. `endpoints` are the local leases, which decide about addresses.
#[must_use]
pub fn explain(
    objects: &Objects,
    endpoints: &[Subject],
    from: &Party,
    to: &Party,
    proto: Proto,
    port: u16,
) -> Explanation {
    let mut subjects = endpoints.to_vec();
    for party in [from, to] {
        let known = subjects.iter().any(|subject| subject.addresses.contains(&party.address));
        if party.pod.is_some() && !known {
            let addresses = vec![party.address];
            subjects.push(Subject { pod: party.pod.clone(), uid: String::new(), addresses });
        }
    }
    let model = Model::compile(objects, &subjects, &mut Numbering::default());
    if from.address == to.address {
        let reason = "the connection stays inside the pod and never reaches a policy".to_owned();
        let answer = DirectionAnswer { allowed: true, decided_by: None, reason };
        return Explanation { egress: answer.clone(), ingress: answer };
    }
    Explanation {
        egress: answer(&model, Direction::Egress, from, to, proto, port),
        ingress: answer(&model, Direction::Ingress, to, from, proto, port),
    }
}

fn answer(
    model: &Model,
    direction: Direction,
    subject: &Party,
    peer: &Party,
    proto: Proto,
    port: u16,
) -> DirectionAnswer {
    let allowed = allows(&model.ruleset, direction, subject.address, peer.address, proto, port);
    let word = match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    };
    let (classes, policies, numbers) = match direction {
        Direction::Ingress => (&model.classes_in, &model.policies_in, &model.ruleset.cls_in),
        Direction::Egress => (&model.classes_eg, &model.policies_eg, &model.ruleset.cls_eg),
    };
    let (subject_name, peer_name) = (name(subject), name(peer));
    let Some(class) = classes.get(&subject.address) else {
        let reason = if numbers.get(&subject.address) == Some(&ClassId::DENY_ALL) {
            format!("{subject_name} is attached but its Pod object is not known, so it is denied everything")
        } else {
            format!("no policy selects {subject_name} for {word}")
        };
        return DirectionAnswer { allowed, decided_by: None, reason };
    };
    let tiers = Tiers::of(class, |name| policies.get(name));
    match tiers.decider(class, &model.identity_of(peer.address), proto, port) {
        Decider::Rule { policy, number, rule } => {
            let verb = match rule.action {
                Action::Accept => "admits",
                Action::Deny | Action::Pass => "denies",
            };
            let quoted = if rule.name.is_empty() { String::new() } else { format!(" \"{}\"", rule.name) };
            let reason = format!(
                "policy {policy}, {word} rule {number}{quoted}, {verb} {peer_name} on {proto} port {port}"
            );
            let decision = Decision { policy: policy.clone(), rule: number, rule_name: rule.name.clone() };
            DirectionAnswer { allowed, decided_by: Some(decision), reason }
        }
        Decider::Isolation => {
            let isolating = class.policies.iter().filter(|policy| policy.tier == super::Tier::NetworkPolicy);
            let names: Vec<String> = isolating.map(ToString::to_string).collect();
            let reason = format!(
                "{subject_name} is isolated for {word} by {} and no rule admits {peer_name} on {proto} port {port}",
                names.join(", ")
            );
            DirectionAnswer { allowed, decided_by: None, reason }
        }
        Decider::Default => {
            let reason = format!(
                "no {word} rule of the policies that select {subject_name} matches {peer_name} on {proto} port {port}"
            );
            DirectionAnswer { allowed, decided_by: None, reason }
        }
    }
}

fn name(party: &Party) -> String {
    party.pod.as_ref().map_or_else(|| party.address.to_string(), ToString::to_string)
}
