//! The lookups that the kernel's chains do, on a ruleset in memory. Explaining and testing use it, so that both speak
//! about what is programmed and not about what was meant.

use std::net::IpAddr;

use crate::ports::{PortRule, PortSet, Proto};
use crate::ruleset::{ClassId, IdentityId, Ruleset};

/// Which end of a connection is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// The server's end: may the subject be reached?
    Ingress,
    /// The client's end: may the subject reach out?
    Egress,
}

impl Direction {
    /// Both.
    pub const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];
}

impl std::fmt::Display for Direction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        })
    }
}

/// Whether the ruleset lets `subject` (a local pod's address) talk with `peer` in one direction. `port` is the server's.
#[must_use]
pub fn allows(
    ruleset: &Ruleset,
    direction: Direction,
    subject: IpAddr,
    peer: IpAddr,
    proto: Proto,
    port: u16,
) -> bool {
    let classes = match direction {
        Direction::Ingress => &ruleset.cls_in,
        Direction::Egress => &ruleset.cls_eg,
    };
    let Some(class) = classes.get(&subject) else { return true };
    let exact = ruleset.ident.get(&peer).copied();
    let range = range_identity(ruleset, peer);
    // The first pair that is found is final.
    let candidates = [exact, range, Some(IdentityId::ANY)];
    let rules =
        candidates.into_iter().flatten().find_map(|identity| rules(ruleset, direction, *class, identity));
    rules.is_some_and(|rules| rules.iter().copied().collect::<PortSet>().contains(proto, port))
}

fn range_identity(ruleset: &Ruleset, peer: IpAddr) -> Option<IdentityId> {
    let matching = ruleset.cidr.iter().find(|(range, _)| range.first <= peer && peer <= range.last);
    matching.map(|(_, identity)| *identity)
}

/// `None` where there is no pair; a pair whose profile has no rules denies everything.
fn rules(
    ruleset: &Ruleset,
    direction: Direction,
    class: ClassId,
    identity: IdentityId,
) -> Option<&[PortRule]> {
    let pairs = match direction {
        Direction::Ingress => &ruleset.pair_in,
        Direction::Egress => &ruleset.pair_eg,
    };
    let profile = pairs.get(&(class, identity))?;
    Some(ruleset.profiles.get(profile).map_or(&[], Vec::as_slice))
}
