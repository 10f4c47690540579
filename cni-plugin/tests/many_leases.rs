//! An address costs the same, however many there are. On the real binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_agent::{AttachmentKey, Lease, Leases, Wanted};
use holdfast_net_core::plan::{BridgePlan, EndpointPlan};
use serde_json::json;
use support::{Cluster, Netns, Node};

const LEASES: usize = 9_999;
const RANGE: &str = "10.64.0.0/16";
const ROUNDS: usize = 5;
const ADDS: usize = 20;
/// The figure itself is printed; this is what no noise of a busy machine explains.
const RATIO_MAX: f64 = 1.5;

/// Fills a store as that many pods would. A bridge takes 1,024 ports, so they cannot all be attached: what is tried is the store,
/// the free space, the model and the rules, not the bridge.
fn fill(folder: &std::path::Path) {
    std::fs::create_dir_all(folder).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let leases = Arc::new(Leases::open(folder, Duration::ZERO).unwrap());
        leases.set_ranges(&[RANGE.parse().unwrap()]).await;
        let mut all = tokio::task::JoinSet::new();
        for number in 0..LEASES {
            let leases = Arc::clone(&leases);
            all.spawn(async move { lease(&leases, number).await });
        }
        all.join_all().await;
        leases.flush().await.unwrap();
    });
}

async fn lease(leases: &Leases, number: usize) {
    let key = AttachmentKey { container_id: format!("old-{number}"), ifname: "eth0".to_owned() };
    let bridge = BridgePlan::for_node("b", 1450);
    let wanted = Wanted::default();
    let reserved = leases.reserve(&key, &wanted, |sequence, addresses| Lease {
        key: key.clone(),
        sequence,
        network: "pods".to_owned(),
        netns: "/nonexistent/netns".to_owned(),
        pod: None,
        pod_uid: String::new(),
        attached: false,
        boot_id: String::new(),
        sandbox: None,
        plan: EndpointPlan::new(&key.container_id, &key.ifname, addresses, &bridge),
    });
    let reserved = reserved.await.unwrap();
    leases.mark_attached(&key, &reserved.plan).await.unwrap();
}

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
    fill(&cluster.folder.path().join("b/state"));
    let (empty, full) = (cluster.start_node("a", 1), cluster.start_node("b", 2));
    // A pin for each lease: the whole state is too large for one answer.
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
