//! What the facts mean. Pure.

use holdfast_net_core::ipam::overlap;
use holdfast_net_core::overlay::IPV6_MTU_MIN;
use holdfast_net_core::plan::{
    BRIDGE_NAME, HOST_IFNAME_PREFIX, VXLAN_NAME, VXLAN_OVERHEAD_V4, VXLAN_OVERHEAD_V6, VXLAN_PORT, VXLAN_VNI,
};
use ipnetwork::IpNetwork;
use serde_json::Value;

use super::Finding;
use super::chains::{Ours, judge_chains};
use super::look::{Facts, Link};

/// More of the table than this in use, in percent, is nearly full: a burst of connections is lost.
const CONNTRACK_PERCENT_MAX: u64 = 80;
/// Strict reverse path filtering.
const RP_FILTER_STRICT: &str = "1";

/// The network as the agent plans it, or as it would be by default.
struct Network<'a> {
    bridge: &'a str,
    vxlan: &'a str,
    vni: u32,
    port: u16,
    own_ranges: Vec<IpNetwork>,
    peer_ranges: Vec<IpNetwork>,
    uplink: Option<&'a Link>,
    is_v6_underlay: bool,
}

pub(super) fn judge(facts: &Facts) -> Vec<Finding> {
    let dump = facts.agent.as_ref().and_then(|agent| agent.as_ref().ok());
    let network = network(dump, facts);
    let mut findings = Vec::new();
    findings.extend(judge_agent(facts));
    findings.extend(judge_managers(facts, &network));
    // Without a bridge each pod's own link is where its packets come in.
    let host_ends = facts.links.iter().map(|link| link.name.as_str());
    let host_ends = host_ends.filter(|name| name.starts_with(HOST_IFNAME_PREFIX));
    let ours = Ours {
        devices: [network.bridge, network.vxlan].into_iter().chain(host_ends).collect(),
        uplink: network.uplink.map(|link| link.name.as_str()),
        port: network.port,
    };
    findings.extend(judge_chains(&facts.chains, &ours));
    findings.extend(judge_sysctls(facts, &network));
    findings.extend(judge_port(facts, &network));
    findings.extend(judge_mtu(facts, &network));
    findings.extend(judge_conntrack(facts));
    findings.extend(judge_ranges(facts, &network));
    findings
}

fn finding(name: &'static str, what: String, advice: &str) -> Finding {
    Finding { name, what, advice: advice.to_owned() }
}

fn network<'a>(dump: Option<&'a Value>, facts: &'a Facts) -> Network<'a> {
    let none = Value::Null;
    let plan = dump.map_or(&none, |dump| &dump["network"]);
    let plan = if plan.is_object() { dump.map(|dump| &dump["network"]) } else { None };
    let text = |key: &str, default: &'a str| plan.and_then(|plan| plan[key].as_str()).unwrap_or(default);
    let number = |key: &str, default: u64| plan.and_then(|plan| plan[key].as_u64()).unwrap_or(default);
    let ranges = |list: &'a Value| {
        let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().filter_map(|range| range.as_str()?.parse().ok()).collect::<Vec<IpNetwork>>()
    };
    let local: Option<std::net::IpAddr> = text("local", "").parse().ok();
    let peers = dump.and_then(|dump| dump["peers"].as_array()).map(Vec::as_slice).unwrap_or_default();
    Network {
        bridge: text("bridge", BRIDGE_NAME),
        vxlan: text("vxlan", VXLAN_NAME),
        vni: u32::try_from(number("vni", u64::from(VXLAN_VNI))).unwrap_or(VXLAN_VNI),
        port: u16::try_from(number("port", u64::from(VXLAN_PORT))).unwrap_or(VXLAN_PORT),
        own_ranges: plan.map(|plan| ranges(&plan["podRanges"])).unwrap_or_default(),
        peer_ranges: peers.iter().flat_map(|peer| ranges(&peer["podRanges"])).collect(),
        uplink: local.and_then(|local| facts.links.iter().find(|link| link.addresses.contains(&local))),
        is_v6_underlay: local.is_some_and(|local| local.is_ipv6()),
    }
}

fn judge_agent(facts: &Facts) -> Vec<Finding> {
    let dump = match &facts.agent {
        None => return Vec::new(),
        Some(Err(error)) => {
            let what = format!("the node agent does not answer: {error}");
            return vec![finding(
                "agent-down",
                what,
                "start holdfast-netd, or look at its log; --socket names where it listens",
            )];
        }
        Some(Ok(dump)) => dump,
    };
    let mut findings = Vec::new();
    for (key, advice) in [
        ("nodeError", "the agent repeats it every second; mend what it names"),
        ("rulesError", "the rules of before stay in force; mend what it names"),
    ] {
        if let Some(error) = dump[key].as_str() {
            findings.push(finding("not-as-planned", format!("the agent says: {error}"), advice));
        }
    }
    for reason in dump["leftOut"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        findings.push(finding(
            "left-out",
            reason.to_owned(),
            "correct that Node object; until then its pods cannot be reached",
        ));
    }
    for thing in
        dump["healing"]["things"].as_array().into_iter().flatten().filter(|thing| thing["again"] == true)
    {
        let what = format!(
            "another program undoes what the agent does again and again: {} ({} times so far)",
            thing["what"].as_str().unwrap_or_default(),
            thing["times"]
        );
        findings.push(finding(
            "fight",
            what,
            "find it with `ip monitor` or `nft monitor` and keep it off our interfaces and tables",
        ));
    }
    findings
}

fn judge_managers(facts: &Facts, network: &Network<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    if facts.running.contains(&"firewalld") {
        let advice = format!(
            "put {} and {} into its zone `trusted`, or stop it: its chains have the last word",
            network.bridge, network.vxlan
        );
        findings.push(Finding { name: "firewalld", what: "firewalld runs".to_owned(), advice });
    }
    if facts.ufw_is_enabled {
        let advice = format!(
            "allow UDP port {} and routed traffic of {} (`ufw route allow in on {} out on {}`), or disable it",
            network.port, network.bridge, network.bridge, network.vxlan
        );
        findings.push(Finding { name: "ufw", what: "ufw is enabled".to_owned(), advice });
    }
    let is_ours =
        |name: &str| name == network.bridge || name == network.vxlan || name.starts_with(HOST_IFNAME_PREFIX);
    for (manager, ifname) in facts.managed.iter().filter(|(_, ifname)| is_ours(ifname)) {
        let advice = match *manager {
            "NetworkManager" => {
                "add `unmanaged-devices=interface-name:hf*` to the section [keyfile] of a file in /etc/NetworkManager/conf.d"
            }
            _ => "add a .network file that matches Name=hf* with `Unmanaged=yes` in its section [Link]",
        };
        findings.push(finding("managed", format!("{manager} manages {ifname}"), advice));
    }
    if !facts.legacy_tables.is_empty() {
        let what = format!("there are tables of legacy iptables ({})", facts.legacy_tables.join(", "));
        findings.push(finding(
            "legacy-iptables",
            what,
            "they are not looked at here: see `iptables-legacy-save`",
        ));
    }
    findings
}

fn judge_sysctls(facts: &Facts, network: &Network<'_>) -> Vec<Finding> {
    let value = |path: &str| facts.sysctls.get(path).map(String::as_str);
    let has_v6 = network.own_ranges.iter().any(IpNetwork::is_ipv6);
    let mut findings = Vec::new();
    let mut wrong = |name, path: &str, wanted: &str, why: &str| {
        if let Some(found) = value(path).filter(|found| *found != wanted) {
            let key = format!("net/{path}");
            let advice = format!("set it to {wanted}, and find what sets it: {why}");
            findings.push(Finding { name, what: format!("{key} is {found}"), advice });
        }
    };
    wrong("forwarding-off", "ipv4/ip_forward", "1", "no packet of a pod leaves the node");
    if has_v6 {
        wrong("forwarding-off", "ipv6/conf/all/forwarding", "1", "no packet of a pod leaves the node");
    }
    let links = [Some(network.bridge), Some(network.vxlan), network.uplink.map(|link| link.name.as_str())];
    if value("ipv4/ip_forward") == Some("1") {
        for name in links.into_iter().flatten() {
            wrong(
                "forwarding-off",
                &format!("ipv4/conf/{name}/forwarding"),
                "1",
                "what comes in there is not forwarded",
            );
        }
    }
    for name in ["iptables", "ip6tables"] {
        let why = "connections to a Service on the same node are lost in the bridge";
        wrong("br-netfilter", &format!("bridge/bridge-nf-call-{name}"), "0", why);
    }
    if has_v6 && !facts.sysctls.contains_key("ipv6/conf/all/forwarding") {
        let what = "the node has an IPv6 range and the kernel no IPv6".to_owned();
        findings.push(finding(
            "no-ipv6",
            what,
            "boot without ipv6.disable=1, or take the range from the Node",
        ));
    }
    for name in links.into_iter().flatten() {
        let path = format!("ipv4/conf/{name}/rp_filter");
        let all = value("ipv4/conf/all/rp_filter").unwrap_or("0");
        // The larger one counts; "loose" is 2.
        if value(&path).is_some_and(|own| own.max(all) == RP_FILTER_STRICT) {
            let what = format!("the reverse path filter of {name} is strict");
            let advice =
                format!("set net/{path} to 2: answers that come by another way are dropped without a trace");
            findings.push(Finding { name: "rp-filter", what, advice });
        }
    }
    findings
}

fn judge_port(facts: &Facts, network: &Network<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let is_other = |link: &&Link| link.name != network.vxlan;
    for link in facts.links.iter().filter(is_other) {
        let Some(vxlan) = link.vxlan.filter(|vxlan| vxlan.port == network.port) else { continue };
        if vxlan.vni == network.vni || vxlan.is_external {
            let what = format!(
                "the VXLAN device {} takes the overlay's frames (UDP port {}, VNI {})",
                link.name, vxlan.port, vxlan.vni
            );
            findings.push(finding(
                "vxlan-port",
                what,
                "give one of them another port or identifier: --vxlan-port, --vni, the same on all nodes",
            ));
        }
    }
    // A VXLAN device that is up has the port itself, and one that shares it.
    let has_it = |link: &Link| link.is_up && link.vxlan.is_some_and(|vxlan| vxlan.port == network.port);
    if facts.udp_ports.contains(&network.port) && !facts.links.iter().any(has_it) {
        let what = format!("a process listens on UDP port {}, which the overlay needs", network.port);
        findings.push(finding(
            "vxlan-port",
            what,
            "find it with `ss -ulnp` and end it, or use another --vxlan-port on all nodes",
        ));
    }
    findings
}

fn judge_mtu(facts: &Facts, network: &Network<'_>) -> Vec<Finding> {
    let Some(uplink) = network.uplink else { return Vec::new() };
    let overhead = if network.is_v6_underlay { VXLAN_OVERHEAD_V6 } else { VXLAN_OVERHEAD_V4 };
    let fits = uplink.mtu.saturating_sub(overhead);
    let mut findings = Vec::new();
    if fits < IPV6_MTU_MIN && network.own_ranges.iter().any(IpNetwork::is_ipv6) {
        let what = format!(
            "the MTU of {} is {}: IPv6 needs {IPV6_MTU_MIN} inside the overlay, so packets are cut",
            uplink.name, uplink.mtu
        );
        let advice = format!("raise it to {} at least", IPV6_MTU_MIN + overhead);
        return vec![Finding { name: "mtu", what, advice }];
    }
    for link in facts.links.iter().filter(|link| link.name == network.bridge || link.name == network.vxlan) {
        if link.mtu > fits {
            let what = format!(
                "{} has MTU {}, and {} carries {fits} bytes inside the overlay",
                link.name, link.mtu, uplink.name
            );
            findings.push(finding(
                "mtu",
                what,
                "the agent mends that within a second while it runs; else look at its log",
            ));
        }
    }
    findings
}

fn judge_conntrack(facts: &Facts) -> Option<Finding> {
    let (count, max) = facts.conntrack?;
    (max > 0 && count * 100 >= max * CONNTRACK_PERCENT_MAX).then(|| {
        let what = format!("the connection table has {count} of at most {max} entries; new connections are dropped when it is full");
        finding("conntrack-full", what, "raise net/netfilter/nf_conntrack_max, or find who opens so many (`conntrack -L`)")
    })
}

fn judge_ranges(facts: &Facts, network: &Network<'_>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let name_of = |device: Option<u32>| {
        let link = facts.links.iter().find(|link| Some(link.index) == device);
        link.map_or("an unknown interface", |link| link.name.as_str())
    };
    for route in &facts.routes {
        let name = name_of(route.device);
        if name == network.bridge || name == network.vxlan || name.starts_with(HOST_IFNAME_PREFIX) {
            continue;
        }
        let ranges = network.own_ranges.iter().chain(&network.peer_ranges);
        for range in ranges.filter(|range| overlap(range, &route.to)) {
            let what = format!("the pods' range {range} overlaps the route to {} by {name}", route.to);
            findings.push(finding(
                "range-overlap",
                what,
                "give the pods another range, or take the route away: one of both cannot be reached",
            ));
        }
    }
    findings
}
