//! Applies a [`NodePlan`]: bridge, overlay and the ways to the other nodes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use holdfast_net_core::overlay::IPV6_MTU_MIN;
use holdfast_net_core::plan::{BridgePlan, GATEWAY_V4, GATEWAY_V6, MacAddr, NodePlan, VxlanPlan};
use ipnetwork::IpNetwork;
use netlink_packet_route::address::AddressScope;
use netlink_packet_route::link::{
    BridgeStpState, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkBridge, LinkVxlan};

use crate::error::{Error, Result};
use crate::links::{Fdb, Links, Route, master_of};
use crate::sysctls;

/// Makes the node as planned; returns the number of writes.
///
/// `ours` names the devices that are ours, and removed where the plan has none.
pub async fn apply(links: &Links, plan: &NodePlan, ours: &Ours) -> Result<usize> {
    let mut writes = 0;
    writes += sysctls::set(sysctls::of_node(plan))?;
    writes += match &plan.bridge {
        Some(plan) => apply_bridge(links, plan).await?,
        None => usize::from(remove_unused_bridge(links, &ours.bridge).await?),
    };
    let mut routes: BTreeSet<Route> = BTreeSet::new();
    for range in &plan.pod_ranges {
        // Without it a packet to an address that no pod has would leave by the default route.
        routes.insert(Route { to: *range, device: None, via: None, source: None });
    }
    routes.extend(direct_routes(links, plan).await?);
    let Some(vxlan) = &plan.vxlan else {
        // Routes first: a peer whose route now leads another way is never without one.
        writes += apply_routes(links, &routes).await?;
        writes += usize::from(remove_vxlan(links, &ours.vxlan_device).await?);
        return Ok(writes);
    };
    let (index, done) = apply_vxlan(links, vxlan).await?;
    writes += done + apply_vtep_addresses(links, index, &plan.pod_ranges).await?;
    for peer in &plan.peers {
        routes.extend(peer.overlaid().map(|range| Route {
            to: *range,
            device: Some(index),
            via: Some(peer.next_hop(range)),
            source: vtep_address(&plan.pod_ranges, range.is_ipv4()),
        }));
    }
    // What routes need is there before them, and goes after them.
    let found = Peers::of(links, index).await?;
    let wanted = Peers::planned(plan);
    writes += found.add_missing(links, index, &wanted).await?;
    writes += apply_routes(links, &routes).await?;
    writes += found.remove_stale(links, index, &wanted).await?;
    Ok(writes)
}

/// Names of the devices that are ours.
#[derive(Debug, Clone)]
pub struct Ours {
    /// The bridge.
    pub bridge: String,
    /// The VXLAN device.
    pub vxlan_device: String,
}

/// Routes to peers on the uplink's link.
async fn direct_routes(links: &Links, plan: &NodePlan) -> Result<Vec<Route>> {
    let hops: Vec<(&IpNetwork, &IpAddr)> = plan.peers.iter().flat_map(|peer| &peer.direct).collect();
    if hops.is_empty() {
        return Ok(Vec::new());
    }
    let uplink = links.link(&plan.uplink).await?.ok_or_else(|| Error::Link {
        what: format!("set routes through {}", plan.uplink),
        reason: "there is no such interface".to_string(),
        errno: libc::ENODEV,
    })?;
    let device = Some(uplink.header.index);
    let route = |(to, via): (&IpNetwork, &IpAddr)| Route { to: *to, device, via: Some(*via), source: None };
    Ok(hops.into_iter().map(route).collect())
}

/// Removes what a time with an overlay left.
async fn remove_vxlan(links: &Links, name: &str) -> Result<bool> {
    let found = links.link(name).await?.filter(|link| kind_of(link) == Some(&InfoKind::Vxlan));
    let Some(link) = found else { return Ok(false) };
    links.delete_link(link.header.index, name).await?;
    Ok(true)
}

/// The source of the node's own packets to remote pods: the address that names its pod range, which no pod gets.
///
/// With the InternalIP as source the answers would come by the uplink instead of the overlay, and a strict reverse path
/// filter on either side would drop them.
fn vtep_address(pod_ranges: &[IpNetwork], v4: bool) -> Option<IpAddr> {
    pod_ranges.iter().find(|range| range.is_ipv4() == v4).map(IpNetwork::network)
}

async fn apply_vtep_addresses(links: &Links, index: u32, pod_ranges: &[IpNetwork]) -> Result<usize> {
    let mut writes = 0;
    let wanted: BTreeSet<(IpAddr, u8)> = [true, false]
        .into_iter()
        .filter_map(|v4| vtep_address(pod_ranges, v4))
        .map(|address| (address, if address.is_ipv4() { 32 } else { 128 }))
        .collect();
    let present: BTreeSet<(IpAddr, u8)> = links.addresses(index).await?.into_iter().collect();
    for (address, prefix) in wanted.difference(&present) {
        links.add_address(index, *address, *prefix, AddressScope::Universe).await?;
        writes += 1;
    }
    for (address, prefix) in present.difference(&wanted) {
        writes += usize::from(links.delete_address(index, *address, *prefix).await?);
    }
    Ok(writes)
}

/// Removes the bridge of that name, if it has the pods' gateway and no port: what a time in mode `bridge` left.
async fn remove_unused_bridge(links: &Links, name: &str) -> Result<bool> {
    let Some(link) = links.link(name).await?.filter(|link| kind_of(link) == Some(&InfoKind::Bridge)) else {
        return Ok(false);
    };
    let index = link.header.index;
    let is_ours = links.addresses(index).await?.contains(&(IpAddr::V4(GATEWAY_V4), 32));
    if !is_ours || links.all_links().await?.iter().any(|link| master_of(link) == Some(index)) {
        return Ok(false);
    }
    links.delete_link(index, name).await?;
    Ok(true)
}

async fn apply_bridge(links: &Links, plan: &BridgePlan) -> Result<usize> {
    let mut writes = 0;
    let link = match links.link(&plan.name).await? {
        Some(link) => link,
        None => {
            let message = LinkBridge::new(&plan.name)
                .address(plan.mac.0.to_vec())
                .mtu(plan.mtu)
                .stp_state(BridgeStpState::Disabled)
                .mcast_snooping(false)
                .build();
            links.add_link(message, &format!("make the bridge {}", plan.name)).await?;
            writes += 1;
            made(links, &plan.name).await?
        }
    };
    if kind_of(&link) != Some(&InfoKind::Bridge) {
        return Err(Error::Exists {
            ifname: plan.name.clone(),
            place: "this node, and it is no bridge".into(),
        });
    }
    let index = link.header.index;
    writes += sysctls::set(sysctls::of_bridge(&plan.name))?;
    writes += links.align_link(&link, &plan.name, plan.mtu, plan.mac).await?;
    let present = links.addresses(index).await?;
    for (address, prefix) in [(IpAddr::V4(GATEWAY_V4), 32), (IpAddr::V6(GATEWAY_V6), 64)] {
        // On an interface of less the kernel has no IPv6.
        let fits = address.is_ipv4() || plan.mtu >= IPV6_MTU_MIN;
        if !present.contains(&(address, prefix)) && has_family(address) && fits {
            links.add_address(index, address, prefix, AddressScope::Link).await?;
            writes += 1;
        }
    }
    Ok(writes)
}

async fn apply_vxlan(links: &Links, plan: &VxlanPlan) -> Result<(u32, usize)> {
    let mut writes = 0;
    let mut found = links.link(&plan.name).await?;
    if let Some(link) = &found {
        if kind_of(link) != Some(&InfoKind::Vxlan) {
            let place = "this node, and it is no VXLAN device".to_string();
            return Err(Error::Exists { ifname: plan.name.clone(), place });
        }
        // The kernel cannot change these on a living device.
        if !vxlan_as_planned(link, plan) {
            links.delete_link(link.header.index, &plan.name).await?;
            writes += 1;
            found = None;
        }
    }
    let link = match found {
        Some(link) => link,
        None => {
            let builder = LinkVxlan::new(&plan.name, plan.vni)
                .address(plan.mac.0.to_vec())
                .mtu(plan.mtu)
                .port(plan.port)
                .learning(false);
            let message = match plan.local {
                IpAddr::V4(local) => builder.local(local),
                // Sent with checksums, since an IPv6 header has none and by default receivers drop what has none
                // (RFC 8200, 8.1); received without, as RFC 7348 has others send it.
                IpAddr::V6(local) => builder.local6(local).udp_zero_csum6_tx(false).udp_zero_csum6_rx(true),
            };
            links.add_link(message.build(), &format!("make the VXLAN device {}", plan.name)).await?;
            writes += 1;
            made(links, &plan.name).await?
        }
    };
    writes += sysctls::set(sysctls::of_vxlan(&plan.name))?;
    writes += links.align_link(&link, &plan.name, plan.mtu, plan.mac).await?;
    Ok((link.header.index, writes))
}

/// Neighbours and forwarding entries of the VXLAN device: nothing learned, nothing left over.
struct Peers {
    neighbours: BTreeSet<(IpAddr, MacAddr)>,
    entries: BTreeSet<Fdb>,
}

impl Peers {
    async fn of(links: &Links, index: u32) -> Result<Self> {
        let neighbours = links.permanent_neighbours(index).await?.into_iter();
        let neighbours = neighbours.filter(|(address, _)| !address.is_multicast()).collect();
        Ok(Self { neighbours, entries: links.vxlan_entries(index).await?.into_iter().collect() })
    }

    fn planned(plan: &NodePlan) -> Self {
        let overlaid = || plan.peers.iter().filter(|peer| peer.overlaid().next().is_some());
        let neighbours = overlaid()
            .flat_map(|peer| peer.overlaid().map(|range| (peer.next_hop(range), peer.vtep_mac)))
            .collect();
        let entries = overlaid().map(|peer| Fdb { mac: peer.vtep_mac, to: peer.underlay }).collect();
        Self { neighbours, entries }
    }

    async fn add_missing(&self, links: &Links, index: u32, wanted: &Self) -> Result<usize> {
        let mut writes = 0;
        for (address, mac) in wanted.neighbours.difference(&self.neighbours) {
            links.set_neighbour(index, *address, *mac).await?;
            writes += 1;
        }
        // A peer that moved keeps its MAC or not; a MAC has one destination, so an old one goes first.
        let new: BTreeSet<MacAddr> =
            wanted.entries.difference(&self.entries).map(|entry| entry.mac).collect();
        for stale in self.entries.difference(&wanted.entries).filter(|entry| new.contains(&entry.mac)) {
            writes += usize::from(links.delete_vxlan_entry(index, *stale).await?);
        }
        for entry in wanted.entries.difference(&self.entries) {
            links.set_vxlan_entry(index, *entry).await?;
            writes += 1;
        }
        Ok(writes)
    }

    async fn remove_stale(&self, links: &Links, index: u32, wanted: &Self) -> Result<usize> {
        let mut writes = 0;
        let kept: BTreeSet<IpAddr> = wanted.neighbours.iter().map(|(address, _)| *address).collect();
        for (address, _) in self.neighbours.iter().filter(|(address, _)| !kept.contains(address)) {
            writes += usize::from(links.delete_neighbour(index, *address).await?);
        }
        for stale in self.entries.difference(&wanted.entries) {
            writes += usize::from(links.delete_vxlan_entry(index, *stale).await?);
        }
        Ok(writes)
    }
}

/// Routes to other nodes, which all have a next hop, and the unreachable ones; the pods' own routes have none and stay.
async fn apply_routes(links: &Links, wanted: &BTreeSet<Route>) -> Result<usize> {
    let mut writes = 0;
    let present: BTreeSet<Route> = links
        .our_routes()
        .await?
        .into_iter()
        .filter(|route| route.device.is_none() || route.via.is_some())
        .collect();
    let wanted_to: BTreeSet<_> = wanted.iter().map(|r| r.to).collect();
    for stale in present.difference(wanted) {
        // A route that only changes is replaced below, never missing in between.
        let changes = stale.device.is_some() && wanted_to.contains(&stale.to);
        if !changes {
            writes += usize::from(links.delete_route(stale).await?);
        }
    }
    for route in wanted.difference(&present) {
        links.set_route(route).await?;
        writes += 1;
    }
    Ok(writes)
}

async fn made(links: &Links, name: &str) -> Result<LinkMessage> {
    links.link(name).await?.ok_or_else(|| Error::Protocol(format!("{name} vanished while it was set up")))
}

/// Whether the kernel speaks the family at all.
fn has_family(address: IpAddr) -> bool {
    address.is_ipv4() || std::path::Path::new("/proc/sys/net/ipv6").exists()
}

/// The type of a link.
pub fn kind_of(link: &LinkMessage) -> Option<&InfoKind> {
    link_infos(link)?.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

/// The link info attributes of a link.
pub fn link_infos(link: &LinkMessage) -> Option<&Vec<LinkInfo>> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })
}

fn vxlan_as_planned(link: &LinkMessage, plan: &VxlanPlan) -> bool {
    let data = link_infos(link).and_then(|infos| {
        infos.iter().find_map(|info| match info {
            LinkInfo::Data(InfoData::Vxlan(data)) => Some(data),
            _ => None,
        })
    });
    let Some(data) = data else { return false };
    let local = match plan.local {
        IpAddr::V4(local) => data.contains(&InfoVxlan::Local(local)),
        IpAddr::V6(local) => {
            data.contains(&InfoVxlan::Local6(local))
                && data.contains(&InfoVxlan::UDPZeroCsumTX(false))
                && data.contains(&InfoVxlan::UDPZeroCsumRX(true))
        }
    };
    local
        && data.contains(&InfoVxlan::Id(plan.vni))
        && data.contains(&InfoVxlan::Port(plan.port))
        && data.contains(&InfoVxlan::Learning(false))
}
