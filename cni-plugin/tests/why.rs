//! Explaining against the kernel, how policies stand, and metrics, of a real agent on a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use holdfast_proto::agent as pb;
use holdfast_proto::agent::live_answer::State;
use serde_json::json;
use support::{Cluster, METRICS_PORT, Netns, Node, eventually};

/// A node with pods `db` and `web`; only `web` may reach `db`.
fn mk_shop(cluster: &Cluster) -> (Node, Vec<Netns>) {
    cluster.put_node("node-a", 1, "10.10.1.0/24");
    cluster.put_policy("db", "web");
    let node = cluster.start_node("node-a", 1);
    let sandboxes = ["db", "web", "other"].map(|name| {
        cluster.put_pod(name, "");
        let sandbox = Netns::new();
        node.add(name, &sandbox).unwrap();
        sandbox
    });
    (node, sandboxes.into())
}

fn explain(node: &Node, from: &str, to: &str) -> pb::ExplainReply {
    let request = pb::ExplainRequest { from: from.into(), to: to.into(), port: 80, protocol: "tcp".into() };
    let reply = node.ask(async |mut client| client.explain(request).await.unwrap().into_inner());
    assert_eq!(reply.failure, None);
    reply
}

fn policies(node: &Node, policy: &str) -> pb::PoliciesReply {
    let request = pb::PoliciesRequest { policy: policy.into() };
    node.ask(async |mut client| client.policies(request).await.unwrap().into_inner())
}

#[test]
fn the_kernel_agrees_with_what_is_explained_and_nothing_is_written_for_it() {
    let cluster = Cluster::new();
    let (node, _sandboxes) = mk_shop(&cluster);
    let before = node.rules_text();
    for (from, allowed) in [("shop/web", true), ("shop/other", false)] {
        let reply = explain(&node, from, "shop/db");
        assert_eq!((reply.allowed, reply.node.as_str()), (allowed, "node-a"), "{reply:?}");
        let (egress, ingress) = (reply.egress_live.unwrap(), reply.ingress_live.unwrap());
        assert_eq!((egress.state(), egress.allowed), (State::Agrees, Some(true)), "{egress:?}");
        assert_eq!((ingress.state(), ingress.allowed), (State::Agrees, Some(allowed)), "{ingress:?}");
        assert!(ingress.found.starts_with("class "), "{ingress:?}");
    }
    assert_eq!(node.rules_text(), before);
}

#[test]
fn a_policy_is_in_force_since_its_last_change_and_a_refused_one_is_told_everywhere() {
    let cluster = Cluster::new();
    let (node, _sandboxes) = mk_shop(&cluster);
    let reply = policies(&node, "shop/to-db");
    assert_eq!(reply.node, "node-a");
    let [first] = reply.policies.as_slice() else { panic!("{reply:?}") };
    assert!(first.in_force && first.since_ms > 0, "{first:?}");
    assert_eq!((first.ingress_pods, first.egress_pods), (1, 0));
    assert_eq!((first.kind.as_str(), first.tier.as_str()), ("NetworkPolicy", "NetworkPolicy"));
    let unknown = policies(&node, "shop/nowhere").failure.unwrap();
    assert!(unknown.msg.contains("no policy \"shop/nowhere\""), "{unknown:?}");

    cluster.put_policy("db", "other");
    let changed = || policies(&node, "").policies.remove(0);
    eventually("the change is in force", || changed().in_force && changed().since_ms > first.since_ms);

    let ports = json!([{ "port": 90, "endPort": 80 }]);
    cluster.put(
        "policy-bad",
        &json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "name": "bad", "namespace": "shop" },
            "spec": { "podSelector": {}, "ingress": [{ "ports": ports }] },
        }),
    );
    eventually("the refused policy is told", || policies(&node, "").policies.len() == 2);
    let refused = policies(&node, "shop/bad").policies.remove(0);
    assert!(!refused.in_force && refused.since_ms == 0, "{refused:?}");
    assert!(refused.reason.contains("endPort"), "{refused:?}");
    let notes = explain(&node, "shop/other", "shop/db").notes;
    assert!(notes.iter().any(|note| note.starts_with("NetworkPolicy shop/bad is invalid")), "{notes:?}");
    let refused = "holdfast_policy_object_refused{kind=\"NetworkPolicy\",namespace=\"shop\",name=\"bad\"} 1";
    let metrics = scrape(&node, "GET /metrics");
    for line in [refused, "holdfast_policy_policies{state=\"in_force\"} 1"] {
        assert!(metrics.contains(line), "no {line} in {metrics}");
    }
    let commits = metrics.lines().find_map(|line| line.strip_prefix("holdfast_policy_commits_total "));
    assert!(commits.unwrap().parse::<u64>().unwrap() > 0);

    cluster.remove("policy-bad");
    eventually("what is not refused any more is not told", || policies(&node, "").policies.len() == 1);
    assert!(!scrape(&node, "GET /metrics").contains(refused));
    assert!(scrape(&node, "GET /else").starts_with("HTTP/1.1 404"));
    assert!(scrape(&node, "POST /metrics").starts_with("HTTP/1.1 405"));
}

/// What the agent's metrics server answers.
fn scrape(node: &Node, request: &str) -> String {
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{METRICS_PORT}; printf '{request} HTTP/1.1\\r\\nHost: node\\r\\n\\r\\n' >&3; cat <&3"
    );
    let output = node.netns.exec("timeout").args(["10", "bash", "-c", &script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
