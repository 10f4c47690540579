//! Pairs: what each class allows each identity.

use std::collections::{BTreeMap, BTreeSet};

use super::commit::Round;
use super::{Compiler, Profile};
use crate::policy::lookup::Direction;
use crate::policy::rules::PeerRef;
use crate::policy::tiers::Tiers;
use crate::ports::PortSet;
use crate::ruleset::{ClassId, Delta, IdentityId, Key, ProfileId};

const FIRST_PROFILE: u32 = 1;
/// Profiles that no pair uses are kept for a while: deleting an element with port ranges costs the kernel time that grows
/// with their number, and many come back. At this many they are deleted all the same.
const RETIRED_MAX: usize = 256;

/// A pair's identity; `None` is anybody.
type PairOf = Option<u32>;

impl Compiler {
    /// Recomputes the pairs that a change reaches.
    pub(super) fn refresh_pairs(&mut self, round: &mut Round, delta: &mut Delta) {
        for (class, of) in self.reached_pairs(round) {
            if round.ended_classes.contains(&class) {
                continue;
            }
            for (identity, allowed) in self.compute_pairs(class, &of) {
                self.set_pair(class, identity, allowed, round, delta);
            }
        }
    }

    fn reached_pairs(&self, round: &Round) -> BTreeMap<u32, BTreeSet<PairOf>> {
        let mut reached: BTreeMap<u32, BTreeSet<PairOf>> = BTreeMap::new();
        for class in &round.new_classes {
            reached.insert(*class, self.all_pairs_of(*class));
        }
        let changed = round.changed_policies.iter().flat_map(|(name, touched)| {
            let classes = self.policies.get(name).into_iter().flat_map(|policy| &policy.classes);
            classes.map(move |class| (class, touched))
        });
        for (class, touched) in changed.chain(&round.succeeded) {
            if round.new_classes.contains(class) {
                continue;
            }
            let of = reached.entry(*class).or_default();
            match touched {
                Some(peers) => of.extend(self.identities_with(peers.iter()).map(Some)),
                None => of.extend(self.all_pairs_of(*class)),
            }
        }
        for identity in &round.new_identities {
            let key = &self.identities[*identity].key;
            let selectors = key.selectors.iter().filter_map(|number| self.peers.selectors.get(*number));
            let blocks = key.blocks.iter().filter_map(|number| self.peers.blocks.get(*number));
            let classes = selectors.flat_map(|e| &e.classes).chain(blocks.flat_map(|e| &e.classes));
            let named = key.ports.iter().filter_map(|(name, _)| self.names.get(name)).flatten();
            for class in classes.chain(named) {
                reached.entry(*class).or_default().insert(Some(*identity));
            }
        }
        reached
    }

    /// Anybody, and the identities that any rule of the class tells from anybody.
    fn all_pairs_of(&self, slot: u32) -> BTreeSet<PairOf> {
        let class = &self.classes[slot];
        let mut of: BTreeSet<PairOf> = class.pairs.keys().copied().collect();
        of.insert(None);
        of.extend(self.identities_with(class.peers.iter()).map(Some));
        if !class.names.is_empty() {
            let named = self.identities.iter().filter(|(_, identity)| !identity.key.ports.is_empty());
            of.extend(named.map(|(slot, _)| Some(slot)));
        }
        of
    }

    fn identities_with<'a>(&'a self, peers: impl Iterator<Item = &'a PeerRef>) -> impl Iterator<Item = u32> {
        peers.flat_map(|peer| {
            let identities = match peer {
                PeerRef::Selector(number) => self.peers.selectors.get(*number).map(|e| &e.identities),
                PeerRef::Block(number) => self.peers.blocks.get(*number).map(|e| &e.identities),
            };
            identities.into_iter().flatten().copied()
        })
    }

    /// What a class allows these identities; `None` where the kernel's fallback (exact identity, then range, then anybody,
    /// then deny) gives the same.
    fn compute_pairs(&self, slot: u32, of: &BTreeSet<PairOf>) -> Vec<(PairOf, Option<PortSet>)> {
        let class = &self.classes[slot];
        let tiers = Tiers::of(&class.key, |name| self.policies.get(name)?.rules(class.key.direction));
        let anybody = tiers.allowed(&class.key, &super::IdentityKey::default());
        let mut computed = Vec::with_capacity(of.len());
        for identity in of {
            let wanted = match identity {
                None => (!anybody.is_empty()).then(|| anybody.clone()),
                Some(slot) => {
                    let Some(identity) = self.identities.get(*slot).filter(|identity| identity.uses > 0)
                    else {
                        continue;
                    };
                    let allowed = tiers.allowed(&class.key, &identity.key);
                    let falls_to_range = !identity.key.is_of_range() && !identity.key.blocks.is_empty();
                    let same = if falls_to_range {
                        allowed == tiers.allowed(&class.key, &identity.key.of_range())
                    } else {
                        allowed == anybody
                    };
                    (!same).then_some(allowed)
                }
            };
            computed.push((*identity, wanted));
        }
        computed
    }

    fn set_pair(
        &mut self,
        class: u32,
        of: PairOf,
        wanted: Option<PortSet>,
        round: &mut Round,
        delta: &mut Delta,
    ) {
        let before = self.classes[class].pairs.get(&of).copied();
        if before.map(|profile| &self.profiles[profile].allowed) == wanted.as_ref() {
            return;
        }
        round.pairs_before.entry((of, class)).or_insert(before);
        let now = wanted.map(|allowed| self.use_profile(allowed, delta));
        match now {
            Some(profile) => self.classes[class].pairs.insert(of, profile),
            None => self.classes[class].pairs.remove(&of),
        };
        if let Some(identity) = of {
            let classes = &mut self.identities[identity].classes;
            let _ = if now.is_some() { classes.insert(class) } else { classes.remove(&class) };
        }
        delta.set(self.pair_key(class, of), now.map(|profile| self.profiles[profile].number.0));
        if let Some(profile) = before {
            self.drop_profile(profile);
        }
    }

    pub(super) fn pair_key(&self, class: u32, of: PairOf) -> Key {
        let class = &self.classes[class];
        let identity = of.map_or(IdentityId::ANY, |identity| self.identities[identity].number);
        pair_key(class.key.direction, class.number, identity)
    }

    fn use_profile(&mut self, allowed: PortSet, delta: &mut Delta) -> u32 {
        if let Some(slot) = self.profile_keys.get(&allowed) {
            self.profiles[*slot].uses += 1;
            self.retired.remove(slot);
            return *slot;
        }
        let number = ProfileId(self.profile_numbers.take(FIRST_PROFILE));
        for rule in allowed.rules() {
            delta.set(Key::Profile(number, rule), Some(0));
        }
        let slot = self.profiles.insert(Profile { allowed: allowed.clone(), number, uses: 1 });
        self.profile_keys.insert(allowed, slot);
        slot
    }

    /// One use less; what it allowed is still known until the next sweep.
    pub(super) fn drop_profile(&mut self, slot: u32) {
        self.profiles[slot].uses -= 1;
        if self.profiles[slot].uses == 0 {
            self.retired.insert(slot);
        }
    }

    /// Deletes the profiles that no pair uses. Nothing looks them up, so nothing is revoked.
    #[must_use]
    pub fn sweep(&mut self) -> Delta {
        let mut delta = Delta::default();
        for slot in std::mem::take(&mut self.retired) {
            let Some(profile) = self.profiles.remove(slot) else { continue };
            for rule in profile.allowed.rules() {
                delta.set(Key::Profile(profile.number, rule), None);
            }
            self.profile_numbers.give_back(profile.number.0);
            self.profile_keys.remove(&profile.allowed);
        }
        delta
    }

    /// Whether [`Compiler::sweep`] has so much to do that it should not wait.
    #[must_use]
    pub fn needs_sweep(&self) -> bool {
        self.retired.len() > RETIRED_MAX
    }

    /// Whether [`Compiler::sweep`] has anything to do.
    #[must_use]
    pub fn can_sweep(&self) -> bool {
        !self.retired.is_empty()
    }
}

pub(super) fn pair_key(direction: Direction, class: ClassId, identity: IdentityId) -> Key {
    match direction {
        Direction::Ingress => Key::PairIn(class, identity),
        Direction::Egress => Key::PairEg(class, identity),
    }
}
