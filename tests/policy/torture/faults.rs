//! What somebody with root does to a node's network, each with what it may cost.

use anyhow::Result;
use holdfast_tests::netbed::{AgentNode, NetBed};
use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;

/// Whose packets may be lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// Those of the pod that was hit.
    Pod,
    /// Those to and from one other node.
    Peer(usize),
    /// Those to and from all other nodes.
    Others,
    /// All of the node's.
    Node,
    /// The same, and what is denied may pass.
    Rules,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tampering {
    /// For counts and messages.
    pub what: &'static str,
    pub cost: Cost,
    /// A command of a shell on the node.
    pub command: String,
}

/// A pod that can be hit.
pub struct Target<'a> {
    pub host_ifname: &'a str,
    pub addresses: [std::net::IpAddr; 2],
}

/// Draws one for a node.
pub fn draw(random: &mut StdRng, node: usize, peer: usize, pod: Option<&Target<'_>>) -> Tampering {
    let v6 = random.random_bool(0.5);
    let mut all = of_node(v6);
    all.extend(of_peer(node, peer, v6));
    all.extend(pod.map(|pod| of_pod(pod, v6)).unwrap_or_default());
    all.choose(random).cloned().unwrap_or_else(|| unreachable!("there are some for every node"))
}

/// Executes it; false if there was nothing to be taken away.
pub fn tamper(node: &AgentNode, tampering: &Tampering) -> bool {
    node.spaces.run("sh", &["-c", &tampering.command]).is_ok()
}

/// Pulls a node's cable out, or plugs it in.
pub fn set_cable(bed: &NetBed, node: usize, state: &str) -> Result<()> {
    let port = format!("p-{}", bed.nodes[node].name);
    bed.underlay().run("ip", &["link", "set", &port, state]).map(drop)
}

/// Drops a share of a node's packets on the underlay, both ways; 0 is none.
pub fn set_loss(bed: &NetBed, node: usize, percent: u32) -> Result<()> {
    let name = &bed.nodes[node].name;
    let table = format!("bridge loss-{name}");
    let mut script = format!("nft 'delete table {table}' 2>/dev/null;");
    if percent > 0 {
        let lose = format!("numgen random mod 100 < {percent} drop");
        script = format!(
            "nft 'add table {table}; add chain {table} f {{ type filter hook forward priority 0; }}; \
             add rule {table} f iifname p-{name} {lose}; add rule {table} f oifname p-{name} {lose}' &&"
        );
    }
    bed.underlay().run("sh", &["-c", &format!("{script} true")]).map(drop)
}

fn mk(what: &'static str, cost: Cost, command: String) -> Tampering {
    Tampering { what, cost, command }
}

fn of_pod(pod: &Target<'_>, v6: bool) -> Vec<Tampering> {
    let (address, host) = (pod.addresses[usize::from(v6)], pod.host_ifname);
    let family = if v6 { "-6" } else { "-4" };
    vec![
        mk("pod route deleted", Cost::Pod, format!("ip {family} route del {address}")),
        mk("pod neighbour deleted", Cost::Pod, format!("ip neigh del {address} dev hf0")),
        mk("bridge port released", Cost::Pod, format!("ip link set {host} nomaster")),
        mk("bridge port isolation off", Cost::Pod, format!("bridge link set dev {host} isolated off")),
        mk("host end down", Cost::Pod, format!("ip link set {host} down")),
    ]
}

fn of_peer(node: usize, peer: usize, v6: bool) -> Vec<Tampering> {
    let cost = Cost::Peer(peer);
    let (family, range, hop) = if v6 {
        ("-6", format!("fd00:244:{}::/64", peer + 1), format!("fd00:244:{}::", peer + 1))
    } else {
        ("-4", format!("10.244.{}.0/24", peer + 1), format!("10.244.{}.0", peer + 1))
    };
    let entry =
        format!("$(bridge fdb show dev hf.vx | grep 'dst 192.168.77.{} ' | cut -d' ' -f1)", 11 + peer);
    debug_assert_ne!(node, peer);
    vec![
        mk("peer route deleted", cost, format!("ip {family} route del {range}")),
        mk("peer neighbour deleted", cost, format!("ip neigh del {hop} dev hf.vx")),
        mk(
            "forwarding entry deleted",
            cost,
            format!("bridge fdb del {entry} dev hf.vx dst 192.168.77.{}", 11 + peer),
        ),
    ]
}

fn of_node(v6: bool) -> Vec<Tampering> {
    let forwarding = if v6 { "net/ipv6/conf/all/forwarding" } else { "net/ipv4/ip_forward" };
    let gateway = if v6 { "fe80::1/64" } else { "169.254.1.1/32" };
    vec![
        mk("VXLAN device deleted", Cost::Others, "ip link del hf.vx".to_owned()),
        mk("VXLAN device down", Cost::Others, "ip link set hf.vx down".to_owned()),
        mk("bridge deleted", Cost::Node, "ip link del hf0".to_owned()),
        mk("bridge down", Cost::Node, "ip link set hf0 down".to_owned()),
        mk("gateway address deleted", Cost::Node, format!("ip addr del {gateway} dev hf0")),
        mk("forwarding turned off", Cost::Node, format!("echo 0 > /proc/sys/{forwarding}")),
        mk("rules flushed", Cost::Rules, "nft flush table inet holdfast".to_owned()),
        mk(
            "tables deleted",
            Cost::Rules,
            "nft delete table inet holdfast; nft delete table bridge holdfast".to_owned(),
        ),
        mk("ruleset flushed", Cost::Rules, "nft flush ruleset".to_owned()),
    ]
}
