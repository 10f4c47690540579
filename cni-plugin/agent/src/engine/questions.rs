//! What the engine is asked about its state. Nothing here changes anything.

use std::net::IpAddr;

use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::policy::{Compiler, Explanation, Party};
use holdfast_net_core::ports::Proto;
use serde_json::{Value, json};

use super::Engine;

/// A question to the policy model.
pub(crate) struct Question {
    pub from: String,
    pub to: String,
    pub proto: Proto,
    pub port: u16,
}

impl Engine {
    pub(super) fn explain(&self, question: &Question) -> Result<Explanation, String> {
        let from = party(&self.compiler, &question.from, None)?;
        let to = party(&self.compiler, &question.to, Some(from.address))?;
        Ok(self.compiler.explain(&from, &to, question.proto, question.port))
    }

    pub(super) fn dump(&self) -> Value {
        let counts = self.compiler.counts();
        json!({
            "node": self.settings.node,
            "objects": {
                "ready": self.seen.borrow().ready,
                "batches": self.seen.borrow().batches,
                "nodes": self.nodes.len(),
                "pods": counts.pods,
                "policies": counts.policies - counts.cluster_policies,
                "clusterPolicies": counts.cluster_policies,
                "problems": self.problems,
            },
            "leases": self.endpoints.values().collect::<Vec<_>>(),
            "peers": self.node_plan.iter().flat_map(|plan| &plan.peers).map(|peer| json!({
                "node": peer.node, "underlay": peer.underlay, "vtepMac": peer.vtep_mac, "podRanges": peer.pod_ranges,
            })).collect::<Vec<_>>(),
            "leftOut": self.left_out,
            "rules": {
                "classes": counts.classes,
                "identities": counts.identities,
                "addresses": counts.addresses,
                "ranges": counts.ranges,
                "pairs": counts.pairs,
                "profiles": counts.profiles,
            },
            "changes": { "recentUs": self.durations_us },
            "contested": self.compiler.contested(),
            "nodeError": self.node_error,
            "rulesError": self.rules_error,
            "passes": self.passes,
        })
    }
}

/// Reads "namespace/pod" or an address. A pod with two families answers in that of `like`.
fn party(compiler: &Compiler, text: &str, like: Option<IpAddr>) -> Result<Party, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Party { pod: compiler.pod_at(address), address });
    }
    let Some((namespace, name)) = text.split_once('/') else {
        return Err(format!("\"{text}\" is neither an address nor namespace/pod"));
    };
    let name = ObjectName::new(namespace, name);
    let addresses = compiler.addresses_of(&name);
    let fits = |address: &&IpAddr| like.is_none_or(|like| like.is_ipv4() == address.is_ipv4());
    let address = addresses.iter().find(fits).or(addresses.first());
    let address = address.ok_or_else(|| format!("pod {name} is not known or has no address yet"))?;
    Ok(Party { pod: Some(name), address: *address })
}
