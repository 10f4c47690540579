//! Classes: which policies select the endpoints, and which peers that puts in force.

use std::collections::BTreeSet;

use super::commit::{Move, Round};
use super::peers::Force;
use super::{Class, ClassKey, Compiler, Membership};
use crate::policy::lookup::Direction;
use crate::policy::rules::{NamedPort, PeerRef, PolicyRules, Rule};
use crate::ruleset::ClassId;

/// First number for classes: 1 is [`ClassId::DENY_ALL`].
const FIRST_CLASS: u32 = 2;

impl Compiler {
    /// Finds the classes of the endpoints that a change reaches.
    pub(super) fn reclassify(&mut self, round: &mut Round) {
        for name in std::mem::take(&mut self.dirty.locals) {
            let Some(local) = self.locals.get(&name) else { continue };
            let (subject, fresh) = (local.subject.clone(), local.fresh);
            self.dirty.addresses.extend(&subject.addresses);
            let pod = self.pod_of(&subject);
            for direction in Direction::BOTH {
                let before = self.locals[&name].membership(direction);
                let now = match (&subject.pod, pod) {
                    (None, _) => Membership::Open,
                    (Some(_), None) => Membership::DenyAll,
                    (Some(_), Some(pod)) => match self.class_key(pod, direction) {
                        Some(key) => Membership::In(self.class(key, round)),
                        None => Membership::Open,
                    },
                };
                self.join(before, now, round);
                if before != now || fresh {
                    round.moves.push(Move {
                        addresses: subject.addresses.clone(),
                        direction,
                        before,
                        now,
                        fresh,
                    });
                }
                if let Some(local) = self.locals.get_mut(&name) {
                    *local.membership_mut(direction) = now;
                    local.fresh = fresh && direction == Direction::Ingress;
                }
            }
        }
    }

    fn join(&mut self, before: Membership, now: Membership, round: &mut Round) {
        if before == now {
            return;
        }
        if let Membership::In(class) = before {
            self.classes[class].members -= 1;
            round.left.insert(class);
        }
        if let Membership::In(class) = now {
            self.classes[class].members += 1;
        }
    }

    /// The class of a pod in one direction; `None` where no policy selects it.
    pub(in crate::policy) fn class_key(&self, pod: u32, direction: Direction) -> Option<ClassKey> {
        let policies = self.policies_selecting(pod, direction);
        if policies.is_empty() {
            return None;
        }
        let ports = match direction {
            Direction::Ingress => {
                let rules = policies.iter().filter_map(|name| self.policies.get(name)?.rules(direction));
                let names: BTreeSet<&NamedPort> = rules.flat_map(PolicyRules::named_ports).collect();
                self.cluster.pods[pod].resolve(names.into_iter())
            }
            Direction::Egress => Vec::new(),
        };
        Some(ClassKey { direction, policies, ports })
    }

    fn class(&mut self, key: ClassKey, round: &mut Round) -> u32 {
        if let Some(slot) = self.class_keys.get(&key) {
            return *slot;
        }
        let class = Class {
            key: key.clone(),
            number: ClassId(self.class_numbers.take(FIRST_CLASS)),
            members: 0,
            bereft: false,
            peers: BTreeSet::new(),
            names: BTreeSet::new(),
            pairs: std::collections::BTreeMap::new(),
        };
        let slot = self.classes.insert(class);
        for name in &key.policies {
            let Some(policy) = self.policies.get_mut(name) else { continue };
            policy.classes.insert(slot);
            if policy.classes.len() == 1 {
                self.unconfirm(name);
            }
        }
        self.class_keys.insert(key, slot);
        round.new_classes.insert(slot);
        slot
    }

    /// Brings the peers in force in line with the rules of new, changed and ended classes.
    pub(super) fn register_classes(&mut self, round: &mut Round) {
        round.left.append(&mut self.dirty.left);
        let changed = self.dirty.policies.keys().filter_map(|name| self.policies.get(name));
        round.changed_classes = changed.flat_map(|policy| policy.classes.iter().copied()).collect();
        round.changed_classes.extend(round.succeeded.keys());
        let candidates: BTreeSet<u32> =
            round.left.iter().chain(&round.new_classes).chain(&round.changed_classes).copied().collect();
        for slot in candidates {
            let alive = self.classes[slot].members > 0;
            if !alive {
                round.ended_classes.insert(slot);
                for name in self.classes[slot].key.policies.clone() {
                    if let Some(policy) = self.policies.get_mut(&name) {
                        policy.classes.remove(&slot);
                    }
                }
            }
            let (peers, names) = if alive { self.named_by(slot) } else { Default::default() };
            self.register(slot, peers, names);
        }
    }

    /// What the rules of a class name.
    fn named_by(&self, slot: u32) -> (BTreeSet<PeerRef>, BTreeSet<NamedPort>) {
        let key = &self.classes[slot].key;
        let rules = || key.policies.iter().filter_map(|name| self.policies.get(name)?.rules(key.direction));
        let peers = rules().flat_map(PolicyRules::peers).collect();
        let names = match key.direction {
            Direction::Egress => {
                rules().flat_map(|r| &r.rules).flat_map(Rule::named_ports).cloned().collect()
            }
            Direction::Ingress => BTreeSet::new(),
        };
        (peers, names)
    }

    fn register(&mut self, slot: u32, peers: BTreeSet<PeerRef>, names: BTreeSet<NamedPort>) {
        let before = std::mem::replace(&mut self.classes[slot].peers, peers.clone());
        for peer in peers.difference(&before) {
            if self.peers.enter(*peer, slot) == Force::Changed {
                self.bring_into_force(*peer);
            }
        }
        for peer in before.difference(&peers) {
            if self.peers.leave(*peer, slot) == Force::Changed {
                self.take_out_of_force(*peer);
            }
        }
        let before = std::mem::replace(&mut self.classes[slot].names, names.clone());
        for name in names.difference(&before) {
            let classes = self.names.entry(name.clone()).or_default();
            self.dirty.names |= classes.is_empty();
            classes.insert(slot);
        }
        for name in before.difference(&names) {
            let Some(classes) = self.names.get_mut(name) else { continue };
            classes.remove(&slot);
            if classes.is_empty() {
                self.names.remove(name);
                self.dirty.names = true;
            }
        }
    }

    fn bring_into_force(&mut self, peer: PeerRef) {
        let PeerRef::Selector(number) = peer else {
            self.dirty.blocks = true;
            return;
        };
        let Some(entry) = self.peers.selectors.get_mut(number) else { return };
        let groups = self.cluster.groups_matching(&entry.content);
        entry.groups.extend(&groups);
        for slot in groups {
            let selectors = &mut self.cluster.groups[slot].selectors;
            if let Err(index) = selectors.binary_search(&number) {
                selectors.insert(index, number);
            }
            self.dirty.groups.insert(slot);
        }
        self.dirty.nodes |= entry.content.is_of_nodes();
    }

    fn take_out_of_force(&mut self, peer: PeerRef) {
        let PeerRef::Selector(number) = peer else {
            self.dirty.blocks = true;
            return;
        };
        let Some(entry) = self.peers.selectors.get_mut(number) else { return };
        for slot in std::mem::take(&mut entry.groups) {
            self.cluster.groups[slot].selectors.retain(|own| *own != number);
            self.dirty.groups.insert(slot);
        }
        self.dirty.nodes |= entry.content.is_of_nodes();
        self.peers.selectors.forget_if_unused(number);
    }
}
