//! The node's side of an attachment without a bridge: the host end of the veth pair is the pod's gateway.
//!
//! Everything hangs on that interface (addresses, route, neighbours, sysctls), so with it all of it is gone.

use std::collections::BTreeSet;
use std::net::IpAddr;

use holdfast_net_core::plan::{EndpointPlan, MacAddr};
use netlink_packet_route::address::AddressScope;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, State};
use rtnetlink::LinkUnspec;

use crate::endpoint::{alias, pod_route};
use crate::error::{Error, Result};
use crate::links::{Links, Route, mac_of, master_of, mtu_of, name_of, set_sysctl, sysctl_differs};

/// Configures the host end, which has the index `index`, and sets it up. Until the pod's end is up nothing passes.
pub async fn make(links: &Links, plan: &EndpointPlan, index: u32) -> Result<()> {
    for (path, value) in sysctls(plan) {
        set_sysctl(&path, value)?;
    }
    let message = LinkUnspec::new_with_index(index).alias(alias(plan)).up().build();
    links.change_link(message, &format!("set up {}", plan.host_ifname)).await?;
    for (gateway, prefix) in plan.gateways() {
        links.add_address(index, gateway, prefix, AddressScope::Link).await?;
    }
    for address in &plan.addresses {
        links.set_neighbour(index, *address, plan.mac).await?;
        links.set_route(&pod_route(*address, index)).await?;
    }
    Ok(())
}

/// The kernel sends through the interface: it starts some time after both ends are up, in a work queue of its own.
pub fn is_open(link: &LinkMessage) -> bool {
    link.attributes.contains(&LinkAttribute::OperState(State::Up))
}

/// Compares the node's side with the plan; a neighbour entry that is not seen is set again.
pub async fn check(links: &Links, plan: &EndpointPlan, link: &LinkMessage) -> Result<()> {
    let name = &plan.host_ifname;
    let differs = |what: String| Err(Error::Differs(what));
    if master_of(link).is_some() {
        return differs(format!("{name} is a port of another interface"));
    }
    if mtu_of(link) != Some(plan.mtu) || mac_of(link) != Some(plan.host_mac) {
        return differs(format!("{name} has another MTU or MAC than planned"));
    }
    if !link.header.flags.contains(LinkFlags::Up) {
        return differs(format!("{name} is down"));
    }
    for (path, value) in sysctls(plan) {
        if sysctl_differs(&path, value)? {
            return differs(format!("the node's sysctl {path} is not {value}"));
        }
    }
    let index = link.header.index;
    let addresses: BTreeSet<(IpAddr, u8)> = links.addresses(index).await?.into_iter().collect();
    if let Some((lost, _)) = plan.gateways().into_iter().find(|gateway| !addresses.contains(gateway)) {
        return differs(format!("{name} lacks the gateway's address {lost}"));
    }
    let neighbours = links.permanent_neighbours(index).await?;
    let routes = links.our_routes().await?;
    for address in &plan.addresses {
        links.hold_neighbour(index, *address, plan.mac, &neighbours).await?;
        if !routes.contains(&pod_route(*address, index)) {
            return differs(format!("the node lacks the route to {address}"));
        }
    }
    Ok(())
}

/// What the kernel has of all host ends, read once.
struct Seen {
    addresses: BTreeSet<(u32, IpAddr, u8)>,
    neighbours: BTreeSet<(u32, IpAddr, MacAddr)>,
    routes: BTreeSet<Route>,
}

/// Makes the node's side of the routed ones of `plans` as planned; returns the number of writes. One whose interface is gone is left
/// alone: with it went the pod's end, and nothing here can tell a lost pair from a pod that ended.
///
/// # Errors
/// The first thing that the kernel refused; all others were held all the same.
pub async fn hold_all(links: &Links, plans: &[&EndpointPlan]) -> Result<usize> {
    if !plans.iter().any(|plan| plan.bridge.is_none()) {
        return Ok(0);
    }
    let all = links.all_links().await?;
    let seen = Seen {
        addresses: links.all_addresses().await?.into_iter().collect(),
        neighbours: links.all_permanent_neighbours().await?.into_iter().collect(),
        routes: links.our_routes().await?.into_iter().collect(),
    };
    let (mut writes, mut first_error) = (0, None);
    for plan in plans.iter().filter(|plan| plan.bridge.is_none()) {
        let found = all.iter().find(|link| name_of(link) == Some(&plan.host_ifname));
        let Some(link) = found else { continue };
        match hold(links, plan, link, &seen).await {
            Ok(done) => writes += done,
            // A pod that ends meanwhile takes its interface along.
            Err(error) if links.link(&plan.host_ifname).await.is_ok_and(|link| link.is_some()) => {
                first_error = first_error.or(Some(error));
            }
            Err(_) => {}
        }
    }
    first_error.map_or(Ok(writes), Err)
}

async fn hold(links: &Links, plan: &EndpointPlan, link: &LinkMessage, seen: &Seen) -> Result<usize> {
    let index = link.header.index;
    let mut writes = 0;
    for (path, value) in sysctls(plan) {
        writes += usize::from(set_sysctl(&path, value)?);
    }
    if master_of(link).is_some() {
        let alone = LinkUnspec::new_with_index(index).nocontroller().build();
        links.change_link(alone, &format!("take {} out of a bridge", plan.host_ifname)).await?;
        writes += 1;
    }
    // With the interface down or changed, routes went that the look may still show.
    let changed = links.align_link(link, &plan.host_ifname, plan.mtu, plan.host_mac).await?;
    writes += changed;
    for (gateway, prefix) in plan.gateways() {
        if !seen.addresses.contains(&(index, gateway, prefix)) {
            links.add_address(index, gateway, prefix, AddressScope::Link).await?;
            writes += 1;
        }
    }
    for address in &plan.addresses {
        if changed > 0 || !seen.neighbours.contains(&(index, *address, plan.mac)) {
            links.set_neighbour(index, *address, plan.mac).await?;
            writes += 1;
        }
        let route = pod_route(*address, index);
        if changed > 0 || !seen.routes.contains(&route) {
            links.set_route(&route).await?;
            writes += 1;
        }
    }
    Ok(writes)
}

/// Paths below `/proc/sys/net` and values.
fn sysctls(plan: &EndpointPlan) -> Vec<(String, &'static str)> {
    let name = &plan.host_ifname;
    let mut sysctls = vec![
        // A pod that sends to itself by its gateway need not be told so, and the node takes no routes from a pod.
        (format!("ipv4/conf/{name}/send_redirects"), "0"),
        (format!("ipv4/conf/{name}/accept_redirects"), "0"),
        // The node's loopback reaches host ports: it is a source here before it is masqueraded. The pin keeps pods from sending to it.
        (format!("ipv4/conf/{name}/route_localnet"), "1"),
    ];
    if plan.addresses.iter().any(IpAddr::is_ipv6) {
        // fe80::1 is the only link-local address: none is generated from the MAC.
        sysctls.push((format!("ipv6/conf/{name}/addr_gen_mode"), "1"));
        sysctls.push((format!("ipv6/conf/{name}/accept_ra"), "0"));
        sysctls.push((format!("ipv6/conf/{name}/accept_redirects"), "0"));
    } else {
        sysctls.push((format!("ipv6/conf/{name}/disable_ipv6"), "1"));
    }
    sysctls
}
