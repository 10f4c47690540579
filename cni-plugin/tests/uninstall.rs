//! Bringing the network half onto a node and off it, with the real programs in namespaces of their own.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::{Command, Output};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use support::{Cluster, Netns, Node};

const NETD: &str = env!("CARGO_BIN_EXE_holdfast-netd");

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// `holdfast-netd uninstall` in the node, whose files are all below its folder.
fn uninstall(node: &Node, more: &[&str]) -> Output {
    let mut command = node.netns.exec(NETD);
    command.arg("uninstall").arg("--root").arg(&node.state);
    command.args(["--bin-dir=/bin", "--conf-dir=/conf", "--state-dir=/state", "--pending-dir=/pending"]);
    command.args(["--socket=/run/netd.sock"]).args(more).output().unwrap()
}

fn install(node: &Node) {
    let conflist = node.state.join("10-holdfast.conflist");
    let list = json!({"cniVersion": "1.1.0", "name": "pods", "plugins": [{"type": "holdfast-cni"}]});
    std::fs::write(&conflist, list.to_string()).unwrap();
    let mut command = Command::new(NETD);
    command.arg("install-cni").arg("--conflist").arg(&conflist);
    command.arg("--bin-dir").arg(node.state.join("bin")).arg("--conf-dir").arg(node.state.join("conf"));
    let done = command.output().unwrap();
    assert!(done.status.success(), "{}", text(&done));
    std::fs::remove_file(conflist).unwrap();
}

/// What a node that never saw us has, too, is left out.
fn leftovers(node: &Node) -> Vec<String> {
    let mut found = Vec::new();
    for (what, shown) in [
        ("links", node.netns.ip("-o link show")),
        ("IPv4 routes", node.netns.ip("-4 route show table all proto 72")),
        ("IPv6 routes", node.netns.ip("-6 route show table all proto 72")),
        ("neighbours", node.netns.ip("neigh show nud permanent")),
        ("rules", text(&node.netns.exec("nft").args(["list", "tables"]).output().unwrap())),
    ] {
        let is_ours = |line: &&str| {
            what != "links" || line.split(": ").nth(1).is_some_and(|name| name.starts_with("hf"))
        };
        let lines = shown.lines().filter(is_ours);
        found.extend(lines.map(|line| format!("{what}: {line}")));
    }
    found
}

fn entries(folder: &Path) -> Vec<String> {
    let read = std::fs::read_dir(folder).into_iter().flatten();
    read.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

/// One node of two, with a pod attached.
struct Bed {
    node: Node,
    sandbox: Netns,
    _other: Node,
    _cluster: Cluster,
}

fn mk_bed() -> Bed {
    let cluster = Cluster::new();
    cluster.put_node("n1", 1, "10.1.1.0/24");
    cluster.put_node("n2", 2, "10.1.2.0/24");
    let node = cluster.start_node("n1", 1);
    let other = cluster.start_node("n2", 2);
    cluster.put_pod("web", "");
    let sandbox = Netns::new();
    node.add("web", &sandbox).unwrap();
    install(&node);
    Bed { node, sandbox, _other: other, _cluster: cluster }
}

#[test]
fn nothing_is_removed_while_the_agent_runs_or_pods_are_attached() {
    let Bed { mut node, sandbox, _other, _cluster } = mk_bed();
    let before = (node.rules_text(), node.netns.ip("-o link show"), entries(&node.state.join("conf")));
    let after =
        |node: &Node| (node.rules_text(), node.netns.ip("-o link show"), entries(&node.state.join("conf")));

    let refused = uninstall(&node, &["--force"]);
    assert!(
        !refused.status.success() && text(&refused).contains("agent must be stopped"),
        "{}",
        text(&refused)
    );
    node.kill();
    let refused = uninstall(&node, &[]);
    assert!(!refused.status.success(), "{}", text(&refused));
    assert!(text(&refused).contains("pod shop/web (hfv"), "{}", text(&refused));
    assert_eq!(after(&node), before, "a refusal changed something");
    assert!(node.state.join("bin/holdfast-cni").exists());
    drop(sandbox);
}

#[test]
fn what_is_left_on_a_node_is_what_was_there_before() {
    let Bed { mut node, sandbox, _other, _cluster } = mk_bed();
    assert!(!leftovers(&node).is_empty());
    node.kill();
    // The plugin promises a DEL, and a crash leaves a temporary file: both are ours to remove.
    node.del("web").unwrap();
    assert_eq!(entries(&node.pending()).len(), 1);
    std::fs::write(node.state.join("conf/.holdfast-10-holdfast.conflist.new"), "{").unwrap();
    std::fs::write(node.state.join("conf/99-other.conflist"), "{}").unwrap();
    // The runtime keeps results of sandboxes that died with the node.
    let results = node.state.join("var/lib/cni/results");
    std::fs::create_dir_all(&results).unwrap();
    for (name, plugin) in [("pods-1-eth0", "holdfast-cni"), ("others-1-eth0", "bridge")] {
        let list = json!({"cniVersion": "1.1.0", "name": "n", "plugins": [{"type": plugin}]}).to_string();
        let cached = json!({"kind": "cniCacheV1", "config": STANDARD.encode(list), "networkName": "n"});
        std::fs::write(results.join(name), cached.to_string()).unwrap();
    }

    let done = uninstall(&node, &["--force"]);
    assert!(done.status.success(), "{}", text(&done));
    for what in [
        "10-holdfast.conflist",
        "holdfast-cni",
        "hfv",
        "hf.vx",
        "inet holdfast and bridge holdfast",
        "leases",
    ] {
        assert!(text(&done).contains(what), "{what} is not named: {}", text(&done));
    }
    assert_eq!(leftovers(&node), Vec::<String>::new());
    assert_eq!(entries(&node.state.join("conf")), ["99-other.conflist"], "what is others' stays");
    assert_eq!(entries(&results), ["others-1-eth0"]);
    for folder in ["bin", "state", "pending"] {
        assert!(
            entries(&node.state.join(folder)).is_empty(),
            "{folder}: {:?}",
            entries(&node.state.join(folder))
        );
    }
    assert!(!sandbox.ip("-o link show").contains("eth0"), "the pod's end went, too");

    let again = uninstall(&node, &[]);
    assert!(again.status.success() && text(&again).contains("nothing of ours"), "{}", text(&again));
}

#[test]
fn a_removal_that_was_cut_off_is_ended_by_the_next_one() {
    let Bed { mut node, sandbox, _other, _cluster } = mk_bed();
    node.kill();
    drop(sandbox);
    // As after a kill in the middle: the conflist, the bridge and one table are gone.
    std::fs::remove_file(node.state.join("conf/10-holdfast.conflist")).unwrap();
    assert!(
        node.netns.exec("nft").args(["delete", "table", "bridge", "holdfast"]).status().unwrap().success()
    );
    node.netns.ip("link del hf.vx");
    let done = uninstall(&node, &["--force"]);
    assert!(done.status.success(), "{}", text(&done));
    assert_eq!(leftovers(&node), Vec::<String>::new());
}

#[test]
fn ready_is_what_status_says() {
    let cluster = Cluster::new();
    cluster.put_node("n1", 1, "10.1.1.0/24");
    let mut node = cluster.start_node("n1", 1);
    let ready =
        |node: &Node| Command::new(NETD).arg("ready").arg("--socket").arg(node.socket()).output().unwrap();
    assert!(ready(&node).status.success(), "{}", text(&ready(&node)));
    cluster.remove("node-n1");
    support::eventually("the agent has no range", || !ready(&node).status.success());
    let told = ready(&node);
    assert!(told.status.code() == Some(1) && text(&told).contains("not ready: "), "{}", text(&told));
    node.kill();
    let told = ready(&node);
    assert!(
        told.status.code() == Some(1) && text(&told).contains("the node agent is down"),
        "{}",
        text(&told)
    );
}
