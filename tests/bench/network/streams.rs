//! The paths between two pods: throughput of one TCP stream, with iperf3, and round trips.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_tests::Namespaces;
use serde_json::Value;

use super::nodes::{Ours, Peer, StreamPod, veth_address, vxlan_address};
use super::trips;
use crate::figures::{Figure, RatioLimit};

/// The server is asked again this often, 50 ms apart, until it listens.
const CONNECT_TRIES: usize = 40;

/// Where one end of a stream runs.
pub struct End<'a> {
    node: &'a Namespaces,
    netns: Option<&'a Path>,
    /// Its address.
    pub address: Ipv4Addr,
}

impl<'a> End<'a> {
    fn of(ours: &'a Ours, pod: &'a StreamPod) -> Self {
        End { node: &ours.nodes[pod.node], netns: Some(&pod.netns), address: pod.address }
    }

    /// A command that runs there.
    pub fn command(&self, program: &Path) -> Command {
        match self.netns {
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
    for (path, server, peer_name, share) in
        [("overlay", &far, "hand-made VXLAN, no pods", 0.97), ("samenode", &near, "bare veth pair", 0.9)]
    {
        for (what, unit, measure) in [
            ("tcp_1stream", "Gbit/s", stream as fn(&End<'_>, &End<'_>, u32) -> Result<f64>),
            ("tcp_rr", "/s", trips::rate),
        ] {
            let name = format!("{path}.{what}");
            let (mut mine, mut theirs) = (Vec::new(), Vec::new());
            for round in 1..=rounds {
                tell(&format!("{name}, round {round} of {rounds}"));
                let (client, server) = (End::of(ours, &first), End::of(ours, server));
                mine.push(measure(&client, &server, seconds)?);
                let (client, server) = peer_ends(peer, path);
                theirs.push(measure(&client, &server, seconds)?);
            }
            let figure = Figure::of_rounds(&name, unit, peer_name, &mine, &theirs);
            figures.push(figure.with_ratio(RatioLimit::AtLeast(share)));
        }
    }
    Ok(figures)
}

fn peer_ends<'a>(peer: &'a Peer, path: &str) -> (End<'a>, End<'a>) {
    if path == "overlay" {
        let end = |index: usize| End { node: &peer.nodes[index], netns: None, address: vxlan_address(index) };
        return (end(0), end(1));
    }
    let end = |index: usize, netns: &'static str| End {
        node: &peer.nodes[0],
        netns: Some(Path::new(netns)),
        address: veth_address(index),
    };
    (end(0, "/run/netns/v0"), end(1, "/run/netns/v1"))
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
