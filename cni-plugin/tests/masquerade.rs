//! Pods' traffic that leaves the cluster has the node's address as source; all other traffic keeps its own. On the real binaries, a real
//! agent and a real kernel, with a namespace that plays the world outside. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use support::sockets::{Server, ask_tcp, ask_udp};
use support::{Cluster, Netns, Node, eventually};

fn put_node(cluster: &Cluster, name: &str, number: u8) {
    let ranges = [format!("10.42.{number}.0/24"), format!("fd00:{number}::/64")];
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": name }, "spec": { "podCIDRs": ranges },
        "status": { "addresses": [
            { "type": "InternalIP", "address": format!("192.0.2.{number}") },
            { "type": "InternalIP", "address": format!("2001:db8::{number}") },
        ] },
    });
    cluster.put(&format!("node-{name}"), &node);
}

/// A pod on a node, with its addresses.
fn add(cluster: &Cluster, node: &Node, name: &str) -> (Netns, [String; 2]) {
    cluster.put_pod(name, "");
    let sandbox = Netns::new();
    let result: Value = node.add(name, &sandbox).unwrap();
    let address = |index: usize| {
        result["ips"][index]["address"].as_str().unwrap().split('/').next().unwrap().to_owned()
    };
    (sandbox, [address(0), address(1)])
}

/// Whom the server at `host` sees when the pod asks over TCP and UDP, in the families.
fn seen(pod: &Netns, host: u8) -> Vec<Option<String>> {
    let to = [format!("192.0.2.{host}:80"), format!("[2001:db8::{host}]:80")];
    let asked = to.iter().flat_map(|to| [ask_tcp(pod, to), ask_udp(pod, to)]);
    asked.map(|text| text.map(|text| text.rsplit(' ').next().unwrap().to_owned())).collect()
}

fn twice(addresses: [&str; 2]) -> Vec<Option<String>> {
    addresses.iter().flat_map(|address| [Some((*address).to_owned()), Some((*address).to_owned())]).collect()
}

/// A host outside answers to pods' own addresses by the way of their node.
fn routes_to_pods(outside: &Netns, number: u8) {
    outside.ip(&format!("route add 10.42.{number}.0/24 via 192.0.2.{number}"));
    outside.ip(&format!("route add fd00:{number}::/64 via 2001:db8::{number}"));
}

#[test]
fn what_leaves_the_cluster_has_the_nodes_address_and_the_rest_its_own() {
    let cluster = Cluster::new();
    put_node(&cluster, "a", 1);
    put_node(&cluster, "b", 2);
    let settings = &[
        "--address-quarantine-s=0",
        "--collect-after-s=0",
        "--masquerade-exempt=192.0.2.101,2001:db8::101/128",
    ];
    let (a, b) = (cluster.start_node_with("a", 1, settings), cluster.start_node("b", 2));
    let (pod, own) = add(&cluster, &a, "one");
    let (other, [other_4, other_6]) = add(&cluster, &b, "two");
    let own = [own[0].as_str(), own[1].as_str()];
    let (outside, exempt) = (cluster.outside(100), cluster.outside(101));
    routes_to_pods(&exempt, 1);
    let _servers = [&outside, &exempt, &b.netns, &other].map(|netns| Server::new(netns, "x", "[::]:80"));
    assert_eq!(seen(&pod, 100), twice(["192.0.2.1", "2001:db8::1"]), "outside");
    assert_eq!(seen(&pod, 101), twice(own), "exempt by the settings");
    assert_eq!(seen(&pod, 2), twice(own), "another node");
    assert_eq!(ask_tcp(&pod, &format!("{other_4}:80")), Some(format!("x {}", own[0])), "another pod");
    assert_eq!(ask_tcp(&pod, &format!("[{other_6}]:80")), Some(format!("x {}", own[1])), "another pod");
    let _own_server = Server::new(&a.netns, "x", "[::]:80");
    assert_eq!(seen(&pod, 1), twice(own), "its own node");
    assert!(pod.pings("192.0.2.100"), "ICMP");
    assert_eq!(ask_tcp(&a.netns, "192.0.2.100:80").as_deref(), Some("x 192.0.2.1"), "the node's own traffic");

    // A node that comes: its pods and its address are the cluster's from then on, and no more when it goes.
    routes_to_pods(&outside, 1);
    put_node(&cluster, "c", 100);
    eventually("followed live", || seen(&pod, 100) == twice(own));
    cluster.remove("node-c");
    eventually("followed back", || seen(&pod, 100) == twice(["192.0.2.1", "2001:db8::1"]));

    // Egress policy judges who the pod is and where it goes, and replies come back.
    let policy = |cidr: &str| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": "out", "namespace": "shop" },
            "spec": {
                "podSelector": { "matchLabels": { "app": "one" } }, "policyTypes": ["Egress"],
                "egress": [{ "to": [{ "ipBlock": { "cidr": cidr } }] }],
            },
        })
    };
    cluster.put("policy-out", &policy("192.0.2.101/32"));
    eventually("forbidden", || ask_tcp(&pod, "192.0.2.100:80").is_none());
    assert!(ask_tcp(&pod, "192.0.2.101:80").is_some());
    cluster.put("policy-out", &policy("192.0.2.100/32"));
    eventually("allowed", || ask_tcp(&pod, "192.0.2.100:80").as_deref() == Some("x 192.0.2.1"));
}

#[test]
fn the_modes_do_what_they_say_and_a_restart_changes_nothing() {
    let cluster = Cluster::new();
    put_node(&cluster, "a", 1);
    put_node(&cluster, "b", 2);
    let nodes = &["--address-quarantine-s=0", "--masquerade=nodes"];
    let off = &["--address-quarantine-s=0", "--masquerade=off"];
    let (mut a, b) = (cluster.start_node_with("a", 1, nodes), cluster.start_node_with("b", 2, off));
    let (one, own) = add(&cluster, &a, "one");
    let (two, [two_4, two_6]) = add(&cluster, &b, "two");
    let outside = cluster.outside(100);
    routes_to_pods(&outside, 2);
    let _servers = [&outside, &b.netns, &two].map(|netns| Server::new(netns, "x", "[::]:80"));
    assert_eq!(seen(&one, 2), twice(["192.0.2.1", "2001:db8::1"]), "nodes");
    assert_eq!(ask_tcp(&one, &format!("{two_4}:80")), Some(format!("x {}", own[0])));
    assert_eq!(seen(&two, 100), twice([&two_4, &two_6]), "off");
    let rules = a.rules_text();
    a.kill();
    assert_eq!(seen(&one, 2), twice(["192.0.2.1", "2001:db8::1"]), "without an agent");
    a.start();
    assert_eq!(a.rules_text(), rules);
    let mut command = a.netns.exec("nft");
    assert!(command.args(["flush", "set", "inet", "holdfast", "own4"]).status().unwrap().success());
    eventually("mended", || a.rules_text() == rules);
}
