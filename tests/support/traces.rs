//! What pods leave on a node, in the agent and in the kernel: the tests' notion of "nothing is left".

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnetwork::IpNetwork;
use serde_json::Value;

use crate::cluster::NETD_SOCKET;
use crate::netbed::AgentNode;
use crate::process::wait_until;
use crate::work::binaries_dir;

/// How long what was removed may take to vanish: the kernel deletes a namespace's links after its last process.
const VANISH_TIMEOUT: Duration = Duration::from_secs(20);
/// The pod ranges of all nodes of a bed.
const POD_RANGES: [&str; 2] = ["10.244.0.0/16", "fd00:244::/32"];
/// Words of commands' output are cut at these.
const SEPARATORS: [char; 9] = [' ', '\t', '\n', ',', '{', '}', '(', ')', '='];

/// Leases as the agent tells them.
///
/// # Errors
/// The agent does not answer.
pub fn leases(node: &AgentNode) -> Result<Vec<Value>> {
    let program = binaries_dir()?.join("holdfast");
    let text =
        node.spaces.run(&program.display().to_string(), &["policy", "dump", "--socket", NETD_SOCKET])?;
    let mut dump: Value = serde_json::from_str(&text).context("the dump is no JSON")?;
    serde_json::from_value(dump["leases"].take()).context("the dump has no leases")
}

/// What a node holds: leases, delete records, links, namespaces, and routes, neighbours, elements of rules and FDB entries that name
/// a pod's address or a pod's port.
///
/// # Errors
/// The agent or a command fails.
pub fn of(node: &AgentNode) -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for lease in leases(node)? {
        found.insert(format!("lease {}/{}", lease["key"]["container_id"], lease["key"]["ifname"]));
    }
    for entry in std::fs::read_dir(node.pending_dir()).into_iter().flatten().flatten() {
        found.insert(format!("delete record {}", entry.file_name().display()));
    }
    for entry in std::fs::read_dir(node.spaces.host_path("/run/netns")).into_iter().flatten().flatten() {
        found.insert(format!("namespace {}", entry.file_name().display()));
    }
    for line in node.spaces.run("ip", &["-o", "link", "show"])?.lines() {
        let name = line.split(": ").nth(1).unwrap_or(line);
        found.insert(format!("link {}", name.split('@').next().unwrap_or(name)));
    }
    for (what, program, arguments) in [
        ("route", "ip", ["-4", "route", "show", "table", "all"].as_slice()),
        ("route", "ip", &["-6", "route", "show", "table", "all"]),
        ("neighbour", "ip", &["-4", "neigh", "show"]),
        ("neighbour", "ip", &["-6", "neigh", "show"]),
        ("rule", "nft", &["list", "ruleset"]),
    ] {
        let text = node.spaces.run(program, arguments)?;
        let words = text.split(SEPARATORS).filter(|word| names_a_pod(word));
        found.extend(words.map(|word| format!("{what} {word}")));
    }
    Ok(found)
}

/// Waits until a node holds nothing that it did not hold before.
///
/// # Errors
/// Something is left; the error lists it.
pub fn expect_nothing_more(node: &AgentNode, before: &BTreeSet<String>) -> Result<()> {
    wait_until(VANISH_TIMEOUT, || {
        let now = of(node)?;
        let left: Vec<&String> = now.difference(before).collect();
        ensure!(left.is_empty(), "left on {}: {left:?}", node.name);
        Ok(true)
    })
}

/// A single address of a pod range (with a full prefix or none), alone or in a concatenation, or a pod's host end.
fn names_a_pod(word: &str) -> bool {
    let word = word.trim_matches('"');
    if word.starts_with("hfv") {
        return true;
    }
    let Ok(network) = word.parse::<IpNetwork>() else { return false };
    let is_single = network.prefix() == if network.is_ipv4() { 32 } else { 128 };
    // A route to a node's range names the range's first address as its gateway: the node's VTEP, no pod.
    let is_first = match network.ip() {
        std::net::IpAddr::V4(address) => address.octets()[3] == 0,
        std::net::IpAddr::V6(address) => address.segments()[7] == 0,
    };
    let ranges = POD_RANGES.iter().filter_map(|range| range.parse::<IpNetwork>().ok());
    is_single && !is_first && ranges.into_iter().any(|range| range.contains(network.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_addresses_and_host_ends_are_pods_and_ranges_are_not() {
        for pod in ["10.244.1.7", "10.244.1.7/32", "fd00:244:1::9", "\"hfv12ab\"", "hfv1"] {
            assert!(names_a_pod(pod), "{pod}");
        }
        for other in ["10.244.1.0/24", "10.244.2.0", "192.168.77.11", "fd00:244:2::/64", "eth0", "10.245.0.1"]
        {
            assert!(!names_a_pod(other), "{other}");
        }
    }
}
