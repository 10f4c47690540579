//! Numbers for classes, identities and profiles that stay with their content.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::reference::PolicyRef;
use super::rules::{PeerSelector, ResolvedPorts};
use crate::objects::IpBlock;
use crate::ports::PortSet;
use crate::ruleset::{ClassId, IdentityId, ProfileId};

/// First number for classes: 1 is [`ClassId::DENY_ALL`].
const FIRST_CLASS: u32 = 2;
/// First number for identities: 0 is [`IdentityId::ANY`].
const FIRST_IDENTITY: u32 = 1;

/// The numbers in use, by content.
///
/// Numbers are given in rising order and wrap at the end of `u32`, so one that a change frees is not given another
/// meaning in that change: the lookups of one packet may straddle the commit. Persisted by the agent, so that a restart
/// with unchanged objects writes nothing to the kernel.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbering {
    selectors: Numbers<PeerSelector>,
    blocks: Numbers<IpBlock>,
    classes: Numbers<ClassKey>,
    identities: Numbers<IdentityKey>,
    profiles: Numbers<PortSet>,
}

/// Highest numbers that the kernel uses already, for an agent that lost its numbering.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Floor {
    /// Highest class.
    pub class: u32,
    /// Highest identity.
    pub identity: u32,
    /// Highest profile.
    pub profile: u32,
}

/// Content of a class.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct ClassKey {
    pub ingress: bool,
    /// In the order in which they are asked.
    pub policies: Vec<PolicyRef>,
    /// What the port names that the policies use mean for these pods. Ingress only.
    pub ports: ResolvedPorts,
}

/// Content of an identity; selectors and blocks by their numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct IdentityKey {
    pub selectors: Vec<u32>,
    pub blocks: Vec<u32>,
    /// What the port names that egress rules use mean for these peers.
    pub ports: ResolvedPorts,
}

impl Numbering {
    /// Starts above what the kernel uses.
    #[must_use]
    pub fn above(floor: Floor) -> Self {
        let mut numbering = Self::default();
        numbering.classes.last = floor.class;
        numbering.identities.last = floor.identity;
        numbering.profiles.last = floor.profile;
        numbering
    }

    pub(super) fn begin(&mut self) {
        self.selectors.begin();
        self.blocks.begin();
        self.classes.begin();
        self.identities.begin();
        self.profiles.begin();
    }

    /// Forgets what was not asked for since `begin`.
    pub(super) fn finish(&mut self) {
        self.selectors.finish();
        self.blocks.finish();
        self.classes.finish();
        self.identities.finish();
        self.profiles.finish();
    }

    pub(super) fn selector(&mut self, selector: &PeerSelector) -> u32 {
        self.selectors.number(selector, 1)
    }

    pub(super) fn block(&mut self, block: &IpBlock) -> u32 {
        self.blocks.number(block, 1)
    }

    pub(super) fn class(&mut self, key: &ClassKey) -> ClassId {
        ClassId(self.classes.number(key, FIRST_CLASS))
    }

    pub(super) fn identity(&mut self, key: &IdentityKey) -> IdentityId {
        IdentityId(self.identities.number(key, FIRST_IDENTITY))
    }

    pub(super) fn profile(&mut self, allowed: &PortSet) -> ProfileId {
        ProfileId(self.profiles.number(allowed, 1))
    }
}

/// Numbers of one kind. Stored as a list, since JSON has only strings as keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored<K>", into = "Stored<K>")]
#[serde(bound(serialize = "K: Clone + Serialize", deserialize = "K: Ord + Clone + Deserialize<'de>"))]
struct Numbers<K> {
    last: u32,
    entries: BTreeMap<K, Entry>,
    used: BTreeSet<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    number: u32,
    wanted: bool,
}

#[derive(Serialize, Deserialize)]
struct Stored<K> {
    last: u32,
    entries: Vec<(K, u32)>,
}

impl<K> Default for Numbers<K> {
    fn default() -> Self {
        Self { last: 0, entries: BTreeMap::new(), used: BTreeSet::new() }
    }
}

impl<K: Ord> From<Stored<K>> for Numbers<K> {
    fn from(stored: Stored<K>) -> Self {
        let used = stored.entries.iter().map(|(_, number)| *number).collect();
        let entry = |number| Entry { number, wanted: false };
        let entries = stored.entries.into_iter().map(|(key, number)| (key, entry(number))).collect();
        Self { last: stored.last, entries, used }
    }
}

impl<K> From<Numbers<K>> for Stored<K> {
    fn from(numbers: Numbers<K>) -> Self {
        let entries = numbers.entries.into_iter().map(|(key, entry)| (key, entry.number)).collect();
        Self { last: numbers.last, entries }
    }
}

impl<K: Ord + Clone> Numbers<K> {
    fn begin(&mut self) {
        for entry in self.entries.values_mut() {
            entry.wanted = false;
        }
    }

    fn finish(&mut self) {
        let used = &mut self.used;
        self.entries.retain(|_, entry| {
            if !entry.wanted {
                used.remove(&entry.number);
            }
            entry.wanted
        });
    }

    fn number(&mut self, key: &K, first: u32) -> u32 {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.wanted = true;
            return entry.number;
        }
        loop {
            self.last = self.last.checked_add(1).unwrap_or(first).max(first);
            // Terminates: a map of 2^32 entries does not fit in memory.
            if self.used.insert(self.last) {
                break;
            }
        }
        self.entries.insert(key.clone(), Entry { number: self.last, wanted: true });
        self.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ObjectName;

    #[test]
    fn a_number_stays_with_its_content_and_is_not_reused_at_once() {
        let mut numbers = Numbers::<&str>::default();
        let (a, b) = (numbers.number(&"a", 2), numbers.number(&"b", 2));
        assert_eq!((a, b), (2, 3));
        numbers.begin();
        assert_eq!(numbers.number(&"b", 2), b);
        assert_eq!(numbers.number(&"c", 2), 4, "2 is freed by this very change");
        numbers.finish();
        numbers.begin();
        assert_eq!(numbers.number(&"a", 2), 5);
    }

    #[test]
    fn numbers_wrap_over_those_in_use() {
        let mut numbers = Numbers::<u8>::default();
        assert_eq!(numbers.number(&0, 1), 1);
        numbers.last = u32::MAX;
        assert_eq!(numbers.number(&1, 1), 2);
    }

    #[test]
    fn numbering_survives_being_stored() {
        let mut numbering = Numbering::default();
        numbering.begin();
        numbering.class(&ClassKey {
            ingress: true,
            policies: vec![PolicyRef::namespaced(ObjectName::new("a", "b"))],
            ports: Vec::new(),
        });
        numbering.profile(&PortSet::all());
        numbering.finish();
        let text = serde_json::to_string(&numbering).unwrap();
        let mut read: Numbering = serde_json::from_str(&text).unwrap();
        read.begin();
        assert_eq!(read.profile(&PortSet::all()), ProfileId(1));
    }
}
