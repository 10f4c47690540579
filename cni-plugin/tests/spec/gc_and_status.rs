//! Section 2, GC and STATUS.

use serde_json::{Value, json};

use super::support::{Cluster, Netns, address_of, eventually, pod_device};
use super::{add, mk_node};

fn valid(ids: &[&str]) -> Value {
    let entries: Vec<Value> = ids.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
    json!({ "cni.dev/valid-attachments": entries })
}

#[test]
fn gc_should_free_every_attachment_that_is_not_in_the_list_and_no_other() {
    let (_cluster, node) = mk_node();
    let sandboxes = [Netns::new(), Netns::new(), Netns::new()];
    let mut addresses = Vec::new();
    for (id, sandbox) in ["a", "b", "c"].into_iter().zip(&sandboxes) {
        addresses.push(address_of(&add(&node, id, sandbox).unwrap()));
    }
    let mut other = valid(&[]);
    other["name"] = json!("other");
    node.cni("GC", "", None, other).unwrap();
    assert_eq!(node.ports(), 3, "another network's list says nothing about ours");
    node.cni("GC", "", None, valid(&["b", "unknown"])).unwrap();
    assert_eq!(node.ports(), 1);
    assert!(node.netns.pings(&addresses[1]) && !node.netns.pings(&addresses[0]));
    let leases = node.dump()["leases"].as_array().unwrap().len();
    assert_eq!(leases, 1);
    // The namespaces that are gone were gone before: GC may assume that.
    drop(sandboxes);
    node.cni("GC", "", None, valid(&[])).unwrap();
    assert_eq!((node.ports(), node.dump()["leases"].clone()), (0, json!([])));
}

#[test]
fn gc_should_remove_what_belongs_to_no_attachment_at_all() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    let result = add(&node, "c", &sandbox).unwrap();
    let device = pod_device(&result);
    let clean = node.pod_state();
    let left_over = "0a:00:00:00:00:07";
    for command in [
        "link add hfv0123456789ab type veth peer name hfleft",
        "link set hfv0123456789ab alias holdfast:gone/eth0",
        &format!("route add 10.42.1.99 dev {device} proto 72 scope link"),
        &format!("neigh add 10.42.1.99 lladdr {left_over} dev {device} nud permanent"),
    ] {
        node.netns.ip(command);
    }
    let mut element = node.netns.exec("nft");
    element.args(["add", "element", "inet", "holdfast", "cls_in4", "{ 10.42.1.99 : 0x1 }"]);
    assert!(element.status().unwrap().success());
    assert_eq!(node.ports(), 2);
    node.cni("GC", "", None, valid(&["c"])).unwrap();
    assert_eq!(node.ports(), 1);
    eventually("the foreign element is gone", || node.pod_state() == clean);
}

#[test]
fn gc_must_not_take_an_interface_that_the_list_names_even_without_a_lease() {
    let (_cluster, node) = mk_node();
    for command in [
        "link add hfv0123456789ab type veth peer name hfleft",
        "link set hfv0123456789ab alias holdfast:kept/eth0",
    ] {
        node.netns.ip(command);
    }
    node.cni("GC", "", None, valid(&["kept"])).unwrap();
    assert_eq!(node.ports(), 1);
    node.cni("GC", "", None, valid(&[])).unwrap();
    assert_eq!(node.ports(), 0);
}

#[test]
fn gc_must_have_its_list_and_a_null_list_is_an_empty_one() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    add(&node, "c", &sandbox).unwrap();
    let error = node.cni("GC", "", None, json!({})).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    assert_eq!(node.ports(), 1);
    // The key of library versions before the final 1.1.0.
    let entries = json!([{ "containerID": "c", "ifname": "eth0" }]);
    node.cni("GC", "", None, json!({ "cni.dev/attachments": entries })).unwrap();
    assert_eq!(node.ports(), 1);
    node.cni("GC", "", None, json!({ "cni.dev/valid-attachments": null })).unwrap();
    assert_eq!(node.ports(), 0);
}

#[test]
fn gc_should_go_on_after_an_error_and_report_it() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let mut node = cluster.start_node("a", 1);
    let sandboxes = [Netns::new(), Netns::new()];
    for (id, sandbox) in ["a", "b"].into_iter().zip(&sandboxes) {
        add(&node, id, sandbox).unwrap();
    }
    // Without objects no rules can be made, so leases have to wait; interfaces need not.
    node.kill();
    let away = cluster.folder.path().join("away");
    std::fs::rename(cluster.objects(), &away).unwrap();
    node.start();
    let error = node.cni("GC", "", None, valid(&[])).unwrap_err();
    let details = error["details"].as_str().unwrap();
    assert!(details.contains("a/eth0") && details.contains("b/eth0"), "{error}");
    assert_eq!(node.ports(), 0);
    std::fs::rename(&away, cluster.objects()).unwrap();
    eventually("GC succeeds", || node.cni("GC", "", None, valid(&[])).is_ok());
    assert_eq!(node.dump()["leases"], json!([]));
}

#[test]
fn status_must_succeed_when_add_can_be_served_and_fail_with_50_when_not() {
    let cluster = Cluster::new();
    let mut node = cluster.start_node("a", 1);
    let status = |node: &super::Node| node.cni("STATUS", "", None, json!({}));
    let error = status(&node).unwrap_err();
    assert_eq!(error["code"], 50, "no Node object, so no overlay: {error}");
    cluster.put_node("a", 1, "10.42.1.0/24");
    eventually("ready", || status(&node).is_ok());
    let sandbox = Netns::new();
    add(&node, "c", &sandbox).unwrap();
    // The daemon is down.
    node.kill();
    assert_eq!(status(&node).unwrap_err()["code"], 50);
    node.start();
    eventually("ready again", || status(&node).is_ok());
}

#[test]
fn status_should_fail_when_the_addresses_are_exhausted() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/30");
    let node = cluster.start_node("a", 1);
    let sandboxes = [Netns::new(), Netns::new()];
    for (id, sandbox) in ["a", "b"].into_iter().zip(&sandboxes) {
        node.cni("STATUS", "", None, json!({})).unwrap();
        add(&node, id, sandbox).unwrap();
    }
    let error = node.cni("STATUS", "", None, json!({})).unwrap_err();
    assert_eq!(error["code"], 50, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("10.42.1.0/30 is used up"), "{error}");
    let third = Netns::new();
    assert_eq!(add(&node, "c", &third).unwrap_err()["code"], 11);
    node.del("a").unwrap();
    node.cni("STATUS", "", None, json!({})).unwrap();
}

#[test]
fn status_should_say_51_when_the_overlay_cannot_be_made_as_planned() {
    let (cluster, node) = mk_node();
    // Somebody else's device has the name: routes to other nodes cannot be put in place.
    node.paused(|| {
        node.netns.ip("link del hf.vx");
        node.netns.ip("link add hf.vx type bridge");
    });
    cluster.put_node("b", 2, "10.42.2.0/24");
    eventually("51", || node.cni("STATUS", "", None, json!({})).is_err_and(|error| error["code"] == 51));
    node.netns.ip("link del hf.vx");
    eventually("ready", || node.cni("STATUS", "", None, json!({})).is_ok());
}

#[test]
fn other_calls_must_work_without_and_in_spite_of_status() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/30");
    let node = cluster.start_node("a", 1);
    let sandboxes = [Netns::new(), Netns::new()];
    let mut results = Vec::new();
    for (id, sandbox) in ["a", "b"].into_iter().zip(&sandboxes) {
        results.push(add(&node, id, sandbox).unwrap());
    }
    assert!(node.cni("STATUS", "", None, json!({})).is_err());
    let previous = json!({ "prevResult": results[0] });
    node.cni("CHECK", "a", Some(&sandboxes[0].path()), previous).unwrap();
    node.cni("GC", "", None, valid(&["a", "b"])).unwrap();
    node.del("a").unwrap();
}
