//! In a chain with the reference plugins `tuning`, `bandwidth` and `portmap` in version 1.1.0, run by cnitool. Debian's, up to
//! 1.0.0, are tried in `cni-plugin/tests/chain.rs`.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use holdfast_tests::{Reach, traces};
use serde_json::{Value, json};

use super::bed::{Machine, PORT, server_command};
use super::cnitool::Cnitool;

const HOST_PORT: u16 = 8088;
/// What `tuning` sets in the sandbox.
const TTL: &str = "77";

/// ADD, CHECK, STATUS, the host port from another node, DEL.
pub fn run(machine: &mut Machine, tool: &Path, plugins: &Path) -> Result<()> {
    let data = machine.folder("tuning")?;
    let more = [
        json!({ "type": "tuning", "sysctl": { "net.ipv4.ip_default_ttl": TTL }, "dataDir": data }),
        json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }),
        json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }),
    ];
    let conflists = machine.write_conflist("conflists", "1.1.0", &more)?;
    let mapping = json!([{ "hostPort": HOST_PORT, "containerPort": PORT, "protocol": "tcp" }]);
    let rate = json!({ "ingressRate": 80_000_000, "ingressBurst": 8_000_000, "egressRate": 80_000_000, "egressBurst": 8_000_000 });
    let cnitool = Cnitool {
        program: tool,
        machine,
        conflists: &conflists,
        more_plugins: format!(":{}", plugins.display()),
        capabilities: json!({ "portMappings": mapping, "bandwidth": rate }).to_string(),
    };
    machine.put_pod("shop/web", "web", 0, &[])?;
    let clean = traces::of(machine.node())?;
    attach_and_reach(machine, &cnitool)?;
    cnitool.call("del", "box")?;
    machine.node().spaces.run("ip", &["netns", "delete", "box"])?;
    traces::expect_nothing_more(machine.node(), &clean)
}

fn attach_and_reach(machine: &Machine, cnitool: &Cnitool<'_>) -> Result<()> {
    let node = machine.node();
    node.spaces.run("ip", &["netns", "add", "box"])?;
    node.spaces.run("ip", &["-n", "box", "link", "set", "lo", "up"])?;
    let result: Value = serde_json::from_str(&cnitool.call("add", "box")?)?;
    let ours = machine.lease("shop/web")?.1;
    let told = result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
    let mut told: Vec<IpAddr> = told.filter_map(|text| text.split('/').next()?.parse().ok()).collect();
    told.sort_by_key(IpAddr::is_ipv6);
    ensure!(told == ours, "the chain's result has {told:?}, the lease {ours:?}");
    cnitool.call("check", "box")?;
    cnitool.call("status", "box")?;
    let ttl = node.spaces.run("ip", &["netns", "exec", "box", "cat", "/proc/sys/net/ipv4/ip_default_ttl"])?;
    ensure!(ttl.trim() == TTL, "tuning set {ttl:?}");
    let shaped = node.spaces.run("tc", &["qdisc", "show"])?;
    ensure!(shaped.matches("tbf").count() == 2, "bandwidth shaped something else:\n{shaped}");

    let mut server = node.spaces.command("ip");
    server.args(["netns", "exec", "box", "/usr/bin/busybox"]).args(&server_command()[1..]);
    let mut server = server.spawn()?;
    let target = SocketAddr::new(node.addresses[0], HOST_PORT);
    let far = &machine.net.nodes[1].spaces;
    let reached = holdfast_tests::process::wait_until(std::time::Duration::from_secs(5), || {
        let reach = holdfast_tests::probe(far, Path::new("/proc/1/ns/net"), &[target])?;
        ensure!(reach == [Reach::Open], "{target} is {reach:?}");
        Ok(true)
    });
    // nsenter, ip and busybox are one process after another.
    node.spaces.run("sh", &["-c", "kill $(ip netns pids box)"])?;
    server.wait()?;
    reached.context("through the host port, from the other node")
}
