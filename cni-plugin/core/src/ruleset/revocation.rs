//! Whether a change takes anything away from a connection that may live.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{AddrRange, Changes, ClassId, Element, IdentityId, ProfileId, Ruleset};
use crate::policy::Direction;
use crate::ports::{PortRule, covers};

/// Errs towards `true`: a needless revision costs each live connection one slow path, a missing one leaves a forbidden
/// connection alive.
pub(super) fn revokes(old: &Ruleset, new: &Ruleset, changes: &Changes) -> bool {
    if changes.remove.iter().any(|element| removal_revokes(old, new, element)) {
        return true;
    }
    let additions = Additions::new(old, new);
    changes.add.iter().any(|element| additions.revoke(element))
}

fn removal_revokes(old: &Ruleset, new: &Ruleset, element: &Element) -> bool {
    match element {
        // Leaving a class without entering another opens; from deny-all every other class is wider.
        Element::ClsIn(address, class) => *class != ClassId::DENY_ALL && new.cls_in.contains_key(address),
        Element::ClsEg(address, class) => *class != ClassId::DENY_ALL && new.cls_eg.contains_key(address),
        Element::Ident(_, identity) | Element::Cidr(_, identity) => used_identity(old, *identity),
        Element::PairIn(class, identity, profile) => {
            narrows(old, new, *profile, new.pair_in.get(&(*class, *identity)))
        }
        Element::PairEg(class, identity, profile) => {
            narrows(old, new, *profile, new.pair_eg.get(&(*class, *identity)))
        }
        Element::Profile(id, _) => used_profile(old, *id) && narrows(old, new, *id, Some(id)),
        // Its address may be handed out again while entries of the old pod's connections live on.
        Element::Pin(_) => true,
        // A translation is made at a connection's first packet; what lives keeps it, and policy judges its pod's own port.
        Element::Nat(_) => false,
    }
}

/// What additions do. A pair or an identity that is new is final, and a policy that denies makes it narrower than what the
/// fallback allowed: it is compared with that.
struct Additions<'a> {
    old: &'a Ruleset,
    new: &'a Ruleset,
    /// The classes with a pair for an identity, in the new ruleset.
    classes: BTreeMap<IdentityId, BTreeSet<(Direction, ClassId)>>,
    /// One of the addresses that had an identity: all of them lie in ranges of one identity.
    holders: BTreeMap<IdentityId, IpAddr>,
    /// Identities that ranges had.
    of_ranges: BTreeSet<IdentityId>,
}

/// What the lookups find for an address: its exact identity, then its range's.
type View = [Option<IdentityId>; 2];

impl<'a> Additions<'a> {
    fn new(old: &'a Ruleset, new: &'a Ruleset) -> Self {
        let mut classes: BTreeMap<IdentityId, BTreeSet<(Direction, ClassId)>> = BTreeMap::new();
        let ingress = new.pair_in.keys().map(|pair| (Direction::Ingress, pair));
        for (direction, (class, identity)) in
            ingress.chain(new.pair_eg.keys().map(|pair| (Direction::Egress, pair)))
        {
            classes.entry(*identity).or_default().insert((direction, *class));
        }
        let holders = old.ident.iter().map(|(address, identity)| (*identity, *address)).collect();
        Self { old, new, classes, holders, of_ranges: old.cidr.values().copied().collect() }
    }

    fn revoke(&self, element: &Element) -> bool {
        match element {
            // Isolating a pod revokes, unless the pod is new: it has no connections yet, and those of an earlier pod with
            // its address lost their revision when that pod's pin was removed.
            Element::ClsIn(address, _) => {
                !self.old.cls_in.contains_key(address) && pinned(self.old, *address)
            }
            Element::ClsEg(address, _) => {
                !self.old.cls_eg.contains_key(address) && pinned(self.old, *address)
            }
            Element::Ident(address, identity) => {
                let before = [self.old.ident.get(address).copied(), range_identity(self.old, *address)];
                self.identity_narrows(*identity, before)
            }
            Element::Cidr(range, identity) => {
                self.identity_narrows(*identity, [None, range_identity(self.old, range.first)])
            }
            Element::PairIn(class, identity, profile) => {
                self.pair_narrows(Direction::Ingress, *class, *identity, *profile)
            }
            Element::PairEg(class, identity, profile) => {
                self.pair_narrows(Direction::Egress, *class, *identity, *profile)
            }
            Element::Profile(..) | Element::Pin(_) | Element::Nat(_) => false,
        }
    }

    /// Whether any class allows an address that gets `identity` less than it did when the address looked as `before`.
    fn identity_narrows(&self, identity: IdentityId, before: View) -> bool {
        let classes = self.classes.get(&identity).into_iter().flatten();
        classes.copied().any(|(direction, class)| {
            let now = allowed(self.new, direction, class, [Some(identity), None]);
            !covers(now, allowed(self.old, direction, class, before))
        })
    }

    /// Whether a pair that is new allows less than those that had the identity got without it.
    fn pair_narrows(
        &self,
        direction: Direction,
        class: ClassId,
        identity: IdentityId,
        profile: ProfileId,
    ) -> bool {
        // Nobody is behind anybody: such a pair was a deny.
        if identity == IdentityId::ANY {
            return false;
        }
        let now = rules(self.new, profile);
        let exact = self.holders.get(&identity);
        let of_exact = exact.map(|address| [Some(identity), range_identity(self.old, *address)]);
        let of_range = self.of_ranges.contains(&identity).then_some([None, Some(identity)]);
        let mut before = of_exact.into_iter().chain(of_range);
        before.any(|view| !covers(now, allowed(self.old, direction, class, view)))
    }
}

/// What a class allows a view: the first pair that is found is final, anybody's is the last.
fn allowed(ruleset: &Ruleset, direction: Direction, class: ClassId, view: View) -> &[PortRule] {
    let pairs = match direction {
        Direction::Ingress => &ruleset.pair_in,
        Direction::Egress => &ruleset.pair_eg,
    };
    let identities = view.into_iter().flatten().chain([IdentityId::ANY]);
    let found = identities.map(|identity| pairs.get(&(class, identity))).find_map(|profile| profile.copied());
    found.map_or(&[], |profile| rules(ruleset, profile))
}

fn rules(ruleset: &Ruleset, profile: ProfileId) -> &[PortRule] {
    ruleset.profiles.get(&profile).map_or(&[], Vec::as_slice)
}

/// The identity of the range that contains an address.
fn range_identity(ruleset: &Ruleset, address: IpAddr) -> Option<IdentityId> {
    let highest = match address {
        IpAddr::V4(_) => IpAddr::V4(std::net::Ipv4Addr::BROADCAST),
        IpAddr::V6(_) => IpAddr::V6(std::net::Ipv6Addr::from(u128::MAX)),
    };
    let (range, identity) = ruleset.cidr.range(..=AddrRange { first: address, last: highest }).next_back()?;
    (range.first.is_ipv4() == address.is_ipv4() && address <= range.last).then_some(*identity)
}

fn pinned(ruleset: &Ruleset, address: IpAddr) -> bool {
    ruleset.pins.iter().any(|pin| pin.address == address)
}

fn used_identity(ruleset: &Ruleset, identity: IdentityId) -> bool {
    ruleset.pair_in.keys().chain(ruleset.pair_eg.keys()).any(|(_, i)| *i == identity)
}

fn used_profile(ruleset: &Ruleset, profile: ProfileId) -> bool {
    ruleset.pair_in.values().chain(ruleset.pair_eg.values()).any(|p| *p == profile)
}

/// Whether going from `profile` of `old` to `successor` of `new` takes a port away.
fn narrows(old: &Ruleset, new: &Ruleset, profile: ProfileId, successor: Option<&ProfileId>) -> bool {
    let before = old.profiles.get(&profile).map_or(&[][..], Vec::as_slice);
    let after = successor.and_then(|id| new.profiles.get(id)).map_or(&[][..], Vec::as_slice);
    !covers(after, before)
}
