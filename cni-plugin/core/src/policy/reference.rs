//! How a policy is named, and in which order policies are asked.

use serde::{Deserialize, Serialize};

use crate::objects::{ClusterTier, ObjectName};

/// The tiers, in the order in which they are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Tier {
    /// ClusterNetworkPolicies that nobody overrides.
    Admin,
    /// NetworkPolicies: where one selects a pod, this tier decides.
    NetworkPolicy,
    /// ClusterNetworkPolicies for pods that no NetworkPolicy selects.
    Baseline,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Tier::Admin => "Admin",
            Tier::NetworkPolicy => "NetworkPolicy",
            Tier::Baseline => "Baseline",
        })
    }
}

/// A policy of either kind. Its order is the order in which policies are asked: tier, priority, name. The API leaves the
/// order of equal priorities open.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyRef {
    /// Its tier.
    pub tier: Tier,
    /// 0 to 1000; 0 for a NetworkPolicy.
    pub priority: i32,
    /// Its name; the namespace is empty for a ClusterNetworkPolicy.
    pub name: ObjectName,
}

impl PolicyRef {
    /// A NetworkPolicy.
    #[must_use]
    pub fn namespaced(name: ObjectName) -> Self {
        Self { tier: Tier::NetworkPolicy, priority: 0, name }
    }

    /// A ClusterNetworkPolicy.
    #[must_use]
    pub fn cluster(tier: ClusterTier, priority: i32, name: &str) -> Self {
        let name = ObjectName { namespace: String::new(), name: name.to_owned() };
        Self { tier: tier.into(), priority, name }
    }
}

impl std::fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.tier {
            Tier::NetworkPolicy => write!(f, "{}", self.name),
            tier => write!(f, "{} ({tier}, priority {})", self.name.name, self.priority),
        }
    }
}
