//! The whole of what is compiled, and how much it is.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{Compiler, Local, Membership};
use crate::objects::ObjectName;
use crate::policy::lookup::Direction;
use crate::ruleset::{ClassId, Delta, IdentityId, Key, ProfileId, Ruleset};

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
        let mut ruleset = Ruleset::default();
        for local in self.locals.values().filter(|local| !local.fresh) {
            for direction in Direction::BOTH {
                let Some(class) = self.class_of(local, direction) else { continue };
                let classes = match direction {
                    Direction::Ingress => &mut ruleset.cls_in,
                    Direction::Egress => &mut ruleset.cls_eg,
                };
                classes.extend(local.subject.addresses.iter().map(|address| (*address, class)));
            }
        }
        // Collected, not inserted one by one: then the nodes of the trees are full.
        let identity = |slot: u32| self.identities[slot].number;
        let known = self.addresses.iter();
        ruleset.ident =
            known.filter_map(|(address, known)| Some((address, identity(known.identity?)))).collect();
        ruleset.cidr = self.ranges.iter().map(|range| (range.range, identity(range.identity))).collect();
        ruleset.pair_in = self.pairs_of(Direction::Ingress).collect();
        ruleset.pair_eg = self.pairs_of(Direction::Egress).collect();
        let profiles = self.profiles.iter().map(|(_, profile)| (profile.number, profile.allowed.rules()));
        ruleset.profiles = profiles.filter(|(_, rules)| !rules.is_empty()).collect();
        ruleset
    }

    /// The class that an endpoint's addresses have in a direction; `None`: it is open there.
    fn class_of(&self, local: &Local, direction: Direction) -> Option<ClassId> {
        match local.membership(direction) {
            Membership::Open => None,
            Membership::DenyAll => Some(ClassId::DENY_ALL),
            Membership::In(class) => Some(self.classes[class].number),
        }
    }

    /// What the classes of an endpoint's addresses are since the last commit, also those that they do not have. Empty for an
    /// endpoint that is not known or was not compiled yet.
    #[must_use]
    pub fn classes_of(&self, endpoint: &str) -> Delta {
        let mut delta = Delta::default();
        let Some(local) = self.locals.get(endpoint).filter(|local| !local.fresh) else { return delta };
        for address in &local.subject.addresses {
            let class = |direction| self.class_of(local, direction).map(|class| class.0);
            delta.set(Key::ClsIn(*address), class(Direction::Ingress));
            delta.set(Key::ClsEg(*address), class(Direction::Egress));
        }
        delta
    }

    fn pairs_of(&self, direction: Direction) -> impl Iterator<Item = ((ClassId, IdentityId), ProfileId)> {
        let classes = self.classes.iter().filter(move |(_, class)| class.key.direction == direction);
        classes.flat_map(|(_, class)| {
            class.pairs.iter().map(|(of, profile)| {
                let identity = of.map_or(IdentityId::ANY, |slot| self.identities[slot].number);
                ((class.number, identity), self.profiles[*profile].number)
            })
        })
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
        let known = self.cluster.pods.iter();
        let known = known.filter(|(_, pod)| pod.concerned && pod.addresses().next().is_some());
        let known = known.map(|(id, _)| self.cluster.object_name(id));
        let local = self.locals.values().filter_map(|local| local.subject.pod.clone());
        let names: BTreeSet<ObjectName> = local.chain(known.take(max)).collect();
        names.into_iter().take(max).collect()
    }

    /// The endpoint that has an address.
    #[must_use]
    pub fn endpoint_at(&self, address: IpAddr) -> Option<&str> {
        self.leased.get(&address).map(String::as_str)
    }
}
