//! The cluster's objects as the compiler keeps them: small, since there may be a hundred thousand pods.
//!
//! Pods of one namespace with the same labels are a group: selectors are matched against groups.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU64;
use std::sync::Arc;

use hashbrown::HashTable;

use super::arena::Arena;
use crate::objects::{
    LabelSelector, Labels, NAMESPACE_NAME_LABEL, Node, ObjectName, Operator, Pod, Protocol,
};
use crate::policy::rules::{NamedPort, NamespaceScope, PeerSelector, ResolvedPorts};

/// A pod; its namespace is its group's.
#[derive(Debug)]
pub(in crate::policy) struct PodFacts {
    pub name: Box<str>,
    /// `None` for an object without a uid.
    uid: Option<NonZeroU64>,
    pub group: u32,
    /// A pod has at most one of each family.
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
    pub ports: Arc<[PodPort]>,
    /// Policies concern it: neither completed nor on the host network.
    pub concerned: bool,
    pub deleting: bool,
}

/// A named container port.
pub(in crate::policy) type PodPort = (Box<str>, Protocol, u16);

/// Pods of one namespace with the same labels.
#[derive(Debug)]
pub(in crate::policy) struct Group {
    pub namespace: Arc<str>,
    /// Sorted by key.
    pub labels: Box<[(Arc<str>, Box<str>)]>,
    /// Selectors in force that match it, sorted.
    pub selectors: Vec<u32>,
    pub members: Vec<u32>,
}

#[derive(Debug)]
struct NamespaceFacts {
    labels: Labels,
    groups: BTreeSet<u32>,
}

/// A node, for peers that select nodes.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::policy) struct NodeFacts {
    pub labels: Labels,
    pub addresses: Vec<IpAddr>,
}

/// Namespaces, pods and nodes.
#[derive(Debug, Default)]
pub(in crate::policy) struct Cluster {
    namespaces: BTreeMap<Arc<str>, NamespaceFacts>,
    pub pods: Arena<PodFacts>,
    by_name: HashTable<u32>,
    pub groups: Arena<Group>,
    /// Groups by namespace and labels.
    by_key: HashTable<u32>,
    /// Groups by the hash of each of their labels.
    by_label: BTreeSet<(u64, u32)>,
    /// Label keys and lists of ports, each once.
    words: BTreeSet<Arc<str>>,
    port_lists: BTreeSet<Arc<[PodPort]>>,
    pub nodes: BTreeMap<String, NodeFacts>,
}

/// A stable hash of a label. Two labels of one hash only make a needless comparison.
pub(in crate::policy) fn label_hash(key: &str, value: &str) -> u64 {
    hash(&(key, value))
}

/// Hashes of labels of which whatever a selector matches has one; `None`: it needs no certain label.
pub(in crate::policy) fn needed_labels(selector: &LabelSelector) -> Option<Vec<u64>> {
    if let Some((key, value)) = selector.match_labels.iter().next() {
        return Some(vec![label_hash(key, value)]);
    }
    let listing =
        selector.match_expressions.iter().filter(|requirement| requirement.operator == Operator::In);
    let shortest = listing.min_by_key(|requirement| requirement.values.len())?;
    Some(shortest.values.iter().map(|value| label_hash(&shortest.key, value)).collect())
}

pub(super) fn hash(value: &impl Hash) -> u64 {
    // Its keys are fixed, so that a run can be repeated.
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn hash_uid(uid: &str) -> Option<NonZeroU64> {
    NonZeroU64::new(hash(&uid)).filter(|_| !uid.is_empty())
}

impl PodFacts {
    /// Whether an attachment that was made for a pod of this uid is this pod's. Either may be unknown.
    pub(in crate::policy) fn has_uid(&self, uid: &str) -> bool {
        uid.is_empty() || self.uid.is_none_or(|own| Some(own) == hash_uid(uid))
    }

    pub(in crate::policy) fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// What port names stand for at this pod; those it does not have are left out.
    pub(in crate::policy) fn resolve<'a>(&self, names: impl Iterator<Item = &'a NamedPort>) -> ResolvedPorts {
        let numbers = |name: &NamedPort| -> Vec<(Protocol, u16)> {
            let fits = |(own, protocol, _): &&PodPort| {
                **own == *name.name && name.protocol.is_none_or(|wanted| wanted == *protocol)
            };
            self.ports.iter().filter(fits).map(|(_, protocol, number)| (*protocol, *number)).collect()
        };
        names.map(|name| (name.clone(), numbers(name))).filter(|(_, numbers)| !numbers.is_empty()).collect()
    }
}

fn group_hash<'a>(namespace: &str, labels: impl Iterator<Item = (&'a str, &'a str)>) -> u64 {
    let mut hasher = std::collections::hash_map::DefaultHasher::new();
    namespace.hash(&mut hasher);
    labels.for_each(|label| label.hash(&mut hasher));
    hasher.finish()
}

impl Group {
    fn hash(&self) -> u64 {
        group_hash(&self.namespace, self.labels.iter().map(|(key, value)| (&**key, &**value)))
    }

    pub(in crate::policy) fn label(&self, key: &str) -> Option<&str> {
        let index = self.labels.binary_search_by(|(own, _)| (**own).cmp(key)).ok()?;
        Some(&self.labels[index].1)
    }

    pub(in crate::policy) fn is_matched(&self, selector: &PeerSelector, namespace_labels: &Labels) -> bool {
        let PeerSelector::Pods { namespaces, pods } = selector else { return false };
        let in_scope = match namespaces {
            NamespaceScope::Named(name) => **name == *self.namespace,
            NamespaceScope::Matching(selector) => selector.matches(namespace_labels),
        };
        in_scope && pods.matches_by(|key| self.label(key))
    }
}

/// What a change of a pod did.
#[derive(Debug, Default)]
pub(in crate::policy) struct PodChange {
    /// What it was, with its number.
    pub before: Option<(u32, PodFacts)>,
    /// Its number now.
    pub now: Option<u32>,
    /// A group that this made; its selectors are to be found.
    pub new_group: Option<u32>,
    /// A group that this ended, with its selectors.
    pub ended_group: Option<(u32, Vec<u32>)>,
}

impl Cluster {
    pub(in crate::policy) fn find(&self, name: &ObjectName) -> Option<u32> {
        self.by_name
            .find(hash(&(name.namespace.as_str(), name.name.as_str())), |id| {
                let pod = &self.pods[*id];
                *pod.name == *name.name && *self.groups[pod.group].namespace == *name.namespace
            })
            .copied()
    }

    pub(in crate::policy) fn group_of(&self, pod: u32) -> &Group {
        &self.groups[self.pods[pod].group]
    }

    pub(in crate::policy) fn object_name(&self, pod: u32) -> ObjectName {
        let name = self.pods[pod].name.to_string();
        ObjectName { namespace: self.group_of(pod).namespace.to_string(), name }
    }

    /// Labels of a namespace. One without an object has only its name label.
    pub(in crate::policy) fn namespace_labels(&self, name: &str) -> Labels {
        let automatic = || Labels::from([(NAMESPACE_NAME_LABEL.to_owned(), name.to_owned())]);
        self.namespaces.get(name).map_or_else(automatic, |namespace| namespace.labels.clone())
    }

    /// Sets the labels of a namespace; `None`: it is gone. Returns the groups that are in it, if anything changed.
    pub(in crate::policy) fn set_namespace(&mut self, name: &str, labels: Option<Labels>) -> Vec<u32> {
        let mut labels = labels.unwrap_or_default();
        labels.insert(NAMESPACE_NAME_LABEL.to_owned(), name.to_owned());
        let namespace = self.namespace(name);
        if namespace.labels == labels {
            return Vec::new();
        }
        namespace.labels = labels;
        namespace.groups.iter().copied().collect()
    }

    fn namespace(&mut self, name: &str) -> &mut NamespaceFacts {
        let word = self.word(name);
        self.namespaces.entry(word).or_insert_with(|| NamespaceFacts {
            labels: Labels::from([(NAMESPACE_NAME_LABEL.to_owned(), name.to_owned())]),
            groups: BTreeSet::new(),
        })
    }

    /// Sets a node; `None`: it is gone. Returns the addresses that this concerns.
    pub(in crate::policy) fn set_node(&mut self, name: &str, node: Option<&Node>) -> Vec<IpAddr> {
        let now = node.map(|node| NodeFacts {
            labels: node.metadata.labels.clone(),
            addresses: node.addresses().collect(),
        });
        let before = self.nodes.remove(name);
        if before == now {
            self.nodes.extend(before.map(|facts| (name.to_owned(), facts)));
            return Vec::new();
        }
        let concerned = before.iter().chain(&now).flat_map(|facts| facts.addresses.clone()).collect();
        self.nodes.extend(now.map(|facts| (name.to_owned(), facts)));
        concerned
    }

    /// Sets a pod; `None`: it is gone.
    pub(in crate::policy) fn set_pod(&mut self, name: &ObjectName, pod: Option<&Pod>) -> PodChange {
        let mut change = PodChange::default();
        if let Some(id) = self.find(name) {
            change.before = self.take_pod(id).map(|pod| (id, pod));
        }
        if let Some(pod) = pod {
            let (group, is_new) = self.group(name, &pod.metadata.labels);
            change.new_group = is_new.then_some(group);
            change.now = Some(self.put_pod(name, pod, group));
        }
        if let Some(group) = change.before.as_ref().map(|(_, pod)| pod.group) {
            change.ended_group = self.end_group(group).map(|selectors| (group, selectors));
        }
        change
    }

    fn take_pod(&mut self, id: u32) -> Option<PodFacts> {
        let pod = self.pods.remove(id)?;
        let hashed = hash(&(&*self.groups[pod.group].namespace, &*pod.name));
        if let Ok(entry) = self.by_name.find_entry(hashed, |other| *other == id) {
            entry.remove();
        }
        self.groups[pod.group].members.retain(|member| *member != id);
        Some(pod)
    }

    fn put_pod(&mut self, name: &ObjectName, pod: &Pod, group: u32) -> u32 {
        let addresses = pod.addresses();
        let facts = PodFacts {
            name: name.name.as_str().into(),
            uid: hash_uid(pod.running_uid()),
            group,
            v4: addresses.iter().find_map(|address| match address {
                IpAddr::V4(v4) => Some(*v4),
                IpAddr::V6(_) => None,
            }),
            v6: addresses.iter().find_map(|address| match address {
                IpAddr::V4(_) => None,
                IpAddr::V6(v6) => Some(*v6),
            }),
            ports: self.port_list(pod),
            concerned: pod.is_policy_pod(),
            deleting: pod.metadata.deletion_timestamp.is_some(),
        };
        let id = self.pods.insert(facts);
        self.groups[group].members.push(id);
        let (pods, groups) = (&self.pods, &self.groups);
        let hasher = |id: &u32| hash(&(&*groups[pods[*id].group].namespace, &*pods[*id].name));
        self.by_name.insert_unique(hash(&(name.namespace.as_str(), name.name.as_str())), id, hasher);
        id
    }

    fn port_list(&mut self, pod: &Pod) -> Arc<[PodPort]> {
        let list: Arc<[PodPort]> =
            pod.all_named_ports().map(|(name, protocol, number)| (name.into(), protocol, number)).collect();
        if let Some(known) = self.port_lists.get(&list) {
            return Arc::clone(known);
        }
        self.port_lists.insert(Arc::clone(&list));
        list
    }

    fn word(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.words.get(text) {
            return Arc::clone(known);
        }
        let word: Arc<str> = text.into();
        self.words.insert(Arc::clone(&word));
        word
    }

    fn group(&mut self, name: &ObjectName, labels: &Labels) -> (u32, bool) {
        let namespace = self.word(&name.namespace);
        let hashed = group_hash(&namespace, labels.iter());
        let is_it = |slot: &u32| {
            let group = &self.groups[*slot];
            let own = group.labels.iter().map(|(key, value)| (&**key, &**value));
            *group.namespace == *namespace && own.eq(labels.iter())
        };
        if let Some(group) = self.by_key.find(hashed, is_it) {
            return (*group, false);
        }
        let labels: Box<[(Arc<str>, Box<str>)]> =
            labels.iter().map(|(key, value)| (self.word(key), value.into())).collect();
        let hashes: Vec<u64> = labels.iter().map(|(key, value)| label_hash(key, value)).collect();
        let group =
            self.groups.insert(Group { namespace, labels, selectors: Vec::new(), members: Vec::new() });
        let groups = &self.groups;
        self.by_key.insert_unique(hashed, group, |slot| groups[*slot].hash());
        self.by_label.extend(hashes.into_iter().map(|hashed| (hashed, group)));
        self.namespace(&name.namespace).groups.insert(group);
        (group, true)
    }

    /// Removes a group that has no member any more and returns its selectors.
    fn end_group(&mut self, slot: u32) -> Option<Vec<u32>> {
        if !self.groups[slot].members.is_empty() {
            return None;
        }
        let group = self.groups.remove(slot)?;
        for (key, value) in &group.labels {
            self.by_label.remove(&(label_hash(key, value), slot));
        }
        self.namespace(&group.namespace).groups.remove(&slot);
        if let Ok(entry) = self.by_key.find_entry(group.hash(), |other| *other == slot) {
            entry.remove();
        }
        Some(group.selectors)
    }

    /// The groups that a selector matches; one may be named twice.
    pub(in crate::policy) fn groups_matching(&self, selector: &PeerSelector) -> Vec<u32> {
        let PeerSelector::Pods { namespaces, pods } = selector else { return Vec::new() };
        let matches = |group: &u32| {
            let group = &self.groups[*group];
            match self.namespaces.get(&group.namespace) {
                Some(namespace) => group.is_matched(selector, &namespace.labels),
                None => false,
            }
        };
        if let Some(needed) = needed_labels(pods) {
            let with_one =
                needed.iter().flat_map(|hashed| self.by_label.range((*hashed, 0)..=(*hashed, u32::MAX)));
            return with_one.map(|(_, group)| *group).filter(matches).collect();
        }
        if let NamespaceScope::Named(name) = namespaces {
            let of_namespace = self.namespaces.get(name.as_str()).map(|namespace| &namespace.groups);
            return of_namespace.into_iter().flatten().copied().filter(matches).collect();
        }
        self.groups.iter().map(|(slot, _)| slot).filter(matches).collect()
    }
}
