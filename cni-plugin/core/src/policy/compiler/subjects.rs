//! Which policies select a pod, without asking each of them.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::cluster::{hash, needed_labels};
use super::{Compiler, Policy, PolicySubject};
use crate::objects::{ClusterSubject, LabelSelector, Labels};
use crate::policy::lookup::Direction;
use crate::policy::reference::{PolicyRef, Tier};

/// NetworkPolicies by what they need of a pod: its namespace and one of its labels, or its namespace alone. Two of one
/// hash only make a needless comparison.
#[derive(Debug, Default)]
pub(super) struct Subjects(BTreeSet<(u64, Arc<PolicyRef>)>);

impl Subjects {
    pub(super) fn insert(&mut self, policy: &Arc<PolicyRef>, selector: &LabelSelector) {
        self.0.extend(keys(&policy.name.namespace, selector).map(|key| (key, Arc::clone(policy))));
    }

    pub(super) fn remove(&mut self, policy: &Arc<PolicyRef>, selector: &LabelSelector) {
        for key in keys(&policy.name.namespace, selector) {
            self.0.remove(&(key, Arc::clone(policy)));
        }
    }

    fn with(&self, key: u64) -> impl Iterator<Item = &Arc<PolicyRef>> {
        let first = Arc::new(PolicyRef::cluster(crate::objects::ClusterTier::Admin, i32::MIN, ""));
        self.0.range((key, first)..).take_while(move |(own, _)| *own == key).map(|(_, policy)| policy)
    }
}

fn keys(namespace: &str, selector: &LabelSelector) -> impl Iterator<Item = u64> {
    let labels =
        needed_labels(selector).map_or_else(|| vec![None], |needed| needed.into_iter().map(Some).collect());
    labels.into_iter().map(move |label| hash(&(namespace, label)))
}

impl Compiler {
    /// The policies that select a pod, in the order in which they are asked.
    pub(super) fn policies_selecting(&self, pod: u32, direction: Direction) -> Vec<Arc<PolicyRef>> {
        let group = self.cluster.group_of(pod);
        let labels = group.labels.iter().map(|(key, value)| Some(super::cluster::label_hash(key, value)));
        let namespaced =
            labels.chain([None]).flat_map(|label| self.subjects.with(hash(&(&*group.namespace, label))));
        let candidates = namespaced.chain(self.cluster_refs.values());
        let namespace_labels = self.cluster.namespace_labels(&group.namespace);
        let selects = |name: &&Arc<PolicyRef>| {
            self.policies.get(*name).is_some_and(|policy| {
                let own = name.tier != Tier::NetworkPolicy || *name.name.namespace == *group.namespace;
                own && policy.rules(direction).is_some()
                    && policy.selects(&namespace_labels, |key| group.label(key))
            })
        };
        let names: BTreeSet<&Arc<PolicyRef>> = candidates.filter(selects).collect();
        names.into_iter().cloned().collect()
    }

    /// Whether a policy of this name selects an endpoint's pod, as it is known now.
    pub(super) fn selects_local(&self, name: &PolicyRef, policy: &Policy, local: &super::Local) -> bool {
        let Some(pod) = self.pod_of(&local.subject) else { return false };
        let group = self.cluster.group_of(pod);
        let own = name.tier != Tier::NetworkPolicy || *name.name.namespace == *group.namespace;
        own && policy.selects(&self.cluster.namespace_labels(&group.namespace), |key| group.label(key))
    }
}

impl Policy {
    fn selects<'a>(&self, namespace_labels: &Labels, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        match &self.subject {
            PolicySubject::Namespaced(selector) => selector.matches_by(label),
            PolicySubject::Cluster(subject) => is_subject(subject, namespace_labels, label),
        }
    }
}

fn is_subject<'a>(
    subject: &ClusterSubject,
    namespace_labels: &Labels,
    label: impl Fn(&str) -> Option<&'a str>,
) -> bool {
    match (&subject.namespaces, &subject.pods) {
        (Some(namespaces), _) => namespaces.matches(namespace_labels),
        (None, Some(pods)) => {
            pods.namespace_selector.matches(namespace_labels) && pods.pod_selector.matches_by(label)
        }
        (None, None) => false,
    }
}
