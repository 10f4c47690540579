//! The ruleset: compiled policy as the elements of the kernel's sets and maps.
//!
//! The chains and maps are fixed (see `docs/adr/0005-nf-tables-by-netlink.md`); pods, labels and policies are elements
//! only, so a packet's cost does not grow with their number:
//!
//! ```text
//! local pod address --cls_in/cls_eg--> class  \
//!                                              pair_in/pair_eg --> profile --profiles--> proto, port --> allow | deny
//! peer address --ident, else cidr, else ANY--> identity /
//! ```
//!
//! Invariants the compiler keeps:
//! - an address without a class is not isolated in that direction;
//! - a pair that is found is final: its profile holds all that applies to the peer, also what comes from CIDRs and
//!   "any peer" rules. A missing pair falls from `ident` to `cidr` to [`IdentityId::ANY`] to deny;
//! - `cidr` ranges are disjoint;
//! - a class, identity or profile number is never given another meaning in the change that frees it, because a packet's
//!   lookups may straddle the commit.

mod revocation;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::nat::{self, Nat, NatElement};
use crate::plan::{EndpointPlan, MacAddr};
use crate::ports::{PortRule, normalise};

/// Which policies select a pod in one direction (and its named ports): never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassId(pub u32);

impl ClassId {
    /// The class of a pod whose policies are not known yet: it has no pairs, so everything is denied. The compiler
    /// numbers its own classes from 2.
    pub const DENY_ALL: ClassId = ClassId(1);
}

/// Which selectors and CIDRs of the policies in force on this node match a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdentityId(pub u32);

impl IdentityId {
    /// Any peer, known or not: what a rule without `from`/`to` allows.
    pub const ANY: IdentityId = IdentityId(0);
}

/// A set of allowed ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProfileId(pub u32);

/// Addresses `first..=last`, both of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AddrRange {
    /// Lowest address.
    pub first: IpAddr,
    /// Highest address.
    pub last: IpAddr,
}

/// A pod's port may send frames from this MAC with this source address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pin {
    /// The host end of the pod's veth pair.
    pub ifname: String,
    /// The pod's MAC.
    pub mac: MacAddr,
    /// One of its addresses.
    pub address: IpAddr,
    /// The port is no bridge's: its packets are looked at where they enter the node's own IP stack.
    pub routed: bool,
}

/// The pins of an endpoint: its addresses, and with IPv6 the link-local address of its MAC.
pub fn pins_of(plan: &EndpointPlan) -> BTreeSet<Pin> {
    let link_local = plan.addresses.iter().any(IpAddr::is_ipv6).then(|| IpAddr::V6(plan.mac.link_local()));
    plan.addresses
        .iter()
        .copied()
        .chain(link_local)
        .map(|address| Pin {
            ifname: plan.host_ifname.clone(),
            mac: plan.mac,
            address,
            routed: plan.bridge.is_none(),
        })
        .collect()
}

/// Everything policy wants in the kernel; equal values are equal kernel states.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    /// Local pods isolated for ingress.
    pub cls_in: BTreeMap<IpAddr, ClassId>,
    /// Local pods isolated for egress.
    pub cls_eg: BTreeMap<IpAddr, ClassId>,
    /// Peers by exact address (pods, here and elsewhere).
    pub ident: BTreeMap<IpAddr, IdentityId>,
    /// Peers by range; disjoint.
    pub cidr: BTreeMap<AddrRange, IdentityId>,
    /// What a class may receive from an identity.
    pub pair_in: BTreeMap<(ClassId, IdentityId), ProfileId>,
    /// What a class may send to an identity.
    pub pair_eg: BTreeMap<(ClassId, IdentityId), ProfileId>,
    /// What the profiles allow, each in the form of [`normalise`]. One that is not here has no rule and denies everything, as
    /// in the kernel, where only rules are elements.
    pub profiles: BTreeMap<ProfileId, Vec<PortRule>>,
    /// The source pins of the local pods' ports.
    pub pins: BTreeSet<Pin>,
    /// Address translation.
    pub nat: Nat,
}

impl Ruleset {
    /// What pins the endpoint's sources, leads its host ports to it, and denies it everything, both directions, unless it already has a
    /// class there: the state of a pod whose policies are not known.
    #[must_use]
    pub fn quarantine(&self, plan: &EndpointPlan) -> Changes {
        let mut changes = Changes::default();
        changes.add.extend(pins_of(plan).difference(&self.pins).cloned().map(Element::Pin));
        for address in &plan.addresses {
            if !self.cls_in.contains_key(address) {
                changes.add.push(Element::ClsIn(*address, ClassId::DENY_ALL));
            }
            if !self.cls_eg.contains_key(address) {
                changes.add.push(Element::ClsEg(*address, ClassId::DENY_ALL));
            }
        }
        self.nat.attach(plan, &mut changes);
        changes
    }

    /// What removes the pins of `host_ifname`, and the classes and host ports of the addresses that no other port has. It revokes: an
    /// address may be handed out again while entries of the old pod's connections live on.
    #[must_use]
    pub fn forget_port(&self, host_ifname: &str) -> Changes {
        let (gone, kept): (Vec<&Pin>, Vec<&Pin>) =
            self.pins.iter().partition(|pin| pin.ifname == host_ifname);
        let mut changes = Changes { revokes: !gone.is_empty(), ..Changes::default() };
        let mut addresses = BTreeSet::new();
        for pin in gone {
            changes.remove.push(Element::Pin(pin.clone()));
            if kept.iter().any(|other| other.address == pin.address) {
                continue;
            }
            addresses.insert(pin.address);
            let (ingress, egress) = (self.cls_in.get(&pin.address), self.cls_eg.get(&pin.address));
            changes.remove.extend(ingress.map(|class| Element::ClsIn(pin.address, *class)));
            changes.remove.extend(egress.map(|class| Element::ClsEg(pin.address, *class)));
        }
        self.nat.forget(&addresses, &mut changes);
        changes
    }

    /// Whether the kernel can take this ruleset as it is.
    pub fn validate(&self) -> Result<(), RulesetError> {
        let mut previous: Option<AddrRange> = None;
        for range in self.cidr.keys() {
            if range.first.is_ipv4() != range.last.is_ipv4() || range.first > range.last {
                return Err(RulesetError::BadRange(*range));
            }
            if let Some(before) =
                previous.filter(|p| p.first.is_ipv4() == range.first.is_ipv4() && p.last >= range.first)
            {
                return Err(RulesetError::Overlap(before, *range));
            }
            previous = Some(*range);
        }
        for (id, rules) in &self.profiles {
            if *rules != normalise(rules.iter().copied()) {
                return Err(RulesetError::NotNormal(*id));
            }
        }
        Ok(())
    }
}

/// A ruleset that breaks an invariant; a bug of whoever made it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RulesetError {
    /// A range that ends before it begins or mixes families.
    #[error("address range {0:?} is not a range of one family")]
    BadRange(AddrRange),
    /// Two ranges that share addresses.
    #[error("address ranges {0:?} and {1:?} overlap; split them into disjoint ones")]
    Overlap(AddrRange, AddrRange),
    /// A profile that is not in normal form.
    #[error("profile {0:?} is not sorted, merged and disjoint")]
    NotNormal(ProfileId),
}

/// One element of a set or map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    /// `cls_in`
    ClsIn(IpAddr, ClassId),
    /// `cls_eg`
    ClsEg(IpAddr, ClassId),
    /// `ident`
    Ident(IpAddr, IdentityId),
    /// `cidr`
    Cidr(AddrRange, IdentityId),
    /// `pair_in`
    PairIn(ClassId, IdentityId, ProfileId),
    /// `pair_eg`
    PairEg(ClassId, IdentityId, ProfileId),
    /// One rule of a profile.
    Profile(ProfileId, PortRule),
    /// A source pin.
    Pin(Pin),
    /// Of address translation.
    Nat(NatElement),
}

/// What an element is for; an element is a key with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// `cls_in`
    ClsIn(IpAddr),
    /// `cls_eg`
    ClsEg(IpAddr),
    /// `ident`
    Ident(IpAddr),
    /// `cidr`
    Cidr(AddrRange),
    /// `pair_in`
    PairIn(ClassId, IdentityId),
    /// `pair_eg`
    PairEg(ClassId, IdentityId),
    /// One rule of a profile. It has no value: any will do.
    Profile(ProfileId, PortRule),
}

impl Key {
    /// The element of this key with a value.
    #[must_use]
    pub fn element(self, value: u32) -> Element {
        match self {
            Self::ClsIn(address) => Element::ClsIn(address, ClassId(value)),
            Self::ClsEg(address) => Element::ClsEg(address, ClassId(value)),
            Self::Ident(address) => Element::Ident(address, IdentityId(value)),
            Self::Cidr(range) => Element::Cidr(range, IdentityId(value)),
            Self::PairIn(class, identity) => Element::PairIn(class, identity, ProfileId(value)),
            Self::PairEg(class, identity) => Element::PairEg(class, identity, ProfileId(value)),
            Self::Profile(profile, rule) => Element::Profile(profile, rule),
        }
    }
}

/// What some keys are to be; all others stay. Saying what is so already changes nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta {
    /// The values; `None`: no element.
    pub keys: BTreeMap<Key, Option<u32>>,
    /// As in [`Changes`].
    pub revokes: bool,
}

impl Delta {
    /// Says what a key is to be.
    pub fn set(&mut self, key: Key, value: Option<u32>) {
        self.keys.insert(key, value);
    }
}

impl Ruleset {
    /// The value of a key; 0 for a rule of a profile that is there.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<u32> {
        match key {
            Key::ClsIn(address) => self.cls_in.get(address).map(|class| class.0),
            Key::ClsEg(address) => self.cls_eg.get(address).map(|class| class.0),
            Key::Ident(address) => self.ident.get(address).map(|identity| identity.0),
            Key::Cidr(range) => self.cidr.get(range).map(|identity| identity.0),
            Key::PairIn(class, identity) => self.pair_in.get(&(*class, *identity)).map(|profile| profile.0),
            Key::PairEg(class, identity) => self.pair_eg.get(&(*class, *identity)).map(|profile| profile.0),
            Key::Profile(profile, rule) => {
                self.profiles.get(profile).filter(|rules| rules.contains(rule)).map(|_| 0)
            }
        }
    }

    /// The elements that a delta changes here.
    #[must_use]
    pub fn changes(&self, delta: &Delta) -> Changes {
        let mut changes = Changes { revokes: delta.revokes, ..Changes::default() };
        for (key, value) in &delta.keys {
            let before = self.get(key);
            if before != *value {
                changes.remove.extend(before.map(|before| key.element(before)));
                changes.add.extend(value.map(|value| key.element(value)));
            }
        }
        changes
    }

    /// Makes the changes.
    pub fn apply(&mut self, changes: &Changes) {
        changes.remove.iter().for_each(|element| self.take_out(element));
        changes.add.iter().for_each(|element| self.put_in(element));
    }

    fn take_out(&mut self, element: &Element) {
        match element {
            Element::ClsIn(address, _) => drop(self.cls_in.remove(address)),
            Element::ClsEg(address, _) => drop(self.cls_eg.remove(address)),
            Element::Ident(address, _) => drop(self.ident.remove(address)),
            Element::Cidr(range, _) => drop(self.cidr.remove(range)),
            Element::PairIn(class, identity, _) => drop(self.pair_in.remove(&(*class, *identity))),
            Element::PairEg(class, identity, _) => drop(self.pair_eg.remove(&(*class, *identity))),
            Element::Profile(profile, rule) => {
                let Some(rules) = self.profiles.get_mut(profile) else { return };
                rules.retain(|own| own != rule);
                if rules.is_empty() {
                    self.profiles.remove(profile);
                }
            }
            Element::Pin(pin) => drop(self.pins.remove(pin)),
            Element::Nat(element) => self.nat.take_out(element),
        }
    }

    fn put_in(&mut self, element: &Element) {
        match element {
            Element::ClsIn(address, class) => drop(self.cls_in.insert(*address, *class)),
            Element::ClsEg(address, class) => drop(self.cls_eg.insert(*address, *class)),
            Element::Ident(address, identity) => drop(self.ident.insert(*address, *identity)),
            Element::Cidr(range, identity) => drop(self.cidr.insert(*range, *identity)),
            Element::PairIn(class, identity, profile) => {
                self.pair_in.insert((*class, *identity), *profile);
            }
            Element::PairEg(class, identity, profile) => {
                self.pair_eg.insert((*class, *identity), *profile);
            }
            Element::Profile(profile, rule) => {
                let rules = self.profiles.entry(*profile).or_default();
                if let Err(index) = rules.binary_search(rule) {
                    rules.insert(index, *rule);
                }
            }
            Element::Pin(pin) => {
                self.pins.insert(pin.clone());
            }
            Element::Nat(element) => self.nat.put_in(element),
        }
    }
}

/// The difference between two rulesets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Elements to take out, before the additions of the same transaction: a changed value is both.
    pub remove: Vec<Element>,
    /// Elements to put in.
    pub add: Vec<Element>,
    /// Something that was allowed may now be denied, so live connections must be judged again: the transaction must
    /// also advance the policy revision. May be true without need, never false where it is needed.
    pub revokes: bool,
}

impl Changes {
    /// Nothing to do.
    pub fn is_empty(&self) -> bool {
        self.remove.is_empty() && self.add.is_empty()
    }
}

/// What turns `old` into `new`.
pub fn diff(old: &Ruleset, new: &Ruleset) -> Changes {
    let mut changes = Changes::default();
    diff_map(&old.cls_in, &new.cls_in, &mut changes, |a, c| Element::ClsIn(*a, *c));
    diff_map(&old.cls_eg, &new.cls_eg, &mut changes, |a, c| Element::ClsEg(*a, *c));
    diff_map(&old.ident, &new.ident, &mut changes, |a, i| Element::Ident(*a, *i));
    diff_map(&old.cidr, &new.cidr, &mut changes, |r, i| Element::Cidr(*r, *i));
    diff_map(&old.pair_in, &new.pair_in, &mut changes, |(c, i), p| Element::PairIn(*c, *i, *p));
    diff_map(&old.pair_eg, &new.pair_eg, &mut changes, |(c, i), p| Element::PairEg(*c, *i, *p));
    diff_profiles(old, new, &mut changes);
    changes.remove.extend(old.pins.difference(&new.pins).cloned().map(Element::Pin));
    changes.add.extend(new.pins.difference(&old.pins).cloned().map(Element::Pin));
    nat::diff(&old.nat, &new.nat, &mut changes);
    changes.revokes = revocation::revokes(old, new, &changes);
    changes
}

fn diff_map<K: Ord, V: PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    changes: &mut Changes,
    element: impl Fn(&K, &V) -> Element,
) {
    for (key, value) in old {
        if new.get(key) != Some(value) {
            changes.remove.push(element(key, value));
        }
    }
    for (key, value) in new {
        if old.get(key) != Some(value) {
            changes.add.push(element(key, value));
        }
    }
}

fn diff_profiles(old: &Ruleset, new: &Ruleset, changes: &mut Changes) {
    let rules = |ruleset: &Ruleset| -> BTreeSet<(ProfileId, PortRule)> {
        ruleset.profiles.iter().flat_map(|(id, rules)| rules.iter().map(|rule| (*id, *rule))).collect()
    };
    let (before, after) = (rules(old), rules(new));
    changes.remove.extend(before.difference(&after).map(|(id, rule)| Element::Profile(*id, *rule)));
    changes.add.extend(after.difference(&before).map(|(id, rule)| Element::Profile(*id, *rule)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::BridgePlan;
    use crate::ports::Proto;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn mk_ruleset() -> Ruleset {
        let mut r = Ruleset::default();
        r.cls_in.insert(ip(1), ClassId(2));
        r.ident.insert(ip(2), IdentityId(1));
        r.pair_in.insert((ClassId(2), IdentityId(1)), ProfileId(1));
        r.profiles.insert(ProfileId(1), vec![PortRule::port(Proto::Tcp, 80)]);
        r.pins.insert(Pin {
            ifname: "hfv1".into(),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            address: ip(1),
            routed: false,
        });
        r
    }

    #[test]
    fn an_equal_ruleset_has_no_changes() {
        let changes = diff(&mk_ruleset(), &mk_ruleset());
        assert!(changes.is_empty() && !changes.revokes);
    }

    #[test]
    fn a_changed_value_is_removed_and_added() {
        let old = mk_ruleset();
        let mut new = mk_ruleset();
        new.ident.insert(ip(2), IdentityId(7));
        let changes = diff(&old, &new);
        assert_eq!(changes.remove, vec![Element::Ident(ip(2), IdentityId(1))]);
        assert_eq!(changes.add, vec![Element::Ident(ip(2), IdentityId(7))]);
        assert!(changes.revokes);
    }

    #[test]
    fn widening_a_profile_does_not_revoke_and_narrowing_does() {
        let old = mk_ruleset();
        let mut wide = mk_ruleset();
        wide.profiles.insert(ProfileId(1), vec![PortRule::Ports { proto: Proto::Tcp, first: 80, last: 90 }]);
        assert!(!diff(&old, &wide).revokes);
        assert!(diff(&wide, &old).revokes);
    }

    #[test]
    fn isolating_a_known_pod_revokes_and_a_new_pod_does_not() {
        let old = mk_ruleset();
        let mut isolated = mk_ruleset();
        isolated.cls_eg.insert(ip(1), ClassId(3));
        assert!(diff(&old, &isolated).revokes);

        let bridge = BridgePlan::for_node("n", 1500);
        let plan = EndpointPlan::new("c", "eth0", vec![ip(9)], &bridge);
        let mut quarantined = mk_ruleset();
        quarantined.apply(&old.quarantine(&plan));
        assert!(!diff(&old, &quarantined).revokes);

        let mut open = quarantined.clone();
        open.cls_in.insert(ip(9), ClassId(2));
        open.cls_eg.remove(&ip(9));
        assert!(!diff(&quarantined, &open).revokes, "from deny-all every class is wider");

        let mut gone = quarantined.clone();
        gone.apply(&quarantined.forget_port(&plan.host_ifname));
        assert_eq!(gone, old);
        assert!(diff(&quarantined, &gone).revokes, "the address may be handed out again");
    }

    #[test]
    fn taking_a_pair_or_a_used_identity_away_revokes() {
        let old = mk_ruleset();
        let mut no_pair = mk_ruleset();
        no_pair.pair_in.clear();
        assert!(diff(&old, &no_pair).revokes);
        assert!(!diff(&no_pair, &old).revokes);
        let mut no_ident = mk_ruleset();
        no_ident.ident.clear();
        assert!(diff(&old, &no_ident).revokes);
    }

    #[test]
    fn overlapping_ranges_are_refused() {
        let mut r = mk_ruleset();
        r.cidr.insert(AddrRange { first: ip(0), last: ip(10) }, IdentityId(2));
        r.cidr.insert(AddrRange { first: ip(10), last: ip(20) }, IdentityId(3));
        assert!(matches!(r.validate(), Err(RulesetError::Overlap(..))));
    }
}
