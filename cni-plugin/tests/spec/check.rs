//! Section 2, CHECK. Each test takes one thing away behind the plugin's back.

use serde_json::{Value, json};

use super::support::{Cluster, Netns, Node, eventually, host_end, is_routed, pod_device, pod_end};
use super::{add, mk_node};

struct Bed {
    _cluster: Cluster,
    node: Node,
    sandbox: Netns,
    result: Value,
}

impl Bed {
    fn new() -> Self {
        let (cluster, node) = mk_node();
        let sandbox = Netns::new();
        let result = add(&node, "c", &sandbox).unwrap();
        Self { _cluster: cluster, node, sandbox, result }
    }

    fn check(&self) -> Result<Value, Value> {
        self.check_with(self.result.clone())
    }

    fn check_with(&self, previous: Value) -> Result<Value, Value> {
        self.node.cni("CHECK", "c", Some(&self.sandbox.path()), json!({ "prevResult": previous }))
    }

    /// CHECK fails with a sentence that has this part.
    fn refuses(&self, part: &str) {
        let error = self.check().expect_err(part);
        assert_eq!(error["code"], 999, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(part), "{part}: {error}");
    }

    /// Something that must succeed on the node.
    fn sh(&self, script: &str) {
        let status = self.node.netns.exec("sh").args(["-c", script]).status().unwrap();
        assert!(status.success(), "{script}");
    }

    fn host_end(&self) -> String {
        host_end(&self.result).to_owned()
    }
}

#[test]
fn check_must_consult_the_previous_result() {
    let bed = Bed::new();
    bed.check().unwrap();
    let error = bed.node.cni("CHECK", "c", Some(&bed.sandbox.path()), json!({})).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    let mut other = bed.result.clone();
    other["ips"][0]["address"] = json!("10.42.1.77/32");
    assert!(bed.check_with(other).unwrap_err()["msg"].as_str().unwrap().contains("not in prevResult"));
    let mut other = bed.result.clone();
    other["interfaces"][pod_end(&bed.result)]["mac"] = json!("0a:00:00:00:00:07");
    assert!(bed.check_with(other).unwrap_err()["msg"].as_str().unwrap().contains("names MAC"));
}

#[test]
fn check_must_allow_for_changes_by_a_later_plugin_that_the_previous_result_tells() {
    let bed = Bed::new();
    bed.sandbox.ip("route del default");
    bed.sandbox.ip("link set eth0 mtu 1300");
    bed.refuses("MTU");
    let mut later = bed.result.clone();
    later["interfaces"][pod_end(&bed.result)]["mtu"] = json!(1300);
    assert!(
        bed.check_with(later.clone()).unwrap_err()["msg"].as_str().unwrap().contains("route to 0.0.0.0/0")
    );
    later["routes"] = json!([]);
    bed.check_with(later).unwrap();
}

#[test]
fn check_should_fail_when_an_interface_address_or_route_of_the_result_is_missing() {
    for (command, part) in [
        ("link del eth0", "is missing"),
        ("addr flush dev eth0", "address"),
        ("route del default", "route to 0.0.0.0/0"),
        ("route del 169.254.1.1", "route to"),
        ("link set eth0 address 0a:00:00:00:00:07", "MAC"),
    ] {
        let bed = Bed::new();
        bed.sandbox.ip(command);
        bed.refuses(part);
    }
}

/// On the node's side the agent mends what it notices, and CHECK waits for that: what it finds well is well.
#[test]
fn check_should_find_the_nodes_side_well_because_it_is_mended_first() {
    let bed = Bed::new();
    let host = bed.host_end();
    let address = super::support::address_of(&bed.result);
    let device = pod_device(&bed.result);
    let of_link = |flag: &str| format!("ip -d link show {host} | grep -q '{flag}'");
    let mut cases = if is_routed() {
        vec![
            (
                format!("ip addr del 169.254.1.1/32 dev {host}"),
                format!("ip addr show dev {host} | grep -q 169.254.1.1"),
            ),
            (
                format!("ip link add other type bridge; ip link set {host} master other"),
                format!("! {}", of_link("master other")),
            ),
        ]
    } else {
        vec![
            (format!("ip link set {host} type bridge_slave isolated off"), of_link("isolated on")),
            (format!("ip link set {host} type bridge_slave learning on"), of_link("learning off")),
            (format!("ip link set {host} type bridge_slave flood on"), of_link("flood off")),
            (format!("ip link set {host} nomaster"), of_link("master hf0")),
        ]
    };
    cases.extend([
        (format!("ip link set {host} mtu 1300"), of_link("mtu 1450")),
        (format!("ip route del {address}"), format!("ip route show | grep -q '^{address} dev {device}'")),
        (
            format!("ip neigh replace {address} lladdr 0a:00:00:00:00:07 dev {device} nud permanent"),
            "! ip neigh show | grep -q 0a:00:00:00:00:07".to_owned(),
        ),
        (format!("ip link set {host} down"), of_link("[<,]UP[,>]")),
    ]);
    for (take, whole) in cases {
        bed.sh(&take);
        eventually(&format!("CHECK after {take}"), || bed.check().is_ok());
        bed.sh(&whole);
        assert!(bed.node.netns.pings(&address), "{take}");
    }
}

#[test]
fn check_should_fail_when_something_that_the_result_does_not_tell_is_wrong() {
    let bed = Bed::new();
    if is_routed() {
        bed.sh(&format!("ip link del {}", bed.host_end()));
        bed.refuses("is missing on the node");
        return;
    }
    // Nobody can put the port into this one.
    bed.node.paused(|| {
        bed.sh("ip link del hf0");
        bed.sh("ip link add hf0 type vxlan id 9 dstport 9999 local 192.0.2.1");
    });
    bed.refuses("not in the bridge");
    bed.sh("ip link del hf0");
    eventually("all is mended", || bed.check().is_ok());
}

#[test]
fn check_should_fail_when_the_sandboxes_neighbour_or_sysctl_is_wrong() {
    let bed = Bed::new();
    bed.sandbox.ip("neigh replace 169.254.1.1 lladdr 0a:00:00:00:00:07 dev eth0 nud permanent");
    bed.refuses("neighbour");
    let bed = Bed::new();
    let mut sysctl = bed.sandbox.exec("sh");
    sysctl.args(["-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/accept_redirects"]);
    assert!(sysctl.status().unwrap().success());
    bed.refuses("accept_redirects");
}

#[test]
fn check_should_fail_when_the_container_is_generally_unreachable() {
    let bed = Bed::new();
    bed.sandbox.ip("link set eth0 down");
    bed.refuses(if is_routed() { "is down in the sandbox" } else { "a port that does not forward" });
}

#[test]
fn check_should_fail_when_the_address_is_not_leased() {
    let bed = Bed::new();
    let previous = json!({ "prevResult": bed.result, "name": "another" });
    let error = bed.node.cni("CHECK", "c", Some(&bed.sandbox.path()), previous).unwrap_err();
    assert_eq!(error["code"], 3, "the lease is another network's: {error}");
    bed.node.del("c").unwrap();
    let error = bed.check().unwrap_err();
    assert_eq!(error["code"], 3, "{error}");
}

#[test]
fn check_should_fail_when_the_daemon_that_connectivity_depends_on_is_down() {
    let mut bed = Bed::new();
    bed.node.kill();
    assert_eq!(bed.check().unwrap_err()["code"], 11);
}

/// What was noticed is mended before the answer, so a check right after somebody's interference finds the pod well or says why not.
#[test]
fn check_should_find_firewall_rules_that_are_missing() {
    let bed = Bed::new();
    let pins =
        if is_routed() { "flush set inet holdfast pin_routed4" } else { "flush set bridge holdfast pin4" };
    for what in [pins, "delete table inet holdfast", "flush chain inet holdfast forward"] {
        let mut command = bed.node.netns.exec("nft");
        assert!(command.args(what.split(' ')).status().unwrap().success());
        bed.check().unwrap();
        assert!(bed.node.rules_text().contains(&bed.host_end()), "{what}");
        assert!(bed.node.rules_text().contains("chain forward"), "{what}");
    }
}

#[test]
fn check_must_be_served_immediately_after_add() {
    let (_cluster, node) = mk_node();
    for round in 0..10 {
        let sandbox = Netns::new();
        let id = format!("c{round}");
        let result = add(&node, &id, &sandbox).unwrap();
        node.cni("CHECK", &id, Some(&sandbox.path()), json!({ "prevResult": result })).unwrap();
        node.del(&id).unwrap();
    }
}
