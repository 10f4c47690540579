//! A class whose endpoints all go to one new class hands on its number: where a pod gets one policy more or less, the pairs
//! that this policy touches change, and not all that the pod has.

use std::collections::{BTreeMap, BTreeSet};

use super::apply::touched_peers;
use super::commit::Round;
use super::{ClassKey, Compiler, Membership};
use crate::policy::lookup::Direction;
use crate::policy::reference::Tier;
use crate::policy::rules::PeerRef;

impl Compiler {
    /// Lets new classes take the place of those that all endpoints left for them. A class stays as it is where an endpoint
    /// of it is gone: its port, which may still be there, must not come under other rules.
    pub(super) fn succeed(&mut self, round: &mut Round) {
        let mut ways: BTreeMap<u32, BTreeSet<Option<u32>>> = BTreeMap::new();
        for moved in &round.moves {
            let Membership::In(from) = moved.before else { continue };
            let to = match moved.now {
                Membership::In(to) => Some(to),
                Membership::Open | Membership::DenyAll => None,
            };
            ways.entry(from).or_default().insert(to);
        }
        for (from, to) in ways {
            let Some(Some(to)) = to.first().copied().filter(|_| to.len() == 1) else { continue };
            let left = self.classes[from].members == 0 && !self.classes[from].bereft;
            // One that has a predecessor already is new no more.
            if left && round.new_classes.contains(&to) {
                self.hand_on(from, to, round);
            }
        }
    }

    fn hand_on(&mut self, from: u32, to: u32, round: &mut Round) {
        let Some(heir) = self.classes.remove(to) else { return };
        self.class_numbers.give_back(heir.number.0);
        let class = &mut self.classes[from];
        class.members = heir.members;
        let before = std::mem::replace(&mut class.key, heir.key.clone());
        self.class_keys.remove(&before);
        for name in &before.policies {
            if let Some(policy) = self.policies.get_mut(name) {
                policy.classes.remove(&from);
            }
        }
        for name in &heir.key.policies {
            if let Some(policy) = self.policies.get_mut(name) {
                policy.classes.remove(&to);
                policy.classes.insert(from);
            }
        }
        round.succeeded.insert(from, self.touched_between(&before, &heir.key));
        self.class_keys.insert(heir.key, from);
        for local in self.locals.values_mut() {
            for direction in Direction::BOTH {
                let membership = local.membership_mut(direction);
                if *membership == Membership::In(to) {
                    *membership = Membership::In(from);
                }
            }
        }
        round.moves.retain_mut(|moved| {
            if moved.now == Membership::In(to) {
                moved.now = Membership::In(from);
            }
            // A new endpoint's is made also where nothing isolates it: until then it is denied everything.
            moved.before != moved.now || moved.fresh
        });
        round.new_classes.remove(&to);
        round.left.remove(&from);
    }

    /// The peers whose pairs may differ between two classes; `None`: anybody's may.
    fn touched_between(&self, before: &ClassKey, now: &ClassKey) -> Option<BTreeSet<PeerRef>> {
        let isolates = |key: &ClassKey| key.policies.iter().any(|name| name.tier == Tier::NetworkPolicy);
        if before.ports != now.ports || isolates(before) != isolates(now) {
            return None;
        }
        let (old, new): (BTreeSet<_>, BTreeSet<_>) =
            (before.policies.iter().collect(), now.policies.iter().collect());
        let mut touched = BTreeSet::new();
        for name in old.symmetric_difference(&new) {
            match self.dirty.policies.get(*name) {
                Some(peers) => touched.extend(peers.as_ref()?),
                None => touched.extend(touched_peers([self.policies.get(*name)?])?),
            }
        }
        Some(touched)
    }
}
