//! The node plan: a pure function of the node list and of the uplink.

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
    /// How packets go to pods of other nodes.
    pub routing: Routing,
}

/// How packets go to pods of other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routing {
    /// Through the overlay, to all of them.
    Vxlan,
    /// By plain routes, as far as nodes share a link; other nodes are left out. There is no overlay.
    Direct,
    /// By plain routes to nodes on the same link, through the overlay to all others.
    Auto,
}

/// The interface of the underlay, as the kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// The kernel's number of it.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Bytes, IP packet size.
    pub mtu: u32,
    /// Its addresses with their prefix lengths: what is within them is on its link.
    pub networks: Vec<IpNetwork>,
}

impl Uplink {
    /// Whether another node's address is on its link.
    #[must_use]
    pub fn is_on_link(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(address) && network.ip() != address)
    }
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
    /// The MTU of pods.
    pub mtu: u32,
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

/// Plans bridge (where some pod needs it), VXLAN device and the ways to all other nodes.
///
/// # Errors
/// The own node's object does not suffice. Other nodes' gaps only leave those nodes out.
pub fn plan_node(
    nodes: &BTreeMap<String, Node>,
    name: &str,
    settings: &OverlaySettings,
    uplink: &Uplink,
    needs_bridge: bool,
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
    let direct_through = match settings.routing {
        Routing::Vxlan => None,
        Routing::Direct | Routing::Auto => Some(uplink),
    };
    let mut peers = Vec::new();
    let mut left_out = Vec::new();
    for (peer_name, node) in nodes.iter().filter(|(other, _)| *other != name) {
        match plan_peer(peer_name, node, own_address, direct_through, &mut taken) {
            Ok(peer) if settings.routing == Routing::Direct && peer.overlaid().next().is_some() => {
                left_out.push(format!("node {peer_name} has no InternalIP on the link of {}", uplink.name));
            }
            Ok(peer) => peers.push(peer),
            Err(reason) => left_out.push(reason),
        }
    }
    // Below, the kernel would take IPv6 off the pods' interfaces (RFC 8200, section 5); the outer packets are cut instead.
    let least = if own_ranges.iter().any(IpNetwork::is_ipv6) { IPV6_MTU_MIN } else { IPV4_MTU_MIN };
    let mtu = match settings.routing {
        Routing::Direct => uplink.mtu,
        // The same with and without peers behind the overlay: it must not change because a node comes or goes.
        Routing::Vxlan | Routing::Auto => overlay_mtu(uplink.mtu, own_address).max(least),
    };
    let bridge =
        needs_bridge.then(|| BridgePlan { name: settings.bridge.clone(), ..BridgePlan::for_node(name, mtu) });
    let vxlan = (settings.routing != Routing::Direct).then(|| VxlanPlan {
        name: settings.vxlan_device.clone(),
        vni: settings.vni,
        port: settings.port,
        local: own_address,
        mac: vtep_mac(name, own_address),
        mtu,
    });
    let plan = NodePlan { bridge, vxlan, uplink: uplink.name.clone(), peers, pod_ranges: own_ranges };
    Ok(PlannedNode { plan, internal_ip: own_address, mtu, left_out })
}

/// Plans one peer. A range that another node has already is refused: the node first by name keeps it, so that all
/// agents decide alike.
fn plan_peer(
    name: &str,
    node: &Node,
    own_address: IpAddr,
    direct_through: Option<&Uplink>,
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
    let mut peer = PeerPlan::new(name, underlay, ranges);
    if let Some(uplink) = direct_through {
        let addresses = node.internal_addresses().into_iter();
        let on_link: Vec<IpAddr> = addresses.filter(|address| uplink.is_on_link(*address)).collect();
        let with_hop = |range: &IpNetwork| Some((*range, direct_hop(range, &on_link)?));
        peer.direct = peer.pod_ranges.iter().filter_map(with_hop).collect();
    }
    Ok(peer)
}

/// The peer's address that a range of its pods is reached by. IPv4 goes by IPv6 where there is no other (RFC 5549); the
/// kernel has no route the other way round.
fn direct_hop(range: &IpNetwork, on_link: &[IpAddr]) -> Option<IpAddr> {
    let of = |v4: bool| on_link.iter().copied().find(|address| address.is_ipv4() == v4);
    of(range.is_ipv4()).or_else(|| if range.is_ipv4() { of(false) } else { None })
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
        OverlaySettings {
            bridge: "hf0".into(),
            vxlan_device: "hf.vx".into(),
            vni: 4807,
            port: 4789,
            routing: Routing::Vxlan,
        }
    }

    fn mk_uplink(networks: &[&str]) -> Uplink {
        let networks = networks.iter().map(|network| network.parse().unwrap()).collect();
        Uplink { index: 2, name: "eth0".into(), mtu: 1500, networks }
    }

    fn plan_with(nodes: &BTreeMap<String, Node>, routing: Routing, networks: &[&str]) -> PlannedNode {
        let settings = OverlaySettings { routing, ..mk_settings() };
        plan_node(nodes, "a", &settings, &mk_uplink(networks), true).unwrap()
    }

    #[test]
    fn peers_on_the_link_are_reached_directly_if_that_is_asked_for() {
        let nodes = mk_nodes(&[
            ("a", "192.0.2.1", "10.1.0.0/24"),
            ("b", "192.0.2.2", "10.1.1.0/24"),
            ("c", "198.51.100.3", "10.1.2.0/24"),
        ]);
        let direct = |planned: &PlannedNode| -> Vec<usize> {
            planned.plan.peers.iter().map(|peer| peer.direct.len()).collect()
        };
        let auto = plan_with(&nodes, Routing::Auto, &["192.0.2.1/24"]);
        assert_eq!((direct(&auto), auto.mtu, auto.plan.vxlan.is_some()), (vec![1, 0], 1450, true));
        let hop: IpAddr = "192.0.2.2".parse().unwrap();
        assert_eq!(auto.plan.peers[0].direct.values().next(), Some(&hop));
        let vxlan = plan_with(&nodes, Routing::Vxlan, &["192.0.2.1/24"]);
        assert_eq!(direct(&vxlan), [0, 0]);
        // As cloud networks hand addresses out: nothing is on the link.
        assert_eq!(direct(&plan_with(&nodes, Routing::Auto, &["192.0.2.1/32"])), [0, 0]);
        let only = plan_with(&nodes, Routing::Direct, &["192.0.2.1/24"]);
        assert_eq!((direct(&only), only.mtu, only.plan.vxlan.is_none()), (vec![1], 1500, true));
        assert_eq!(only.left_out, ["node c has no InternalIP on the link of eth0"]);
    }

    #[test]
    fn a_range_goes_directly_by_an_address_of_its_family_and_ipv4_by_ipv6_if_need_be() {
        let mut nodes = mk_nodes(&[("a", "192.0.2.1", "10.1.0.0/24"), ("b", "192.0.2.2", "10.1.1.0/24")]);
        let ranges = ["10.1.1.0/24", "fd00:1::/64"].map(|range| range.parse().unwrap());
        nodes.get_mut("b").unwrap().spec.pod_cidrs = ranges.to_vec();
        let networks = ["192.0.2.1/24", "fd00:9::1/64"];
        let hops = |nodes: &BTreeMap<String, Node>, networks: &[&str]| {
            let planned = plan_with(nodes, Routing::Auto, networks);
            ranges.map(|range| planned.plan.peers[0].direct.get(&range).map(ToString::to_string))
        };
        assert_eq!(hops(&nodes, &networks), [Some("192.0.2.2".into()), None], "IPv6 goes by the overlay");
        let v6 = NodeAddress { kind: "InternalIP".into(), address: "fd00:9::2".into() };
        nodes.get_mut("b").unwrap().status.addresses.push(v6);
        assert_eq!(hops(&nodes, &networks), [Some("192.0.2.2".into()), Some("fd00:9::2".into())]);
        assert_eq!(hops(&nodes, &["fd00:9::1/64"]), [Some("fd00:9::2".into()), Some("fd00:9::2".into())]);
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
        let planned = plan_node(&nodes, "b", &mk_settings(), &mk_uplink(&[]), true).unwrap();
        let names: Vec<&str> = planned.plan.peers.iter().map(|peer| peer.node.as_str()).collect();
        assert_eq!(names, ["a", "c"]);
        assert_eq!((planned.mtu, planned.plan.bridge.unwrap().mtu), (1450, 1450));
        let back = plan_node(&nodes, "a", &mk_settings(), &mk_uplink(&[]), false).unwrap();
        assert_eq!((back.mtu, back.plan.bridge), (1450, None));
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
        let planned = plan_node(&nodes, "a", &mk_settings(), &mk_uplink(&[]), true).unwrap();
        assert_eq!(planned.plan.peers.len(), 1);
        assert_eq!(planned.left_out.len(), 3, "{:?}", planned.left_out);
    }

    #[test]
    fn the_own_node_must_be_complete() {
        let mut nodes = mk_nodes(&[("a", "192.0.2.1", "10.1.0.0/24")]);
        let error = |nodes: &BTreeMap<String, Node>| {
            plan_node(nodes, "a", &mk_settings(), &mk_uplink(&[]), true).unwrap_err()
        };
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
