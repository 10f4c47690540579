//! How large one policy may be. A larger one costs every change of its neighbours time and memory, so it is not enforced
//! rule by rule: it fails closed. It isolates the pods that it selects, and admits nothing.

use std::collections::BTreeSet;

use super::lookup::Direction;
use super::rules::isolates;
use super::validate::{InvalidPolicy, invalid};
use crate::objects::{
    ClusterNetworkPolicy, ClusterPeer, IpBlock, LabelSelector, NetworkPolicy, NetworkPolicySpec, Peer,
    PolicyPort, PolicyType, PortNumberOrName, Protocol,
};

/// Rules, peers, ports, exceptions, and requirements and values of selectors of one policy, together.
pub const PARTS_MAX: usize = 20_000;
/// Different ports and ranges of ports of one policy. Each is an element of the kernel's map of ranges, whose deletion takes
/// time that grows with their number.
pub const PORTS_MAX: usize = 256;
/// Different address blocks times exceptions of one policy: exceptions cut other blocks into pieces, and a piece knows all
/// blocks that it is in.
pub const PIECES_MAX: usize = 1_000_000;

/// Checks the size of a policy.
///
/// # Errors
/// It is beyond a limit; [`closed`] is what can be enforced of it.
pub fn check_size(policy: &NetworkPolicy) -> Result<(), InvalidPolicy> {
    let spec = &policy.spec;
    let ingress = spec.ingress.iter().map(|rule| (&rule.from, &rule.ports));
    let egress = spec.egress.iter().map(|rule| (&rule.to, &rule.ports));
    let rules = || ingress.clone().chain(egress.clone());

    let of_rule = |(peers, ports): (&Vec<Peer>, &Vec<PolicyPort>)| {
        1 + ports.len() + peers.iter().map(parts_of_peer).sum::<usize>()
    };
    let parts = parts_of_selector(&spec.pod_selector) + rules().map(of_rule).sum::<usize>();
    if parts > PARTS_MAX {
        let problem = format!("has {parts} rules, peers, ports and values; at most {PARTS_MAX} are enforced");
        return invalid("spec", &problem);
    }
    let ports: BTreeSet<Port<'_>> = rules().flat_map(|(_, ports)| ports).filter_map(port).collect();
    if ports.len() > PORTS_MAX {
        let problem = format!("names {} different ports; at most {PORTS_MAX} are enforced", ports.len());
        return invalid("spec", &problem);
    }
    let blocks: BTreeSet<&IpBlock> =
        rules().flat_map(|(peers, _)| peers).filter_map(|peer| peer.ip_block.as_ref()).collect();
    let pieces = blocks.len() * blocks.iter().map(|block| block.except.len()).sum::<usize>();
    if pieces > PIECES_MAX {
        let problem = format!("has {pieces} blocks times exceptions; at most {PIECES_MAX} are enforced");
        return invalid("spec", &problem);
    }
    Ok(())
}

/// Checks the size of a ClusterNetworkPolicy's peers; its API limits all the rest. The subject has no limit: it is asked
/// about pods of this node only.
///
/// # Errors
/// A peer is beyond the limit; [`closed_cluster`] is what can be enforced of the policy.
pub fn check_cluster_size(policy: &ClusterNetworkPolicy) -> Result<(), InvalidPolicy> {
    let spec = &policy.spec;
    let ingress = spec.ingress.iter().map(|rule| ("spec.ingress", "from", &rule.from));
    let egress = spec.egress.iter().map(|rule| ("spec.egress", "to", &rule.to));
    for ((field, peers_field, peers), rule) in ingress.zip(0..).chain(egress.zip(0..)) {
        if let Some(peer) = peers.iter().position(is_oversized) {
            let field = format!("{field}[{rule}].{peers_field}[{peer}]");
            return invalid(&field, &format!("at most {PARTS_MAX} requirements and values are enforced"));
        }
    }
    Ok(())
}

/// The same policy with peers beyond the limit replaced by one that nobody knows, so that their rules fail closed: Accept
/// matches nothing, Deny and Pass deny everything.
#[must_use]
pub fn closed_cluster(policy: &ClusterNetworkPolicy) -> ClusterNetworkPolicy {
    let mut closed = policy.clone();
    let ingress = closed.spec.ingress.iter_mut().flat_map(|rule| &mut rule.from);
    let egress = closed.spec.egress.iter_mut().flat_map(|rule| &mut rule.to);
    for peer in ingress.chain(egress).filter(|peer| is_oversized(peer)) {
        *peer = ClusterPeer::default();
    }
    closed
}

fn is_oversized(peer: &ClusterPeer) -> bool {
    let pods = peer.pods.iter().flat_map(|pods| [&pods.namespace_selector, &pods.pod_selector]);
    let mut selectors = peer.namespaces.iter().chain(&peer.nodes).chain(pods);
    selectors.any(|selector| parts_of_selector(selector) > PARTS_MAX)
}

/// The same policy without its rules: what it selects is isolated in the same directions.
#[must_use]
pub fn closed(policy: &NetworkPolicy) -> NetworkPolicy {
    let types = [(Direction::Ingress, PolicyType::Ingress), (Direction::Egress, PolicyType::Egress)];
    let isolated = types.into_iter().filter(|(direction, _)| isolates(policy, *direction));
    NetworkPolicy {
        metadata: policy.metadata.clone(),
        spec: NetworkPolicySpec {
            pod_selector: policy.spec.pod_selector.clone(),
            policy_types: isolated.map(|(_, kind)| kind).collect(),
            ..NetworkPolicySpec::default()
        },
    }
}

/// Requirements and values of a selector.
fn parts_of_selector(selector: &LabelSelector) -> usize {
    let of_expressions = selector.match_expressions.iter().map(|requirement| 1 + requirement.values.len());
    selector.match_labels.len() + of_expressions.sum::<usize>()
}

fn parts_of_peer(peer: &Peer) -> usize {
    let selectors = peer.pod_selector.iter().chain(&peer.namespace_selector);
    let except = peer.ip_block.as_ref().map_or(0, |block| block.except.len());
    1 + except + selectors.map(parts_of_selector).sum::<usize>()
}

type Port<'a> = (Protocol, &'a PortNumberOrName, Option<u16>);

fn port(port: &PolicyPort) -> Option<Port<'_>> {
    Some((port.protocol, port.port.as_ref()?, port.end_port))
}
