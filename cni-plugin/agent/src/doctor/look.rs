//! Looks at the node. Nothing is judged here.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use futures::TryStreamExt;
use holdfast_dataplane::{Config, ForeignChain, foreign_chains};
use holdfast_proto::agent as pb;
use ipnetwork::IpNetwork;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoData, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use serde_json::Value;

use super::DoctorOptions;
use crate::engine::sentence;

/// An agent that serves answers well within this.
const AGENT_TIMEOUT: Duration = Duration::from_secs(5);
/// `rtm_protocol` of our routes.
const OWN_ROUTES: u8 = 0x48;
/// Names of processes as the kernel keeps them: 15 bytes.
const MANAGERS: [&str; 3] = ["firewalld", "NetworkManager", "systemd-network"];

/// A link.
#[derive(Debug, Clone, Default)]
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    pub mtu: u32,
    pub is_up: bool,
    pub addresses: Vec<IpAddr>,
    pub vxlan: Option<Vxlan>,
}

/// What matters of a VXLAN device.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Vxlan {
    pub vni: u32,
    pub port: u16,
    /// It takes the frames of all identifiers.
    pub is_external: bool,
}

/// A route that is none of ours.
#[derive(Debug, Clone)]
pub(super) struct ForeignRoute {
    pub to: IpNetwork,
    pub device: Option<u32>,
}

/// Everything that is judged.
#[derive(Debug, Default)]
pub(super) struct Facts {
    /// The agent's dump, or why there is none; `None`: it was not asked.
    pub agent: Option<Result<Value, String>>,
    /// Which of [`MANAGERS`] run in this network namespace.
    pub running: Vec<&'static str>,
    pub ufw_is_enabled: bool,
    /// Manager and interface.
    pub managed: Vec<(&'static str, String)>,
    pub chains: Vec<ForeignChain>,
    pub legacy_tables: Vec<String>,
    /// Below `/proc/sys/net`; those that exist.
    pub sysctls: BTreeMap<String, String>,
    pub links: Vec<Link>,
    pub routes: Vec<ForeignRoute>,
    /// UDP ports that somebody listens on, the kernel too.
    pub udp_ports: Vec<u16>,
    /// Entries, and how many there may be.
    pub conntrack: Option<(u64, u64)>,
    /// What could not be looked at, as "routes: not permitted".
    pub unseen: Vec<String>,
}

pub(super) async fn look(options: &DoctorOptions) -> Facts {
    let mut facts = Facts { agent: Some(ask_agent(&options.socket).await), ..Facts::default() };
    let table = Config::default().table;
    match tokio::task::spawn_blocking(move || foreign_chains(&table)).await {
        Ok(Ok(chains)) => facts.chains = chains,
        Ok(Err(error)) => facts.unseen.push(format!("nf_tables: {}", sentence(&error))),
        Err(error) => facts.unseen.push(format!("nf_tables: {error}")),
    }
    if let Err(error) = look_at_links(&mut facts).await {
        facts.unseen.push(format!("links and routes: {error:#}"));
    }
    facts.running = running();
    facts.ufw_is_enabled = read(&options.root.join("etc/ufw/ufw.conf"))
        .is_some_and(|text| text.lines().any(|line| line.trim() == "ENABLED=yes"));
    facts.managed = managed(&options.root, &facts.links);
    for file in ["ip_tables_names", "ip6_tables_names"] {
        let names = read(&Path::new("/proc/net").join(file)).unwrap_or_default();
        facts.legacy_tables.extend(names.lines().map(str::to_owned));
    }
    facts.udp_ports = ["udp", "udp6"].into_iter().flat_map(udp_ports).collect();
    let number = |name: &str| read(&Path::new("/proc/sys/net/netfilter").join(name))?.trim().parse().ok();
    facts.conntrack = number("nf_conntrack_count").zip(number("nf_conntrack_max"));
    read_sysctls(&mut facts);
    facts
}

async fn ask_agent(socket: &Path) -> Result<Value, String> {
    let asked = async {
        let mut client = crate::ask::connect(socket, AGENT_TIMEOUT).await?;
        let reply = client.dump(pb::DumpRequest {}).await.map_err(|status| status.message().to_owned())?;
        serde_json::from_str(&reply.into_inner().json).map_err(|error| error.to_string())
    };
    match tokio::time::timeout(AGENT_TIMEOUT, asked).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {} s", AGENT_TIMEOUT.as_secs())),
    }
}

async fn look_at_links(facts: &mut Facts) -> anyhow::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let looked = async {
        let mut links: Vec<Link> =
            handle.link().get().execute().map_ok(|message| link(&message)).try_collect().await?;
        let mut addresses = handle.address().get().execute();
        while let Some(entry) = addresses.try_next().await? {
            let Some(link) = links.iter_mut().find(|link| link.index == entry.header.index) else { continue };
            link.addresses.extend(entry.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            }));
        }
        let mut routes = Vec::new();
        for query in [
            rtnetlink::RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
            rtnetlink::RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
        ] {
            let found: Vec<RouteMessage> = handle.route().get(query).execute().try_collect().await?;
            routes.extend(found.iter().filter_map(foreign_route));
        }
        anyhow::Ok((links, routes))
    };
    let looked = looked.await;
    connection.abort();
    (facts.links, facts.routes) = looked?;
    Ok(())
}

fn link(message: &LinkMessage) -> Link {
    let is_up = message.header.flags.contains(LinkFlags::Up);
    let mut link = Link { index: message.header.index, is_up, ..Link::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => link.vxlan = infos.iter().find_map(vxlan),
            _ => {}
        }
    }
    link
}

fn vxlan(info: &LinkInfo) -> Option<Vxlan> {
    let LinkInfo::Data(InfoData::Vxlan(data)) = info else { return None };
    let mut vxlan = Vxlan::default();
    for info in data {
        match info {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::CollectMetadata(is_external) => vxlan.is_external = *is_external,
            _ => {}
        }
    }
    Some(vxlan)
}

/// A unicast route of the main table to a part of the addresses.
fn foreign_route(message: &RouteMessage) -> Option<ForeignRoute> {
    let header = &message.header;
    let is_main = header.table == RouteHeader::RT_TABLE_MAIN && header.kind == RouteType::Unicast;
    if !is_main || u8::from(header.protocol) == OWN_ROUTES || header.destination_prefix_length == 0 {
        return None;
    }
    let (mut to, mut device) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(IpAddr::V4(*address)),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => to = Some(IpAddr::V6(*address)),
            RouteAttribute::Oif(index) => device = Some(*index),
            _ => {}
        }
    }
    Some(ForeignRoute { to: IpNetwork::new(to?, header.destination_prefix_length).ok()?, device })
}

/// Processes of other network namespaces do not matter here.
fn running() -> Vec<&'static str> {
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/net")).ok();
    let own = namespace(Path::new("/proc/self"));
    let mut found: Vec<&'static str> = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(comm) = read(&entry.path().join("comm")) else { continue };
        let Some(manager) = MANAGERS.iter().find(|manager| **manager == comm.trim()) else { continue };
        if !found.contains(manager) && namespace(&entry.path()) == own {
            found.push(manager);
        }
    }
    found
}

/// Which of our interfaces a manager says it manages, by its state files.
fn managed(root: &Path, links: &[Link]) -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    for link in links {
        let of_manager = root.join(format!("run/NetworkManager/devices/{}", link.index));
        if read(&of_manager).is_some_and(|text| text.lines().any(|line| line.trim() == "managed=true")) {
            found.push(("NetworkManager", link.name.clone()));
        }
        let of_networkd = root.join(format!("run/systemd/netif/links/{}", link.index));
        let is_unmanaged = |line: &str| line == "ADMIN_STATE=unmanaged";
        if read(&of_networkd)
            .is_some_and(|text| text.contains("ADMIN_STATE=") && !text.lines().any(is_unmanaged))
        {
            found.push(("systemd-networkd", link.name.clone()));
        }
    }
    found
}

/// Ports of sockets, those of the kernel's own tunnels among them.
fn udp_ports(file: &str) -> Vec<u16> {
    let text = read(&Path::new("/proc/net").join(file)).unwrap_or_default();
    let port = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()
    };
    text.lines().skip(1).filter_map(port).collect()
}

fn read_sysctls(facts: &mut Facts) {
    let mut paths = vec!["ipv4/ip_forward".to_owned(), "ipv6/conf/all/forwarding".to_owned()];
    paths.extend(["iptables", "ip6tables"].map(|name| format!("bridge/bridge-nf-call-{name}")));
    for name in ["all"].into_iter().chain(facts.links.iter().map(|link| link.name.as_str())) {
        paths.extend(["rp_filter", "forwarding"].map(|key| format!("ipv4/conf/{name}/{key}")));
    }
    for path in paths {
        if let Some(value) = read(&Path::new("/proc/sys/net").join(&path)) {
            facts.sysctls.insert(path, value.trim().to_owned());
        }
    }
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}
