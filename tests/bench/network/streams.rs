//! The paths between two pods: throughput of one TCP stream, with iperf3, and round trips.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_tests::Namespaces;
use serde_json::Value;

use super::nodes::{Ours, PEER_POD, Peer, StreamPod, pod_address, veth_address, vxlan_address};
use super::trips;
use crate::figures::{Figure, RatioLimit};

/// The server is asked again this often, 50 ms apart, until it listens.
const CONNECT_TRIES: usize = 40;

/// Where one end of a stream runs.
pub struct End<'a> {
    node: &'a Namespaces,
    netns: Option<PathBuf>,
    /// Its address.
    pub address: Ipv4Addr,
}

impl<'a> End<'a> {
    fn of(ours: &'a Ours, pod: &'a StreamPod) -> Self {
        End { node: &ours.nodes[pod.node], netns: Some(pod.netns.clone()), address: pod.address }
    }

    /// A command that runs there.
    pub fn command(&self, program: &Path) -> Command {
        match &self.netns {
            Some(netns) => self.node.command_in(netns, program),
            None => self.node.command(program),
        }
    }
}

/// Figures of both, in rounds that alternate.
pub fn compare(
    ours: &Ours,
    peer: &Peer,
    rounds: usize,
    seconds: u32,
    tell: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    for line in &peer.by_hand {
        eprintln!("peer: {line}");
    }
    eprintln!("both: iperf3 -s -1; iperf3 -c ADDRESS -t {seconds} -O 1 -J, MTU of the uplink 1500");
    let first = ours.stream_pod(0, "stream-0")?;
    let near = ours.stream_pod(0, "stream-1")?;
    let far = ours.stream_pod(1, "stream-2")?;
    let mut figures = Vec::new();
    for (path, server, others) in
        [("overlay", &far, &OVERLAY_PEERS[..]), ("samenode", &near, &NODE_PEERS[..])]
    {
        for (what, unit, measure) in [
            ("tcp_1stream", "Gbit/s", stream as fn(&End<'_>, &End<'_>, u32) -> Result<f64>),
            ("tcp_rr", "/s", trips::rate),
        ] {
            let mut mine = Vec::new();
            let mut theirs = vec![Vec::new(); others.len()];
            for round in 1..=rounds {
                tell(&format!("{path}.{what}, round {round} of {rounds}"));
                let (client, server) = (End::of(ours, &first), End::of(ours, server));
                mine.push(measure(&client, &server, seconds)?);
                for (other, values) in others.iter().zip(&mut theirs) {
                    values.push(measure(&other.end(peer, 0), &other.end(peer, 1), seconds)?);
                }
            }
            for (other, values) in others.iter().zip(&theirs) {
                let name = format!("{path}.{what}{}", other.suffix);
                let figure = Figure::of_rounds(&name, unit, other.name, &mine, values);
                figures.push(Figure { ratio_limit: other.at_least.map(RatioLimit::AtLeast), ..figure });
            }
        }
    }
    Ok(figures)
}

/// A path that was made by hand.
struct OtherPath {
    suffix: &'static str,
    name: &'static str,
    at_least: Option<f64>,
    /// Namespace of both ends inside their nodes; the nodes' own without one.
    netns: [Option<&'static str>; 2],
    /// Whether its ends are on two nodes.
    two_nodes: bool,
    address: fn(usize) -> Ipv4Addr,
}

const OVERLAY_PEERS: [OtherPath; 2] = [
    OtherPath {
        suffix: "",
        name: "hand-made VXLAN, no pods",
        at_least: Some(0.97),
        netns: [None, None],
        two_nodes: true,
        address: vxlan_address,
    },
    OtherPath {
        suffix: "_vs_pods",
        name: "pods by hand on a hand-made VXLAN, no filter, no tracking",
        at_least: None,
        netns: [Some(PEER_POD), Some(PEER_POD)],
        two_nodes: true,
        address: pod_address,
    },
];

const NODE_PEERS: [OtherPath; 1] = [OtherPath {
    suffix: "",
    name: "bare veth pair",
    at_least: Some(0.9),
    netns: [Some("v0"), Some("v1")],
    two_nodes: false,
    address: veth_address,
}];

impl OtherPath {
    fn end<'a>(&self, peer: &'a Peer, index: usize) -> End<'a> {
        End {
            node: &peer.nodes[if self.two_nodes { index } else { 0 }],
            netns: self.netns[index].map(|name| Path::new("/run/netns").join(name)),
            address: (self.address)(index),
        }
    }
}

/// Gbit/s that the server received.
fn stream(client: &End<'_>, server: &End<'_>, seconds: u32) -> Result<f64> {
    let listener = server
        .command(Path::new("iperf3"))
        .args(["-s", "-1"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let mut listener = EndWithDrop(listener);
    let seconds = seconds.to_string();
    let address = server.address.to_string();
    let mut last = String::new();
    for _ in 0..CONNECT_TRIES {
        let output = client
            .command(Path::new("iperf3"))
            .args(["-c", &address, "-t", &seconds, "-O", "1", "-J"])
            .output()?;
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if let Some(rate) = report["end"]["sum_received"]["bits_per_second"].as_f64().filter(|r| *r > 0.0) {
            listener.0.wait()?;
            return Ok(rate / 1e9);
        }
        last = report["error"].as_str().unwrap_or("no report").to_owned();
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(anyhow::anyhow!(last)).with_context(|| format!("iperf3 from {} to {address}", client.address))
}

/// A child that does not outlive its use.
pub struct EndWithDrop(pub Child);

impl Drop for EndWithDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
