//! `holdfast-netd doctor` names each thing that interferes, and nothing on a healthy node. On the real binaries and a real kernel,
//! each finding provoked in a namespace of its own. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Child;

use serde_json::Value;
use support::{Cluster, Netns, Node, eventually};

/// What the doctor finds, by name, and its exit code.
struct Examined {
    findings: Vec<(String, String)>,
    code: i32,
}

impl Examined {
    fn names(&self) -> Vec<&str> {
        self.findings.iter().map(|(name, _)| name.as_str()).collect()
    }
}

fn examine_at(netns: &Netns, socket: &Path, root: &Path) -> Examined {
    let mut command = netns.exec(env!("CARGO_BIN_EXE_holdfast-netd"));
    command.args(["doctor", "--json", "--socket"]).arg(socket).arg("--root").arg(root);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let told: Value = serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{error}: {text} {}", String::from_utf8_lossy(&output.stderr)));
    assert_eq!(told["notLookedAt"].as_array().unwrap().len(), 0, "{told}");
    let text = |finding: &Value, key: &str| finding[key].as_str().unwrap().to_owned();
    let findings = told["findings"].as_array().unwrap().iter();
    Examined {
        findings: findings.map(|finding| (text(finding, "name"), text(finding, "what"))).collect(),
        code: output.status.code().unwrap(),
    }
}

struct Bed {
    node: Node,
    cluster: Cluster,
    /// In the place of the machine's /run and /etc.
    root: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let cluster = Cluster::new();
        cluster.put_node("a", 1, "10.42.1.0/24");
        cluster.put_node("b", 2, "10.42.2.0/24");
        let node = cluster.start_node("a", 1);
        Self { node, cluster, root: tempfile::tempdir().unwrap() }
    }

    fn examine(&self) -> Examined {
        examine_at(&self.node.netns, &self.node.socket(), self.root.path())
    }

    fn sh(&self, script: &str) {
        let output = self.node.netns.exec("sh").args(["-ec", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// After `make` exactly this is found, with this in its sentence, and after `unmake` nothing.
    fn finds(&self, make: &str, unmake: &str, name: &str, part: &str) {
        self.sh(make);
        let found = self.examine();
        assert_eq!(found.names(), [name], "{make}: {:?}", found.findings);
        assert!(found.findings[0].1.contains(part), "{make}: {:?}", found.findings);
        assert_eq!(found.code, 1, "{make}");
        self.sh(unmake);
        self.is_healthy(unmake);
    }

    fn is_healthy(&self, after: &str) {
        let found = self.examine();
        assert!(found.findings.is_empty() && found.code == 0, "after {after}: {:?}", found.findings);
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn index_of(&self, link: &str) -> String {
        self.node.netns.ip(&format!("-o link show {link}")).split(':').next().unwrap().to_owned()
    }
}

#[test]
fn a_healthy_node_with_a_pod_yields_nothing() {
    let bed = Bed::new();
    let pod = Netns::new();
    bed.cluster.put_pod("one", "");
    bed.node.add("one", &pod).unwrap();
    bed.is_healthy("a start");
    let output = bed
        .node
        .netns
        .exec(env!("CARGO_BIN_EXE_holdfast-netd"))
        .args(["doctor", "--socket"])
        .arg(bed.node.socket())
        .arg("--root")
        .arg(bed.root.path())
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "nothing is wrong\n");
}

#[test]
fn foreign_chains_that_may_drop_are_named_and_harmless_ones_are_not() {
    let bed = Bed::new();
    let gone = "nft delete table inet fw";
    let base = |hook: &str, rest: &str| {
        let (policy, rules) =
            rest.strip_prefix("policy drop;").map_or(("accept", rest), |rest| ("drop", rest));
        let rules = rules.split(';').map(str::trim).filter(|rule| !rule.is_empty());
        let rules: String = rules.map(|rule| format!(" add rule inet fw c {rule};")).collect();
        format!(
            "nft 'add table inet fw; add chain inet fw c {{ type filter hook {hook} priority 5; policy {policy}; }};{rules}'"
        )
    };
    bed.finds(&base("forward", "policy drop;"), gone, "forward-drop", "chain c of table inet fw");
    bed.finds(&base("input", "policy drop; tcp dport 22 accept"), gone, "input-drop", "chain c");
    bed.finds(&base("output", "policy drop;"), gone, "policy-drop", "chain c");
    bed.finds(&base("prerouting", "policy drop;"), gone, "policy-drop", "chain c");
    bed.finds(&base("forward", "ip daddr 10.0.0.0/8 reject"), gone, "drop-rule", "has 1 rules");
    bed.finds(&base("input", "udp dport 4789 drop"), gone, "drop-rule", "has 1 rules");
    let jumps = "nft 'add table ip fw; add chain ip fw d; add rule ip fw d drop; \
                 add chain ip fw c { type filter hook forward priority 0; }; add rule ip fw c iifname \"hf0\" jump d'";
    bed.finds(jumps, "nft delete table ip fw", "drop-rule", "table ip fw");
    bed.finds(
        "nft 'add table bridge fw; add chain bridge fw c { type filter hook forward priority 0; policy drop; }'",
        "nft delete table bridge fw",
        "forward-drop",
        "table bridge fw",
    );
    // As iptables-nft writes them.
    if bed.node.netns.exec("iptables-nft").arg("-S").output().is_ok_and(|output| output.status.success()) {
        bed.finds(
            "iptables-nft -P FORWARD DROP",
            "iptables-nft -P FORWARD ACCEPT",
            "forward-drop",
            "table ip filter",
        );
        bed.finds(
            "iptables-nft -A FORWARD -j REJECT",
            "iptables-nft -F FORWARD",
            "drop-rule",
            "chain FORWARD",
        );
    }
    for harmless in [
        base("forward", "policy drop; iifname \"hf0\" accept; oifname \"hf0\" accept"),
        base("input", "policy drop; udp dport 4789 accept"),
        base("forward", "ct state invalid drop"),
        base("forward", "iifname \"docker0\" drop"),
        base("input", "tcp dport 22 drop"),
        "nft 'add table inet fw; add chain inet fw unused; add rule inet fw unused drop'".to_owned(),
    ] {
        bed.sh(&harmless);
        bed.is_healthy(&harmless);
        bed.sh(gone);
    }
}

#[test]
fn ports_routes_and_filters_that_interfere_are_named() {
    let bed = Bed::new();
    let taken = "ip link add other type vxlan external dstport 4799";
    bed.sh(taken);
    bed.is_healthy("a VXLAN device of another port");
    bed.sh("ip link del other");
    bed.sh("ip link add other type vxlan id 1 dstport 4789 nolearning local 192.0.2.1");
    bed.is_healthy("a VXLAN device of another identifier");
    bed.sh("ip link del other");

    bed.sh("ip link add up1 type veth peer name up2; ip addr add 10.42.2.129/25 dev up1; ip link set up1 up; ip link set up2 up");
    let found = bed.examine();
    assert_eq!(found.names(), ["range-overlap"], "{:?}", found.findings);
    assert!(
        found.findings[0].1.contains("10.42.2.0/24 overlaps the route to 10.42.2.128/25 by up1"),
        "{:?}",
        found.findings
    );
    bed.sh("ip link del up1");
    bed.is_healthy("the link is gone");

    bed.finds(
        "echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter",
        "echo 0 > /proc/sys/net/ipv4/conf/eth0/rp_filter",
        "rp-filter",
        "of eth0 is strict",
    );
    bed.finds(
        "echo 0 > /proc/sys/net/ipv4/conf/hf0/forwarding",
        "echo 1 > /proc/sys/net/ipv4/conf/hf0/forwarding",
        "forwarding-off",
        "net/ipv4/conf/hf0/forwarding is 0",
    );
}

#[test]
fn other_managers_are_named() {
    let bed = Bed::new();
    // A process of that name in this namespace counts, one elsewhere does not.
    let program = bed.root.path().join("firewalld");
    std::fs::copy("/bin/sleep", &program).unwrap();
    let elsewhere = Netns::new();
    let mut far = spawn(&elsewhere, &program);
    bed.is_healthy("firewalld runs elsewhere");
    let mut near = spawn(&bed.node.netns, &program);
    eventually("firewalld is found", || bed.examine().names() == ["firewalld"]);
    for child in [&mut far, &mut near] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    bed.is_healthy("firewalld ended");

    bed.file("etc/ufw/ufw.conf", "# x\nENABLED=yes\n");
    assert_eq!(bed.examine().names(), ["ufw"]);
    bed.file("etc/ufw/ufw.conf", "ENABLED=no\n");
    let of_bridge = format!("run/NetworkManager/devices/{}", bed.index_of("hf0"));
    bed.file(&of_bridge, "[device]\nmanaged=true\n");
    let found = bed.examine();
    assert_eq!(found.names(), ["managed"]);
    assert!(found.findings[0].1.contains("NetworkManager manages hf0"));
    bed.file(&of_bridge, "[device]\nmanaged=false\n");
    let of_vxlan = format!("run/systemd/netif/links/{}", bed.index_of("hf.vx"));
    bed.file(&of_vxlan, "ADMIN_STATE=configured\n");
    assert_eq!(bed.examine().names(), ["managed"]);
    bed.file(&of_vxlan, "ADMIN_STATE=unmanaged\n");
    bed.is_healthy("nobody manages ours");
}

fn spawn(netns: &Netns, program: &Path) -> Child {
    netns.exec(program.to_str().unwrap()).arg("60").spawn().unwrap()
}

#[test]
fn what_the_agent_cannot_do_or_does_again_and_again_is_named() {
    let bed = Bed::new();
    // A node that lacks its address.
    bed.cluster.put("node-c", &serde_json::json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": "c" }, "spec": { "podCIDR": "10.42.3.0/24" },
    }));
    eventually("a node without an address is named", || bed.examine().names() == ["left-out"]);
    bed.cluster.remove("node-c");
    eventually("it is gone", || bed.examine().code == 0);

    let fight = "while :; do ip route del 10.42.2.0/24 2>/dev/null; done";
    let mut foreign = bed.node.netns.exec("sh").args(["-c", fight]).spawn().unwrap();
    eventually("the fight is named", || {
        let found = bed.examine();
        found
            .findings
            .iter()
            .any(|(name, what)| name == "fight" && what.contains("set the route to 10.42.2.0/24"))
    });
    foreign.kill().unwrap();
    foreign.wait().unwrap();
}

#[test]
fn without_an_agent_the_rest_is_looked_at_all_the_same() {
    let mut bed = Bed::new();
    bed.node.kill();
    let found = bed.examine();
    assert_eq!(found.names(), ["agent-down"], "{:?}", found.findings);
    // Nobody mends these now.
    for (make, name) in [
        ("echo 0 > /proc/sys/net/ipv4/ip_forward", "forwarding-off"),
        (
            "ip link del hf.vx; ip link add other type vxlan id 4807 dstport 4789 nolearning local 192.0.2.1",
            "vxlan-port",
        ),
    ] {
        bed.sh(make);
        let found = bed.examine();
        assert!(found.names().contains(&name), "{make}: {:?}", found.findings);
        assert_eq!(found.code, 1);
    }
    bed.sh("ip link del other");
    let socket = std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            let file = std::fs::File::open(bed.node.netns.path()).unwrap();
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            std::net::UdpSocket::bind("0.0.0.0:4789").unwrap()
        });
        entered.join().unwrap()
    });
    let found = bed.examine();
    assert!(
        found.findings.iter().any(|(_, what)| what.contains("listens on UDP port 4789")),
        "{:?}",
        found.findings
    );
    drop(socket);
    let bridge_filter = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    if Path::new(bridge_filter).exists() {
        bed.sh(&format!("echo 1 > {bridge_filter}"));
        assert!(bed.examine().names().contains(&"br-netfilter"));
    }
}

#[test]
fn who_may_not_look_is_told_so_with_code_2() {
    let netns = Netns::new();
    // Without privileges nf_tables cannot be listed.
    let program = env!("CARGO_BIN_EXE_holdfast-netd");
    let output = netns
        .exec("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            program,
            "doctor",
            "--socket",
            "/nonexistent",
        ])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("could not look at nf_tables"), "{text}");
}
