//! The node's side of an attachment.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use holdfast_net_core::plan::{EndpointPlan, HOST_IFNAME_PREFIX, IFNAME_LEN_MAX, MacAddr};
use netlink_packet_route::link::{
    BridgePortState, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::{LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};

use crate::FoundEndpoint;
use crate::error::{Error, Result};
use crate::links::{Links, Route, alias_of, host_route, mac_of, master_of, mtu_of, name_of, set_sysctl};
use crate::node::{kind_of, link_infos};

/// Bytes of an interface alias the kernel keeps (IFALIASZ - 1).
const ALIAS_BYTES_MAX: usize = 255;
/// A port that does not forward by then will not: the attachment fails.
const FORWARDING_WAIT_MAX: Duration = Duration::from_secs(5);
/// Between two looks at it.
const FORWARDING_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Makes the veth pair, its far end in the sandbox at once, and everything on the node's side. The host end is up when
/// this returns; the pod's end is not.
pub async fn make(links: &Links, plan: &EndpointPlan, netns: &File) -> Result<()> {
    check_name(&plan.host_ifname)?;
    check_name(&plan.container_ifname)?;
    let bridge = links.link(&plan.bridge).await?.ok_or_else(|| Error::Link {
        what: format!("attach {}", plan.host_ifname),
        reason: format!("there is no bridge {}; apply the node plan first", plan.bridge),
        errno: libc::ENODEV,
    })?;
    let bridge = bridge.header.index;
    make_pair(links, plan, netns).await?;
    let link = links.link(&plan.host_ifname).await?;
    let index = link.ok_or_else(|| Error::Protocol(format!("{} vanished", plan.host_ifname)))?.header.index;
    turn_ipv6_off(&plan.host_ifname)?;
    let master = LinkUnspec::new_with_index(index).controller(bridge).build();
    links.change_link(master, &format!("put {} into {}", plan.host_ifname, plan.bridge)).await?;
    links.set_bridge_entry(index, plan.mac).await?;
    for address in &plan.addresses {
        links.set_neighbour(bridge, *address, plan.mac).await?;
        links.set_route(&pod_route(*address, bridge)).await?;
    }
    // Isolated before it is up: no frame ever goes from pod to pod.
    links
        .change_link(isolated_port(plan, index), &format!("set up the bridge port {}", plan.host_ifname))
        .await
}

/// A bridge port needs no addresses of its own.
pub fn turn_ipv6_off(host_ifname: &str) -> Result<()> {
    set_sysctl(&format!("ipv6/conf/{host_ifname}/disable_ipv6"), "1").map(drop)
}

/// Makes an isolated port of a link in the bridge, and sets it up.
pub fn isolated_port(plan: &EndpointPlan, index: u32) -> LinkMessage {
    LinkBridgePort::new(index)
        .isolated(true)
        .learning(false)
        .flood(false)
        .mcast_flood(false)
        .bcast_flood(false)
        .alias(alias(plan))
        .up()
        .build()
}

/// Waits until the bridge forwards for the port. The kernel turns a port on some time after both ends are up, in a work
/// queue of its own, and drops what the pod or the node sends before that.
pub async fn wait_until_forwarding(links: &Links, host_ifname: &str) -> Result<()> {
    let deadline = Instant::now() + FORWARDING_WAIT_MAX;
    loop {
        let link = links.link(host_ifname).await?;
        let link = link.ok_or_else(|| Error::Protocol(format!("{host_ifname} vanished")))?;
        if port_data(&link).contains(&InfoBridgePort::State(BridgePortState::Forwarding)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let seconds = FORWARDING_WAIT_MAX.as_secs();
            return Err(Error::Protocol(format!(
                "the bridge port {host_ifname} did not forward within {seconds} s"
            )));
        }
        tokio::time::sleep(FORWARDING_POLL_INTERVAL).await;
    }
}

async fn make_pair(links: &Links, plan: &EndpointPlan, netns: &File) -> Result<()> {
    let mut peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(plan.container_ifname.clone())
        .address(plan.mac.0.to_vec())
        .mtu(plan.mtu)
        .build();
    peer.attributes.push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
    let message = LinkVeth::new(&plan.host_ifname, &plan.container_ifname)
        .address(plan.host_mac.0.to_vec())
        .mtu(plan.mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    match links.add_link(message, &format!("make the veth pair {}", plan.host_ifname)).await {
        Err(Error::Link { errno: libc::EEXIST, .. }) => {
            let on_node = links.link(&plan.host_ifname).await?.is_some();
            let (ifname, place) = if on_node {
                (&plan.host_ifname, "this node")
            } else {
                (&plan.container_ifname, "the sandbox")
            };
            Err(Error::Exists { ifname: ifname.clone(), place: place.to_string() })
        }
        other => other,
    }
}

/// Removes the veth pair, and routes and neighbours of `known` addresses and of those found by the pod's MAC.
/// Goes on after a failure and returns the first one.
pub async fn remove(links: &Links, bridge: &str, host_ifname: &str, known: &BTreeSet<IpAddr>) -> Result<()> {
    let bridge = links.link(bridge).await?.map(|l| l.header.index);
    let mut addresses = known.clone();
    let mut first_error = None;
    if let Some(link) = links.link(host_ifname).await? {
        let index = link.header.index;
        if let Some(bridge) = bridge.filter(|_| addresses.is_empty()) {
            addresses = addresses_behind(links, bridge, index).await?;
        }
        first_error = links.delete_link(index, host_ifname).await.err();
    }
    for address in addresses {
        let Some(bridge) = bridge else { break };
        for result in [
            links.delete_route(&pod_route(address, bridge)).await,
            links.delete_neighbour(bridge, address).await,
        ] {
            first_error = first_error.or(result.err());
        }
    }
    first_error.map_or(Ok(()), Err)
}

/// Removes pods' routes and neighbours of addresses that are not known. Goes on after a failure and returns the first one.
pub async fn sweep(links: &Links, bridge: &str, known: &BTreeSet<IpAddr>) -> Result<usize> {
    let Some(bridge) = links.link(bridge).await?.map(|link| link.header.index) else { return Ok(0) };
    let is_stray = |address: &IpAddr| !known.contains(address) && !address.is_multicast();
    let routes = links.our_routes().await?.into_iter();
    let routes: Vec<Route> = routes
        .filter(|route| is_stray(&route.to.ip()) && *route == pod_route(route.to.ip(), bridge))
        .collect();
    let neighbours = links.permanent_neighbours(bridge).await?.into_iter().map(|(address, _)| address);
    let (mut swept, mut first_error) = (0, None);
    for route in routes {
        match links.delete_route(&route).await {
            Ok(removed) => swept += usize::from(removed),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    for address in neighbours.filter(is_stray) {
        match links.delete_neighbour(bridge, address).await {
            Ok(removed) => swept += usize::from(removed),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    first_error.map_or(Ok(swept), Err)
}

/// The permanent neighbours of the bridge whose MAC is behind the port. One that is not seen stays with its route, until
/// the address is leased again and both are replaced.
async fn addresses_behind(links: &Links, bridge: u32, port: u32) -> Result<BTreeSet<IpAddr>> {
    let macs: BTreeSet<MacAddr> = links.bridge_entries(port).await?.into_iter().collect();
    let neighbours = links.permanent_neighbours(bridge).await?;
    Ok(neighbours.into_iter().filter(|(_, mac)| macs.contains(mac)).map(|(address, _)| address).collect())
}

/// Compares the node's side with the plan; a neighbour entry that is not seen is set again.
pub async fn check(links: &Links, plan: &EndpointPlan) -> Result<()> {
    let name = &plan.host_ifname;
    let differs = |what: String| Err(Error::Differs(what));
    let Some(link) = links.link(name).await? else {
        return differs(format!("{name} is missing on the node"));
    };
    let Some(bridge) = links.link(&plan.bridge).await?.map(|b| b.header.index) else {
        return differs(format!("the bridge {} is missing", plan.bridge));
    };
    if master_of(&link) != Some(bridge) {
        return differs(format!("{name} is not in the bridge {}", plan.bridge));
    }
    if mtu_of(&link) != Some(plan.mtu) || mac_of(&link) != Some(plan.host_mac) {
        return differs(format!("{name} has another MTU or MAC than planned"));
    }
    if !link.header.flags.contains(LinkFlags::Up) {
        return differs(format!("{name} is down"));
    }
    check_port(name, &link)?;
    if !links.bridge_entries(link.header.index).await?.contains(&plan.mac) {
        return differs(format!("the bridge lacks the forwarding entry of {}", plan.mac));
    }
    let neighbours = links.permanent_neighbours(bridge).await?;
    let routes = links.our_routes().await?;
    for address in &plan.addresses {
        links.hold_neighbour(bridge, *address, plan.mac, &neighbours).await?;
        if !routes.contains(&pod_route(*address, bridge)) {
            return differs(format!("the node lacks the route to {address}"));
        }
    }
    Ok(())
}

/// All host ends of ours.
pub async fn list(links: &Links) -> Result<Vec<FoundEndpoint>> {
    let all = links.all_links().await?;
    Ok(all
        .iter()
        .filter(|link| kind_of(link) == Some(&InfoKind::Veth))
        .filter_map(|link| {
            let name = name_of(link)?;
            let attachment = alias_of(link)
                .and_then(|alias| alias.strip_prefix("holdfast:")?.rsplit_once('/'))
                .map(|(id, ifname)| (id.to_string(), ifname.to_string()));
            (name.starts_with(HOST_IFNAME_PREFIX) || attachment.is_some())
                .then(|| FoundEndpoint { host_ifname: name.to_string(), attachment })
        })
        .collect())
}

pub fn pod_route(address: IpAddr, bridge: u32) -> Route {
    Route { to: host_route(address), device: Some(bridge), via: None, source: None }
}

/// The alias as the kernel can keep it; a longer container id is cut, and garbage collection then goes by name.
fn alias(plan: &EndpointPlan) -> String {
    let mut alias = plan.alias();
    alias.truncate(ALIAS_BYTES_MAX);
    alias
}

/// How a port keeps pods apart, and what to say of one that does not.
const PORT_FLAGS: [(InfoBridgePort, &str); 5] = [
    (InfoBridgePort::Isolated(true), "is not an isolated port"),
    (InfoBridgePort::Learning(false), "is a port that learns"),
    (InfoBridgePort::UnicastFlood(false), "is a port that is flooded"),
    (InfoBridgePort::MulticastFlood(false), "is a port that is flooded with multicast"),
    (InfoBridgePort::BroadcastFlood(false), "is a port that is flooded with broadcast"),
];

/// The port keeps pods apart, and lets their frames through.
fn check_port(name: &str, link: &LinkMessage) -> Result<()> {
    let forwards = (InfoBridgePort::State(BridgePortState::Forwarding), "is a port that does not forward");
    for (wanted, what) in PORT_FLAGS.iter().chain([&forwards]) {
        if !is_port(link) || !port_data(link).contains(wanted) {
            return Err(Error::Differs(format!("{name} {what}")));
        }
    }
    Ok(())
}

/// The port keeps pods apart.
pub fn port_as_planned(link: &LinkMessage) -> bool {
    is_port(link) && PORT_FLAGS.iter().all(|(wanted, _)| port_data(link).contains(wanted))
}

fn is_port(link: &LinkMessage) -> bool {
    link_infos(link).into_iter().flatten().any(|info| *info == LinkInfo::PortKind(InfoPortKind::Bridge))
}

/// What the bridge says of its port; nothing if the link is none.
pub fn port_data(link: &LinkMessage) -> &[InfoBridgePort] {
    let data = link_infos(link).into_iter().flatten().find_map(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(data)) => Some(data.as_slice()),
        _ => None,
    });
    data.unwrap_or_default()
}

/// What the kernel takes as an interface name, and no path.
fn check_name(name: &str) -> Result<()> {
    let valid = !name.is_empty()
        && name.len() <= IFNAME_LEN_MAX
        && !matches!(name, "." | ".." | "all" | "default" | "lo")
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':' && b != b'%');
    if valid { Ok(()) } else { Err(Error::Config(format!("{name:?} is not a usable interface name"))) }
}
