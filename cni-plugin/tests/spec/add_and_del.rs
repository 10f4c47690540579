//! Section 2, ADD and DEL, and section 3, what runs beside what.

use serde_json::{Value, json};

use super::support::{Netns, address_of, is_routed};
use super::{add, call, mk_node};

#[test]
fn add_must_make_the_interface_of_that_name_in_that_namespace() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    let variables = [("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "net1"), ("CNI_NETNS", &sandbox.path())];
    let result = call(&node, "ADD", &variables, json!({})).unwrap();
    assert!(sandbox.ip("-o -4 addr show dev net1").contains(&address_of(&result)));
    assert!(node.netns.pings(&address_of(&result)));
}

#[test]
fn add_must_fail_if_an_interface_of_that_name_exists_and_leave_it_alone() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    sandbox.ip("link add eth0 type veth peer name other");
    let before = sandbox.ip("-o link show");
    let error = add(&node, "c", &sandbox).unwrap_err();
    assert!(error["code"] == 4 && error["msg"].as_str().unwrap().contains("CNI_IFNAME"), "{error}");
    assert_eq!(sandbox.ip("-o link show"), before);
    assert_eq!((node.ports(), node.dump()["leases"].clone()), (0, json!([])));
    // A runtime undoes what failed.
    node.del("c").unwrap();
    assert_eq!(sandbox.ip("-o link show"), before);
}

#[test]
fn a_previous_result_must_be_passed_on_with_ours_after_it() {
    let (_cluster, node) = mk_node();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let sandbox = Netns::new();
        let mut ip = json!({ "address": "192.0.2.7/24", "gateway": "192.0.2.1", "interface": 1 });
        if version < "1.0.0" {
            ip["version"] = json!("4");
        }
        let previous = json!({
            "cniVersion": version,
            "interfaces": [{ "name": "before" }, { "name": "eth7", "mac": "0a:00:00:00:00:07", "sandbox": sandbox.path() }],
            "ips": [ip],
            "routes": [{ "dst": "198.51.100.0/24", "gw": "192.0.2.1" }],
            "dns": { "nameservers": ["192.0.2.53"] },
            "from.example/key": { "kept": true },
        });
        let extra = json!({ "cniVersion": version, "prevResult": previous });
        let result = node.cni("ADD", "c", Some(&sandbox.path()), extra).unwrap();
        for (list, length) in [("interfaces", 2), ("ips", 1), ("routes", 1)] {
            let head = &result[list].as_array().unwrap()[..length];
            assert_eq!(head, &previous[list].as_array().unwrap()[..], "{version} {list}");
        }
        let of_pod = 4 - usize::from(is_routed());
        assert_eq!(
            result["ips"][1]["interface"], of_pod,
            "indices of ours move behind the earlier interfaces"
        );
        assert_eq!(result["dns"], previous["dns"]);
        assert_eq!(result["from.example/key"], previous["from.example/key"]);
        // What the chain gives in the end is what CHECK gets.
        if version != "0.3.1" {
            let extra = json!({ "cniVersion": version, "prevResult": result });
            node.cni("CHECK", "c", Some(&sandbox.path()), extra).unwrap();
        }
        node.del("c").unwrap();
    }
}

#[test]
fn a_second_interface_for_one_container_is_refused_and_takes_nothing_from_the_first() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    let path = sandbox.path();
    let of = |name| [("CNI_CONTAINERID", "c"), ("CNI_IFNAME", name), ("CNI_NETNS", path.as_str())];
    let first = address_of(&call(&node, "ADD", &of("eth0"), json!({})).unwrap());
    let other = json!({ "name": "second" });
    let second = call(&node, "ADD", &of("net1"), other.clone()).unwrap_err();
    // Both would go by one gateway, and what leaves by the other's port is dropped there.
    assert_eq!(second["code"], 4, "{second}");
    assert!(second["details"].as_str().unwrap().contains("one attachment"), "{second}");
    assert!(node.netns.pings(&first), "the refused one took nothing from the first");
    call(&node, "DEL", &of("net1"), other).unwrap();
    assert!(node.netns.pings(&first));
}

#[test]
fn a_default_route_of_another_interface_is_left_to_it() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    for command in [
        "link add first type veth peer name far",
        "addr add 192.0.2.7/24 dev first",
        "link set first up",
        "link set far up",
        "route add default via 192.0.2.1 dev first",
    ] {
        sandbox.ip(command);
    }
    let result = add(&node, "c", &sandbox).unwrap();
    assert!(sandbox.ip("route show default").contains("via 192.0.2.1 dev first"));
    assert_eq!(result.get("routes"), None, "{result}");
    node.cni("CHECK", "c", Some(&sandbox.path()), json!({ "prevResult": result })).unwrap();
    node.del("c").unwrap();
    assert!(sandbox.ip("route show default").contains("via 192.0.2.1 dev first"));
}

#[test]
fn del_must_remove_what_add_made() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    let (before, links) = (node.pod_state(), sandbox.ip("-o link show"));
    let result = add(&node, "c", &sandbox).unwrap();
    assert_ne!(node.pod_state(), before);
    node.cni("DEL", "c", Some(&sandbox.path()), json!({ "prevResult": result })).unwrap();
    assert_eq!(node.pod_state(), before);
    assert_eq!((node.ports(), node.dump()["leases"].clone()), (0, json!([])));
    assert_eq!(sandbox.ip("-o link show"), links);
}

#[test]
fn del_should_succeed_without_a_previous_result_and_with_one_that_is_none() {
    let (_cluster, node) = mk_node();
    for previous in
        [Value::Null, json!({}), json!([1]), json!("x"), json!({ "ips": [{ "address": "nonsense" }] })]
    {
        let sandbox = Netns::new();
        add(&node, "c", &sandbox).unwrap();
        node.cni("DEL", "c", Some(&sandbox.path()), json!({ "prevResult": previous })).unwrap();
        assert_eq!(node.ports(), 0, "{previous}");
    }
}

#[test]
fn del_should_succeed_and_free_the_address_without_the_namespace_and_without_its_path() {
    let (_cluster, node) = mk_node();
    for netns in [Some("/nonexistent/netns"), None] {
        let sandbox = Netns::new();
        add(&node, "c", &sandbox).unwrap();
        drop(sandbox);
        node.cni("DEL", "c", netns, json!({})).unwrap();
        assert_eq!((node.ports(), node.dump()["leases"].clone()), (0, json!([])));
    }
}

#[test]
fn del_should_be_served_whatever_else_the_configuration_asks_for() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    add(&node, "c", &sandbox).unwrap();
    let variables = [("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "eth0"), ("CNI_ARGS", "nonsense")];
    let extra =
        json!({ "ipMasq": true, "ipam": { "type": "x" }, "runtimeConfig": { "deviceID": "x", "mac": 7 } });
    call(&node, "DEL", &variables, extra).unwrap();
    assert_eq!(node.ports(), 0);
}

#[test]
fn del_must_be_accepted_many_times_and_for_what_never_was() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    add(&node, "c", &sandbox).unwrap();
    for _ in 0..3 {
        node.del("c").unwrap();
        node.del("never").unwrap();
    }
    // Somebody deleted the interface: the rest goes all the same.
    add(&node, "c", &sandbox).unwrap();
    sandbox.ip("link del eth0");
    node.del("c").unwrap();
    assert_eq!(node.dump()["leases"], json!([]));
}

#[test]
fn del_of_another_network_must_not_take_a_living_attachment_away() {
    let (_cluster, mut node) = mk_node();
    let sandbox = Netns::new();
    let address = address_of(&add(&node, "c", &sandbox).unwrap());
    let other = json!({ "name": "other" });
    assert_eq!(node.cni("ADD", "c", Some(&sandbox.path()), other.clone()).unwrap_err()["code"], 4);
    node.cni("DEL", "c", Some(&sandbox.path()), other.clone()).unwrap();
    assert!(node.netns.pings(&address));
    // The same by a record while the agent is down.
    node.kill();
    node.cni("DEL", "c", None, other).unwrap();
    node.start();
    assert!(node.netns.pings(&address));
    assert!(super::support::is_empty(&node.pending()), "the record is done with");
    node.del("c").unwrap();
    assert_eq!(node.ports(), 0);
}

#[test]
fn calls_for_different_containers_must_be_served_at_the_same_time() {
    let (_cluster, node) = mk_node();
    let clean = node.pod_state();
    let sandboxes: Vec<Netns> = (0..24).map(|_| Netns::new()).collect();
    let addresses: Vec<String> = std::thread::scope(|scope| {
        let adds: Vec<_> = sandboxes
            .iter()
            .enumerate()
            .map(|(index, sandbox)| {
                let node = &node;
                scope.spawn(move || address_of(&add(node, &format!("c{index}"), sandbox).unwrap()))
            })
            .collect();
        adds.into_iter().map(|add| add.join().unwrap()).collect()
    });
    let distinct: std::collections::BTreeSet<&String> = addresses.iter().collect();
    assert_eq!(distinct.len(), sandboxes.len());
    assert!(addresses.iter().all(|address| node.netns.pings(address)));
    std::thread::scope(|scope| {
        for index in 0..sandboxes.len() {
            let node = &node;
            scope.spawn(move || node.del(&format!("c{index}")).unwrap());
        }
    });
    assert_eq!((node.ports(), node.pod_state()), (0, clean));
}

#[test]
fn a_failed_add_must_leave_nothing_behind() {
    let (_cluster, node) = mk_node();
    let clean = node.pod_state();
    // A namespace that vanishes meanwhile, one that is none, and one of another kind.
    for path in ["/proc/self/ns/mnt", "/dev/null", "/tmp"] {
        let error = node.cni("ADD", "c", Some(path), json!({})).unwrap_err();
        assert!([4, 999].contains(&error["code"].as_u64().unwrap()), "{path}: {error}");
        assert_eq!((node.ports(), node.dump()["leases"].clone()), (0, json!([])), "{path}");
        assert_eq!(node.pod_state(), clean, "{path}");
    }
}
