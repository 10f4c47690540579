//! Address translation: host ports of pods, and masquerade of what leaves the cluster.
//!
//! ```text
//! host socket (protocol, address or any local one, port) --host_ports--> pod's socket     before policy (DNAT)
//! pod to itself by its host port, the node's loopback to a pod with one: source masqueraded   after policy (SNAT)
//! own --> anything that is not exempt: source masqueraded                                     after policy (SNAT)
//! ```
//!
//! Policy judges conntrack's keys: who opened the connection, before the source is replaced, and the pod's own port, after the
//! destination was. So a host port opens nothing that policy closes, and a client's address counts, as it came to this node.
//!
//! **Promise**: a host socket leads to one living pod at most. Who could break it: two ADDs at once ([`PortMapping::overlaps`] is asked
//! under the leases' lock), a kill (the lease is durable before the kernel knows), a pod that is gone (its elements leave
//! with its source pins, before its lease is released).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::objects::Node;
use crate::plan::EndpointPlan;
use crate::ports::Proto;
use crate::ruleset::{AddrRange, Changes, Element};

/// A host port of a pod, as a runtime asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortMapping {
    /// Of both ports.
    pub proto: Proto,
    /// The node's address; unspecified: all of its family; `None`: all.
    pub host_ip: Option<IpAddr>,
    /// Never 0.
    pub host_port: u16,
    /// The pod's port, never 0.
    pub container_port: u16,
}

impl PortMapping {
    /// Whether one packet could be meant by both.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let addresses = match (self.host_ip, other.host_ip) {
            (Some(one), Some(other)) => {
                one.is_ipv4() == other.is_ipv4()
                    && (one == other || one.is_unspecified() || other.is_unspecified())
            }
            _ => true,
        };
        addresses && self.proto == other.proto && self.host_port == other.host_port
    }
}

impl std::fmt::Display for PortMapping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.host_port, self.proto)?;
        self.host_ip.map_or(Ok(()), |address| write!(f, " of {address}"))
    }
}

/// What is dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostSocket {
    /// Its protocol.
    pub proto: Proto,
    /// An address of the node; unspecified: any of its family.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

impl std::fmt::Display for HostSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{} of {}", self.port, self.proto, self.address)
    }
}

/// Who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodSocket {
    /// The pod's address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
}

/// The translations of an endpoint: for each family that a mapping is for and that the pod has an address of.
pub fn translations_of(plan: &EndpointPlan) -> BTreeMap<HostSocket, PodSocket> {
    let mut translations = BTreeMap::new();
    for mapping in &plan.host_ports {
        for v4 in [true, false] {
            let any = if v4 { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
            let host = mapping.host_ip.unwrap_or(any);
            let pod = plan.addresses.iter().find(|address| address.is_ipv4() == v4);
            if let Some(address) = pod.filter(|_| host.is_ipv4() == v4) {
                let socket = HostSocket { proto: mapping.proto, address: host, port: mapping.host_port };
                translations.insert(socket, PodSocket { address: *address, port: mapping.container_port });
            }
        }
    }
    translations
}

/// What of address translation is in the kernel; a part of the ruleset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nat {
    /// Host ports.
    pub host_ports: BTreeMap<HostSocket, PodSocket>,
    /// The pods' addresses in it.
    pub hairpins: BTreeSet<IpAddr>,
    /// Whose traffic is masqueraded, and where to it is not.
    pub masquerade: MasqueradeRanges,
}

/// Ranges of masquerade; those of one set are disjoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MasqueradeRanges {
    /// Sources: pods of this node.
    pub own: BTreeSet<AddrRange>,
    /// Destinations that see the pod's own address.
    pub exempt: BTreeSet<AddrRange>,
}

/// An element of the sets of translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NatElement {
    /// A host port.
    HostPort(HostSocket, PodSocket),
    /// A pod with host ports.
    Hairpin(IpAddr),
    /// A range of [`MasqueradeRanges::own`].
    Own(AddrRange),
    /// A range of [`MasqueradeRanges::exempt`].
    Exempt(AddrRange),
}

impl Nat {
    /// Adds what an endpoint lacks.
    pub(crate) fn attach(&self, plan: &EndpointPlan, changes: &mut Changes) {
        for (socket, pod) in translations_of(plan) {
            let before = self.host_ports.get(&socket);
            if before == Some(&pod) {
                continue;
            }
            changes.remove.extend(before.map(|before| host_port(&socket, before)));
            changes.add.push(host_port(&socket, &pod));
        }
        let pods: BTreeSet<IpAddr> = translations_of(plan).into_values().map(|pod| pod.address).collect();
        changes.add.extend(pods.difference(&self.hairpins).copied().map(hairpin));
    }

    /// Removes what leads to these addresses.
    pub(crate) fn forget(&self, addresses: &BTreeSet<IpAddr>, changes: &mut Changes) {
        changes.remove.extend(self.leading_to(addresses).iter().map(|(socket, pod)| host_port(socket, pod)));
        changes.remove.extend(self.hairpins.intersection(addresses).copied().map(hairpin));
    }

    /// The host ports that lead to these addresses.
    #[must_use]
    pub fn leading_to(&self, addresses: &BTreeSet<IpAddr>) -> BTreeMap<HostSocket, PodSocket> {
        if self.hairpins.is_disjoint(addresses) {
            return BTreeMap::new();
        }
        let found = self.host_ports.iter().filter(|(_, pod)| addresses.contains(&pod.address));
        found.map(|(socket, pod)| (*socket, *pod)).collect()
    }

    /// What makes the ranges of masquerade these.
    #[must_use]
    pub fn masquerade_changes(&self, ranges: &MasqueradeRanges) -> Changes {
        let with = |masquerade: &MasqueradeRanges| Self { masquerade: masquerade.clone(), ..Self::default() };
        let mut changes = Changes::default();
        diff(&with(&self.masquerade), &with(ranges), &mut changes);
        changes
    }

    /// Puts the translations of an endpoint in.
    pub fn insert(&mut self, plan: &EndpointPlan) {
        let translations = translations_of(plan);
        self.hairpins.extend(translations.values().map(|pod| pod.address));
        self.host_ports.extend(translations);
    }

    pub(crate) fn take_out(&mut self, element: &NatElement) {
        match element {
            NatElement::HostPort(socket, _) => drop(self.host_ports.remove(socket)),
            NatElement::Hairpin(address) => _ = self.hairpins.remove(address),
            NatElement::Own(range) => _ = self.masquerade.own.remove(range),
            NatElement::Exempt(range) => _ = self.masquerade.exempt.remove(range),
        }
    }

    /// Puts an element in.
    pub fn put_in(&mut self, element: &NatElement) {
        match element {
            NatElement::HostPort(socket, pod) => drop(self.host_ports.insert(*socket, *pod)),
            NatElement::Hairpin(address) => _ = self.hairpins.insert(*address),
            NatElement::Own(range) => _ = self.masquerade.own.insert(*range),
            NatElement::Exempt(range) => _ = self.masquerade.exempt.insert(*range),
        }
    }
}

fn host_port(socket: &HostSocket, pod: &PodSocket) -> Element {
    Element::Nat(NatElement::HostPort(*socket, *pod))
}

fn hairpin(address: IpAddr) -> Element {
    Element::Nat(NatElement::Hairpin(address))
}

/// What turns `old` into `new`.
pub(crate) fn diff(old: &Nat, new: &Nat, changes: &mut Changes) {
    let elements = |nat: &Nat| -> BTreeSet<NatElement> {
        let ports = nat.host_ports.iter().map(|(socket, pod)| NatElement::HostPort(*socket, *pod));
        let hairpins = nat.hairpins.iter().copied().map(NatElement::Hairpin);
        let own = nat.masquerade.own.iter().copied().map(NatElement::Own);
        let exempt = nat.masquerade.exempt.iter().copied().map(NatElement::Exempt);
        ports.chain(hairpins).chain(own).chain(exempt).collect()
    };
    let (before, after) = (elements(old), elements(new));
    changes.remove.extend(before.difference(&after).copied().map(Element::Nat));
    changes.add.extend(after.difference(&before).copied().map(Element::Nat));
}

/// Whose source is replaced when pods' traffic leaves the cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MasqueradeMode {
    /// Nobody's.
    Off,
    /// Traffic to addresses that are neither a pod's, nor an InternalIP of a node, nor exempt.
    #[default]
    Outside,
    /// The same, and traffic to other nodes' InternalIPs: for networks that drop what comes from a pod's address.
    Nodes,
}

/// Settings of masquerade.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MasqueradeSettings {
    /// Whose.
    pub mode: MasqueradeMode,
    /// Destinations besides those of the mode that see the pod's own address.
    pub exempt: Vec<IpNetwork>,
}

/// The ranges of masquerade: a function of the node list. `own`: this node's pod ranges.
#[must_use]
pub fn masquerade(
    settings: &MasqueradeSettings,
    nodes: &BTreeMap<String, Node>,
    own: &[IpNetwork],
) -> MasqueradeRanges {
    if settings.mode == MasqueradeMode::Off {
        return MasqueradeRanges::default();
    }
    let mut exempt: Vec<IpNetwork> = settings.exempt.clone();
    exempt.extend(own);
    // Who sends to a group expects answers to nobody, and conntrack follows no groups.
    exempt.extend(IpNetwork::new(Ipv4Addr::new(224, 0, 0, 0).into(), 4));
    exempt.extend(IpNetwork::new(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8));
    for node in nodes.values() {
        exempt.extend(node.pod_cidrs());
        if settings.mode == MasqueradeMode::Outside {
            exempt.extend(node.internal_addresses().into_iter().map(IpNetwork::from));
        }
    }
    MasqueradeRanges { own: merged(own), exempt: merged(&exempt) }
}

/// The same addresses as disjoint ranges with gaps between them.
fn merged(networks: &[IpNetwork]) -> BTreeSet<AddrRange> {
    let mut ranges: Vec<AddrRange> = networks
        .iter()
        .map(|network| AddrRange { first: network.network(), last: network.broadcast() })
        .collect();
    ranges.sort_unstable();
    let mut joined: Vec<AddrRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(before) if touches(before.last, range.first) => before.last = before.last.max(range.last),
            _ => joined.push(range),
        }
    }
    joined.into_iter().collect()
}

/// `next` lies not behind the address after `last`; both begin at or after what `last` ends.
fn touches(last: IpAddr, next: IpAddr) -> bool {
    match (last, next) {
        (IpAddr::V4(last), IpAddr::V4(next)) => u32::from(next) <= u32::from(last).saturating_add(1),
        (IpAddr::V6(last), IpAddr::V6(next)) => u128::from(next) <= u128::from(last).saturating_add(1),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::BridgePlan;
    use crate::ruleset::{Ruleset, diff};

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn mk_mapping(proto: Proto, host_ip: &str, host_port: u16) -> PortMapping {
        let host_ip = (!host_ip.is_empty()).then(|| ip(host_ip));
        PortMapping { proto, host_ip, host_port, container_port: 80 }
    }

    fn mk_plan(addresses: &[&str], host_ports: Vec<PortMapping>) -> EndpointPlan {
        let addresses = addresses.iter().map(|text| ip(text)).collect();
        let bridge = BridgePlan::for_node("n", 1500);
        EndpointPlan { host_ports, ..EndpointPlan::new("c", "eth0", addresses, &bridge) }
    }

    #[test]
    fn mappings_overlap_where_one_packet_could_be_meant_by_both() {
        let overlap = |one: &str, other: &str| {
            let (one, other) = (mk_mapping(Proto::Tcp, one, 80), mk_mapping(Proto::Tcp, other, 80));
            assert_eq!(one.overlaps(&other), other.overlaps(&one));
            one.overlaps(&other)
        };
        assert!(overlap("", "") && overlap("", "192.0.2.1") && overlap("", "::"));
        assert!(overlap("0.0.0.0", "192.0.2.1") && overlap("192.0.2.1", "192.0.2.1"));
        assert!(
            !overlap("0.0.0.0", "::") && !overlap("192.0.2.1", "192.0.2.2") && !overlap("0.0.0.0", "fd00::1")
        );
        let one = mk_mapping(Proto::Tcp, "", 80);
        assert!(!one.overlaps(&mk_mapping(Proto::Udp, "", 80)));
        assert!(!one.overlaps(&mk_mapping(Proto::Tcp, "", 81)));
    }

    #[test]
    fn a_mapping_is_translated_in_the_families_that_it_and_the_pod_have() {
        let sockets = |addresses: &[&str], host_ip: &str| -> Vec<(String, String)> {
            let plan = mk_plan(addresses, vec![mk_mapping(Proto::Udp, host_ip, 53)]);
            let text = |(socket, pod): (HostSocket, PodSocket)| {
                (socket.address.to_string(), pod.address.to_string())
            };
            translations_of(&plan).into_iter().map(text).collect()
        };
        let pair = |one: &str, other: &str| (one.to_owned(), other.to_owned());
        let both = ["10.0.0.2", "fd00::2"];
        assert_eq!(sockets(&both, ""), [pair("0.0.0.0", "10.0.0.2"), pair("::", "fd00::2")]);
        assert_eq!(sockets(&both, "0.0.0.0"), [pair("0.0.0.0", "10.0.0.2")]);
        assert_eq!(sockets(&both, "fd01::1"), [pair("fd01::1", "fd00::2")]);
        assert_eq!(sockets(&both[..1], "::"), []);
    }

    #[test]
    fn an_endpoints_translations_come_with_its_pins_and_go_with_them() {
        let one = mk_plan(&["10.0.0.2", "fd00::2"], vec![mk_mapping(Proto::Tcp, "", 8080)]);
        let mut other = mk_plan(&["10.0.0.3"], vec![mk_mapping(Proto::Tcp, "", 8081)]);
        other.host_ifname = "hfv-other".to_owned();
        let mut ruleset = Ruleset::default();
        ruleset.apply(&ruleset.clone().quarantine(&other));
        let before = ruleset.clone();
        ruleset.apply(&before.quarantine(&one));
        assert_eq!((ruleset.nat.host_ports.len(), ruleset.nat.hairpins.len()), (3, 3));
        assert!(ruleset.quarantine(&one).is_empty(), "again changes nothing");
        let mut inserted = before.nat.clone();
        inserted.insert(&one);
        assert_eq!(inserted, ruleset.nat);
        let mut by_diff = before.clone();
        by_diff.apply(&diff(&before, &ruleset));
        assert_eq!(by_diff, ruleset);

        let gone = ruleset.forget_port(&one.host_ifname);
        ruleset.apply(&gone);
        assert_eq!(ruleset, before);
    }

    #[test]
    fn a_port_that_leads_elsewhere_is_replaced() {
        let old = mk_plan(&["10.0.0.2"], vec![mk_mapping(Proto::Tcp, "", 8080)]);
        let new = mk_plan(&["10.0.0.3"], vec![mk_mapping(Proto::Tcp, "", 8080)]);
        let mut ruleset = Ruleset::default();
        ruleset.nat.insert(&old);
        let changes = ruleset.quarantine(&new);
        assert_eq!(changes.remove.len(), 1);
        ruleset.apply(&changes);
        assert_eq!(ruleset.nat.host_ports.values().next().unwrap().address, ip("10.0.0.3"));
    }

    fn mk_nodes() -> BTreeMap<String, Node> {
        let node = |range: &str, address: &str| -> Node {
            serde_json::from_value(serde_json::json!({
                "metadata": { "name": "x" }, "spec": { "podCIDR": range },
                "status": { "addresses": [{ "type": "InternalIP", "address": address }] },
            }))
            .unwrap()
        };
        let nodes = [("a", node("10.1.0.0/24", "192.0.2.1")), ("b", node("10.1.1.0/24", "192.0.2.2"))];
        nodes.map(|(name, node)| (name.to_owned(), node)).into()
    }

    fn is_exempt(ranges: &MasqueradeRanges, address: &str) -> bool {
        ranges.exempt.iter().any(|range| {
            range.first.is_ipv4() == ip(address).is_ipv4()
                && range.first <= ip(address)
                && ip(address) <= range.last
        })
    }

    #[test]
    fn pods_nodes_and_what_is_named_are_exempt_as_the_mode_says() {
        let own: Vec<IpNetwork> = vec!["10.1.0.0/24".parse().unwrap()];
        let mut settings =
            MasqueradeSettings { exempt: vec!["198.51.100.0/25".parse().unwrap()], ..Default::default() };
        let ranges = masquerade(&settings, &mk_nodes(), &own);
        for exempt in
            ["10.1.0.9", "10.1.1.9", "192.0.2.1", "192.0.2.2", "198.51.100.127", "224.0.0.1", "ff02::1"]
        {
            assert!(is_exempt(&ranges, exempt), "{exempt}");
        }
        for masqueraded in ["10.1.2.0", "192.0.2.3", "198.51.100.128", "223.255.255.255", "::", "8.8.8.8"] {
            assert!(!is_exempt(&ranges, masqueraded), "{masqueraded}");
        }
        assert_eq!(ranges.own.len(), 1);
        settings.mode = MasqueradeMode::Nodes;
        let ranges = masquerade(&settings, &mk_nodes(), &own);
        assert!(!is_exempt(&ranges, "192.0.2.2") && is_exempt(&ranges, "10.1.1.9"));
        settings.mode = MasqueradeMode::Off;
        assert_eq!(masquerade(&settings, &mk_nodes(), &own), MasqueradeRanges::default());
    }

    #[test]
    fn overlapping_and_adjacent_ranges_are_one() {
        let merge = |texts: &[&str]| -> Vec<String> {
            let networks: Vec<IpNetwork> = texts.iter().map(|text| text.parse().unwrap()).collect();
            merged(&networks).iter().map(|range| format!("{}-{}", range.first, range.last)).collect()
        };
        assert_eq!(merge(&["10.0.1.0/24", "10.0.0.0/24", "10.0.0.0/16"]), ["10.0.0.0-10.0.255.255"]);
        assert_eq!(merge(&["10.0.1.0/24", "10.0.0.0/24"]), ["10.0.0.0-10.0.1.255"]);
        assert_eq!(merge(&["10.0.2.0/24", "10.0.0.0/24", "::/0", "fd00::/8"]).len(), 3);
        assert_eq!(merge(&["255.0.0.0/8", "255.255.255.255/32"]), ["255.0.0.0-255.255.255.255"]);
    }
}
