//! The node plan: a pure function of the node list and of the uplink's MTU.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use crate::ipam::overlap;
use crate::objects::Node;
use crate::plan::{BridgePlan, NodePlan, PeerPlan, VxlanPlan, overlay_mtu, vtep_mac};

/// Bytes that an IPv6 link must carry (RFC 8200, section 5).
pub const IPV6_MTU_MIN: u32 = 1280;
/// Bytes that an IPv4 link must carry (RFC 791); the kernel makes no interface with less.
const IPV4_MTU_MIN: u32 = 68;

/// Settings of the overlay that are the same on all nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverlaySettings {
    /// Name of the bridge.
    pub bridge: String,
    /// Name of the VXLAN device.
    pub vxlan_device: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
}

/// A node list from which no plan can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverlayError {
    /// The own node is missing.
    #[error("there is no Node object \"{0}\": this node's pod ranges and InternalIP are not known")]
    NoNode(String),
    /// It has no range for pods.
    #[error("Node \"{0}\" has no spec.podCIDR: there are no addresses for pods")]
    NoRange(String),
    /// Two of its ranges share addresses.
    #[error("Node \"{node}\" has the pod ranges {other} and {range}, which overlap")]
    Overlap {
        /// The node.
        node: String,
        /// The later one.
        range: IpNetwork,
        /// The earlier one.
        other: IpNetwork,
    },
    /// It has no address to build the overlay on.
    #[error("Node \"{0}\" has no status.addresses entry of type InternalIP")]
    NoAddress(String),
}

/// A plan, and the nodes that it leaves out with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedNode {
    /// What to apply.
    pub plan: NodePlan,
    /// This node's address on the underlay.
    pub internal_ip: IpAddr,
    /// Other nodes that cannot be reached yet: sentences for the log.
    pub left_out: Vec<String>,
}

/// The underlay address of a node.
///
/// # Errors
/// The node is missing or has no InternalIP.
pub fn internal_ip(nodes: &BTreeMap<String, Node>, name: &str) -> Result<IpAddr, OverlayError> {
    let node = nodes.get(name).ok_or_else(|| OverlayError::NoNode(name.to_owned()))?;
    node.internal_addresses().first().copied().ok_or_else(|| OverlayError::NoAddress(name.to_owned()))
}

/// Plans bridge, VXLAN device and the ways to all other nodes.
///
/// # Errors
/// The own node's object does not suffice. Other nodes' gaps only leave those nodes out.
pub fn plan_node(
    nodes: &BTreeMap<String, Node>,
    name: &str,
    settings: &OverlaySettings,
    uplink_mtu: u32,
) -> Result<PlannedNode, OverlayError> {
    let own_address = internal_ip(nodes, name)?;
    let own_ranges = nodes[name].pod_cidrs();
    if own_ranges.is_empty() {
        return Err(OverlayError::NoRange(name.to_owned()));
    }
    for (index, range) in own_ranges.iter().enumerate() {
        if let Some(other) = own_ranges[..index].iter().find(|other| overlap(other, range)) {
            return Err(OverlayError::Overlap { node: name.to_owned(), range: *range, other: *other });
        }
    }
    let mut taken: Vec<(IpNetwork, String)> =
        own_ranges.iter().map(|range| (*range, name.to_owned())).collect();
    let mut peers = Vec::new();
    let mut left_out = Vec::new();
    for (peer_name, node) in nodes.iter().filter(|(other, _)| *other != name) {
        match plan_peer(peer_name, node, own_address, &mut taken) {
            Ok(peer) => peers.push(peer),
            Err(reason) => left_out.push(reason),
        }
    }
    // Below, the kernel would take IPv6 off the pods' interfaces (RFC 8200, section 5); the outer packets are cut instead.
    let least = if own_ranges.iter().any(IpNetwork::is_ipv6) { IPV6_MTU_MIN } else { IPV4_MTU_MIN };
    let mtu = overlay_mtu(uplink_mtu, own_address).max(least);
    let bridge = BridgePlan { name: settings.bridge.clone(), ..BridgePlan::for_node(name, mtu) };
    let vxlan = VxlanPlan {
        name: settings.vxlan_device.clone(),
        vni: settings.vni,
        port: settings.port,
        local: own_address,
        mac: vtep_mac(name, own_address),
        mtu,
    };
    let plan = NodePlan { bridge, vxlan: Some(vxlan), peers, pod_ranges: own_ranges };
    Ok(PlannedNode { plan, internal_ip: own_address, left_out })
}

/// Plans one peer. A range that another node has already is refused: the node first by name keeps it, so that all
/// agents decide alike.
fn plan_peer(
    name: &str,
    node: &Node,
    own_address: IpAddr,
    taken: &mut Vec<(IpNetwork, String)>,
) -> Result<PeerPlan, String> {
    let same_family = |address: &IpAddr| address.is_ipv4() == own_address.is_ipv4();
    let Some(underlay) = node.internal_addresses().into_iter().find(same_family) else {
        return Err(format!("node {name} has no InternalIP of the family of {own_address}"));
    };
    if underlay == own_address {
        return Err(format!("node {name} claims this node's InternalIP {underlay}"));
    }
    let ranges = node.pod_cidrs();
    if ranges.is_empty() {
        return Err(format!("node {name} has no spec.podCIDR yet"));
    }
    for range in &ranges {
        if let Some((other, owner)) = taken.iter().find(|(other, _)| overlap(other, range)) {
            return Err(format!("node {name} has the range {range}, which overlaps {other} of node {owner}"));
        }
    }
    taken.extend(ranges.iter().map(|range| (*range, name.to_owned())));
    Ok(PeerPlan::new(name, underlay, ranges))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::{NodeAddress, NodeSpec, NodeStatus};

    fn mk_node(address: &str, range: &str) -> Node {
        let addresses = vec![
            NodeAddress { kind: "Hostname".into(), address: "x".into() },
            NodeAddress { kind: "InternalIP".into(), address: address.into() },
        ];
        Node {
            spec: NodeSpec { pod_cidr: Some(range.parse().unwrap()), pod_cidrs: Vec::new() },
            status: NodeStatus { addresses },
            ..Node::default()
        }
    }

    fn mk_settings() -> OverlaySettings {
        OverlaySettings { bridge: "hf0".into(), vxlan_device: "hf.vx".into(), vni: 4807, port: 4789 }
    }

    fn mk_nodes(list: &[(&str, &str, &str)]) -> BTreeMap<String, Node> {
        list.iter().map(|(name, address, range)| ((*name).to_owned(), mk_node(address, range))).collect()
    }

    #[test]
    fn each_other_node_is_one_peer_and_the_mtu_leaves_room() {
        let nodes = mk_nodes(&[
            ("a", "192.0.2.1", "10.1.0.0/24"),
            ("b", "192.0.2.2", "10.1.1.0/24"),
            ("c", "192.0.2.3", "10.1.2.0/24"),
        ]);
        let planned = plan_node(&nodes, "b", &mk_settings(), 1500).unwrap();
        let names: Vec<&str> = planned.plan.peers.iter().map(|peer| peer.node.as_str()).collect();
        assert_eq!(names, ["a", "c"]);
        assert_eq!(planned.plan.bridge.mtu, 1450);
        let back = plan_node(&nodes, "a", &mk_settings(), 1500).unwrap();
        assert_eq!(
            back.plan.peers[0].vtep_mac,
            planned.plan.vxlan.unwrap().mac,
            "both ends derive the same MAC"
        );
    }

    #[test]
    fn a_peer_with_a_gap_or_an_overlap_is_left_out_and_the_rest_stays() {
        let mut nodes = mk_nodes(&[
            ("a", "192.0.2.1", "10.1.0.0/24"),
            ("b", "192.0.2.2", "10.1.0.0/16"),
            ("c", "192.0.2.3", "10.1.2.0/24"),
            ("d", "192.0.2.1", "10.1.3.0/24"),
        ]);
        nodes.insert("e".into(), Node::default());
        let planned = plan_node(&nodes, "a", &mk_settings(), 1500).unwrap();
        assert_eq!(planned.plan.peers.len(), 1);
        assert_eq!(planned.left_out.len(), 3, "{:?}", planned.left_out);
    }

    #[test]
    fn the_own_node_must_be_complete() {
        let mut nodes = mk_nodes(&[("a", "192.0.2.1", "10.1.0.0/24")]);
        let error = |nodes: &BTreeMap<String, Node>| plan_node(nodes, "a", &mk_settings(), 1500).unwrap_err();
        let twice = ["10.1.0.0/24", "10.1.0.128/25"].map(|range| range.parse().unwrap());
        nodes.get_mut("a").unwrap().spec.pod_cidrs = twice.to_vec();
        assert!(error(&nodes).to_string().contains("10.1.0.0/24 and 10.1.0.128/25, which overlap"));
        nodes.get_mut("a").unwrap().spec.pod_cidrs.clear();
        nodes.get_mut("a").unwrap().spec.pod_cidr = None;
        assert_eq!(error(&nodes), OverlayError::NoRange("a".into()));
        nodes.get_mut("a").unwrap().status.addresses.clear();
        assert_eq!(error(&nodes), OverlayError::NoAddress("a".into()));
        nodes.clear();
        assert_eq!(error(&nodes), OverlayError::NoNode("a".into()));
    }
}
