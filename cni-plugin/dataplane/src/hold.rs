//! Holds the node's side of all attachments to a bridge to their plans: one look at the kernel for all of them, then what differs is mended.
//!
//! Held: bridge, isolation and the other flags of the port, MTU, MAC, that it is up, the bridge's forwarding entry, the node's routes
//! and neighbours. An attachment whose veth pair is gone is left alone: with it went the pod's end, and nothing here
//! can tell a lost pair from a pod that ended.
//!
//! A port that comes back into the bridge is taken down first, put in and turned into an isolated port before it is up again, as
//! for a new pod: no frame goes from pod to pod meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use holdfast_net_core::plan::{EndpointPlan, MacAddr};
use netlink_packet_route::link::{BridgePortState, InfoBridgePort, LinkFlags, LinkMessage};
use rtnetlink::{LinkBridgePort, LinkUnspec};

use crate::endpoint::{isolated_port, pod_route, port_as_planned, port_data, turn_ipv6_off};
use crate::error::{Error, Result};
use crate::links::{Links, Route, mac_of, master_of, mtu_of, name_of};

/// What the kernel has, read once.
struct Found {
    links: BTreeMap<String, LinkMessage>,
    entries: BTreeSet<(u32, MacAddr)>,
    routes: BTreeSet<Route>,
    /// Permanent neighbours of each bridge.
    neighbours: BTreeMap<u32, BTreeMap<IpAddr, MacAddr>>,
}

/// Makes the node's side of `plans` as planned. Returns the interfaces of theirs that exist, bridges among them.
///
/// # Errors
/// The first thing that the kernel refused; all others were held all the same.
pub async fn endpoints(links: &Links, plans: &[&EndpointPlan]) -> Result<Vec<u32>> {
    let found = look(links, plans).await?;
    let mut present = BTreeSet::new();
    let mut first_error = None;
    for plan in plans {
        let Some(link) = found.links.get(&plan.host_ifname) else { continue };
        present.insert(link.header.index);
        // Those without one are held by `routed`.
        let Some(name) = &plan.bridge else { continue };
        let Some(bridge) = found.links.get(name) else { continue };
        present.insert(bridge.header.index);
        let bridge = (name.as_str(), bridge.header.index);
        if let Err(error) = hold(links, plan, link, bridge, &found).await {
            // A pod that ends meanwhile takes its interface along.
            let is_there = links.link(&plan.host_ifname).await.is_ok_and(|link| link.is_some());
            if is_there {
                first_error = first_error.or(Some(error));
            }
        }
    }
    first_error.map_or(Ok(present.into_iter().collect()), Err)
}

async fn look(links: &Links, plans: &[&EndpointPlan]) -> Result<Found> {
    let all = links.all_links().await?;
    let mut found = Found {
        links: all.into_iter().filter_map(|link| Some((name_of(&link)?.to_owned(), link))).collect(),
        entries: BTreeSet::new(),
        routes: BTreeSet::new(),
        neighbours: BTreeMap::new(),
    };
    let bridges: BTreeSet<&str> = plans.iter().filter_map(|plan| plan.bridge.as_deref()).collect();
    for bridge in bridges.iter().filter_map(|name| found.links.get(*name)) {
        let index = bridge.header.index;
        found.neighbours.insert(index, links.permanent_neighbours(index).await?.into_iter().collect());
    }
    if !found.neighbours.is_empty() {
        found.entries = links.all_bridge_entries().await?;
        found.routes = links.our_routes().await?.into_iter().collect();
    }
    Ok(found)
}

async fn hold(
    links: &Links,
    plan: &EndpointPlan,
    link: &LinkMessage,
    (bridge_name, bridge): (&str, u32),
    found: &Found,
) -> Result<()> {
    let (name, index) = (&plan.host_ifname, link.header.index);
    let mut has_entry = found.entries.contains(&(index, plan.mac));
    let is_in = master_of(link) == Some(bridge);
    if !is_in {
        links.set_down(index, name).await?;
        let master = LinkUnspec::new_with_index(index).controller(bridge).build();
        links.change_link(master, &format!("put {name} into {bridge_name}")).await?;
        has_entry = false;
    }
    if !has_entry {
        links.set_bridge_entry(index, plan.mac).await?;
    }
    if !is_in || !port_as_planned(link) {
        links.change_link(isolated_port(plan, index), &format!("set up the bridge port {name}")).await?;
    }
    let is_up = link.header.flags.contains(LinkFlags::Up);
    if is_in && !is_up || mtu_of(link) != Some(plan.mtu) || mac_of(link) != Some(plan.host_mac) {
        // Sets it up, too.
        let current = if is_in { Some(link) } else { None };
        let read = if current.is_none() { links.link(name).await? } else { None };
        if let Some(link) = current.or(read.as_ref()) {
            links.align_link(link, name, plan.mtu, plan.host_mac).await?;
        }
    }
    // Somebody turned it off: the kernel does that itself only while there is no carrier.
    let is_off = port_data(link).contains(&InfoBridgePort::State(BridgePortState::Disabled));
    if is_in && is_off && link.header.flags.contains(LinkFlags::LowerUp) {
        let message = LinkBridgePort::new(index).state(BridgePortState::Forwarding).build();
        links.change_link(message, &format!("turn the bridge port {name} on")).await?;
    }
    hold_addresses(links, plan, bridge, found).await
}

async fn hold_addresses(links: &Links, plan: &EndpointPlan, bridge: u32, found: &Found) -> Result<()> {
    let neighbours = found.neighbours.get(&bridge);
    for address in &plan.addresses {
        if neighbours.and_then(|known| known.get(address)) != Some(&plan.mac) {
            links.set_neighbour(bridge, *address, plan.mac).await?;
        }
        let route = pod_route(*address, bridge);
        if !found.routes.contains(&route) {
            links.set_route(&route).await?;
        }
    }
    Ok(())
}

/// Sets the MTU of the host's end where it is another; fine if the interface is gone.
pub async fn set_mtu(links: &Links, plan: &EndpointPlan) -> Result<()> {
    let Some(link) = links.link(&plan.host_ifname).await? else { return Ok(()) };
    match links.align_link(&link, &plan.host_ifname, plan.mtu, plan.host_mac).await {
        // An interface that could not carry IPv6 and can now has it anew.
        Ok(_) if plan.bridge.is_some() => turn_ipv6_off(&plan.host_ifname),
        // What it has of its own is put back by the next pass.
        Ok(_) => Ok(()),
        Err(Error::Link { errno: libc::ENODEV, .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
