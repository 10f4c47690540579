//! One commit: from what changes reach to the elements that differ.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::cluster::hash;
use super::{Compiler, Membership, Range};
use crate::policy::lookup::Direction;
use crate::policy::reference::PolicyRef;
use crate::policy::rules::PeerRef;
use crate::ruleset::{ClassId, Delta, Key};

/// What a commit has found so far, and how it was before.
#[derive(Debug, Default)]
pub(super) struct Round {
    pub moves: Vec<Move>,
    pub new_classes: BTreeSet<u32>,
    pub ended_classes: BTreeSet<u32>,
    /// Classes that took the place of others with their number: the peers whose pairs may differ; `None`: all.
    pub succeeded: BTreeMap<u32, Option<BTreeSet<PeerRef>>>,
    /// Classes whose rules changed.
    pub changed_classes: BTreeSet<u32>,
    /// Classes that an endpoint left.
    pub left: BTreeSet<u32>,
    pub changed_policies: BTreeMap<Arc<PolicyRef>, Option<BTreeSet<PeerRef>>>,
    pub new_identities: BTreeSet<u32>,
    /// Pairs that changed, by identity and class, as they were.
    pub pairs_before: BTreeMap<(Option<u32>, u32), Option<u32>>,
    /// Where the ranges changed: as they were.
    pub ranges_before: Option<Vec<Range>>,
    /// What addresses looked like before and look like now, for those that changed.
    pub shifted: BTreeSet<(View, View)>,
}

/// What the kernel finds for an address: its exact identity, and that of its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct View {
    pub exact: Option<u32>,
    pub range: Option<u32>,
}

impl View {
    pub(super) fn of_range(range: Option<u32>) -> Self {
        Self { exact: None, range }
    }
}

/// An endpoint's way from one class to another.
#[derive(Debug)]
pub(super) struct Move {
    pub addresses: Vec<IpAddr>,
    pub direction: Direction,
    pub before: Membership,
    pub now: Membership,
    /// The endpoint is new.
    pub fresh: bool,
}

pub(super) fn commit(compiler: &mut Compiler) -> Delta {
    let mut round = Round::default();
    let mut delta = Delta::default();
    compiler.reclassify(&mut round);
    compiler.succeed(&mut round);
    compiler.register_classes(&mut round);
    round.changed_policies = std::mem::take(&mut compiler.dirty.policies);
    compiler.refresh_ranges(&mut round, &mut delta);
    compiler.refresh_addresses(&mut round, &mut delta);
    compiler.refresh_pairs(&mut round, &mut delta);
    delta.revokes = compiler.revokes(&round);
    compiler.end_identities(&round, &mut delta);
    compiler.end_classes(&round, &mut delta);
    compiler.renumber_classes(&round, &mut delta);
    compiler.place_endpoints(&round, &mut delta);
    delta
}

impl Compiler {
    fn place_endpoints(&self, round: &Round, delta: &mut Delta) {
        for moved in &round.moves {
            let class = match moved.now {
                Membership::Open => None,
                Membership::DenyAll => Some(ClassId::DENY_ALL.0),
                Membership::In(class) => Some(self.classes[class].number.0),
            };
            for address in &moved.addresses {
                delta.set(class_key(moved.direction, *address), class);
            }
        }
    }

    /// Removes identities that no address has any more.
    fn end_identities(&mut self, round: &Round, delta: &mut Delta) {
        let shifted =
            round.shifted.iter().flat_map(|(from, to)| [from.exact, from.range, to.exact, to.range]);
        let old_ranges = round.ranges_before.iter().flatten().map(|range| Some(range.identity));
        let candidates: BTreeSet<u32> =
            shifted.chain(old_ranges).flatten().chain(round.new_identities.iter().copied()).collect();
        for slot in candidates {
            if self.identities.get(slot).is_none_or(|identity| identity.uses > 0) {
                continue;
            }
            for class in self.identities[slot].classes.clone() {
                delta.set(self.pair_key(class, Some(slot)), None);
                if let Some(profile) = self.classes[class].pairs.remove(&Some(slot)) {
                    self.drop_profile(profile);
                }
            }
            let Some(identity) = self.identities.remove(slot) else { continue };
            for number in &identity.key.selectors {
                if let Some(entry) = self.peers.selectors.get_mut(*number) {
                    entry.identities.remove(&slot);
                }
                self.peers.selectors.forget_if_unused(*number);
            }
            for number in &identity.key.blocks {
                if let Some(entry) = self.peers.blocks.get_mut(*number) {
                    entry.identities.remove(&slot);
                }
                self.peers.blocks.forget_if_unused(*number);
            }
            if let Ok(entry) = self.identity_keys.find_entry(hash(&identity.key), |other| *other == slot) {
                entry.remove();
            }
            self.identity_numbers.give_back(identity.number.0);
        }
    }

    fn end_classes(&mut self, round: &Round, delta: &mut Delta) {
        for slot in &round.ended_classes {
            let pairs: Vec<(Option<u32>, u32)> =
                self.classes[*slot].pairs.iter().map(|(of, profile)| (*of, *profile)).collect();
            for (of, profile) in pairs {
                delta.set(self.pair_key(*slot, of), None);
                if let Some(identity) = of {
                    self.identities[identity].classes.remove(slot);
                }
                self.drop_profile(profile);
            }
            let Some(class) = self.classes.remove(*slot) else { continue };
            self.class_keys.remove(&class.key);
            self.class_numbers.give_back(class.number.0);
        }
    }

    /// A class that got other rules while an endpoint left it gets another number: a packet that found the endpoint still
    /// in it must not find the new rules.
    fn renumber_classes(&mut self, round: &Round, delta: &mut Delta) {
        let both = round.changed_classes.intersection(&round.left);
        let slots: Vec<u32> = both.filter(|slot| !round.ended_classes.contains(slot)).copied().collect();
        for slot in slots {
            let pairs = self.classes[slot].pairs.clone();
            for of in pairs.keys() {
                delta.set(self.pair_key(slot, *of), None);
            }
            let before = self.classes[slot].number;
            self.renumber_class(slot);
            for (of, profile) in &pairs {
                delta.set(self.pair_key(slot, *of), Some(self.profiles[*profile].number.0));
            }
            self.class_numbers.give_back(before.0);
            let class = &self.classes[slot];
            let direction = class.key.direction;
            let inside = |local: &&super::Local| local.membership(direction) == Membership::In(slot);
            for address in self.locals.values().filter(inside).flat_map(|local| &local.subject.addresses) {
                delta.set(class_key(direction, *address), Some(class.number.0));
            }
        }
    }
}

pub(super) fn class_key(direction: Direction, address: IpAddr) -> Key {
    match direction {
        Direction::Ingress => Key::ClsIn(address),
        Direction::Egress => Key::ClsEg(address),
    }
}
