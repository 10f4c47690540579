//! Who decides about a connection: the compiled model names the policy and the rule.

use std::net::IpAddr;

use super::lookup::{Direction, allows};
use super::model::{Model, Subject, resolve};
use super::numbering::Numbering;
use crate::objects::{ObjectName, Objects};
use crate::ruleset::{ClassId, PortRule, Proto};

/// One end of a connection that is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Party {
    /// The pod; `None` for an address outside the cluster.
    pub pod: Option<ObjectName>,
    /// Its address.
    pub address: IpAddr,
}

/// The answer for one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectionAnswer {
    /// Whether this direction lets the connection pass.
    pub allowed: bool,
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
        let answer = DirectionAnswer { allowed: true, reason };
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
    let (classes, numbers) = match direction {
        Direction::Ingress => (&model.classes_in, &model.ruleset.cls_in),
        Direction::Egress => (&model.classes_eg, &model.ruleset.cls_eg),
    };
    let (subject_name, peer_name) = (name(subject), name(peer));
    let reason = match classes.get(&subject.address) {
        None if numbers.get(&subject.address) == Some(&ClassId::DENY_ALL) => {
            format!("{subject_name} is attached but its Pod object is not known, so it is denied everything")
        }
        None => format!("no policy isolates {subject_name} for {word}"),
        Some(class) => match deciding_rule(model, direction, subject, peer, proto, port) {
            Some((policy, number)) => {
                format!(
                    "policy {policy}, {word} rule {number}, admits {peer_name} on {}",
                    port_text(proto, port)
                )
            }
            None => {
                let names: Vec<String> = class.policies.iter().map(ToString::to_string).collect();
                format!(
                    "{subject_name} is isolated for {word} by {} and no rule admits {peer_name} on {}",
                    names.join(", "),
                    port_text(proto, port)
                )
            }
        },
    };
    DirectionAnswer { allowed, reason }
}

/// The first rule, in the order of the policies' names, that opens the port to the peer. Rules count from 1.
fn deciding_rule(
    model: &Model,
    direction: Direction,
    subject: &Party,
    peer: &Party,
    proto: Proto,
    port: u16,
) -> Option<(ObjectName, usize)> {
    let (classes, policies) = match direction {
        Direction::Ingress => (&model.classes_in, &model.policies_in),
        Direction::Egress => (&model.classes_eg, &model.policies_eg),
    };
    let class = classes.get(&subject.address)?;
    let identity = model.identity_of(peer.address);
    for policy in class.policies.iter().filter_map(|name| policies.get(name)) {
        for (number, rule) in (1..).zip(&policy.rules) {
            let opens = rule.admits(&identity.selectors, &identity.blocks)
                && rule.opened(|named| resolve(class, &identity, named)).any(|rule| match rule {
                    PortRule::All => true,
                    PortRule::Ports { proto: p, first, last } => p == proto && (first..=last).contains(&port),
                });
            if opens {
                return Some((policy.name.clone(), number));
            }
        }
    }
    None
}

fn name(party: &Party) -> String {
    party.pod.as_ref().map_or_else(|| party.address.to_string(), ToString::to_string)
}

fn port_text(proto: Proto, port: u16) -> String {
    let word = match proto {
        Proto::Tcp => "tcp",
        Proto::Udp => "udp",
        Proto::Sctp => "sctp",
    };
    format!("{word} port {port}")
}
