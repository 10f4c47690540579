//! Addresses over time: held back after use, asked for by the runtime, and freed where nobody deletes what is dead. On the real
//! binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Cluster, Netns, Node, address_of, eventually, host_end, pod_end};

fn add(node: &Node, id: &str, sandbox: &Netns, extra: Value) -> Result<Value, Value> {
    node.cni("ADD", id, Some(&sandbox.path()), extra)
}

fn leases(node: &Node) -> usize {
    node.dump()["leases"].as_array().unwrap().len()
}

#[test]
fn a_freed_address_waits_also_over_a_restart_and_status_and_add_say_so() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/30");
    let settings = &["--address-quarantine-s=2", "--collect-after-s=0"];
    let mut node = cluster.start_node_with("a", 1, settings);
    let sandboxes = [Netns::new(), Netns::new(), Netns::new()];
    let first = address_of(&add(&node, "a", &sandboxes[0], json!({})).unwrap());
    add(&node, "b", &sandboxes[1], json!({})).unwrap();
    node.del("a").unwrap();
    let freed = Instant::now();
    let error = add(&node, "c", &sandboxes[2], json!({})).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("were freed a moment ago"), "{error}");
    assert_eq!(node.cni("STATUS", "", None, json!({})).unwrap_err()["code"], 50);
    node.kill();
    node.start();
    assert_eq!(node.dump()["heldBack"], 1);
    eventually("it is given out", || add(&node, "c", &sandboxes[2], json!({})).is_ok());
    assert!(freed.elapsed() >= Duration::from_secs(2), "after {:?}", freed.elapsed());
    assert!(sandboxes[2].ip("-o addr show dev eth0").contains(&first));
    assert_eq!(node.dump()["heldBack"], 0);
}

#[test]
fn no_freed_address_is_given_out_while_objects_are_away() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/30");
    let node = cluster.start_node_with("a", 1, &["--address-quarantine-s=1", "--collect-after-s=0"]);
    let sandboxes = [Netns::new(), Netns::new()];
    add(&node, "a", &sandboxes[0], json!({})).unwrap();
    add(&node, "b", &sandboxes[1], json!({})).unwrap();
    let away = cluster.folder.path().join("away");
    std::fs::rename(cluster.objects(), &away).unwrap();
    eventually("the agent sees it", || node.dump()["readable"] == false);
    node.del("a").unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let error = add(&node, "a", &sandboxes[0], json!({})).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("while objects cannot be read"), "{error}");
    std::fs::rename(&away, cluster.objects()).unwrap();
    eventually("they are back", || node.dump()["readable"] == true);
    let back = Instant::now();
    eventually("it is given out", || add(&node, "a", &sandboxes[0], json!({})).is_ok());
    assert!(back.elapsed() >= Duration::from_millis(800), "others had {:?} to catch up", back.elapsed());
}

#[test]
fn an_add_that_failed_wastes_no_address() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/30");
    let node = cluster.start_node_with("a", 1, &["--address-quarantine-s=600", "--collect-after-s=0"]);
    let taken = Netns::new();
    taken.ip("link add eth0 type veth peer name x");
    for round in 0..6 {
        let error = add(&node, "c", &taken, json!({})).unwrap_err();
        assert_eq!(error["code"], 4, "round {round}: {error}");
        node.del("c").unwrap();
    }
    taken.ip("link del eth0");
    add(&node, "c", &taken, json!({})).unwrap();
    assert_eq!(node.dump()["heldBack"], 0);
}

#[test]
fn a_runtime_may_ask_for_address_mac_and_range() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let node = cluster.start_node("a", 1);
    let sandboxes: Vec<Netns> = (0..4).map(|_| Netns::new()).collect();
    let ask = |id: &str, sandbox: &Netns, config: Value| {
        add(&node, id, sandbox, json!({ "runtimeConfig": config }))
    };

    let mac = "c2:11:22:33:44:55";
    let fixed = json!({ "ips": ["10.42.1.77/24"], "mac": mac, "dns": { "servers": ["10.0.0.53"] } });
    let result = ask("a", &sandboxes[0], fixed.clone()).unwrap();
    assert_eq!(result["ips"][0]["address"], "10.42.1.77/32");
    assert_eq!(result["interfaces"][pod_end(&result)]["mac"], mac);
    assert_eq!(result["dns"]["nameservers"], json!(["10.0.0.53"]));
    assert!(sandboxes[0].ip("-o link show dev eth0").contains(mac));
    assert!(node.netns.pings("10.42.1.77"), "the pin knows the MAC");
    node.cni("CHECK", "a", Some(&sandboxes[0].path()), json!({ "prevResult": result })).unwrap();

    for (config, code, part) in [
        (json!({ "ips": ["10.42.1.77"] }), 11, "is leased"),
        (json!({ "mac": mac }), 11, "MAC"),
        (json!({ "ips": ["10.42.2.1"] }), 7, "none of this node's ranges"),
        (json!({ "ips": ["10.42.1.5", "10.42.1.6"] }), 7, "one address of each family"),
        (json!({ "ips": ["fd00::1"] }), 7, "none of this node's ranges"),
        (json!({ "ipRanges": [[{ "subnet": "10.43.0.0/24" }]] }), 7, "not within"),
        (json!({ "ipRanges": "x" }), 7, "ipRanges"),
    ] {
        let error = ask("b", &sandboxes[1], config).unwrap_err();
        assert_eq!(error["code"], code, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(part), "{part}: {error}");
        assert_eq!((node.ports(), leases(&node)), (1, 1));
    }
    let narrow = json!({ "ipRanges": [[{ "subnet": "10.42.1.128/30" }]] });
    let given: Vec<String> = ["b", "c"]
        .iter()
        .zip(&sandboxes[1..])
        .map(|(id, sandbox)| address_of(&ask(id, sandbox, narrow.clone()).unwrap()))
        .collect();
    // The range's own first and last addresses are usable: it is a part of a larger one.
    assert_eq!(given, ["10.42.1.128", "10.42.1.129"]);
    node.del("a").unwrap();
    assert_eq!(ask("a", &sandboxes[3], fixed).unwrap()["ips"][0]["address"], "10.42.1.77/32");
}

#[test]
fn an_attachment_that_nobody_deletes_is_freed_once_it_is_certainly_dead() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    cluster.put_pod("gone", "");
    let node = cluster.start_node_with("a", 1, &["--address-quarantine-s=0", "--collect-after-s=1"]);
    let clean = node.pod_state();
    let (named, unnamed) = (Netns::new(), Netns::new());
    node.add("gone", &named).unwrap();
    add(&node, "unnamed", &unnamed, json!({})).unwrap();
    drop(named);
    drop(unnamed);
    eventually("the kernel removed the interfaces", || node.ports() == 0);
    let since = Instant::now();
    eventually("the one without a pod is freed", || leases(&node) == 1);
    assert!(since.elapsed() >= Duration::from_millis(900), "after {:?}", since.elapsed());
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(leases(&node), 1, "the object of the other one is still there");
    cluster.remove("pod-gone");
    eventually("it is freed, too", || leases(&node) == 0);
    eventually("nothing is left of it", || node.pod_state() == clean);
}

/// Whatever speaks for a pod's death: while its interface exists, or its namespace and no interface, it is left alone.
#[test]
fn nothing_of_a_living_pod_is_ever_collected() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    for pod in ["lost", "renamed"] {
        cluster.put_pod(pod, "");
    }
    let node = cluster.start_node_with("a", 1, &["--address-quarantine-s=0", "--collect-after-s=1"]);
    // Its object and its namespace's name are gone, its process lives.
    let lost = Netns::new();
    node.add("lost", &lost).unwrap();
    let mut process = lost.exec("sleep").arg("60").spawn().unwrap();
    eventually("it runs in the sandbox", || {
        let of = |pid: String| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        of(process.id().to_string()).is_some_and(|ns| Some(ns) != of("self".into()))
    });
    drop(lost);
    cluster.remove("pod-lost");
    // Somebody renamed the host end.
    let renamed = Netns::new();
    let result = node.add("renamed", &renamed).unwrap();
    let host_end = host_end(&result);
    node.netns.ip(&format!("link set {host_end} down"));
    node.netns.ip(&format!("link set {host_end} name strange"));
    cluster.remove("pod-renamed");
    // Somebody deleted the interface of a pod whose namespace is there.
    let bare = Netns::new();
    add(&node, "bare", &bare, json!({})).unwrap();
    bare.ip("link del eth0");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(leases(&node), 3, "{}", node.log());
    assert_eq!(node.ports(), 1);
    assert!(node.netns.ip("-o link show").contains("strange"));
    // With its process the namespace ends, and with that the interface.
    process.kill().unwrap();
    process.wait().unwrap();
    eventually("the lost one is freed", || leases(&node) == 2);
}

#[test]
fn a_pod_range_that_changes_or_overlaps_itself_harms_no_living_pod() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let node = cluster.start_node("a", 1);
    let sandboxes: Vec<Netns> = (0..3).map(|_| Netns::new()).collect();
    let old = address_of(&add(&node, "old", &sandboxes[0], json!({})).unwrap());
    cluster.put_node("a", 1, "10.42.9.0/24");
    let new = |id: &str, sandbox: &Netns, range: &str| {
        eventually(&format!("an address of {range}"), || {
            let given = add(&node, id, sandbox, json!({})).map(|result| address_of(&result));
            let fits = given.as_ref().is_ok_and(|address| address.starts_with(range));
            if given.is_ok() && !fits {
                node.del(id).unwrap();
            }
            fits
        });
    };
    new("new", &sandboxes[1], "10.42.9.");
    assert!(node.netns.pings(&old), "its own route leads to it");

    let overlapping = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "a" },
        "spec": { "podCIDRs": ["10.42.1.0/24", "10.42.1.0/25"] },
        "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }] },
    });
    cluster.put("node-a", &overlapping);
    eventually("STATUS names the cause", || {
        let status = node.cni("STATUS", "", None, json!({}));
        status.is_err_and(|error| error["code"] == 51 && error.to_string().contains("which overlap"))
    });
    cluster.put_node("a", 1, "10.42.1.0/24");
    new("again", &sandboxes[2], "10.42.1.");
    assert!(!sandboxes[2].ip("-o addr show dev eth0").contains(&format!("{old}/")), "the old pod has it");
    assert!(node.netns.pings(&old));
    for id in ["old", "new", "again"] {
        node.del(id).unwrap();
    }
    assert_eq!(leases(&node), 0);
}

#[test]
fn a_newer_sandbox_of_the_same_pod_frees_the_older_one() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    cluster.put_pod("db", "");
    let node = cluster.start_node_with("a", 1, &["--address-quarantine-s=0", "--collect-after-s=1"]);
    let args = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=db";
    let first = Netns::new();
    node.cni_with("ADD", "first", Some(&first.path()), args, json!({})).unwrap();
    drop(first);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(leases(&node), 1, "the pod's object is there and nothing else serves it");
    let second = Netns::new();
    let address = address_of(&node.cni_with("ADD", "second", Some(&second.path()), args, json!({})).unwrap());
    eventually("the first is freed", || leases(&node) == 1);
    assert!(node.netns.pings(&address));
}

const CLUSTER_RANGE: &[&str] = &["--cluster-cidr=10.42.0.0/23,fd00:42::/63", "--address-quarantine-s=0"];

/// The blocks that are claimed, with their nodes.
fn claims(cluster: &Cluster) -> BTreeMap<String, String> {
    let entries = std::fs::read_dir(cluster.objects()).unwrap().map(|entry| entry.unwrap());
    let entries = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("podrange-"));
    let claim = |entry: std::fs::DirEntry| {
        let object: Value = serde_json::from_slice(&std::fs::read(entry.path()).unwrap()).unwrap();
        let text = |key: &str| object["spec"][key].as_str().unwrap().to_owned();
        (text("range"), text("node"))
    };
    entries.map(claim).collect()
}

#[test]
fn nodes_without_a_pod_cidr_take_blocks_of_the_cluster_range_and_keep_them() {
    let cluster = Cluster::new();
    for (number, name) in [(1, "a"), (2, "b")] {
        cluster.put_bare_node(name, number);
    }
    let mut nodes =
        [("a", 1), ("b", 2)].map(|(name, number)| cluster.start_node_with(name, number, CLUSTER_RANGE));
    let sandboxes = [Netns::new(), Netns::new()];
    for ((node, sandbox), id) in nodes.iter().zip(&sandboxes).zip(["one", "two"]) {
        eventually("the node is ready", || add(node, id, sandbox, json!({})).is_ok());
    }
    let claimed = claims(&cluster);
    assert_eq!(claimed.len(), 4, "one of each family for each node: {claimed:?}");
    let far = sandboxes[1].ip("-o -4 addr show dev eth0");
    let far = far.split_whitespace().skip_while(|word| *word != "inet").nth(1).unwrap().replace("/32", "");
    eventually("the other node's block is routed", || sandboxes[0].pings(&far));
    nodes[0].kill();
    nodes[0].start();
    assert!(sandboxes[0].pings(&far), "after a restart");
    assert_eq!(claims(&cluster), claimed, "found again by its name");

    // Both blocks of both families are taken: a third node says so, until one of the others is gone.
    cluster.put_bare_node("c", 3);
    let third = cluster.start_node_with("c", 3, CLUSTER_RANGE);
    let sandbox = Netns::new();
    let refused = add(&third, "three", &sandbox, json!({})).unwrap_err();
    assert_eq!(refused["code"], 11, "{refused}");
    assert!(refused.to_string().contains("has no block left"), "{refused}");
    let status = third.cni("STATUS", "", None, json!({})).unwrap_err();
    assert_eq!(status["code"], 50, "{status}");
    nodes[1].kill();
    cluster.remove("node-b");
    eventually("it takes them over", || add(&third, "three", &sandbox, json!({})).is_ok());
    let owners: Vec<String> = claims(&cluster).into_values().collect();
    assert_eq!(owners.iter().filter(|owner| *owner == "c").count(), 2, "{owners:?}");
    assert_eq!(owners.iter().filter(|owner| *owner == "a").count(), 2, "{owners:?}");
}

/// Two runtimes on one node whose configurations differ and have the same name: to the specification that is one network.
#[test]
fn two_configurations_of_one_name_are_one_network_and_take_nothing_from_each_other_but_by_gc() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let node = cluster.start_node("a", 1);
    let (first, second) = (Netns::new(), Netns::new());
    let one = json!({ "runtimeConfig": { "ipRanges": [[{ "subnet": "10.42.1.0/26" }]] } });
    let other = json!({ "runtimeConfig": { "ipRanges": [[{ "subnet": "10.42.1.64/26" }]] } });
    let results = [
        node.cni("ADD", "a", Some(&first.path()), one.clone()).unwrap(),
        node.cni("ADD", "b", Some(&second.path()), other.clone()).unwrap(),
    ];
    assert!(
        address_of(&results[1]).starts_with("10.42.1.") && address_of(&results[0]) != address_of(&results[1])
    );

    // The same attachment of the other configuration is the same one: refused, and the living one stays.
    let error = node.cni("ADD", "a", Some(&first.path()), other).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("attached already"), "{error}");
    assert_eq!((leases(&node), node.ports()), (2, 2));
    for (id, sandbox, result) in [("a", &first, &results[0]), ("b", &second, &results[1])] {
        let previous = json!({ "prevResult": result });
        node.cni("CHECK", id, Some(&sandbox.path()), previous).unwrap();
    }

    let list = |ids: &[&str]| {
        let valid = ids.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" }));
        json!({ "cni.dev/valid-attachments": valid.collect::<Vec<_>>() })
    };
    node.cni("GC", "", None, list(&["a", "b"])).unwrap();
    assert_eq!(leases(&node), 2);
    // A runtime that knows its own attachments alone says that the others are not valid; docs/cni.md warns of it.
    node.cni("GC", "", None, list(&["a"])).unwrap();
    assert_eq!((leases(&node), node.ports()), (1, 1));
    assert!(first.ip("-o addr show dev eth0").contains(&address_of(&results[0])));
}
