//! The node's side of an attachment: a port of the bridge, or [`crate::routed`].

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
use crate::limits;
use crate::links::{Links, Route, alias_of, host_route, mac_of, master_of, mtu_of, name_of, set_sysctl};
use crate::node::{kind_of, link_infos};
use crate::routed;

/// Bytes of an interface alias the kernel keeps (IFALIASZ - 1).
const ALIAS_BYTES_MAX: usize = 255;
/// A port that does not forward by then will not: the attachment fails.
const FORWARDING_WAIT_MAX: Duration = Duration::from_secs(5);
/// Between two looks at it.
const FORWARDING_POLL_INTERVAL: Duration = Duration::from_micros(100);

/// Makes the veth pair, its far end in the sandbox at once, and everything on the node's side. The host end is up when
/// this returns; the pod's end is not. Gives the host end's index.
pub async fn make(links: &Links, plan: &EndpointPlan, netns: &File) -> Result<u32> {
    check_name(&plan.host_ifname)?;
    check_name(&plan.container_ifname)?;
    let Some(name) = &plan.bridge else {
        let index = make_pair(links, plan, netns).await?;
        limits::apply(links, plan, index).await?;
        routed::make(links, plan, index).await?;
        return Ok(index);
    };
    let bridge = links.index_of(name)?.ok_or_else(|| Error::Link {
        what: format!("attach {}", plan.host_ifname),
        reason: format!("there is no bridge {name}; apply the node plan first"),
        errno: libc::ENODEV,
    })?;
    let index = make_pair(links, plan, netns).await?;
    limits::apply(links, plan, index).await?;
    turn_ipv6_off(&plan.host_ifname)?;
    let master = LinkUnspec::new_with_index(index).controller(bridge).build();
    links.change_link(master, &format!("put {} into {name}", plan.host_ifname)).await?;
    links.set_bridge_entry(index, plan.mac).await?;
    for address in &plan.addresses {
        links.set_neighbour(bridge, *address, plan.mac).await?;
        links.set_route(&pod_route(*address, bridge)).await?;
    }
    // Isolated before it is up: no frame ever goes from pod to pod.
    let what = format!("set up the bridge port {}", plan.host_ifname);
    links.change_link(isolated_port(plan, index), &what).await?;
    Ok(index)
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

/// Waits until packets pass through the host end. The kernel turns it on some time after both ends are up, in a work
/// queue of its own, and drops what the pod or the node sends before that.
pub async fn wait_until_open(links: &Links, plan: &EndpointPlan) -> Result<()> {
    let host_ifname = &plan.host_ifname;
    let forwarding = InfoBridgePort::State(BridgePortState::Forwarding);
    let deadline = Instant::now() + FORWARDING_WAIT_MAX;
    loop {
        let link = links.link(host_ifname).await?;
        let link = link.ok_or_else(|| Error::Protocol(format!("{host_ifname} vanished")))?;
        let is_open = match &plan.bridge {
            Some(_) => port_data(&link).contains(&forwarding),
            None => routed::is_open(&link),
        };
        if is_open {
            return Ok(());
        }
        if Instant::now() > deadline {
            let seconds = FORWARDING_WAIT_MAX.as_secs();
            return Err(Error::Protocol(format!("no packet passes through {host_ifname} after {seconds} s")));
        }
        // The runtime's own timer counts milliseconds, which is a third of an ADD.
        let paused = tokio::task::spawn_blocking(|| std::thread::sleep(FORWARDING_POLL_INTERVAL)).await;
        paused.map_err(|_| Error::Protocol("the wait for a port was cut off".to_string()))?;
    }
}

/// Gives the host end's index.
async fn make_pair(links: &Links, plan: &EndpointPlan, netns: &File) -> Result<u32> {
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
            return Err(Error::Exists { ifname: ifname.clone(), place: place.to_string() });
        }
        other => other?,
    }
    let index = links.index_of(&plan.host_ifname)?;
    index.ok_or_else(|| Error::Protocol(format!("{} vanished", plan.host_ifname)))
}

/// Removes the veth pair, and what the bridge has of it: routes and neighbours of `known` addresses and of those found by the
/// pod's MAC.
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
    first_error = first_error.or(limits::remove(links, host_ifname).await.err());
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

/// Removes pods' routes and neighbours of addresses that are not known, on the bridge and on host ends. Goes on after a failure and returns the first one.
pub async fn sweep(links: &Links, bridge: &str, known: &BTreeSet<IpAddr>) -> Result<usize> {
    let all = links.all_links().await?.into_iter();
    let is_pods = |link: &LinkMessage| name_of(link) == Some(bridge) || is_host_end(link);
    let devices: BTreeSet<u32> = all.filter(is_pods).map(|link| link.header.index).collect();
    let is_stray = |address: &IpAddr| !known.contains(address) && !address.is_multicast();
    let routes = links.our_routes().await?.into_iter();
    let routes: Vec<Route> = routes
        .filter(|route| {
            let device = route.device.filter(|device| devices.contains(device));
            is_stray(&route.to.ip())
                && device.is_some_and(|device| *route == pod_route(route.to.ip(), device))
        })
        .collect();
    let neighbours = links.all_permanent_neighbours().await?.into_iter();
    let neighbours = neighbours.filter(|(device, address, _)| devices.contains(device) && is_stray(address));
    let (mut swept, mut first_error) = (0, None);
    for route in routes {
        match links.delete_route(&route).await {
            Ok(removed) => swept += usize::from(removed),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    for (device, address, _) in neighbours {
        match links.delete_neighbour(device, address).await {
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
    limits::check(links, plan, link.header.index).await?;
    let Some(on) = &plan.bridge else { return routed::check(links, plan, &link).await };
    let Some(bridge) = links.link(on).await?.map(|b| b.header.index) else {
        return differs(format!("the bridge {on} is missing"));
    };
    if master_of(&link) != Some(bridge) {
        return differs(format!("{name} is not in the bridge {on}"));
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
        .filter(|link| is_host_end(link))
        .filter_map(|link| {
            let name = name_of(link)?;
            let attachment = attachment_of(link).map(|(id, ifname)| (id.to_string(), ifname.to_string()));
            Some(FoundEndpoint { host_ifname: name.to_string(), attachment })
        })
        .collect())
}

/// By name, or by alias where somebody renamed it.
fn is_host_end(link: &LinkMessage) -> bool {
    let by_name = name_of(link).is_some_and(|name| name.starts_with(HOST_IFNAME_PREFIX));
    kind_of(link) == Some(&InfoKind::Veth) && (by_name || attachment_of(link).is_some())
}

/// Container and interface from the alias.
fn attachment_of(link: &LinkMessage) -> Option<(&str, &str)> {
    alias_of(link)?.strip_prefix("holdfast:")?.rsplit_once('/')
}

/// The node's route to a pod: through the bridge, or its own host end.
pub fn pod_route(address: IpAddr, device: u32) -> Route {
    Route { to: host_route(address), device: Some(device), via: None, source: None }
}

/// The alias as the kernel can keep it; a longer container id is cut, and garbage collection then goes by name.
pub fn alias(plan: &EndpointPlan) -> String {
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
