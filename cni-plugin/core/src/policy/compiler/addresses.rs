//! Identities: whom an address belongs to, and which peers match it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::cluster::hash;
use super::commit::{Round, View};
use super::{Compiler, Identity, IdentityKey, Range};
use crate::objects::IpBlock;
use crate::policy::ranges;
use crate::ruleset::{Delta, IdentityId, Key};

/// First number for identities: 0 is [`IdentityId::ANY`].
const FIRST_IDENTITY: u32 = 1;

impl Compiler {
    /// Cuts the address space anew where blocks changed.
    pub(super) fn refresh_ranges(&mut self, round: &mut Round, delta: &mut Delta) {
        if !std::mem::take(&mut self.dirty.blocks) {
            return;
        }
        let blocks: BTreeMap<u32, &IpBlock> =
            self.peers.blocks.in_force().map(|(number, entry)| (number, &*entry.content)).collect();
        let cut = ranges::disjoint(&blocks);
        let mut now = Vec::with_capacity(cut.len());
        for (range, blocks) in cut {
            let identity =
                self.identity(IdentityKey { blocks: blocks.clone(), ..IdentityKey::default() }, round);
            self.identities[identity].uses += 1;
            now.push(Range { range, blocks, identity });
        }
        let before = std::mem::replace(&mut self.ranges, now);
        for old in &before {
            self.identities[old.identity].uses -= 1;
            delta.set(Key::Cidr(old.range), None);
        }
        for new in &self.ranges {
            delta.set(Key::Cidr(new.range), Some(self.identities[new.identity].number.0));
        }
        let stretches = stretches(&before, &self.ranges);
        for stretch in &stretches {
            let (from, to) = (View::of_range(stretch.before), View::of_range(stretch.now));
            round.shifted.insert((from, to));
        }
        let is_inside = |address: &IpAddr| {
            let after = stretches.partition_point(|stretch| stretch.first <= *address);
            after.checked_sub(1).is_some_and(|index| *address <= stretches[index].last)
        };
        if !stretches.is_empty() {
            let known = self.addresses.iter().map(|(address, _)| address);
            self.dirty.addresses.extend(known.filter(is_inside));
        }
        round.ranges_before = Some(before);
    }

    /// Finds the identities of the addresses that a change reaches.
    pub(super) fn refresh_addresses(&mut self, round: &mut Round, delta: &mut Delta) {
        self.expand_dirty();
        let nodes = self.node_selectors();
        for address in std::mem::take(&mut self.dirty.addresses) {
            let key = self.identity_key_at(address, &nodes);
            let now = (!key.is_of_range()).then(|| self.identity(key, round));
            let known = self.addresses.entry(address);
            let before = std::mem::replace(&mut known.identity, now);
            if now.is_none() && known.claims.is_empty() {
                self.addresses.remove(address);
            }
            if before == now {
                continue;
            }
            let number = now.map(|slot| self.identities[slot].number.0);
            delta.set(Key::Ident(address), number);
            for (slot, step) in [(now, 1), (before, -1)] {
                if let Some(slot) = slot {
                    let uses = &mut self.identities[slot].uses;
                    *uses = uses.saturating_add_signed(step);
                }
            }
            let range_before = round.ranges_before.as_ref().unwrap_or(&self.ranges);
            let from = View { exact: before, range: range_at(range_before, address).map(|r| r.identity) };
            let to = View { exact: now, range: range_at(&self.ranges, address).map(|r| r.identity) };
            round.shifted.insert((from, to));
        }
    }

    /// Turns groups, nodes and names that changed into addresses.
    fn expand_dirty(&mut self) {
        let groups = std::mem::take(&mut self.dirty.groups);
        let dirty = &mut self.dirty.addresses;
        if std::mem::take(&mut self.dirty.nodes) {
            dirty.extend(self.cluster.nodes.values().flat_map(|node| &node.addresses));
        }
        let pods = &self.cluster.pods;
        for group in groups.iter().filter_map(|slot| self.cluster.groups.get(*slot)) {
            dirty.extend(group.members.iter().flat_map(|id| pods[*id].addresses()));
        }
        let names = std::mem::take(&mut self.dirty.names);
        if names {
            let named = pods.iter().filter(|(_, pod)| !pod.ports.is_empty());
            dirty.extend(named.flat_map(|(_, pod)| pod.addresses()));
        }
        if names || !groups.is_empty() {
            let reached = self.locals.values().filter(|local| {
                self.pod_of(&local.subject).is_some_and(|id| names || groups.contains(&pods[id].group))
            });
            let addresses: Vec<IpAddr> = reached.flat_map(|local| local.subject.addresses.clone()).collect();
            self.dirty.addresses.extend(addresses);
        }
    }

    fn node_selectors(&self) -> BTreeMap<IpAddr, Vec<u32>> {
        if !self.peers.selects_nodes() {
            return BTreeMap::new();
        }
        let nodes = self.cluster.nodes.values().map(|node| (node, self.peers.matching_node(&node.labels)));
        let matching = nodes.filter(|(_, selectors)| !selectors.is_empty());
        matching
            .flat_map(|(node, selectors)| {
                node.addresses.iter().map(move |address| (*address, selectors.clone()))
            })
            .collect()
    }

    fn identity_key_at(&mut self, address: IpAddr, nodes: &BTreeMap<IpAddr, Vec<u32>>) -> IdentityKey {
        let owner = self.owner(address);
        if owner.is_none() && self.is_contested(address) {
            self.contested.insert(address);
        } else {
            self.contested.remove(&address);
        }
        let (selectors, ports) = match owner {
            Some(id) => {
                let pod = &self.cluster.pods[id];
                (self.cluster.group_of(id).selectors.clone(), pod.resolve(self.names.keys()))
            }
            None => (nodes.get(&address).cloned().unwrap_or_default(), Vec::new()),
        };
        let blocks = range_at(&self.ranges, address).map(|range| range.blocks.clone()).unwrap_or_default();
        IdentityKey { selectors, blocks, ports }
    }

    /// Which pod an address belongs to. Leases on this node decide; else the pods' status, where a pod that is not being
    /// deleted wins. Of several live claims none is believed: an address that is used again must not keep what its former
    /// owner was allowed.
    pub(in crate::policy) fn owner(&self, address: IpAddr) -> Option<u32> {
        if let Some(endpoint) = self.leased.get(&address) {
            return self.pod_of(&self.locals.get(endpoint)?.subject);
        }
        match self.claimants(address).as_slice() {
            [pod] => Some(*pod),
            _ => None,
        }
    }

    fn is_contested(&self, address: IpAddr) -> bool {
        let concerned = |address| self.live_claims(address).next().is_some();
        !self.leased.contains_key(&address) && concerned(address)
    }

    fn live_claims(&self, address: IpAddr) -> impl Iterator<Item = u32> + '_ {
        let claims = self.addresses.get(address).into_iter().flat_map(|known| known.claims.iter().copied());
        claims.filter(|id| self.cluster.pods[*id].concerned)
    }

    fn claimants(&self, address: IpAddr) -> Vec<u32> {
        let mut claims: Vec<u32> = self.live_claims(address).collect();
        if claims.len() > 1 {
            claims.retain(|id| !self.cluster.pods[*id].deleting);
        }
        claims
    }

    pub(super) fn find_identity(&self, key: &IdentityKey) -> Option<u32> {
        self.identity_keys.find(hash(key), |slot| self.identities[*slot].key == *key).copied()
    }

    fn identity(&mut self, key: IdentityKey, round: &mut Round) -> u32 {
        if let Some(slot) = self.find_identity(&key) {
            return slot;
        }
        let number = IdentityId(self.identity_numbers.take(FIRST_IDENTITY));
        let identity = Identity { key: key.clone(), number, uses: 0, classes: BTreeSet::new() };
        let slot = self.identities.insert(identity);
        for selector in &key.selectors {
            if let Some(entry) = self.peers.selectors.get_mut(*selector) {
                entry.identities.insert(slot);
            }
        }
        for block in &key.blocks {
            if let Some(entry) = self.peers.blocks.get_mut(*block) {
                entry.identities.insert(slot);
            }
        }
        let identities = &self.identities;
        self.identity_keys.insert_unique(hash(&key), slot, |slot| hash(&identities[*slot].key));
        round.new_identities.insert(slot);
        slot
    }
}

pub(super) fn range_at(ranges: &[Range], address: IpAddr) -> Option<&Range> {
    let after = ranges.partition_point(|range| range.range.first <= address);
    let range = ranges.get(after.checked_sub(1)?)?;
    (address <= range.range.last).then_some(range)
}

/// Addresses whose range has another identity than before.
struct Stretch {
    first: IpAddr,
    last: IpAddr,
    before: Option<u32>,
    now: Option<u32>,
}

/// Where two cuts differ. A stretch ends where either has a border, or goes on to the family's end.
fn stretches(before: &[Range], now: &[Range]) -> Vec<Stretch> {
    let mut borders: BTreeSet<IpAddr> = BTreeSet::new();
    for range in before.iter().chain(now) {
        borders.insert(range.range.first);
        borders.extend(ranges::successor(range.range.last));
    }
    let starts: Vec<IpAddr> = borders.into_iter().collect();
    let mut found = Vec::new();
    for (index, &first) in starts.iter().enumerate() {
        let next = starts.get(index + 1).filter(|next| next.is_ipv4() == first.is_ipv4());
        let last = next.map_or_else(|| ranges::last_of_family(first), |next| ranges::predecessor(*next));
        let at = |ranges: &[Range]| range_at(ranges, first).map(|range| range.identity);
        let (before, now) = (at(before), at(now));
        if before != now {
            found.push(Stretch { first, last, before, now });
        }
    }
    found
}
