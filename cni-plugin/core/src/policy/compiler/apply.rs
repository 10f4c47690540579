//! Taking changes in: objects and endpoints are stored at once, and what they reach is marked.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Class, Compiler, Local, Membership, Origin, Policy, PolicySubject, Subject};
use crate::objects::{ClusterNetworkPolicy, Labels, NetworkPolicy, ObjectChange, ObjectName, Pod};
use crate::policy::lookup::Direction;
use crate::policy::reference::PolicyRef;
use crate::policy::rules::{self, NamedPort, PeerRef, PolicyRules};

impl Compiler {
    /// Takes in a change of an object. Policies must have passed [`crate::policy::validate()`] or
    /// [`crate::policy::validate_cluster()`].
    pub fn apply(&mut self, change: &ObjectChange) {
        match change {
            ObjectChange::Node(name, node) => {
                let concerned = self.cluster.set_node(name, node.as_deref());
                if self.peers.selects_nodes() {
                    self.dirty.addresses.extend(concerned);
                }
            }
            ObjectChange::Namespace(name, labels) => self.apply_namespace(name, labels.clone()),
            ObjectChange::Pod(name, pod) => self.apply_pod(name, pod.as_deref()),
            ObjectChange::Policy(name, policy) => self.apply_policy(name, policy.as_deref()),
            ObjectChange::ClusterPolicy(name, policy) => self.apply_cluster_policy(name, policy.as_deref()),
            // Which node has an address is nothing that a policy asks.
            ObjectChange::PodRange(..) => {}
        }
    }

    /// Adds an endpoint, or says what it is now.
    pub fn put(&mut self, endpoint: &str, subject: Subject) {
        if self.locals.get(endpoint).is_some_and(|local| local.subject == subject) {
            return;
        }
        self.remove(endpoint);
        for address in &subject.addresses {
            self.leased.insert(*address, endpoint.to_owned());
        }
        let local = Local { subject, ingress: Membership::Open, egress: Membership::Open, fresh: true };
        self.locals.insert(endpoint.to_owned(), local);
        self.dirty.locals.insert(endpoint.to_owned());
    }

    /// Removes an endpoint. Its classes stay in the kernel until its port is gone: whoever removes the port removes them in
    /// the same transaction ([`crate::ruleset::Ruleset::forget_port`]), so that no packet finds it unisolated.
    pub fn remove(&mut self, endpoint: &str) {
        let Some(local) = self.locals.remove(endpoint) else { return };
        for address in local.subject.addresses {
            self.dirty.addresses.insert(address);
            if self.leased.get(&address).is_some_and(|owner| owner == endpoint) {
                self.leased.remove(&address);
            }
        }
        for membership in [local.ingress, local.egress] {
            if let Membership::In(class) = membership {
                self.classes[class].members -= 1;
                self.classes[class].bereft = true;
                self.dirty.left.insert(class);
            }
        }
    }

    fn apply_namespace(&mut self, name: &str, labels: Option<Labels>) {
        for group in self.cluster.set_namespace(name, labels) {
            self.match_group(group);
        }
        // Policies may choose their subjects by the namespace's labels.
        self.mark_locals(|local| local.subject.pod.as_ref().is_some_and(|pod| pod.namespace == name));
    }

    fn apply_pod(&mut self, name: &ObjectName, pod: Option<&Pod>) {
        let change = self.cluster.set_pod(name, pod);
        if let Some(group) = change.new_group {
            self.match_group(group);
        }
        if let Some((group, selectors)) = change.ended_group {
            self.dirty.groups.remove(&group);
            for number in selectors {
                if let Some(entry) = self.peers.selectors.get_mut(number) {
                    entry.groups.remove(&group);
                }
            }
        }
        if let Some((id, before)) = change.before {
            for address in before.addresses() {
                if let Some(known) = self.addresses.get_mut(address) {
                    known.claims.retain(|claim| *claim != id);
                }
                self.dirty.addresses.insert(address);
            }
        }
        if let Some(id) = change.now {
            for address in self.cluster.pods[id].addresses() {
                self.addresses.entry(address).claims.push(id);
                self.dirty.addresses.insert(address);
            }
        }
        self.mark_locals(|local| local.subject.pod.as_ref() == Some(name));
    }

    fn apply_policy(&mut self, name: &ObjectName, policy: Option<&NetworkPolicy>) {
        let reference = Arc::new(PolicyRef::namespaced(name.clone()));
        let now = policy.map(|policy| {
            let mut rules = |direction| {
                rules::isolates(policy, direction)
                    .then(|| rules::of_policy(policy, direction, &mut self.peers))
            };
            let (ingress, egress) = (rules(Direction::Ingress), rules(Direction::Egress));
            let subject = PolicySubject::Namespaced(policy.spec.pod_selector.clone());
            let (classes, origin) = (BTreeSet::new(), Origin::of(&policy.metadata));
            Policy { subject, ingress, egress, classes, origin, since_ms: None }
        });
        self.set_policy(reference, now);
    }

    fn apply_cluster_policy(&mut self, name: &str, policy: Option<&ClusterNetworkPolicy>) {
        let reference = policy.map(|policy| Arc::new(rules::reference(policy)));
        let before = self.cluster_refs.remove(name);
        if let Some(before) = before.filter(|before| reference.as_ref() != Some(before)) {
            self.set_policy(before, None);
        }
        let (Some(reference), Some(policy)) = (reference, policy) else { return };
        self.cluster_refs.insert(name.to_owned(), reference.clone());
        let mut rules = |direction| {
            rules::concerns(policy, direction)
                .then(|| rules::of_cluster_policy(policy, direction, &mut self.peers))
        };
        let (ingress, egress) = (rules(Direction::Ingress), rules(Direction::Egress));
        let subject = PolicySubject::Cluster(Box::new(policy.spec.subject.clone()));
        let (classes, origin) = (BTreeSet::new(), Origin::of(&policy.metadata));
        let now = Policy { subject, ingress, egress, classes, origin, since_ms: None };
        self.set_policy(reference, Some(now));
    }

    fn set_policy(&mut self, reference: Arc<PolicyRef>, now: Option<Policy>) {
        let before = self.policies.remove(&reference);
        let same_subject = match (&before, &now) {
            (Some(before), Some(now)) => {
                before.subject == now.subject
                    && before.ingress.is_some() == now.ingress.is_some()
                    && before.egress.is_some() == now.egress.is_some()
            }
            (None, None) => return,
            _ => false,
        };
        // What port names mean at a pod is part of its class.
        let same_names = port_names(before.as_ref()) == port_names(now.as_ref());
        if !(same_subject && same_names) {
            for policy in before.iter().chain(&now) {
                let selected =
                    self.locals.iter().filter(|(_, local)| self.selects_local(&reference, policy, local));
                let names: Vec<String> = selected.map(|(name, _)| name.clone()).collect();
                self.dirty.locals.extend(names);
            }
        }
        if let Some(PolicySubject::Namespaced(selector)) = before.as_ref().map(|policy| &policy.subject) {
            self.subjects.remove(&reference, selector);
        }
        if let Some(PolicySubject::Namespaced(selector)) = now.as_ref().map(|policy| &policy.subject) {
            self.subjects.insert(&reference, selector);
        }
        for rules in before.iter().flat_map(Policy::all_rules) {
            rules.peers().for_each(|peer| self.peers.release(peer));
        }
        let same_rules = before
            .as_ref()
            .zip(now.as_ref())
            .is_some_and(|(before, now)| before.ingress == now.ingress && before.egress == now.egress);
        if !same_rules {
            let touched = touched_peers(before.iter().chain(&now));
            let touched = match self.dirty.policies.remove(&reference) {
                None => touched,
                Some(earlier) => earlier.zip(touched).map(|(a, b)| a.union(&b).copied().collect()),
            };
            self.dirty.policies.insert(reference.clone(), touched);
        }
        let Some(mut now) = now else {
            self.unconfirmed.remove(&reference);
            return;
        };
        let earlier = before.as_ref().filter(|before| before.origin.uid == now.origin.uid);
        let unchanged = same_subject && same_rules && earlier.is_some();
        now.since_ms = earlier.and_then(|before| before.since_ms);
        now.classes = match before {
            Some(before) => before.classes,
            // Classes that name the policy may be there even if it was not: it went and came back before a commit.
            None => {
                let with_it =
                    |(_, class): &(u32, &Class)| class.key.policies.binary_search(&reference).is_ok();
                self.classes.iter().filter(with_it).map(|(slot, _)| slot).collect()
            }
        };
        self.policies.insert(reference.clone(), now);
        if !unchanged {
            self.unconfirm(&reference);
        }
    }

    fn mark_locals(&mut self, concerned: impl Fn(&Local) -> bool) {
        let names = self.locals.iter().filter(|(_, local)| concerned(local));
        self.dirty.locals.extend(names.map(|(name, _)| name.clone()));
    }

    /// Finds the selectors in force that match a group.
    fn match_group(&mut self, slot: u32) {
        let group = &self.cluster.groups[slot];
        let labels = self.cluster.namespace_labels(&group.namespace);
        let matching = self.peers.matching_group(group, &labels);
        let before = std::mem::replace(&mut self.cluster.groups[slot].selectors, matching.clone());
        if before == matching {
            return;
        }
        self.dirty.groups.insert(slot);
        for number in before {
            if let Some(entry) = self.peers.selectors.get_mut(number) {
                entry.groups.remove(&slot);
            }
        }
        for number in matching {
            if let Some(entry) = self.peers.selectors.get_mut(number) {
                entry.groups.insert(slot);
            }
        }
    }
}

impl Policy {
    fn all_rules(&self) -> impl Iterator<Item = &PolicyRules> {
        self.ingress.iter().chain(&self.egress)
    }
}

/// The port names that are looked up at the pods that a policy selects.
fn port_names(policy: Option<&Policy>) -> BTreeSet<&NamedPort> {
    let ingress = policy.and_then(|policy| policy.ingress.as_ref());
    ingress.into_iter().flat_map(PolicyRules::named_ports).collect()
}

/// The peers that rules of these policies name; `None` where one of them has a rule for everybody.
pub(super) fn touched_peers<'a>(policies: impl IntoIterator<Item = &'a Policy>) -> Option<BTreeSet<PeerRef>> {
    let mut touched = BTreeSet::new();
    for rule in policies.into_iter().flat_map(Policy::all_rules).flat_map(|policy| &policy.rules) {
        touched.extend(rule.peers.as_ref()?);
    }
    Some(touched)
}
