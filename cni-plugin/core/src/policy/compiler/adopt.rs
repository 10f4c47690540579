//! Numbers of an earlier run: a restarted agent whose objects are unchanged writes nothing to the kernel.
//!
//! Nothing but the kernel's elements is read, so nothing has to be stored beside them. A number is adopted where keeping it
//! cannot mislead a packet whose lookups straddle the first commit: everything that has it now still has it after.

use std::collections::{BTreeMap, BTreeSet};

use super::commit::class_key;
use super::{Compiler, Membership};
use crate::ports::PortRule;
use crate::ruleset::{ClassId, IdentityId, Key, ProfileId, Ruleset};

/// For each number of the kernel: how many elements have it.
type Holders = BTreeMap<u32, usize>;

impl Compiler {
    /// Takes over the numbers of what `kernel` holds already, and numbers all else above them. To be called after the
    /// first commit, whose delta is void then: [`Compiler::ruleset`] has what belongs into the kernel.
    pub fn adopt(&mut self, kernel: &Ruleset) {
        self.adopt_classes(kernel);
        self.adopt_identities(kernel);
        self.adopt_profiles(kernel);
    }

    fn adopt_classes(&mut self, kernel: &Ruleset) {
        let mut held: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for local in self.locals.values() {
            for direction in crate::policy::lookup::Direction::BOTH {
                let Membership::In(slot) = local.membership(direction) else { continue };
                let keys = local.subject.addresses.iter().map(|address| class_key(direction, *address));
                held.entry(slot).or_default().extend(keys.filter_map(|key| kernel.get(&key)));
            }
        }
        let numbers = || kernel.cls_in.values().chain(kernel.cls_eg.values()).map(|class| class.0);
        let in_pairs = kernel.pair_in.keys().chain(kernel.pair_eg.keys()).map(|(class, _)| class.0);
        let floor = numbers().chain(in_pairs).max().unwrap_or_default().max(ClassId::DENY_ALL.0);
        let adopted = adopt(&held, &count(numbers().filter(|number| *number != ClassId::DENY_ALL.0)));
        self.class_numbers.restart(floor, adopted.values().copied().collect());
        for slot in self.classes.iter().map(|(slot, _)| slot).collect::<Vec<_>>() {
            match adopted.get(&slot) {
                Some(number) => self.classes[slot].number = ClassId(*number),
                None => self.renumber_class(slot),
            }
        }
    }

    fn adopt_identities(&mut self, kernel: &Ruleset) {
        let mut held: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (address, known) in self.addresses.iter() {
            if let Some(slot) = known.identity {
                held.entry(slot).or_default().extend(kernel.get(&Key::Ident(address)));
            }
        }
        for range in &self.ranges {
            held.entry(range.identity).or_default().extend(kernel.get(&Key::Cidr(range.range)));
        }
        let numbers = || kernel.ident.values().chain(kernel.cidr.values()).map(|identity| identity.0);
        let in_pairs = kernel.pair_in.keys().chain(kernel.pair_eg.keys()).map(|(_, identity)| identity.0);
        let floor = numbers().chain(in_pairs).max().unwrap_or_default();
        let adopted = adopt(&held, &count(numbers()));
        self.identity_numbers.restart(floor, adopted.values().copied().collect());
        for (slot, identity) in self.identities.iter_mut() {
            let number = adopted.get(&slot).copied();
            identity.number = IdentityId(number.unwrap_or_else(|| self.identity_numbers.take(1)));
        }
    }

    fn adopt_profiles(&mut self, kernel: &Ruleset) {
        let by_rules: BTreeMap<&Vec<PortRule>, ProfileId> =
            kernel.profiles.iter().map(|(number, rules)| (rules, *number)).collect();
        let in_pairs = kernel.pair_in.values().chain(kernel.pair_eg.values());
        let floor = kernel.profiles.keys().chain(in_pairs).map(|profile| profile.0).max().unwrap_or_default();
        let mut used = BTreeSet::new();
        let mut adopted = BTreeMap::new();
        for (slot, profile) in self.profiles.iter() {
            // An empty profile has no element by which the kernel could be asked for it.
            if let Some(number) = by_rules.get(&profile.allowed.rules()) {
                used.insert(number.0);
                adopted.insert(slot, *number);
            }
        }
        self.profile_numbers.restart(floor, used);
        for (slot, profile) in self.profiles.iter_mut() {
            let number = adopted.get(&slot).copied();
            profile.number = number.unwrap_or_else(|| ProfileId(self.profile_numbers.take(1)));
        }
        self.adopt_empty_profile(kernel);
    }

    /// The one profile without elements, which denies everything: its number is known by the pairs that have it.
    fn adopt_empty_profile(&mut self, kernel: &Ruleset) {
        let Some((slot, _)) = self.profiles.iter().find(|(_, profile)| profile.allowed.is_empty()) else {
            return;
        };
        let in_pairs = kernel.pair_in.values().chain(kernel.pair_eg.values());
        let empty = in_pairs.filter(|profile| !kernel.profiles.contains_key(profile)).min().copied();
        if let Some(number) = empty {
            self.profile_numbers.replace(self.profiles[slot].number.0, number.0);
            self.profiles[slot].number = number;
        }
    }

    pub(super) fn renumber_class(&mut self, slot: u32) {
        self.classes[slot].number = ClassId(self.class_numbers.take(ClassId::DENY_ALL.0 + 1));
    }
}

fn count(numbers: impl Iterator<Item = u32>) -> Holders {
    let mut holders = Holders::new();
    for number in numbers {
        *holders.entry(number).or_default() += 1;
    }
    holders
}

/// Which slots keep which number: all elements of the slot that the kernel knows have it, and no other element does.
fn adopt(held: &BTreeMap<u32, Vec<u32>>, holders: &Holders) -> BTreeMap<u32, u32> {
    let one = |numbers: &Vec<u32>| {
        let number = *numbers.first()?;
        let all =
            numbers.iter().all(|other| *other == number) && holders.get(&number) == Some(&numbers.len());
        all.then_some(number)
    };
    held.iter().filter_map(|(slot, numbers)| Some((*slot, one(numbers)?))).collect()
}
