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

#[test]
fn check_should_fail_when_something_that_the_result_does_not_tell_is_wrong() {
    let bed = Bed::new();
    let host = bed.host_end();
    let address = super::support::address_of(&bed.result);
    let device = pod_device(&bed.result);
    let mut cases = vec![
        (
            format!("route del {address}"),
            format!("route add {address} dev {device} proto 72 scope link"),
            "lacks the route",
        ),
        (
            format!("neigh replace {address} lladdr 0a:00:00:00:00:07 dev {device} nud permanent"),
            String::new(),
            "neighbour",
        ),
    ];
    // What only one of the modes has goes ahead: the last case is not put right.
    let of_port = |change: &str| format!("link set {host} type bridge_slave {change}");
    let own = if is_routed() {
        vec![(format!("link set {host} mtu 1300"), format!("link set {host} mtu 1450"), "another MTU")]
    } else {
        [
            ("isolated off", "isolated on", "isolated"),
            ("learning on", "learning off", "learns"),
            ("flood on", "flood off", "flooded"),
        ]
        .map(|(wrong, right, part)| (of_port(wrong), of_port(right), part))
        .to_vec()
    };
    cases.splice(0..0, own);
    for (take, put, part) in cases {
        bed.node.netns.ip(&take);
        bed.refuses(part);
        if !put.is_empty() {
            bed.node.netns.ip(&put);
            bed.check().unwrap();
        }
    }
    if is_routed() {
        let bed = Bed::new();
        bed.node.netns.ip(&format!("addr del 169.254.1.1/32 dev {}", bed.host_end()));
        bed.refuses("gateway's address");
    }
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
    bed.node.netns.ip(&format!("link set {} down", bed.host_end()));
    bed.refuses("is down");
    let bed = Bed::new();
    if is_routed() {
        bed.node.netns.ip("link add other type bridge");
        bed.node.netns.ip(&format!("link set {} master other", bed.host_end()));
        bed.refuses("port of another interface");
        return;
    }
    bed.node.netns.ip(&format!("link set {} down", bed.host_end()));
    bed.node.netns.ip(&format!("link set {} up", bed.host_end()));
    eventually("it forwards", || bed.check().is_ok());
    bed.node.netns.ip(&format!("link set {} nomaster", bed.host_end()));
    bed.refuses("not in the bridge");
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
