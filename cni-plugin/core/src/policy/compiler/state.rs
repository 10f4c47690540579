//! The whole of what is compiled, and how much it is.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::cluster::PodFacts;
use super::commit::class_key;
use super::{Compiler, Membership};
use crate::objects::ObjectName;
use crate::policy::lookup::Direction;
use crate::ruleset::{ClassId, Delta, Key, Ruleset};

/// How much there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Pods known.
    pub pods: usize,
    /// Policies known, of both kinds.
    pub policies: usize,
    /// ClusterNetworkPolicies among them.
    pub cluster_policies: usize,
    /// Classes of local pods.
    pub classes: usize,
    /// Identities in force.
    pub identities: usize,
    /// Addresses with an identity, or that a pod claims.
    pub addresses: usize,
    /// Disjoint ranges.
    pub ranges: usize,
    /// Pairs of class and identity.
    pub pairs: usize,
    /// Profiles, retired ones too.
    pub profiles: usize,
}

impl Compiler {
    /// Everything that is compiled, without source pins: what all deltas since the first commit add up to. Anything that
    /// was changed since the last commit is not in it.
    #[must_use]
    pub fn ruleset(&self) -> Ruleset {
        let mut delta = Delta::default();
        for local in self.locals.values().filter(|local| !local.fresh) {
            for direction in Direction::BOTH {
                let class = match local.membership(direction) {
                    Membership::Open => continue,
                    Membership::DenyAll => ClassId::DENY_ALL.0,
                    Membership::In(class) => self.classes[class].number.0,
                };
                for address in &local.subject.addresses {
                    delta.set(class_key(direction, *address), Some(class));
                }
            }
        }
        for (address, known) in &self.addresses {
            if let Some(slot) = known.identity {
                delta.set(Key::Ident(*address), Some(self.identities[slot].number.0));
            }
        }
        for range in &self.ranges {
            delta.set(Key::Cidr(range.range), Some(self.identities[range.identity].number.0));
        }
        for (slot, class) in self.classes.iter() {
            for (of, profile) in &class.pairs {
                delta.set(self.pair_key(slot, *of), Some(self.profiles[*profile].number.0));
            }
        }
        for (_, profile) in self.profiles.iter() {
            for rule in profile.allowed.rules() {
                delta.set(Key::Profile(profile.number, rule), Some(0));
            }
        }
        let mut ruleset = Ruleset::default();
        ruleset.apply(&ruleset.changes(&delta));
        ruleset
    }

    /// How much there is.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            pods: self.cluster.pods.len(),
            policies: self.policies.len(),
            cluster_policies: self.cluster_refs.len(),
            classes: self.classes.len(),
            identities: self.identities.len(),
            addresses: self.addresses.len(),
            ranges: self.ranges.len(),
            pairs: self.classes.iter().map(|(_, class)| class.pairs.len()).sum(),
            profiles: self.profiles.len(),
        }
    }

    /// Pods that have an address and that policies concern, and those of endpoints; at most `max`.
    #[must_use]
    pub fn concerned_pods(&self, max: usize) -> Vec<ObjectName> {
        let known = self.cluster.pods.iter().map(|(_, pod)| pod);
        let known = known.filter(|pod| pod.concerned && pod.addresses().next().is_some());
        let local = self.locals.values().filter_map(|local| local.subject.pod.clone());
        let names: BTreeSet<ObjectName> = local.chain(known.map(PodFacts::object_name).take(max)).collect();
        names.into_iter().take(max).collect()
    }

    /// The endpoint that has an address.
    #[must_use]
    pub fn endpoint_at(&self, address: IpAddr) -> Option<&str> {
        self.leased.get(&address).map(String::as_str)
    }
}
