//! A node whose mode is changed while it has pods.

use serde_json::{Value, json};

use super::cni::support::{Cluster, Netns, Node, address_of, eventually};

/// ADD; the address, and the result.
fn add(node: &Node, id: &str, sandbox: &Netns) -> (String, Value) {
    let result = node.cni("ADD", id, Some(&sandbox.path()), json!({})).unwrap();
    (address_of(&result), result)
}

fn check(node: &Node, id: &str, sandbox: &Netns, result: &Value) {
    node.cni("CHECK", id, Some(&sandbox.path()), json!({ "prevResult": result })).unwrap();
}

#[test]
fn pods_of_either_mode_go_on_on_a_node_whose_mode_changes_and_reach_each_other() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let mut node = cluster.start_node("a", 1);
    for (first, second) in [("bridge", "routed"), ("routed", "bridge")] {
        node.kill();
        node.attachment = first;
        node.start();
        let (old, new) = (Netns::new(), Netns::new());
        let (old_address, old_result) = add(&node, "old", &old);
        let links = node.netns.ip("-o link show");
        node.kill();
        node.attachment = second;
        node.start();
        let (new_address, new_result) = add(&node, "new", &new);
        assert_ne!(
            old_result["interfaces"].as_array().unwrap().len(),
            new_result["interfaces"].as_array().unwrap().len(),
            "they are attached in different modes"
        );
        for line in links.lines().filter(|line| line.contains("hfv")) {
            let name = line.split(": ").nth(1).unwrap();
            assert!(node.netns.ip("-o link show").contains(name), "{first}: the old pod's interface is gone");
        }
        for (sandbox, address) in [(&old, &new_address), (&new, &old_address), (&new, &new_address)] {
            assert!(sandbox.pings(address), "{first} to {second}: {address}");
        }
        assert!(node.netns.pings(&old_address) && node.netns.pings(&new_address));
        check(&node, "old", &old, &old_result);
        check(&node, "new", &new, &new_result);
        // A restart in the new mode knows both.
        node.kill();
        node.start();
        check(&node, "old", &old, &old_result);
        assert!(old.pings(&new_address));
        node.del("old").unwrap();
        assert!(!node.netns.pings(&old_address));
        assert!(node.netns.pings(&new_address));
        node.del("new").unwrap();
        assert_eq!((node.ports(), node.dump()["leases"].clone()), (0, json!([])));
    }
}

#[test]
fn the_bridge_goes_with_its_last_pod() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let mut node = cluster.start_node("a", 1);
    node.kill();
    node.attachment = "bridge";
    node.start();
    let sandbox = Netns::new();
    let (address, _) = add(&node, "old", &sandbox);
    node.kill();
    node.attachment = "routed";
    node.start();
    assert!(node.netns.ip("-o link show").contains("hf0"), "it has a pod");
    assert!(node.netns.pings(&address));
    node.del("old").unwrap();
    // A look at the node's plan, without waiting for the next one.
    cluster.put_node("b", 2, "10.42.2.0/24");
    eventually("the bridge is gone", || !node.netns.ip("-o link show").contains("hf0"));
    // Somebody else's bridge of that name is not ours to remove.
    node.netns.ip("link add hf0 type bridge");
    cluster.put_node("c", 3, "10.42.3.0/24");
    eventually("the plan was applied", || node.netns.ip("route show").contains("10.42.3.0/24"));
    assert!(node.netns.ip("-o link show").contains("hf0"));
}
