//! rtnetlink: what the data path needs of links, addresses, routes, neighbours and forwarding entries.
//!
//! Everything of ours is told apart: routes carry [`ROUTE_PROTOCOL`], host ends carry a name prefix and an alias.

mod neighbours;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::TryStreamExt;
use holdfast_net_core::plan::MacAddr;
use ipnetwork::IpNetwork;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::AsyncSocket;
use rtnetlink::{Handle, LinkUnspec};
use tokio::task::JoinHandle;

use crate::dump::Dumps;
use crate::error::{Error, Result};
use crate::unlink::Unlinker;

/// `rtm_protocol` of our routes, outside the range iproute2 names (`/etc/iproute2/rt_protos`).
pub const ROUTE_PROTOCOL: u8 = 0x48;

/// A connection to rtnetlink in the namespace where it was opened.
pub struct Links {
    handle: Handle,
    dumps: Dumps,
    unlinker: Unlinker,
    connection: JoinHandle<()>,
    port: u32,
    /// What was written, where somebody wants to tell it.
    journal: Option<Mutex<Vec<String>>>,
}

fn unpoisoned(journal: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    // A list of finished sentences is whole after any panic.
    journal.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// A forwarding entry of the VXLAN device: frames to `mac` go to the node at `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fdb {
    /// The VTEP.
    pub mac: MacAddr,
    /// Its node.
    pub to: IpAddr,
}

/// A route of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Where to.
    pub to: IpNetwork,
    /// Through which device; `None`: unreachable.
    pub device: Option<u32>,
    /// Over which next hop, taken as on the link.
    pub via: Option<IpAddr>,
    /// Preferred source.
    pub source: Option<IpAddr>,
}

impl Links {
    /// Opens the connection in the calling thread's network namespace, driven by the current tokio runtime.
    pub fn open() -> Result<Self> {
        let (mut connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| Error::Socket { what: "open rtnetlink".to_string(), source })?;
        connection.set_forward_done(true);
        let bound = connection.socket_mut().socket_mut().bind_auto();
        let bound = bound.map_err(|source| Error::Socket { what: "bind rtnetlink".to_string(), source })?;
        Ok(Self {
            dumps: Dumps::new(handle.clone()),
            handle,
            unlinker: Unlinker::default(),
            connection: tokio::spawn(connection),
            port: bound.port_number(),
            journal: None,
        })
    }

    /// The connection, for requests of other kinds.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Its dumps.
    pub fn dumps(&self) -> &Dumps {
        &self.dumps
    }

    /// The same, for a caller that asks [`Links::take_journal`] after each of its passes.
    pub fn open_with_journal() -> Result<Self> {
        let mut links = Self::open()?;
        links.journal = Some(Mutex::default());
        Ok(links)
    }

    /// The socket's port, which marks our own changes in some notifications.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// What was written since the last call, each as "set the route to 10.0.0.0/24".
    pub fn take_journal(&self) -> Vec<String> {
        let journal = self.journal.as_ref();
        journal.map(|journal| std::mem::take(&mut *unpoisoned(journal))).unwrap_or_default()
    }

    /// Notes what the kernel took.
    fn wrote<T>(&self, result: Result<T>, what: impl FnOnce() -> String) -> Result<T> {
        if let (Ok(_), Some(journal)) = (&result, &self.journal) {
            unpoisoned(journal).push(what());
        }
        result
    }

    /// The link called `name`, if it exists.
    pub async fn link(&self, name: &str) -> Result<Option<LinkMessage>> {
        let mut stream = Box::pin(self.handle.link().get().match_name(name).execute());
        match stream.try_next().await {
            Ok(found) => Ok(found),
            Err(error) if errno(&error) == libc::ENODEV => Ok(None),
            Err(error) => Err(refused(format!("look up link {name}"), error)),
        }
    }

    /// A link's index by its name, in the calling thread's network namespace, which is that of the connection. Without the round trip
    /// through the connection's task, and without all that the kernel tells of a link.
    pub fn index_of(&self, name: &str) -> Result<Option<u32>> {
        match nix::net::if_::if_nametoindex(name) {
            Ok(index) => Ok(Some(index)),
            Err(nix::errno::Errno::ENODEV) => Ok(None),
            Err(errno) => Err(Error::Link {
                what: format!("look up link {name}"),
                reason: errno.desc().to_string(),
                errno: errno as i32,
            }),
        }
    }

    /// All links.
    pub async fn all_links(&self) -> Result<Vec<LinkMessage>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let found = self.dumps.run(request, "list links").await?;
        Ok(found
            .into_iter()
            .filter_map(|m| if let RouteNetlinkMessage::NewLink(link) = m { Some(link) } else { None })
            .collect())
    }

    /// Makes a link from a built message.
    pub async fn add_link(&self, message: LinkMessage, what: &str) -> Result<()> {
        let made = self.handle.link().add(message).execute().await;
        self.wrote(made.map_err(|e| refused(what.to_string(), e)), || what.to_string())
    }

    /// Changes a link: RTM_NEWLINK without create, which takes type data and port data too.
    pub async fn change_link(&self, message: LinkMessage, what: &str) -> Result<()> {
        let changed = self.handle.link().set_port(message).execute().await;
        self.wrote(changed.map_err(|e| refused(what.to_string(), e)), || what.to_string())
    }

    /// Deletes a link; fine if it is gone. Nobody finds it any more when this returns; its memory is freed later.
    pub async fn delete_link(&self, index: u32, name: &str) -> Result<()> {
        match self.unlinker.delete(index).await {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => Err(Error::Link {
                what: format!("delete link {name}"),
                errno: error.raw_os_error().unwrap_or_default(),
                reason: error.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Sets a link up.
    pub async fn set_up(&self, index: u32, name: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let set = self.handle.link().set(message).execute().await;
        self.wrote(set.map_err(|e| refused(format!("set {name} up"), e)), || format!("set {name} up"))
    }

    /// Sets a link down.
    pub async fn set_down(&self, index: u32, name: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).down().build();
        self.handle.link().set(message).execute().await.map_err(|e| refused(format!("set {name} down"), e))
    }

    /// Sets MTU and MAC where they differ, and the link up; returns the number of writes.
    pub async fn align_link(&self, link: &LinkMessage, name: &str, mtu: u32, mac: MacAddr) -> Result<usize> {
        let mut message = LinkUnspec::new_with_index(link.header.index);
        let mut writes = 0;
        if mtu_of(link) != Some(mtu) {
            message = message.mtu(mtu);
            writes += 1;
        }
        if mac_of(link) != Some(mac) {
            message = message.address(mac.0.to_vec());
            writes += 1;
        }
        if !link.header.flags.contains(LinkFlags::Up) {
            message = message.up();
            writes += 1;
        }
        if writes > 0 {
            let what = format!("set MTU {mtu}, MAC {mac} and up on {name}");
            let set = self.handle.link().set(message.build()).execute().await;
            self.wrote(set.map_err(|e| refused(what.clone(), e)), || what)?;
        }
        Ok(writes)
    }

    /// Sets a link's MTU, if it is not `current`.
    pub async fn set_mtu(&self, index: u32, name: &str, mtu: u32, current: u32) -> Result<()> {
        if mtu == current {
            return Ok(());
        }
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        let what = || format!("set MTU {mtu} on {name}");
        let set = self.handle.link().set(message).execute().await;
        self.wrote(set.map_err(|e| refused(what(), e)), what)
    }

    /// The addresses of a link with their prefix lengths.
    pub async fn addresses(&self, index: u32) -> Result<Vec<(IpAddr, u8)>> {
        let all = self.all_addresses().await?.into_iter();
        Ok(all.filter(|(of, ..)| *of == index).map(|(_, address, prefix)| (address, prefix)).collect())
    }

    /// The addresses of all links.
    pub async fn own_addresses(&self) -> Result<BTreeSet<IpAddr>> {
        Ok(self.all_addresses().await?.into_iter().map(|(_, address, _)| address).collect())
    }

    /// Link, address and prefix length.
    pub async fn all_addresses(&self) -> Result<Vec<(u32, IpAddr, u8)>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let found = self.dumps.run(request, "list addresses").await?;
        let address = |message: &RouteNetlinkMessage| {
            let RouteNetlinkMessage::NewAddress(message) = message else { return None };
            // The local end, where the other one of a point-to-point link is told, too.
            let own = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            Some((message.header.index, own.or(address)?, message.header.prefix_len))
        };
        Ok(found.iter().filter_map(address).collect())
    }

    /// Adds an address without duplicate address detection (it would delay a pod's start by a second); fine if present.
    pub async fn add_address(
        &self,
        index: u32,
        address: IpAddr,
        prefix: u8,
        scope: AddressScope,
    ) -> Result<()> {
        let mut request = self.handle.address().add(index, address, prefix);
        let message = request.message_mut();
        message.header.scope = scope;
        if address.is_ipv6() {
            message.header.flags |= AddressHeaderFlags::Nodad;
        }
        let what = || format!("add address {address}/{prefix}");
        let added = absent_or(request.execute().await, libc::EEXIST, what);
        self.wrote(added.map(drop), what)
    }

    /// Removes an address; true if it was there.
    pub async fn delete_address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<bool> {
        let mut message = AddressMessage::default();
        message.header.family = family_of(address);
        message.header.index = index;
        message.header.prefix_len = prefix;
        message.attributes.push(AddressAttribute::Local(address));
        let result = self.handle.address().del(message).execute().await;
        let what = || format!("remove address {address}/{prefix}");
        let removed = absent_or(result, libc::EADDRNOTAVAIL, what)?;
        if removed { self.wrote(Ok(true), what) } else { Ok(false) }
    }

    /// Our routes in the main table.
    pub async fn our_routes(&self) -> Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            routes.extend(self.routes_of(family).await?.iter().filter_map(our_route));
        }
        Ok(routes)
    }

    /// What pods' sandboxes are asked before they are given routes: the devices of routes of ours, and those that default routes of
    /// `families` lead through, whosever they are.
    pub async fn devices_of_routes(&self, families: Families) -> Result<(BTreeSet<u32>, BTreeSet<u32>)> {
        let (mut ours, mut defaults) = (BTreeSet::new(), BTreeSet::new());
        for (family, asks) in [(AddressFamily::Inet, families.v4), (AddressFamily::Inet6, families.v6)] {
            let routes = self.routes_of(family).await?;
            ours.extend(routes.iter().filter_map(our_route).filter_map(|route| route.device));
            defaults.extend(routes.iter().filter(|route| asks && is_default(route)).filter_map(device_of));
        }
        Ok((ours, defaults))
    }

    async fn routes_of(&self, family: AddressFamily) -> Result<Vec<RouteMessage>> {
        let mut query = RouteMessage::default();
        query.header.address_family = family;
        let found = self.dumps.run(RouteNetlinkMessage::GetRoute(query), "list routes").await?;
        Ok(found
            .into_iter()
            .filter_map(|m| if let RouteNetlinkMessage::NewRoute(route) = m { Some(route) } else { None })
            .collect())
    }

    /// Adds or replaces a route.
    pub async fn set_route(&self, route: &Route) -> Result<()> {
        let request = self.handle.route().add(route_message(route)).replace();
        let what = || format!("set the route to {}", route.to);
        self.wrote(request.execute().await.map_err(|e| refused(what(), e)), what)
    }

    /// Removes a route; true if it was there.
    pub async fn delete_route(&self, route: &Route) -> Result<bool> {
        let result = self.handle.route().del(route_message(route)).execute().await;
        let what = || format!("remove the route to {}", route.to);
        let removed = absent_or(result, libc::ESRCH, what)?;
        if removed { self.wrote(Ok(true), what) } else { Ok(false) }
    }
}

/// The MAC of a link.
pub fn mac_of(link: &LinkMessage) -> Option<MacAddr> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok().map(MacAddr),
        _ => None,
    })
}

/// The MTU of a link.
pub fn mtu_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

/// The name of a link.
pub fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

/// The alias of a link.
pub fn alias_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfAlias(alias) => Some(alias.as_str()),
        _ => None,
    })
}

/// The bridge a link belongs to.
pub fn master_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })
}

/// The route to one address.
pub fn host_route(address: IpAddr) -> IpNetwork {
    IpNetwork::from(address)
}

/// Writes a sysctl of the calling thread's network namespace if it differs; true if it was written. A sysctl that does
/// not exist (IPv6 compiled out) is fine.
pub fn set_sysctl(path: &str, value: &str) -> Result<bool> {
    if !sysctl_differs(path, value)? {
        return Ok(false);
    }
    let full = format!("/proc/sys/net/{path}");
    let written = std::fs::write(&full, value);
    written.map(|()| true).map_err(|source| Error::Sysctl { path: full, source })
}

/// Whether a sysctl of the calling thread's network namespace is another than `value`. One that does not exist is not.
pub fn sysctl_differs(path: &str, value: &str) -> Result<bool> {
    let full = format!("/proc/sys/net/{path}");
    match std::fs::read_to_string(&full) {
        Ok(current) => Ok(current.trim() != value),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Error::Sysctl { path: full, source }),
    }
}

/// The address family.
fn family_of(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// Which families are meant.
#[derive(Debug, Clone, Copy)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

fn is_default(message: &RouteMessage) -> bool {
    let header = &message.header;
    header.destination_prefix_length == 0
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
}

fn device_of(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(route.to.ip());
    message.header.destination_prefix_length = route.to.prefix();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::from(ROUTE_PROTOCOL);
    message.header.kind = if route.device.is_some() { RouteType::Unicast } else { RouteType::Unreachable };
    message.header.scope = match (route.device, route.via) {
        (Some(_), None) if route.to.is_ipv4() => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    if route.to.prefix() > 0 {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(route.to.network())));
    }
    if let Some(device) = route.device {
        message.attributes.push(RouteAttribute::Oif(device));
    }
    match (route.via, route.to) {
        (Some(IpAddr::V6(via)), IpNetwork::V4(_)) => {
            message.attributes.push(RouteAttribute::Via(RouteVia::Inet6(via)));
        }
        (Some(via), _) => message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(via))),
        (None, _) => {}
    }
    if route.via.is_some() {
        message.header.flags |= RouteFlags::Onlink;
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(RouteAddress::from(source)));
    }
    message
}

/// The route, if its protocol says that it is ours.
fn our_route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.protocol != RouteProtocol::from(ROUTE_PROTOCOL) || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let (mut to, mut device, mut via, mut source) = (any, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => to = plain(address)?,
            // IPv6 names the loopback device on unreachable routes.
            RouteAttribute::Oif(index) if header.kind == RouteType::Unicast => device = Some(*index),
            RouteAttribute::Gateway(address) => via = plain(address),
            RouteAttribute::Via(RouteVia::Inet6(address)) => via = Some(IpAddr::V6(*address)),
            RouteAttribute::PrefSource(address) => source = plain(address),
            _ => {}
        }
    }
    Some(Route { to: IpNetwork::new(to, header.destination_prefix_length).ok()?, device, via, source })
}

fn plain(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some(IpAddr::V4(*a)),
        RouteAddress::Inet6(a) => Some(IpAddr::V6(*a)),
        _ => None,
    }
}

/// The positive errno of a refusal; 0 if it is none.
fn errno(error: &rtnetlink::Error) -> i32 {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.raw_code().abs(),
        _ => 0,
    }
}

/// Turns the refusal `harmless` into `false`.
fn absent_or(
    result: std::result::Result<(), rtnetlink::Error>,
    harmless: i32,
    what: impl FnOnce() -> String,
) -> Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if errno(&error) == harmless => Ok(false),
        Err(error) => Err(refused(what(), error)),
    }
}

/// A refusal of rtnetlink; `what` was tried.
pub fn refused(what: String, error: rtnetlink::Error) -> Error {
    let errno = errno(&error);
    let reason = match &error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().to_string(),
        other => other.to_string(),
    };
    Error::Link { what, reason, errno }
}
