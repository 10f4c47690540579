//! The peers that policies name, each once: who uses it, and whom it matches.
//!
//! A selector is matched against pods only while a class uses it, that is while a policy with it selects a pod of this
//! node. Numbers rise and are never used again, so that an identity, which is a set of them, keeps its meaning.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::cluster::{Group, label_hash, needed_labels};
use crate::objects::{IpBlock, Labels};
use crate::policy::rules::{PeerRef, PeerSelector};

/// All peers of all policies.
#[derive(Debug, Default)]
pub(in crate::policy) struct Peers {
    pub selectors: Table<PeerSelector>,
    pub blocks: Table<IpBlock>,
    /// Selectors in force by the hashes of labels of which they need one.
    by_label: BTreeSet<(u64, u32)>,
    /// Selectors of pods in force that need no certain label.
    unlabelled: BTreeSet<u32>,
    /// Selectors of nodes in force.
    of_nodes: BTreeSet<u32>,
}

/// Peers of one kind by number and by content.
#[derive(Debug)]
pub(in crate::policy) struct Table<T> {
    last: u32,
    entries: BTreeMap<u32, Entry<T>>,
    by_content: BTreeMap<Arc<T>, u32>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { last: 0, entries: BTreeMap::new(), by_content: BTreeMap::new() }
    }
}

/// One peer.
#[derive(Debug)]
pub(in crate::policy) struct Entry<T> {
    pub content: Arc<T>,
    /// How often rules of policies name it.
    uses: u32,
    /// Classes whose rules name it: while there are any it is in force.
    pub classes: BTreeSet<u32>,
    /// Identities that have it.
    pub identities: BTreeSet<u32>,
    /// Groups of pods that it matches.
    pub groups: BTreeSet<u32>,
}

impl<T: Ord> Table<T> {
    fn intern(&mut self, content: T) -> u32 {
        if let Some(number) = self.by_content.get(&content) {
            if let Some(entry) = self.entries.get_mut(number) {
                entry.uses += 1;
            }
            return *number;
        }
        self.last = self.last.checked_add(1).expect("four billion changes of policies");
        let content = Arc::new(content);
        let entry = Entry {
            content: Arc::clone(&content),
            uses: 1,
            classes: BTreeSet::new(),
            identities: BTreeSet::new(),
            groups: BTreeSet::new(),
        };
        self.entries.insert(self.last, entry);
        self.by_content.insert(content, self.last);
        self.last
    }

    pub(in crate::policy) fn get(&self, number: u32) -> Option<&Entry<T>> {
        self.entries.get(&number)
    }

    pub(in crate::policy) fn get_mut(&mut self, number: u32) -> Option<&mut Entry<T>> {
        self.entries.get_mut(&number)
    }

    /// Forgets a peer that nothing refers to any more.
    pub(in crate::policy) fn forget_if_unused(&mut self, number: u32) {
        let Some(entry) = self.entries.get(&number) else { return };
        if entry.uses == 0 && entry.classes.is_empty() && entry.identities.is_empty() {
            let content = Arc::clone(&entry.content);
            self.entries.remove(&number);
            self.by_content.remove(&content);
        }
    }

    pub(in crate::policy) fn in_force(&self) -> impl Iterator<Item = (u32, &Entry<T>)> {
        self.entries.iter().filter(|(_, e)| !e.classes.is_empty()).map(|(number, entry)| (*number, entry))
    }
}

/// What a class's use of a peer changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::policy) enum Force {
    /// It is matched from now on, or from now on no more.
    Changed,
    /// Others use it too.
    Same,
}

impl Peers {
    /// The number of a selector, for one more use.
    pub(in crate::policy) fn selector(&mut self, selector: PeerSelector) -> PeerRef {
        PeerRef::Selector(self.selectors.intern(selector))
    }

    /// The number of a block, for one more use.
    pub(in crate::policy) fn block(&mut self, block: IpBlock) -> PeerRef {
        PeerRef::Block(self.blocks.intern(block))
    }

    /// One use less.
    pub(in crate::policy) fn release(&mut self, peer: PeerRef) {
        match peer {
            PeerRef::Selector(number) => release(&mut self.selectors, number),
            PeerRef::Block(number) => release(&mut self.blocks, number),
        }
    }

    /// A class uses the peer.
    pub(in crate::policy) fn enter(&mut self, peer: PeerRef, class: u32) -> Force {
        let (first, selector) = match peer {
            PeerRef::Selector(number) => {
                let Some(entry) = self.selectors.get_mut(number) else { return Force::Same };
                let first = entry.classes.is_empty();
                entry.classes.insert(class);
                (first, Some((number, Arc::clone(&entry.content))))
            }
            PeerRef::Block(number) => {
                let Some(entry) = self.blocks.get_mut(number) else { return Force::Same };
                let first = entry.classes.is_empty();
                entry.classes.insert(class);
                (first, None)
            }
        };
        if !first {
            return Force::Same;
        }
        if let Some((number, selector)) = selector {
            self.index(&selector, number, true);
        }
        Force::Changed
    }

    /// A class does not use the peer any more.
    pub(in crate::policy) fn leave(&mut self, peer: PeerRef, class: u32) -> Force {
        let (was, now, selector) = match peer {
            PeerRef::Selector(number) => {
                let Some(entry) = self.selectors.get_mut(number) else { return Force::Same };
                let was = entry.classes.remove(&class);
                (was, entry.classes.is_empty(), Some((number, Arc::clone(&entry.content))))
            }
            PeerRef::Block(number) => {
                let Some(entry) = self.blocks.get_mut(number) else { return Force::Same };
                (entry.classes.remove(&class), entry.classes.is_empty(), None)
            }
        };
        if !(was && now) {
            return Force::Same;
        }
        if let Some((number, selector)) = selector {
            self.index(&selector, number, false);
        }
        Force::Changed
    }

    /// Puts a selector into the sets by which it is found, or takes it out.
    fn index(&mut self, selector: &PeerSelector, number: u32, is_in: bool) {
        let needed = match selector {
            PeerSelector::Pods { pods, .. } => needed_labels(pods),
            PeerSelector::Nodes(_) => return put(&mut self.of_nodes, number, is_in),
        };
        match needed {
            Some(hashes) => {
                hashes.into_iter().for_each(|hashed| put(&mut self.by_label, (hashed, number), is_in));
            }
            None => put(&mut self.unlabelled, number, is_in),
        }
    }

    /// The selectors in force that match a group of pods, in order.
    pub(in crate::policy) fn matching_group(&self, group: &Group, namespace_labels: &Labels) -> Vec<u32> {
        let with_one = |(key, value): &(Arc<str>, Box<str>)| {
            let hashed = label_hash(key, value);
            self.by_label.range((hashed, 0)..=(hashed, u32::MAX)).map(|(_, number)| number)
        };
        let candidates = group.labels.iter().flat_map(with_one).chain(&self.unlabelled);
        let mut matching: Vec<u32> = candidates
            .filter(|number| {
                self.selectors.get(**number).is_some_and(|e| group.is_matched(&e.content, namespace_labels))
            })
            .copied()
            .collect();
        matching.sort_unstable();
        matching.dedup();
        matching
    }

    /// The selectors in force that match a node, in order.
    pub(in crate::policy) fn matching_node(&self, labels: &Labels) -> Vec<u32> {
        let matches = |number: &&u32| {
            self.selectors.get(**number).is_some_and(|entry| entry.content.matches_node(labels))
        };
        self.of_nodes.iter().filter(matches).copied().collect()
    }

    /// Whether any selector of nodes is in force.
    pub(in crate::policy) fn selects_nodes(&self) -> bool {
        !self.of_nodes.is_empty()
    }
}

fn put<T: Ord>(set: &mut BTreeSet<T>, item: T, is_in: bool) {
    if is_in {
        set.insert(item);
    } else {
        set.remove(&item);
    }
}

fn release<T: Ord>(table: &mut Table<T>, number: u32) {
    if let Some(entry) = table.get_mut(number) {
        entry.uses = entry.uses.saturating_sub(1);
    }
    table.forget_if_unused(number);
}
