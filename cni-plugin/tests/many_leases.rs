//! An address costs the same, however many there are. On the real binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

#[path = "../examples/fill_leases.rs"]
mod fill_leases;
mod support;

use std::time::Instant;

use serde_json::json;
use support::{Cluster, Netns, Node};

const LEASES: usize = 9_999;
const RANGE: &str = "10.64.0.0/16";
const ROUNDS: usize = 5;
const ADDS: usize = 20;
/// The figure itself is printed; this is what no noise of a busy machine explains.
const RATIO_MAX: f64 = 1.5;

/// Milliseconds of each ADD.
fn adds(node: &Node, sandboxes: &[Netns]) -> Vec<f64> {
    let mut times = Vec::new();
    for (number, sandbox) in sandboxes.iter().enumerate() {
        let begin = Instant::now();
        node.cni("ADD", &format!("new-{number}"), Some(&sandbox.path()), json!({})).unwrap();
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    for number in 0..sandboxes.len() {
        node.del(&format!("new-{number}")).unwrap();
    }
    times
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
fn the_ten_thousandth_lease_costs_what_the_first_one_did() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.63.0.0/16");
    cluster.put_node("b", 2, RANGE);
    fill_leases::fill(&cluster.folder.path().join("b/state"), LEASES, RANGE.parse().unwrap()).unwrap();
    let (empty, full) = (cluster.start_node("a", 1), cluster.start_node("b", 2));
    assert_eq!(full.dump()["leases"].as_array().map(Vec::len), Some(LEASES), "more than gRPC's usual limit");
    // A pin for each lease.
    assert!(full.rules_text().matches("hfv").count() >= LEASES, "the leases are not in force");
    let sandboxes: Vec<Netns> = (0..ADDS).map(|_| Netns::new()).collect();
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        first.extend(adds(&empty, &sandboxes));
        last.extend(adds(&full, &sandboxes));
    }
    let (first, last) = (median(first), median(last));
    println!(
        "ADD, median: {first:.2} ms with no lease, {last:.2} ms with {LEASES}; ratio {:.2}",
        last / first
    );
    assert!(last / first < RATIO_MAX, "{first} ms, {last} ms");
}
