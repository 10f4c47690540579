//! How policies stand on this node: whom they select here, and since when the kernel has them as they are.

use std::sync::Arc;

use super::{Compiler, Origin, Policy};
use crate::objects::{Meta, ObjectName};
use crate::policy::lookup::Direction;
use crate::policy::reference::{PolicyRef, Tier};

/// How a policy stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyStanding<'a> {
    /// The policy.
    pub policy: &'a PolicyRef,
    /// Of its object; may be empty.
    pub uid: &'a str,
    /// Of its object; 0 if it says none.
    pub metadata_generation: i64,
    /// When the kernel was said to have its content and the first pod here that it selects ([`Compiler::confirm`]);
    /// milliseconds since 1970. `None`: not yet.
    pub since_ms: Option<u64>,
    /// Endpoints here that it selects for ingress.
    pub ingress_pods: u32,
    /// And for egress.
    pub egress_pods: u32,
}

impl Compiler {
    /// Says that the kernel has everything that was compiled, since `now_ms` (milliseconds since 1970). Counts for the
    /// policies that changed since it was last said. A policy that was read again and says the same has not changed.
    pub fn confirm(&mut self, now_ms: u64) {
        for name in std::mem::take(&mut self.unconfirmed) {
            if let Some(policy) = self.policies.get_mut(&name) {
                policy.since_ms = Some(now_ms);
            }
        }
    }

    /// All policies, in the order in which they are asked.
    pub fn standings(&self) -> impl Iterator<Item = PolicyStanding<'_>> {
        self.policies.iter().map(|(name, policy)| self.standing(name, policy))
    }

    /// The policy of that name: of a namespace, or where that is empty of the cluster.
    #[must_use]
    pub fn standing_of(&self, name: &ObjectName) -> Option<PolicyStanding<'_>> {
        let reference = if name.namespace.is_empty() {
            Arc::clone(self.cluster_refs.get(&name.name)?)
        } else {
            Arc::new(PolicyRef::namespaced(name.clone()))
        };
        self.policies.get_key_value(&reference).map(|(name, policy)| self.standing(name, policy))
    }

    fn standing<'a>(&'a self, name: &'a PolicyRef, policy: &'a Policy) -> PolicyStanding<'a> {
        let members = |direction| {
            let classes = policy.classes.iter().filter_map(|slot| self.classes.get(*slot));
            classes.filter(|class| class.key.direction == direction).map(|class| class.members).sum()
        };
        PolicyStanding {
            policy: name,
            uid: &policy.origin.uid,
            metadata_generation: policy.origin.metadata_generation,
            since_ms: policy.since_ms,
            ingress_pods: members(Direction::Ingress),
            egress_pods: members(Direction::Egress),
        }
    }

    /// Has a policy confirmed anew: its content changed, or it selects its first pod here.
    pub(super) fn unconfirm(&mut self, name: &Arc<PolicyRef>) {
        if let Some(policy) = self.policies.get_mut(name) {
            policy.since_ms = None;
            self.unconfirmed.insert(Arc::clone(name));
        }
    }
}

impl Origin {
    pub(super) fn of(metadata: &Meta) -> Self {
        Self { uid: metadata.uid.as_str().into(), metadata_generation: metadata.metadata_generation }
    }
}

impl PolicyStanding<'_> {
    /// Kind of its object.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self.policy.tier {
            Tier::NetworkPolicy => "NetworkPolicy",
            Tier::Admin | Tier::Baseline => "ClusterNetworkPolicy",
        }
    }

    /// Whether it selects an endpoint here, in either direction.
    #[must_use]
    pub fn selects_here(&self) -> bool {
        self.ingress_pods > 0 || self.egress_pods > 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::Subject;
    use super::*;
    use crate::objects::{
        LabelSelector, Labels, NetworkPolicy, NetworkPolicySpec, ObjectChange, Pod, PolicyType,
    };

    fn name() -> ObjectName {
        ObjectName::new("shop", "to-db")
    }

    /// Selects `app`, for `types`; read from an object of that generation.
    fn mk_policy(app: &str, types: &[PolicyType], metadata_generation: i64) -> ObjectChange {
        let labels = Labels::from([("app".to_owned(), app.to_owned())]);
        let metadata =
            Meta { name: "to-db".into(), namespace: "shop".into(), metadata_generation, ..Meta::default() };
        let spec = NetworkPolicySpec {
            pod_selector: LabelSelector { match_labels: labels, ..LabelSelector::default() },
            policy_types: types.to_vec(),
            ..NetworkPolicySpec::default()
        };
        ObjectChange::Policy(name(), Some(Box::new(NetworkPolicy { metadata, spec })))
    }

    fn mk_pod(app: &str) -> ObjectChange {
        let labels = Labels::from([("app".to_owned(), app.to_owned())]);
        let metadata = Meta { name: app.into(), namespace: "shop".into(), labels, ..Meta::default() };
        let pod = Pod { metadata, ..Pod::default() };
        ObjectChange::Pod(ObjectName::new("shop", app), Some(Box::new(pod)))
    }

    fn put(compiler: &mut Compiler, app: &str, address: [u8; 4]) {
        let pod = Some(ObjectName::new("shop", app));
        compiler.put(app, Subject { pod, uid: String::new(), addresses: vec![address.into()] });
    }

    /// Commits, and says at `now_ms` that the kernel has it.
    fn commit(compiler: &mut Compiler, now_ms: u64) {
        let _ = compiler.commit();
        compiler.confirm(now_ms);
    }

    fn standing(compiler: &Compiler) -> (Option<u64>, u32, u32) {
        let standing = compiler.standing_of(&name()).unwrap();
        (standing.since_ms, standing.ingress_pods, standing.egress_pods)
    }

    #[test]
    fn a_policy_is_in_force_since_the_commit_of_its_last_change_and_a_mere_touch_is_none() {
        let mut compiler = Compiler::default();
        compiler.apply(&mk_pod("db"));
        put(&mut compiler, "db", [10, 0, 0, 1]);
        compiler.apply(&mk_policy("db", &[PolicyType::Ingress], 1));
        let _ = compiler.commit();
        assert_eq!(standing(&compiler), (None, 1, 0), "nobody said that the kernel has it");
        commit(&mut compiler, 10);
        assert_eq!(standing(&compiler), (Some(10), 1, 0));

        compiler.apply(&mk_policy("db", &[PolicyType::Ingress], 2));
        commit(&mut compiler, 20);
        assert_eq!(standing(&compiler), (Some(10), 1, 0), "the same content");
        assert_eq!(compiler.standing_of(&name()).unwrap().metadata_generation, 2);

        compiler.apply(&mk_policy("db", &[PolicyType::Ingress, PolicyType::Egress], 3));
        assert_eq!(standing(&compiler).0, None, "what changed is not confirmed");
        commit(&mut compiler, 30);
        assert_eq!(standing(&compiler), (Some(30), 1, 1));
    }

    #[test]
    fn a_policy_is_in_force_here_since_its_first_pod_here_and_not_since_its_next_ones() {
        let mut compiler = Compiler::default();
        compiler.apply(&mk_policy("db", &[PolicyType::Ingress], 1));
        commit(&mut compiler, 10);
        assert_eq!(standing(&compiler), (Some(10), 0, 0));
        compiler.apply(&mk_pod("db"));
        put(&mut compiler, "db", [10, 0, 0, 1]);
        commit(&mut compiler, 20);
        assert_eq!(standing(&compiler), (Some(20), 1, 0));
        put(&mut compiler, "db-again", [10, 0, 0, 2]);
        compiler.put(
            "second",
            Subject {
                pod: Some(ObjectName::new("shop", "db")),
                uid: String::new(),
                addresses: vec![[10, 0, 0, 3].into()],
            },
        );
        commit(&mut compiler, 30);
        assert_eq!(standing(&compiler), (Some(20), 2, 0));
    }

    #[test]
    fn a_policy_that_is_gone_is_not_told_and_one_that_comes_back_counts_anew() {
        let mut compiler = Compiler::default();
        compiler.apply(&mk_policy("db", &[PolicyType::Ingress], 1));
        commit(&mut compiler, 10);
        compiler.apply(&ObjectChange::Policy(name(), None));
        commit(&mut compiler, 20);
        assert_eq!(compiler.standing_of(&name()), None);
        assert_eq!(compiler.standings().count(), 0);
        compiler.apply(&mk_policy("db", &[PolicyType::Ingress], 1));
        commit(&mut compiler, 30);
        assert_eq!(standing(&compiler).0, Some(30));
    }
}
