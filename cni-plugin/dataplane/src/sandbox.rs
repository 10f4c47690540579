//! The pod's side of an attachment, worked on by a thread of its own inside the sandbox's network namespace.
//!
//! A namespace belongs to a thread, and a tokio worker that changed it would take other tasks along. So each visit
//! starts a thread, enters, works and ends: the thread never comes back to the node's namespace, which is the guard.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use holdfast_net_core::plan::EndpointPlan;
use ipnetwork::IpNetwork;
use netlink_packet_route::address::AddressScope;
use netlink_packet_route::link::LinkFlags;

use crate::error::{Error, Result};
use crate::links::{Families, Links, Route, host_route, mac_of, mtu_of, set_sysctl, sysctl_differs};

/// Opens a network namespace by its path. What else may lie there is refused and not waited for: a FIFO would keep an open waiting for
/// ever. So is the node's own, whose routes would be taken for a pod's.
pub fn open(path: &Path) -> Result<File> {
    let refused = |source| Error::Sandbox { path: path.display().to_string(), source };
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(refused)?;
    // SAFETY: the call takes no argument and only answers what kind of namespace the open file is.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    if kind != libc::CLONE_NEWNET {
        return Err(refused(std::io::Error::other("it is no network namespace")));
    }
    let id = |found: std::fs::Metadata| (found.dev(), found.ino());
    let own = std::fs::metadata("/proc/self/ns/net").map(id).map_err(refused)?;
    if file.metadata().map(id).map_err(refused)? == own {
        return Err(refused(std::io::Error::other("it is the node's own network namespace")));
    }
    Ok(file)
}

/// `_IO(0xb7, 0x3)` of linux/nsfs.h: which kind a namespace is.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// Configures the pod's end, which the veth's creation already put into the sandbox. Returns whether it got the default routes: one
/// that another interface has is left to it.
pub async fn configure(netns: &File, plan: &EndpointPlan) -> Result<bool> {
    let plan = plan.clone();
    visit(netns, move |links| Box::pin(async move { configure_inside(&links, &plan).await })).await
}

/// Compares the pod's end with the plan; a neighbour entry that is not seen is set again.
pub async fn check(netns: &File, plan: &EndpointPlan) -> Result<()> {
    let plan = plan.clone();
    visit(netns, move |links| Box::pin(async move { check_inside(&links, &plan).await })).await
}

/// Brings the MTU of the pod's end from `before` to the plan's, but not above `limit`. Returns the limit for the next time: one that
/// is below what it was before and the limit was lowered by somebody else, and stays so low.
pub async fn follow_mtu(netns: &File, plan: &EndpointPlan, before: u32, limit: u32) -> Result<u32> {
    let plan = plan.clone();
    visit(netns, move |links| Box::pin(async move { follow_mtu_inside(&links, &plan, before, limit).await }))
        .await
}

async fn follow_mtu_inside(links: &Links, plan: &EndpointPlan, before: u32, limit: u32) -> Result<u32> {
    let Some(link) = links.link(&plan.container_ifname).await? else { return Ok(limit) };
    // Another interface of that name is not ours.
    let Some(current) = mtu_of(&link).filter(|_| mac_of(&link) == Some(plan.mac)) else { return Ok(limit) };
    let limit = if current < before.min(limit) { current } else { limit };
    let wanted = plan.mtu.min(limit);
    links.set_mtu(link.header.index, &plan.container_ifname, wanted, current).await?;
    // An interface that could not carry IPv6 and can now has it anew, with the kernel's defaults.
    for path in zero_sysctls(&plan.container_ifname) {
        set_sysctl(&path, "0")?;
    }
    Ok(limit)
}

/// Work to be done inside a sandbox.
type Work<'a, T> = std::pin::Pin<Box<dyn Future<Output = Result<T>> + 'a>>;

async fn visit<T: Send + 'static>(
    netns: &File,
    work: impl FnOnce(Links) -> Work<'static, T> + Send + 'static,
) -> Result<T> {
    let netns = netns
        .try_clone()
        .map_err(|source| Error::Sandbox { path: "given by the container runtime".into(), source })?;
    let (done, result) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("sandbox".into()).spawn(move || {
        // The receiver is gone only if the caller was cancelled; then nobody wants the result.
        let _ = done.send(enter_and_run(&netns, work));
    });
    thread.map_err(|source| Error::Sandbox { path: "no thread to enter it".into(), source })?;
    result.await.unwrap_or_else(|_| Err(Error::Protocol("the sandbox thread ended without a result".into())))
}

fn enter_and_run<T>(netns: &File, work: impl FnOnce(Links) -> Work<'static, T>) -> Result<T> {
    let sandbox = |source| Error::Sandbox { path: "given by the container runtime".into(), source };
    nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).map_err(|e| sandbox(e.into()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(sandbox)?;
    runtime.block_on(async { work(Links::open()?).await })
}

/// The loopback device's index, the same in every namespace.
const LOOPBACK: u32 = 1;

async fn configure_inside(links: &Links, plan: &EndpointPlan) -> Result<bool> {
    let name = &plan.container_ifname;
    let index = own_link(links, name)?;
    let has_defaults = plan.default_routes && !has_other_defaults(links, plan, index).await?;
    let plan = &EndpointPlan { default_routes: has_defaults, ..plan.clone() };
    links.set_up(LOOPBACK, "lo").await?;
    for path in zero_sysctls(name) {
        set_sysctl(&path, "0")?;
    }
    links.set_up(index, name).await?;
    for address in &plan.addresses {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        links.add_address(index, *address, prefix, AddressScope::Universe).await?;
    }
    for gateway in gateways(plan) {
        links.set_neighbour(index, gateway, plan.gateway_mac).await?;
    }
    for route in routes(plan, index) {
        links.set_route(&route).await?;
    }
    Ok(has_defaults)
}

/// Whether another interface has a default route of one of the pod's families.
///
/// # Errors
/// It is one of ours: both would go by the same gateway, and what one of them sends by the other's port is dropped there.
async fn has_other_defaults(links: &Links, plan: &EndpointPlan, index: u32) -> Result<bool> {
    let has = |v4: bool| plan.addresses.iter().any(|address| address.is_ipv4() == v4);
    let (ours, defaults) = links.devices_of_routes(Families { v4: has(true), v6: has(false) }).await?;
    if ours.into_iter().any(|device| device != index) {
        let place = "the sandbox, and a sandbox takes one attachment of this plugin".to_string();
        return Err(Error::Exists { ifname: "of ours".to_string(), place });
    }
    Ok(defaults.into_iter().any(|device| device != index))
}

/// Redirects would make the pod look for its peers on the bridge, where isolated ports never answer; router advertisements have
/// no business here.
fn zero_sysctls(name: &str) -> impl Iterator<Item = String> {
    ["all", name].into_iter().flat_map(|conf| {
        [
            format!("ipv4/conf/{conf}/accept_redirects"),
            format!("ipv6/conf/{conf}/accept_redirects"),
            format!("ipv6/conf/{conf}/accept_ra"),
        ]
    })
}

async fn check_inside(links: &Links, plan: &EndpointPlan) -> Result<()> {
    let name = &plan.container_ifname;
    let differs = |what: String| Err(Error::Differs(what));
    let Some(link) = links.link(name).await? else {
        return differs(format!("{name} is missing in the sandbox"));
    };
    if mac_of(&link) != Some(plan.mac) {
        return differs(format!("{name} has MAC {:?} instead of {}", mac_of(&link), plan.mac));
    }
    if mtu_of(&link) != Some(plan.mtu) {
        return differs(format!("{name} has MTU {:?} instead of {}", mtu_of(&link), plan.mtu));
    }
    if !link.header.flags.contains(LinkFlags::Up) {
        return differs(format!("{name} is down in the sandbox"));
    }
    for path in zero_sysctls(name) {
        if sysctl_differs(&path, "0")? {
            return differs(format!("the sandbox's sysctl {path} is not 0"));
        }
    }
    let index = link.header.index;
    let addresses = links.addresses(index).await?;
    if let Some(lost) = plan.addresses.iter().find(|a| !addresses.iter().any(|(have, _)| have == *a)) {
        return differs(format!("{name} lacks the address {lost}"));
    }
    let neighbours = links.permanent_neighbours(index).await?;
    for gateway in gateways(plan) {
        links.hold_neighbour(index, gateway, plan.gateway_mac, &neighbours).await?;
    }
    let present: BTreeSet<IpNetwork> = links.our_routes().await?.into_iter().map(|r| r.to).collect();
    if let Some(lost) = routes(plan, index).into_iter().find(|r| !present.contains(&r.to)) {
        return differs(format!("the sandbox lacks the route to {}", lost.to));
    }
    Ok(())
}

fn own_link(links: &Links, name: &str) -> Result<u32> {
    let vanished = || Error::Protocol(format!("{name} vanished from the sandbox while it was set up"));
    links.index_of(name)?.ok_or_else(vanished)
}

fn gateways(plan: &EndpointPlan) -> impl Iterator<Item = IpAddr> {
    plan.gateways().into_iter().map(|(address, _)| address)
}

fn routes(plan: &EndpointPlan, index: u32) -> Vec<Route> {
    let mut routes = Vec::new();
    for gateway in gateways(plan) {
        let source = plan.addresses.iter().copied().find(|a| a.is_ipv4() == gateway.is_ipv4());
        let through = |to: IpNetwork| Route { to, device: Some(index), via: Some(gateway), source: None };
        if gateway.is_ipv4() {
            routes.push(Route { to: host_route(gateway), device: Some(index), via: None, source });
        }
        if plan.default_routes {
            let any = if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
            routes.push(through(any.parse().expect("a constant network")));
        }
        let same_family = plan.extra_routes.iter().filter(|r| r.is_ipv4() == gateway.is_ipv4());
        routes.extend(same_family.map(|range| through(*range)));
    }
    routes
}
