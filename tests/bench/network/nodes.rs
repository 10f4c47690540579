//! Two nodes of ours, and the peers' two namespaces.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Namespaces, Objects, Program, Work, cni};
use serde_json::{Value, json};

use super::calls::LEASES;
use crate::node::{AGENT_SOCKET, attach, make_sandbox, shell, start_agent, wait_serving};

const NAMES: [&str; 2] = ["net-a", "net-b"];
const PEER_NAMES: [&str; 2] = ["peer-a", "peer-b"];
/// Sandbox of the pod that is attached by hand.
pub const PEER_POD: &str = "pod";
/// Kubernetes namespace of the pods.
pub const NAMESPACE: &str = "default";

/// A pod for throughput.
pub struct StreamPod {
    /// Which node.
    pub node: usize,
    /// Its sandbox, a path inside the node.
    pub netns: PathBuf,
    /// Its address.
    pub address: Ipv4Addr,
}

/// Two nodes, joined by a veth pair, each with the agent.
pub struct Ours {
    /// Their namespaces.
    pub nodes: Vec<Namespaces>,
    /// What their agents watch.
    pub objects: Objects,
    pending: Vec<PathBuf>,
    agents: Vec<Program>,
}

impl Ours {
    /// Starts them; objects for `pods` pods and a policy that selects them all are in place, and [`LEASES`] leases on the second node.
    pub fn start(work: &Work, pods: usize, attachment: &str) -> Result<Self> {
        let objects = Objects::new(work.folder("objects")?);
        write_objects(&objects, pods)?;
        let nodes = join(work, NAMES, address)?;
        let mut agents = Vec::new();
        let mut pending = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            let state = work.folder(NAMES[index])?;
            pending.push(state.join("pending"));
            if index == 1 {
                fill_leases(&state, &range(index))?;
            }
            let mut agent =
                start_agent(work, node, &state, objects.dir(), &[format!("--attachment={attachment}")])?;
            wait_serving(node, &mut agent)?;
            agents.push(agent);
        }
        Ok(Self { nodes, objects, pending, agents })
    }

    /// The plugin's configuration on the node.
    pub fn config(&self, node: usize) -> Value {
        cni::network_config(AGENT_SOCKET, &self.pending[node].display().to_string())
    }

    /// Resident memory of the node's agent, MiB.
    pub fn agent_rss_mib(&self, node: usize) -> Result<f64> {
        Ok(self.agents[node].rss_mib()?.0)
    }

    /// Makes a pod that no policy selects.
    pub fn stream_pod(&self, node: usize, name: &str) -> Result<StreamPod> {
        let netns = make_sandbox(&self.nodes[node], name)?;
        let address = attach(&self.nodes[node], &self.config(node), name, &netns, "")?;
        Ok(StreamPod { node, netns, address })
    }
}

/// The peers' two namespaces, joined by a veth pair; nothing of ours runs there.
pub struct Peer {
    /// The namespaces.
    pub nodes: Vec<Namespaces>,
    /// What was done by hand, for the reader.
    pub by_hand: Vec<String>,
}

impl Peer {
    /// Makes them, with a VXLAN between them, a pod on each side of it, and a bare veth pair between two sandboxes of the first.
    pub fn start(work: &Work) -> Result<Self> {
        let nodes = join(work, PEER_NAMES, address)?;
        let mut by_hand = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            let (own, other) = (address(index), address(1 - index));
            let steps = [
                format!(
                    "ip link add vx0 type vxlan id 42 local {own} remote {other} dstport 4790 nolearning"
                ),
                format!("ip addr add {}/24 dev vx0", vxlan_address(index)),
                "ip link set vx0 up".to_owned(),
            ];
            for step in steps {
                shell(node, &step)?;
                by_hand.push(format!("{}: {step}", PEER_NAMES[index]));
            }
        }
        for (index, node) in nodes.iter().enumerate() {
            for step in pod_by_hand(index) {
                shell(node, &step)?;
                by_hand.push(format!("{}: {step}", PEER_NAMES[index]));
            }
        }
        for step in [
            "ip netns add v0".to_owned(),
            "ip netns add v1".to_owned(),
            "ip link add eth0 netns v0 type veth peer name eth0 netns v1".to_owned(),
            format!("ip -n v0 addr add {}/24 dev eth0", veth_address(0)),
            format!("ip -n v1 addr add {}/24 dev eth0", veth_address(1)),
            "ip -n v0 link set eth0 up".to_owned(),
            "ip -n v1 link set eth0 up".to_owned(),
        ] {
            shell(&nodes[0], &step)?;
            by_hand.push(format!("{}: {step}", PEER_NAMES[0]));
        }
        Ok(Self { nodes, by_hand })
    }
}

/// Address on the hand-made VXLAN.
pub fn vxlan_address(index: usize) -> Ipv4Addr {
    nth(Ipv4Addr::new(10, 251, 0, 1), index)
}

/// Address of the pod behind the hand-made VXLAN.
pub fn pod_address(index: usize) -> Ipv4Addr {
    nth(Ipv4Addr::new(10, 250, 0, 1), index)
}

/// What it takes by hand to put a pod on a node and to reach the other one: a routed veth pair, no filter, no tracking.
fn pod_by_hand(index: usize) -> Vec<String> {
    let (own, other) = (pod_address(index), pod_address(1 - index));
    vec![
        "sysctl -qw net.ipv4.ip_forward=1".to_owned(),
        format!("ip netns add {PEER_POD}"),
        format!("ip link add pod0 mtu 1450 type veth peer name eth0 mtu 1450 netns {PEER_POD}"),
        "ip addr add 169.254.1.1/32 dev pod0".to_owned(),
        "ip link set pod0 up".to_owned(),
        format!("ip route add {own}/32 dev pod0"),
        format!("ip -n {PEER_POD} addr add {own}/32 dev eth0"),
        format!("ip -n {PEER_POD} link set eth0 up"),
        format!("ip -n {PEER_POD} route add 169.254.1.1 dev eth0"),
        format!("ip -n {PEER_POD} route add default via 169.254.1.1"),
        format!("ip route add {other}/32 via {}", vxlan_address(1 - index)),
    ]
}

/// Address on the bare veth pair.
pub fn veth_address(index: usize) -> Ipv4Addr {
    nth(Ipv4Addr::new(10, 252, 0, 1), index)
}

/// The node's range for pods.
fn range(index: usize) -> String {
    format!("10.{}.0.0/16", 246 + index)
}

/// Fills the store of an agent that does not run.
fn fill_leases(state: &Path, range: &str) -> Result<()> {
    let program = binaries_dir()?.join("examples/fill_leases");
    let output = Command::new(&program).arg(state).args([&LEASES.to_string(), range]).output();
    let output = output.with_context(|| format!("cannot execute {}", program.display()))?;
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Address of a node on its underlay.
fn address(index: usize) -> Ipv4Addr {
    nth(Ipv4Addr::new(192, 168, 78, 11), index)
}

fn nth(first: Ipv4Addr, index: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(first) + u32::try_from(index).unwrap_or(0))
}

fn join(work: &Work, names: [&str; 2], address: fn(usize) -> Ipv4Addr) -> Result<Vec<Namespaces>> {
    let nodes: Vec<Namespaces> =
        names.iter().map(|name| Namespaces::create(name, work)).collect::<Result<_>>()?;
    let pair = format!("ip link add up0 type veth peer name up0 netns {}", nodes[1].pid());
    anyhow::ensure!(
        nodes[0].network_command("sh").args(["-ec", &pair]).status()?.success(),
        "cannot join {} and {}",
        names[0],
        names[1]
    );
    for (index, node) in nodes.iter().enumerate() {
        shell(
            node,
            &format!("ip addr add {}/24 dev up0; ip link set up0 up; ip link set lo up", address(index)),
        )?;
    }
    Ok(nodes)
}

fn write_objects(objects: &Objects, pods: usize) -> Result<()> {
    for (index, name) in NAMES.iter().enumerate() {
        objects.put_node(name, address(index), &range(index))?;
    }
    objects.put_namespace(NAMESPACE)?;
    for index in 0..pods {
        let name = pod_name(index);
        objects.put(
            &format!("pod-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {"name": name, "namespace": NAMESPACE, "uid": name, "labels": {"app": "bench"}},
                "spec": {"nodeName": NAMES[0], "containers": [{"name": "main", "image": "none"}]},
                "status": {"phase": "Pending", "hostIP": address(0).to_string()},
            }),
        )?;
    }
    objects.put(
        "policy",
        &json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "bench", "namespace": NAMESPACE},
            "spec": {
                "podSelector": {"matchLabels": {"app": "bench"}}, "policyTypes": ["Ingress"],
                "ingress": [{
                    "from": [{"podSelector": {"matchLabels": {"app": "bench"}}}],
                    "ports": [{"protocol": "TCP", "port": 80}],
                }],
            },
        }),
    )
}

/// Name of the nth pod whose ADD is timed.
pub fn pod_name(index: usize) -> String {
    format!("bench-{index}")
}
