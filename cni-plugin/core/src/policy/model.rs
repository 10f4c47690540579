//! The compiler: objects and local pods in, ruleset out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::lookup::Direction;
use super::numbering::{ClassKey, IdentityKey, Numbering};
use super::ranges;
use super::reference::PolicyRef;
use super::rules::{
    Interned, NamedPort, PeerSelector, PolicyRules, ResolvedPorts, Rule, concerns, isolates, reference,
};
use super::tiers::Tiers;
use crate::objects::{ClusterNetworkPolicy, ClusterSubject, Labels, NetworkPolicy, ObjectName, Objects, Pod};
use crate::ports::PortSet;
use crate::ruleset::{AddrRange, ClassId, IdentityId, Ruleset};

/// A local endpoint: addresses that were leased, and the pod they were leased to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The pod; `None` for an attachment that no pod was named for, which no policy isolates and no selector matches.
    pub pod: Option<ObjectName>,
    /// Uid the runtime gave; empty matches every object of that name.
    pub uid: String,
    /// Its addresses; they win over what any object's status says.
    pub addresses: Vec<IpAddr>,
}

/// Compiled policy.
#[derive(Debug, Clone, Default)]
pub struct Model {
    /// Classes, identities, pairs and profiles. Source pins are the agent's to add.
    pub ruleset: Ruleset,
    /// Addresses that several live pods claim. They match no pod selector until the claim is settled.
    pub contested: BTreeSet<IpAddr>,
    pub(super) classes_in: BTreeMap<IpAddr, ClassKey>,
    pub(super) classes_eg: BTreeMap<IpAddr, ClassKey>,
    pub(super) policies_in: BTreeMap<PolicyRef, PolicyRules>,
    pub(super) policies_eg: BTreeMap<PolicyRef, PolicyRules>,
    pub(super) ranges: Vec<(AddrRange, Vec<u32>)>,
    pub(super) identities: BTreeMap<IpAddr, IdentityKey>,
}

impl Model {
    /// Compiles the policies that select the subjects. A subject whose pod is unknown, completed or of another uid is
    /// denied everything.
    #[must_use]
    pub fn compile(objects: &Objects, subjects: &[Subject], numbering: &mut Numbering) -> Self {
        numbering.begin();
        let mut model = Self::default();
        let mut interned = Interned::default();
        for subject in subjects {
            model.classify(objects, subject, &mut interned, numbering);
        }
        model.ranges =
            ranges::disjoint(&interned.blocks.iter().map(|(number, block)| (*number, block)).collect());
        model.identify(objects, subjects, &interned);
        model.number(numbering);
        numbering.finish();
        model
    }

    /// Whether the pod of a subject is known, so that its policies are, too.
    #[must_use]
    pub fn is_known(objects: &Objects, subject: &Subject) -> bool {
        subject.pod.as_ref().is_none_or(|name| known_pod(objects, name, &subject.uid).is_some())
    }

    fn classify(
        &mut self,
        objects: &Objects,
        subject: &Subject,
        interned: &mut Interned,
        numbering: &mut Numbering,
    ) {
        let Some(name) = &subject.pod else { return };
        let Some(pod) = known_pod(objects, name, &subject.uid) else {
            for address in &subject.addresses {
                self.ruleset.cls_in.insert(*address, ClassId::DENY_ALL);
                self.ruleset.cls_eg.insert(*address, ClassId::DENY_ALL);
            }
            return;
        };
        for direction in [Direction::Ingress, Direction::Egress] {
            let known = match direction {
                Direction::Ingress => &mut self.policies_in,
                Direction::Egress => &mut self.policies_eg,
            };
            let policies = select(objects, pod, direction, |name, policy| {
                known.entry(name.clone()).or_insert_with(|| match policy {
                    Selected::Namespaced(policy) => interned.policy(policy, direction, numbering),
                    Selected::Cluster(policy) => interned.cluster_policy(policy, direction, numbering),
                });
            });
            if policies.is_empty() {
                continue;
            }
            let ports = match direction {
                Direction::Ingress => resolved_ports(pod, &names_used(policies.iter().map(|p| &known[p]))),
                Direction::Egress => Vec::new(),
            };
            let key = ClassKey { ingress: direction == Direction::Ingress, policies, ports };
            let classes = match direction {
                Direction::Ingress => &mut self.classes_in,
                Direction::Egress => &mut self.classes_eg,
            };
            classes.extend(subject.addresses.iter().map(|address| (*address, key.clone())));
        }
    }

    /// Finds what each pod's address matches.
    fn identify(&mut self, objects: &Objects, subjects: &[Subject], interned: &Interned) {
        let names = names_used(self.policies_eg.values());
        let (owners, contested) = owners(objects, subjects);
        self.contested = contested;
        // Pods of one set share their labels; unique labels cost one evaluation each.
        let mut matches: BTreeMap<(&str, &Labels), Vec<u32>> = BTreeMap::new();
        for (address, pod) in owners {
            let namespace = namespace_of(pod);
            let selectors = matches.entry((namespace, &pod.metadata.labels)).or_insert_with(|| {
                let labels = objects.namespace_labels(namespace);
                let matching = interned
                    .selectors
                    .iter()
                    .filter(|(_, selector)| selector.matches_pod(namespace, &labels, &pod.metadata.labels));
                matching.map(|(number, _)| *number).collect()
            });
            let ports = resolved_ports(pod, &names);
            if !selectors.is_empty() || !ports.is_empty() {
                let blocks = self.blocks_at(address).to_vec();
                self.identities.insert(address, IdentityKey { selectors: selectors.clone(), blocks, ports });
            }
        }
        for node in objects.nodes.values() {
            let matching =
                |(_, selector): &(&u32, &PeerSelector)| selector.matches_node(&node.metadata.labels);
            let selectors: Vec<u32> =
                interned.selectors.iter().filter(matching).map(|(number, _)| *number).collect();
            if selectors.is_empty() {
                continue;
            }
            for address in node.addresses() {
                let blocks = self.blocks_at(address).to_vec();
                let key = IdentityKey { selectors: selectors.clone(), blocks, ports: Vec::new() };
                self.identities.insert(address, key);
            }
        }
    }

    /// Gives numbers and fills the ruleset.
    fn number(&mut self, numbering: &mut Numbering) {
        let mut identities: BTreeMap<IdentityKey, IdentityId> = BTreeMap::new();
        for (address, key) in &self.identities {
            let id = *identities.entry(key.clone()).or_insert_with(|| numbering.identity(key));
            self.ruleset.ident.insert(*address, id);
        }
        for (range, blocks) in &self.ranges {
            let key = IdentityKey { blocks: blocks.clone(), ..IdentityKey::default() };
            let id = *identities.entry(key.clone()).or_insert_with(|| numbering.identity(&key));
            self.ruleset.cidr.insert(*range, id);
        }
        for direction in [Direction::Ingress, Direction::Egress] {
            self.number_direction(direction, &identities, numbering);
        }
    }

    fn number_direction(
        &mut self,
        direction: Direction,
        identities: &BTreeMap<IdentityKey, IdentityId>,
        numbering: &mut Numbering,
    ) {
        let (by_address, policies, classes, pairs) = match direction {
            Direction::Ingress => {
                (&self.classes_in, &self.policies_in, &mut self.ruleset.cls_in, &mut self.ruleset.pair_in)
            }
            Direction::Egress => {
                (&self.classes_eg, &self.policies_eg, &mut self.ruleset.cls_eg, &mut self.ruleset.pair_eg)
            }
        };
        let mut done: BTreeMap<&ClassKey, ClassId> = BTreeMap::new();
        for (address, key) in by_address {
            if let Some(class) = done.get(key) {
                classes.insert(*address, *class);
                continue;
            }
            let class = numbering.class(key);
            done.insert(key, class);
            classes.insert(*address, class);
            let tiers = Tiers::of(key, |name| policies.get(name));
            for (identity, allowed) in class_pairs(&tiers, key, identities) {
                let profile = numbering.profile(&allowed);
                pairs.insert((class, identity), profile);
                self.ruleset.profiles.entry(profile).or_insert_with(|| allowed.rules());
            }
        }
    }

    /// The blocks that contain an address.
    pub(super) fn blocks_at(&self, address: IpAddr) -> &[u32] {
        let after = self.ranges.partition_point(|(range, _)| range.first <= address);
        match after.checked_sub(1).map(|index| &self.ranges[index]) {
            Some((range, blocks)) if address <= range.last => blocks,
            Some(_) | None => &[],
        }
    }

    /// What an address matches; the empty identity for a stranger.
    pub(super) fn identity_of(&self, address: IpAddr) -> IdentityKey {
        let blocks = || IdentityKey { blocks: self.blocks_at(address).to_vec(), ..IdentityKey::default() };
        self.identities.get(&address).cloned().unwrap_or_else(blocks)
    }
}

/// What a class allows each identity, without the pairs to which the kernel's fallback (exact identity, then range, then
/// anybody) gives the same answer already.
fn class_pairs(
    tiers: &Tiers<'_>,
    class: &ClassKey,
    identities: &BTreeMap<IdentityKey, IdentityId>,
) -> Vec<(IdentityId, PortSet)> {
    let anybody = tiers.allowed(class, &IdentityKey::default());
    let mut pairs = Vec::new();
    for (identity, id) in identities {
        let allowed = tiers.allowed(class, identity);
        let fallback = if identity.selectors.is_empty() && identity.ports.is_empty() {
            None
        } else {
            let range = IdentityKey { blocks: identity.blocks.clone(), ..IdentityKey::default() };
            (!identity.blocks.is_empty()).then(|| tiers.allowed(class, &range))
        };
        if allowed != *fallback.as_ref().unwrap_or(&anybody) {
            pairs.push((*id, allowed));
        }
    }
    if !anybody.is_empty() {
        pairs.push((IdentityId::ANY, anybody));
    }
    pairs
}

fn known_pod<'a>(objects: &'a Objects, name: &ObjectName, uid: &str) -> Option<&'a Pod> {
    let same = |pod: &&Pod| uid.is_empty() || pod.metadata.uid.is_empty() || pod.metadata.uid == uid;
    objects.pods.get(name).filter(same).filter(|pod| pod.is_policy_pod())
}

/// A policy of either kind.
enum Selected<'a> {
    Namespaced(&'a NetworkPolicy),
    Cluster(&'a ClusterNetworkPolicy),
}

/// The policies that select a pod, in the order in which they are asked; `found` sees each of them.
fn select<'a>(
    objects: &'a Objects,
    pod: &Pod,
    direction: Direction,
    mut found: impl FnMut(&PolicyRef, Selected<'a>),
) -> Vec<PolicyRef> {
    let mut names = Vec::new();
    let labels = &pod.metadata.labels;
    let namespace = namespace_of(pod);
    // Names sort by namespace, so a namespace's policies are neighbours.
    let first = ObjectName { namespace: namespace.to_owned(), name: String::new() };
    let in_namespace = objects.policies.range(first..).take_while(|(name, _)| name.namespace == namespace);
    for (name, policy) in in_namespace {
        if isolates(policy, direction) && policy.spec.pod_selector.matches(labels) {
            let name = PolicyRef::namespaced(name.clone());
            found(&name, Selected::Namespaced(policy));
            names.push(name);
        }
    }
    let namespace_labels = objects.namespace_labels(namespace);
    for policy in objects.cluster_policies.values().filter(|policy| concerns(policy, direction)) {
        if is_subject(&policy.spec.subject, &namespace_labels, labels) {
            let name = reference(policy);
            found(&name, Selected::Cluster(policy));
            names.push(name);
        }
    }
    names.sort();
    names
}

fn is_subject(subject: &ClusterSubject, namespace_labels: &Labels, labels: &Labels) -> bool {
    match (&subject.namespaces, &subject.pods) {
        (Some(namespaces), _) => namespaces.matches(namespace_labels),
        (None, Some(pods)) => {
            pods.namespace_selector.matches(namespace_labels) && pods.pod_selector.matches(labels)
        }
        (None, None) => false,
    }
}

fn names_used<'a>(policies: impl Iterator<Item = &'a PolicyRules>) -> BTreeSet<NamedPort> {
    policies.flat_map(|policy| &policy.rules).flat_map(Rule::named_ports).cloned().collect()
}

fn resolved_ports(pod: &Pod, names: &BTreeSet<NamedPort>) -> ResolvedPorts {
    let resolved = names.iter().map(|port| (port.clone(), pod.named_ports(&port.name, port.protocol)));
    resolved.filter(|(_, numbers)| !numbers.is_empty()).collect()
}

fn namespace_of(pod: &Pod) -> &str {
    if pod.metadata.namespace.is_empty() { "default" } else { &pod.metadata.namespace }
}

/// Which pod an address belongs to. Leases on this node decide; else the pods' status, where a pod that is not being
/// deleted wins. Of several live claims none is believed: an address that is used again must not keep what its former
/// owner was allowed.
fn owners<'a>(objects: &'a Objects, subjects: &[Subject]) -> (BTreeMap<IpAddr, &'a Pod>, BTreeSet<IpAddr>) {
    let mut owners: BTreeMap<IpAddr, &Pod> = BTreeMap::new();
    let mut leased: BTreeSet<IpAddr> = BTreeSet::new();
    for subject in subjects {
        leased.extend(&subject.addresses);
        let Some(name) = &subject.pod else { continue };
        let Some(pod) = known_pod(objects, name, &subject.uid) else { continue };
        owners.extend(subject.addresses.iter().map(|address| (*address, pod)));
    }
    let mut claims: BTreeMap<IpAddr, Vec<&Pod>> = BTreeMap::new();
    // Also of a pod that is attached here: one that was started again elsewhere keeps its name, and its old sandbox may
    // not be gone yet.
    for pod in objects.pods.values().filter(|pod| pod.is_policy_pod()) {
        for address in pod.addresses().into_iter().filter(|address| !leased.contains(address)) {
            claims.entry(address).or_default().push(pod);
        }
    }
    let mut contested = BTreeSet::new();
    for (address, mut pods) in claims {
        if pods.len() > 1 {
            pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
        }
        match pods.as_slice() {
            [pod] => {
                owners.insert(address, pod);
            }
            _ => {
                contested.insert(address);
            }
        }
    }
    (owners, contested)
}
