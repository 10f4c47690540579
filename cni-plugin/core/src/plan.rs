//! Plans: the links, routes and neighbours that must exist, as plain data.
//!
//! The agent builds plans from objects and leases; `holdfast-dataplane` compares them with the kernel and mends the
//! difference. Everything that can be derived (names, MACs, next hops) is derived here, deterministically, so that a
//! restart or a reboot yields the same plan and peers never hold a stale MAC.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::bandwidth::Bandwidth;
use crate::nat::PortMapping;

/// The pods' IPv4 gateway: the same link-local address on every node, so a pod's routes never depend on its node.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// The pods' IPv6 gateway.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// The bridge every pod port is attached to.
pub const BRIDGE_NAME: &str = "hf0";
/// The VXLAN device of the node.
pub const VXLAN_NAME: &str = "hf.vx";
/// Default VXLAN network identifier.
pub const VXLAN_VNI: u32 = 4807;
/// Default VXLAN UDP port (IANA).
pub const VXLAN_PORT: u16 = 4789;
/// Bytes VXLAN adds to a frame over IPv4: outer Ethernet is the uplink's, IP 20, UDP 8, VXLAN 8, inner Ethernet 14.
pub const VXLAN_OVERHEAD_V4: u32 = 50;
/// The same over IPv6, whose header is 20 bytes longer.
pub const VXLAN_OVERHEAD_V6: u32 = 70;
/// Every host end of a pod's veth pair starts with this, so that garbage collection finds them.
pub const HOST_IFNAME_PREFIX: &str = "hfv";
/// The kernel's limit for interface names (IFNAMSIZ - 1).
pub const IFNAME_LEN_MAX: usize = 15;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// A locally administered unicast address made from `seed`; equal seeds give equal addresses.
    pub fn derive(seed: &[&str]) -> Self {
        let bytes = stable_hash(seed).to_be_bytes();
        // Bit 1 of the first byte: locally administered; bit 0 clear: unicast.
        Self([0x0a, bytes[3], bytes[4], bytes[5], bytes[6], bytes[7]])
    }

    /// The link-local IPv6 address the kernel derives from this MAC (modified EUI-64, RFC 4291 appendix A).
    pub fn link_local(&self) -> Ipv6Addr {
        let m = self.0;
        Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, m[0] ^ 0x02, m[1], m[2], 0xff, 0xfe, m[3], m[4], m[5]])
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let m = self.0;
        write!(f, "{:02x}:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", m[0], m[1], m[2], m[3], m[4], m[5])
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not six two-digit hexadecimal bytes separated by colons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an Ethernet address: write six hexadecimal bytes separated by colons")]
pub struct MacParseError(String);

impl FromStr for MacAddr {
    type Err = MacParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || MacParseError(text.to_string());
        let mut mac = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            return Err(error());
        }
        Ok(Self(mac))
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for MacAddr {
    type Error = MacParseError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// What one node needs besides its pods: bridge, overlay and the ways to the other nodes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    /// The bridge of the pods; `None` where none is attached to it: then one of ours that is there is removed.
    pub bridge: Option<BridgePlan>,
    /// The overlay; `None` on a node without peers or with direct routes only: then a device of ours that is there is removed.
    pub vxlan: Option<VxlanPlan>,
    /// The interface of the underlay, which direct routes lead through.
    pub uplink: String,
    /// The other nodes.
    pub peers: Vec<PeerPlan>,
    /// Ranges of this node's own pods; an address of them that no pod has is unreachable rather than sent elsewhere.
    pub pod_ranges: Vec<IpNetwork>,
}

/// The bridge of the pods; it carries [`GATEWAY_V4`] and [`GATEWAY_V6`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BridgePlan {
    /// Interface name, normally [`BRIDGE_NAME`].
    pub name: String,
    /// Fixed MAC; the pods' permanent neighbour entries name it.
    pub mac: MacAddr,
    /// Bytes, IP packet size.
    pub mtu: u32,
}

impl BridgePlan {
    /// The bridge of the node called `node`.
    pub fn for_node(node: &str, mtu: u32) -> Self {
        Self { name: BRIDGE_NAME.to_string(), mac: MacAddr::derive(&["bridge", node]), mtu }
    }
}

/// What new pods are attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attachment {
    /// The bridge, each pod as an isolated port.
    Bridge(BridgePlan),
    /// Nothing: the host end of each pod's veth pair is its gateway.
    Routed {
        /// Bytes, IP packet size.
        mtu: u32,
    },
}

impl Attachment {
    /// Bytes, IP packet size.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        match self {
            Self::Bridge(bridge) => bridge.mtu,
            Self::Routed { mtu } => *mtu,
        }
    }

    /// The attachment of `container_ifname` of `container_id` with `addresses`.
    pub fn endpoint(
        &self,
        container_id: &str,
        container_ifname: &str,
        addresses: Vec<IpAddr>,
    ) -> EndpointPlan {
        match self {
            Self::Bridge(bridge) => EndpointPlan::new(container_id, container_ifname, addresses, bridge),
            Self::Routed { mtu } => EndpointPlan::routed(container_id, container_ifname, addresses, *mtu),
        }
    }
}

/// The VXLAN device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanPlan {
    /// Interface name, normally [`VXLAN_NAME`].
    pub name: String,
    /// Network identifier, below 2^24.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// This node's address on the underlay (its InternalIP): the outer source.
    pub local: IpAddr,
    /// See [`vtep_mac`].
    pub mac: MacAddr,
    /// Bytes, IP packet size inside the overlay.
    pub mtu: u32,
}

/// One other node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerPlan {
    /// Its name, for messages only.
    pub node: String,
    /// Its address on the underlay (InternalIP): the outer destination.
    pub underlay: IpAddr,
    /// Its VTEP's MAC, see [`vtep_mac`].
    pub vtep_mac: MacAddr,
    /// Its pods' ranges.
    pub pod_ranges: Vec<IpNetwork>,
    /// Those of them that are reached without the overlay, with the peer's address that is on the uplink's link.
    pub direct: BTreeMap<IpNetwork, IpAddr>,
}

impl PeerPlan {
    /// The peer called `node` at `underlay`.
    pub fn new(node: &str, underlay: IpAddr, pod_ranges: Vec<IpNetwork>) -> Self {
        let vtep_mac = vtep_mac(node, underlay);
        Self { node: node.to_string(), underlay, vtep_mac, pod_ranges, direct: BTreeMap::new() }
    }

    /// The ranges that are reached through the overlay.
    pub fn overlaid(&self) -> impl Iterator<Item = &IpNetwork> {
        self.pod_ranges.iter().filter(|range| !self.direct.contains_key(range))
    }

    /// The on-link next hop for this peer's ranges of `range`'s family.
    ///
    /// The same family as the underlay: the underlay address itself. IPv6 ranges over an IPv4 underlay: the VTEP's
    /// link-local address. IPv4 ranges over an IPv6 underlay also go by the link-local address (RFC 5549).
    pub fn next_hop(&self, range: &IpNetwork) -> IpAddr {
        match (range, self.underlay) {
            (IpNetwork::V4(_), IpAddr::V4(_)) => self.underlay,
            (IpNetwork::V4(_) | IpNetwork::V6(_), _) => IpAddr::V6(self.vtep_mac.link_local()),
        }
    }
}

/// The MAC of the VTEP of the node called `node` at `underlay`: a function of the Node object, so that every agent
/// knows it without writing to the API, and a reboot does not change it.
pub fn vtep_mac(node: &str, underlay: IpAddr) -> MacAddr {
    MacAddr::derive(&["vtep", node, &underlay.to_string()])
}

/// The MTU inside the overlay on an uplink with `uplink_mtu` bytes.
pub fn overlay_mtu(uplink_mtu: u32, underlay: IpAddr) -> u32 {
    let overhead = match underlay {
        IpAddr::V4(_) => VXLAN_OVERHEAD_V4,
        IpAddr::V6(_) => VXLAN_OVERHEAD_V6,
    };
    uplink_mtu.saturating_sub(overhead)
}

/// A pod's attachment.
///
/// Both ends are configured in full by `Dataplane::attach`. The pod's end is the same in both modes: its addresses (/32,
/// /128), link routes to the gateways, default routes through them, permanent neighbours, and the sysctls
/// `accept_redirects=0`, `accept_ra=0`. The host end is an isolated port of the bridge that learns and floods nothing, or
/// has the gateways' addresses itself.
///
/// It is on disk in every lease, so a pod stays attached as it was when its node's mode changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointPlan {
    /// The container's id, for the interface alias and for messages.
    pub container_id: String,
    /// Interface name inside the sandbox, e.g. `eth0`.
    pub container_ifname: String,
    /// Interface name on the node, see [`host_ifname`].
    pub host_ifname: String,
    /// MAC of the pod's end.
    pub mac: MacAddr,
    /// MAC of the host's end. On a bridge nothing is ever addressed to it.
    pub host_mac: MacAddr,
    /// The pod's addresses, at most one per family is usual.
    pub addresses: Vec<IpAddr>,
    /// The bridge to attach to; `None`: routed, the host end is the gateway.
    pub bridge: Option<String>,
    /// The gateway's MAC in the pod's permanent neighbour entries: the bridge's, or that of the host's end.
    pub gateway_mac: MacAddr,
    /// Bytes, IP packet size.
    pub mtu: u32,
    /// Default routes of the families present; `false` for a pod that has another default route from another plugin.
    pub default_routes: bool,
    /// More ranges to reach through the gateway (CNI `routes`).
    pub extra_routes: Vec<IpNetwork>,
    /// Ports of the node that lead to the pod.
    #[serde(default)]
    pub host_ports: Vec<PortMapping>,
    /// Limits of its rate.
    #[serde(default)]
    pub bandwidth: Bandwidth,
}

impl EndpointPlan {
    /// The attachment of `container_ifname` of `container_id` with `addresses` to `bridge`.
    pub fn new(
        container_id: &str,
        container_ifname: &str,
        addresses: Vec<IpAddr>,
        bridge: &BridgePlan,
    ) -> Self {
        Self {
            container_id: container_id.to_string(),
            container_ifname: container_ifname.to_string(),
            host_ifname: host_ifname(container_id, container_ifname),
            mac: MacAddr::derive(&["pod", container_id, container_ifname]),
            host_mac: MacAddr::derive(&["host", container_id, container_ifname]),
            addresses,
            bridge: Some(bridge.name.clone()),
            gateway_mac: bridge.mac,
            mtu: bridge.mtu,
            default_routes: true,
            extra_routes: Vec::new(),
            host_ports: Vec::new(),
            bandwidth: Bandwidth::default(),
        }
    }

    /// The same without a bridge.
    pub fn routed(container_id: &str, container_ifname: &str, addresses: Vec<IpAddr>, mtu: u32) -> Self {
        let host_mac = MacAddr::derive(&["host", container_id, container_ifname]);
        Self {
            container_id: container_id.to_string(),
            container_ifname: container_ifname.to_string(),
            host_ifname: host_ifname(container_id, container_ifname),
            mac: MacAddr::derive(&["pod", container_id, container_ifname]),
            host_mac,
            addresses,
            bridge: None,
            gateway_mac: host_mac,
            mtu,
            default_routes: true,
            extra_routes: Vec::new(),
            host_ports: Vec::new(),
            bandwidth: Bandwidth::default(),
        }
    }

    /// The gateways of the pod's families, IPv4 first, with the prefix length that their addresses have.
    pub fn gateways(&self) -> Vec<(IpAddr, u8)> {
        let v4 = self.addresses.iter().any(IpAddr::is_ipv4).then_some((IpAddr::V4(GATEWAY_V4), 32));
        let v6 = self.addresses.iter().any(IpAddr::is_ipv6).then_some((IpAddr::V6(GATEWAY_V6), 64));
        v4.into_iter().chain(v6).collect()
    }

    /// The alias of the host end (`ip link` shows it): which attachment the interface belongs to.
    pub fn alias(&self) -> String {
        format!("holdfast:{}/{}", self.container_id, self.container_ifname)
    }
}

/// The name of the host end of the veth pair of `container_ifname` in `container_id`: [`HOST_IFNAME_PREFIX`] and 48
/// bits of a hash. A clash (1 in 10^10 for a hundred pods) shows as "exists" with another alias and fails the ADD.
pub fn host_ifname(container_id: &str, container_ifname: &str) -> String {
    format!("{HOST_IFNAME_PREFIX}{:012x}", stable_hash(&[container_id, container_ifname]) & 0xffff_ffff_ffff)
}

/// FNV-1a over the parts, each followed by a zero byte so that ("ab","c") and ("a","bc") differ, with a final mix
/// (from splitmix64) because FNV's high bits are weak on short input. Its values are on disk and on the wire of other
/// nodes: never change it.
pub(crate) fn stable_hash(parts: &[&str]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for part in parts {
        for byte in part.bytes().chain(std::iter::once(0)) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derived_names_are_stable_short_and_distinct() {
        let name = host_ifname("0123456789abcdef", "eth0");
        assert!(name.len() <= IFNAME_LEN_MAX);
        assert_eq!(name, host_ifname("0123456789abcdef", "eth0"));
        assert_ne!(name, host_ifname("0123456789abcdef", "eth1"));
        // Pinned: other nodes compute the same value from the Node object.
        assert_eq!(vtep_mac("node-a", IpAddr::from([10, 0, 0, 1])).to_string(), "0a:8d:4d:18:aa:2e");
    }

    #[test]
    fn macs_are_local_unicast_and_parse_back() {
        let mac = MacAddr::derive(&["x"]);
        assert_eq!(mac.0[0] & 0b11, 0b10);
        assert_eq!(mac.to_string().parse(), Ok(mac));
        assert!("0a:00:00:00:00".parse::<MacAddr>().is_err());
        assert!("0a:00:00:00:00:00:00".parse::<MacAddr>().is_err());
        assert!("+a:00:00:00:00:0".parse::<MacAddr>().is_err());
    }

    /// A lease of before mode `routed` has the bridge's name as a plain string.
    #[test]
    fn a_plan_of_an_older_version_is_read_as_one_on_a_bridge() {
        let bridge = BridgePlan::for_node("n", 1450);
        let addresses = vec![IpAddr::from([10, 0, 0, 2])];
        let old = r#"{"container_id":"c","container_ifname":"eth0","host_ifname":"hfvb4b6c2b8f2a1","mac":"0a:00:00:00:00:01",
            "host_mac":"0a:00:00:00:00:02","addresses":["10.0.0.2"],"bridge":"hf0","gateway_mac":"0a:00:00:00:00:03",
            "mtu":1450,"default_routes":true,"extra_routes":[]}"#;
        let read: EndpointPlan = serde_json::from_str(old).unwrap();
        assert_eq!(read.bridge.as_deref(), Some("hf0"));
        for plan in [
            EndpointPlan::new("c", "eth0", addresses.clone(), &bridge),
            EndpointPlan::routed("c", "eth0", addresses, 1450),
        ] {
            let text = serde_json::to_string(&plan).unwrap();
            assert_eq!(serde_json::from_str::<EndpointPlan>(&text).unwrap(), plan);
        }
    }

    #[test]
    fn next_hop_is_the_underlay_address_or_the_vteps_link_local() {
        let peer = PeerPlan::new("b", IpAddr::from([192, 0, 2, 2]), Vec::new());
        let v4: IpNetwork = "10.42.1.0/24".parse().unwrap();
        let v6: IpNetwork = "fd00:1::/64".parse().unwrap();
        assert_eq!(peer.next_hop(&v4), IpAddr::from([192, 0, 2, 2]));
        assert_eq!(peer.next_hop(&v6), IpAddr::V6(peer.vtep_mac.link_local()));
    }
}
