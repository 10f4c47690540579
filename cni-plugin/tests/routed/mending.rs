//! Somebody changes a pod's link on the node, on which in this mode everything of the pod hangs.

use serde_json::json;

use super::cni::support::{Cluster, Netns, address_of, eventually, host_end};

#[test]
fn what_somebody_changes_at_the_nodes_end_of_a_pods_link_is_put_back() {
    let cluster = Cluster::new();
    cluster.put(
        "node-a",
        &json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": "a" },
            "spec": { "podCIDRs": ["10.42.1.0/24", "fd42:1::/64"] },
            "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }] },
        }),
    );
    let node = cluster.start_node("a", 1);
    let (sandbox, gone) = (Netns::new(), Netns::new());
    let result = node.cni("ADD", "c", Some(&sandbox.path()), json!({})).unwrap();
    // One whose link is gone is in nobody's way.
    node.cni("ADD", "gone", Some(&gone.path()), json!({})).unwrap();
    drop(gone);
    let (host, v4) = (host_end(&result), address_of(&result));
    let v6 = result["ips"][1]["address"].as_str().unwrap().split('/').next().unwrap();
    node.netns.ip("link add other type bridge");
    let cases = [
        format!("link set {host} down"),
        format!("route del {v4}"),
        format!("-6 route del {v6}"),
        format!("addr flush dev {host}"),
        format!("neigh replace {v4} lladdr 0a:00:00:00:00:07 dev {host} nud permanent"),
        format!("link set {host} mtu 1300"),
        format!("link set {host} address 0a:00:00:00:00:07"),
        format!("link set {host} master other"),
    ];
    for (number, change) in (0u8..).zip(&cases) {
        node.netns.ip(change);
        // A look at the node's plan, without waiting for the next one.
        cluster.put_node("b", 2, &format!("10.42.{}.0/24", 100 + number));
        eventually(change, || {
            let previous = json!({ "prevResult": result });
            node.cni("CHECK", "c", Some(&sandbox.path()), previous).is_ok()
        });
        assert!(node.netns.pings(&v4) && node.netns.pings(v6), "{change}");
        assert!(sandbox.pings("169.254.1.1"), "{change}");
    }
    node.del("gone").unwrap();
}
