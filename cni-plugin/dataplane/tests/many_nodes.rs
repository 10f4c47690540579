//! A thousand other nodes: planned and programmed at once, and one of them at a time. Needs root.

#![allow(unsafe_code)] // one lifetime extension in the support module, argued there
#![allow(clippy::unwrap_used)] // a test's failure is its panic

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use holdfast_dataplane::Dataplane;
use holdfast_net_core::objects::{Node as NodeObject, NodeAddress, NodeSpec, NodeStatus};
use holdfast_net_core::overlay::{OverlaySettings, Routing, Uplink, plan_node};
use holdfast_net_core::plan::NodePlan;
use support::{Netns, Node};

const NODES: usize = 1000;
/// What a thousand nodes may take on the machines that these tests are for.
const GOAL: Duration = Duration::from_secs(1);

fn mk_node(number: usize) -> NodeObject {
    let (high, low) = (number / 250, number % 250 + 1);
    let address = |text: String| NodeAddress { kind: "InternalIP".into(), address: text };
    let ranges = [format!("10.{}.{low}.0/24", 64 + high), format!("fd64:{number:x}::/64")];
    NodeObject {
        spec: NodeSpec { pod_cidr: None, pod_cidrs: ranges.map(|range| range.parse().unwrap()).to_vec() },
        status: NodeStatus { addresses: vec![address(format!("192.0.{high}.{low}"))] },
        ..NodeObject::default()
    }
}

fn plan(nodes: &BTreeMap<String, NodeObject>, routing: Routing) -> NodePlan {
    let settings = OverlaySettings {
        bridge: "hf0".into(),
        vxlan_device: "hf.vx".into(),
        vni: 4807,
        port: 4789,
        routing,
    };
    let uplink =
        Uplink { index: 2, name: "up0".into(), mtu: 1500, networks: vec!["192.0.0.1/16".parse().unwrap()] };
    let planned = plan_node(nodes, "node-0", &settings, &uplink, true).unwrap();
    assert!(planned.left_out.is_empty(), "{:?}", planned.left_out);
    planned.plan
}

/// Routes of both families through `device`, neighbours and forwarding entries of the overlay.
fn counts(netns: &Netns, device: &str) -> [usize; 4] {
    let script = format!(
        "ip -4 route show dev {device} proto 72 | wc -l; ip -6 route show dev {device} proto 72 | wc -l; \
         ip neigh show dev hf.vx nud permanent | grep -vc ff02:: || true; bridge fdb show dev hf.vx | wc -l"
    );
    let text = netns.run(&script);
    let numbers: Vec<usize> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
    numbers.try_into().unwrap()
}

#[test]
fn a_thousand_nodes_are_planned_and_programmed_within_a_second() {
    let node = Node::new("hft-many");
    node.netns.run(
        "ip link add up0 type veth peer name up1; ip addr add 192.0.0.1/16 dev up0; ip link set up0 up; ip link set up1 up",
    );
    let mut nodes: BTreeMap<String, NodeObject> =
        (0..=NODES).map(|number| (format!("node-{number}"), mk_node(number))).collect();
    let apply = |nodes: &BTreeMap<String, NodeObject>, routing: Routing| {
        let started = Instant::now();
        let plan = plan(nodes, routing);
        let planned = started.elapsed();
        let writes = node.runtime.block_on(async |dp: &Dataplane| dp.apply_node(&plan).await.unwrap());
        (writes, planned, started.elapsed())
    };
    let (writes, planned, took) = apply(&nodes, Routing::Vxlan);
    println!(
        "{NODES} nodes, two ranges each: planned and programmed in {:.3} s, {writes} writes (planned in {:.3} s)",
        took.as_secs_f64(),
        planned.as_secs_f64()
    );
    // One route for each range; of neighbours one for each next hop: IPv6 ranges have another one than IPv4 ranges.
    assert_eq!(counts(&node.netns, "hf.vx"), [NODES, NODES, 2 * NODES, NODES]);

    let (writes, _, idle) = apply(&nodes, Routing::Vxlan);
    assert_eq!(writes, 0, "a second apply writes nothing");
    println!("compared with the kernel in {:.3} s", idle.as_secs_f64());
    let gone = nodes.remove("node-500").unwrap();
    let (writes, _, one) = apply(&nodes, Routing::Vxlan);
    assert_eq!(writes, 5, "two routes, two neighbours, one forwarding entry");
    assert_eq!(counts(&node.netns, "hf.vx"), [NODES - 1, NODES - 1, 2 * (NODES - 1), NODES - 1]);
    nodes.insert("node-500".into(), gone);
    assert_eq!(apply(&nodes, Routing::Vxlan).0, 5);
    println!("one node removed in {:.3} s", one.as_secs_f64());

    // All of them have an InternalIP of IPv4 on the link: IPv4 goes directly, IPv6 by the overlay.
    let (_, _, switched) = apply(&nodes, Routing::Auto);
    println!("switched to direct routes in {:.3} s", switched.as_secs_f64());
    assert_eq!(counts(&node.netns, "up0")[..2], [NODES, 0]);
    assert_eq!(counts(&node.netns, "hf.vx"), [0, NODES, NODES, NODES]);
    assert_eq!(apply(&nodes, Routing::Auto).0, 0);
    assert!(took < GOAL, "{took:?} for {NODES} nodes");
}
