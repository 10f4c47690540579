//! The lookups that the kernel's chains do, over whoever holds the elements: a ruleset in memory, the compiler, a kernel that
//! is read element by element. Explaining and testing use it, so that all of them speak about the same data path.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv6Addr};

use crate::ports::{PortRule, PortSet, Proto};
use crate::ruleset::{AddrRange, ClassId, IdentityId, ProfileId, Ruleset};

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

/// One direction of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lookup {
    /// Which end is judged.
    pub direction: Direction,
    /// The address of the local pod that is judged.
    pub subject: IpAddr,
    /// The other end, of the same family.
    pub peer: IpAddr,
    /// The protocol.
    pub proto: Proto,
    /// The server's port.
    pub port: u16,
}

/// Holds elements, and is asked for single ones.
pub trait Elements {
    /// Why one cannot be told.
    type Error;

    /// The class of a local pod's address.
    ///
    /// # Errors
    /// It cannot be told; so for all of these.
    fn class(&mut self, direction: Direction, subject: IpAddr) -> Result<Option<ClassId>, Self::Error>;
    /// The identity of an exact address.
    fn exact(&mut self, peer: IpAddr) -> Result<Option<IdentityId>, Self::Error>;
    /// The range that an address is in, with its identity.
    fn range(&mut self, peer: IpAddr) -> Result<Option<(AddrRange, IdentityId)>, Self::Error>;
    /// The profile of a pair.
    fn pair(
        &mut self,
        direction: Direction,
        class: ClassId,
        identity: IdentityId,
    ) -> Result<Option<ProfileId>, Self::Error>;
    /// What a profile says of a port.
    fn port(&mut self, profile: ProfileId, proto: Proto, port: u16) -> Result<PortLookup, Self::Error>;
}

/// What the lookup of a port in a profile yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortLookup {
    /// A rule of the profile allows it.
    Allow,
    /// No rule does: the map's catch-all denies.
    Deny,
    /// Neither: the catch-all is missing, and the next lookup goes on. Only in a kernel that somebody else changed.
    Nothing,
}

/// One pair that was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairStep {
    /// With this identity.
    pub identity: IdentityId,
    /// What was found: the profile, and what it says of the port.
    pub found: Option<(ProfileId, PortLookup)>,
}

/// What the lookups of one direction found, in the order of the data path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// The subject's class; `None`: it is not isolated, and nothing else counts.
    pub class: Option<ClassId>,
    /// The peer's own identity. Told, like the range, also where it does not count.
    pub exact: Option<IdentityId>,
    /// The range that the peer is in.
    pub range: Option<(AddrRange, IdentityId)>,
    /// The pairs that were looked for, up to the one that decided.
    pub pairs: Vec<PairStep>,
}

impl Trace {
    /// Does the lookups.
    ///
    /// # Errors
    /// The first element that cannot be told.
    pub fn of<E: Elements>(elements: &mut E, lookup: &Lookup) -> Result<Self, E::Error> {
        let class = elements.class(lookup.direction, lookup.subject)?;
        let exact = elements.exact(lookup.peer)?;
        let range = elements.range(lookup.peer)?;
        let mut trace = Self { class, exact, range, pairs: Vec::new() };
        let Some(class) = class else { return Ok(trace) };
        for identity in [exact, range.map(|(_, identity)| identity), Some(IdentityId::ANY)] {
            let Some(identity) = identity else { continue };
            let profile = elements.pair(lookup.direction, class, identity)?;
            let found = match profile {
                Some(profile) => Some((profile, elements.port(profile, lookup.proto, lookup.port)?)),
                None => None,
            };
            trace.pairs.push(PairStep { identity, found });
            // The first pair that is found is final.
            if matches!(found, Some((_, PortLookup::Allow | PortLookup::Deny))) {
                break;
            }
        }
        Ok(trace)
    }

    /// The verdict: allowed where nobody isolates the subject or the pair that decided allows the port.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.class.is_none()
            || matches!(self.pairs.last(), Some(PairStep { found: Some((_, PortLookup::Allow)), .. }))
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
    let lookup = Lookup { direction, subject, peer, proto, port };
    match Trace::of(&mut &*ruleset, &lookup) {
        Ok(trace) => trace.is_allowed(),
        Err(never) => match never {},
    }
}

impl Elements for &Ruleset {
    type Error = Infallible;

    fn class(&mut self, direction: Direction, subject: IpAddr) -> Result<Option<ClassId>, Infallible> {
        let classes = match direction {
            Direction::Ingress => &self.cls_in,
            Direction::Egress => &self.cls_eg,
        };
        Ok(classes.get(&subject).copied())
    }

    fn exact(&mut self, peer: IpAddr) -> Result<Option<IdentityId>, Infallible> {
        Ok(self.ident.get(&peer).copied())
    }

    fn range(&mut self, peer: IpAddr) -> Result<Option<(AddrRange, IdentityId)>, Infallible> {
        let highest = IpAddr::V6(Ipv6Addr::from(u128::MAX));
        // Ranges are disjoint: the last one that begins here or before is the only one that may hold the address.
        let before = self.cidr.range(..=AddrRange { first: peer, last: highest }).next_back();
        let found = before.filter(|(range, _)| peer <= range.last);
        Ok(found.map(|(range, identity)| (*range, *identity)))
    }

    fn pair(
        &mut self,
        direction: Direction,
        class: ClassId,
        identity: IdentityId,
    ) -> Result<Option<ProfileId>, Infallible> {
        let pairs = match direction {
            Direction::Ingress => &self.pair_in,
            Direction::Egress => &self.pair_eg,
        };
        Ok(pairs.get(&(class, identity)).copied())
    }

    /// A profile that has no rule denies everything.
    fn port(&mut self, profile: ProfileId, proto: Proto, port: u16) -> Result<PortLookup, Infallible> {
        let rules: &[PortRule] = self.profiles.get(&profile).map_or(&[], Vec::as_slice);
        Ok(PortLookup::of(&rules.iter().copied().collect(), proto, port))
    }
}

impl PortLookup {
    /// What a profile that allows these ports says.
    pub(super) fn of(allowed: &PortSet, proto: Proto, port: u16) -> Self {
        if allowed.contains(proto, port) { Self::Allow } else { Self::Deny }
    }
}
