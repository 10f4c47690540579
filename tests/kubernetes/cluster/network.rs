//! Pods on three nodes, Services, and policies between tiers.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, NODES, Tools};
use holdfast_tests::process::run;
use libtest_mimic::Trial;

use super::reach::{PORT, Place, expect, mk_servers, places, service};
use super::trial;

/// Until a change of a policy is in force on every node; the agent's own work takes milliseconds.
const HEEDED_WITHIN: Duration = Duration::from_secs(10);
/// The tiers of the application.
const TIERS: [&str; 3] = ["front", "logic", "data"];

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![
        trial(tools, "pods_of_three_nodes_reach_each_other_and_services", pods_reach_each_other),
        trial(tools, "an_application_of_three_tiers_is_held_to_its_policies", three_tiers),
    ]
}

fn pods_reach_each_other(cluster: &mut KubeCluster) -> Result<()> {
    let pods = deploy(cluster, "reach", &["web"])?;
    let (address, node_port) = service(cluster, "reach", "web")?;
    let mut targets: BTreeMap<String, bool> =
        pods.iter().map(|pod| (format!("{}:{PORT}", pod.address), true)).collect();
    targets.insert(format!("{address}:80"), true);
    // A node's own address reaches the Service, too, from any pod.
    for node in NODES {
        targets.insert(format!("{}:{node_port}", cluster.node(node)?.address), true);
    }
    pods.iter().try_for_each(|pod| expect(cluster, pod, &targets))?;
    for node in NODES {
        let url = format!("http://{}:{node_port}/", cluster.node(node)?.address);
        let page = run(cluster.outside("busybox").args(["wget", "-q", "-O", "-", &url]))?;
        ensure!(page == "ok\n", "{url} answers {page}");
    }
    cluster.kubectl(&["delete", "namespace", "reach", "--wait=true", "--timeout=60s"]).map(drop)
}

fn three_tiers(cluster: &mut KubeCluster) -> Result<()> {
    let pods = deploy(cluster, "shop", &TIERS)?;
    check(cluster, &pods, |_, _| true)?;
    cluster.apply(POLICIES)?;
    let restricted = |from: &str, to: &str| match to {
        "front" => true,
        "logic" => from == "front",
        _ => from == "logic",
    };
    heeded(cluster, &pods, restricted)?;
    // A pod that is new is held to them from its first packet.
    cluster.kubectl(&["delete", "pods", "-n", "shop", "-l", "app=logic", "--wait=true"])?;
    cluster.kubectl(&["rollout", "status", "-n", "shop", "daemonset/logic", "--timeout=60s"])?;
    let pods = places(cluster, "shop")?;
    check(cluster, &pods, restricted)?;
    cluster.kubectl(&["delete", "networkpolicy", "-n", "shop", "data-from-logic"])?;
    heeded(cluster, &pods, |from, to| to != "data" && restricted(from, to))?;
    cluster.kubectl(&["delete", "namespace", "shop", "--wait=true", "--timeout=60s"]).map(drop)
}

/// Starts servers on every node and waits until all are ready.
fn deploy(cluster: &KubeCluster, namespace: &str, apps: &[&str]) -> Result<Vec<Place>> {
    let mut yaml = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}}}\n---\n");
    apps.iter().for_each(|app| yaml.push_str(&mk_servers(namespace, app)));
    cluster.apply(&yaml)?;
    for app in apps {
        let daemon_set = format!("daemonset/{app}");
        cluster.kubectl(&["rollout", "status", "-n", namespace, &daemon_set, "--timeout=90s"])?;
    }
    let pods = places(cluster, namespace)?;
    ensure!(pods.len() == apps.len() * NODES.len(), "{} pods", pods.len());
    Ok(pods)
}

/// Every pod against every pod, and against every Service; `may` says which tier reaches which.
fn check(cluster: &KubeCluster, pods: &[Place], may: impl Fn(&str, &str) -> bool) -> Result<()> {
    let mut services = Vec::new();
    for tier in TIERS {
        services.push((tier, service(cluster, "shop", tier)?.0));
    }
    for from in pods {
        let others = pods.iter().filter(|to| to.pod != from.pod);
        let mut targets: BTreeMap<String, bool> =
            others.map(|to| (format!("{}:{PORT}", to.address), may(&from.app, &to.app))).collect();
        // A Service of its own tier may lead a pod to itself, which no policy forbids.
        let of_others = services.iter().filter(|(tier, _)| *tier != from.app);
        targets.extend(of_others.map(|(tier, address)| (format!("{address}:80"), may(&from.app, tier))));
        expect(cluster, from, &targets)?;
    }
    Ok(())
}

/// The same, within a time.
fn heeded(cluster: &KubeCluster, pods: &[Place], may: impl Fn(&str, &str) -> bool) -> Result<()> {
    cluster.wait("the policies are in force", HEEDED_WITHIN, || check(cluster, pods, &may).map(|()| true))
}

const POLICIES: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec:
  podSelector: {}
  policyTypes: [Ingress]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: front-from-all, namespace: shop}
spec:
  podSelector: {matchLabels: {app: front}}
  ingress: [{ports: [{port: 8080}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: logic-from-front, namespace: shop}
spec:
  podSelector: {matchLabels: {app: logic}}
  ingress: [{from: [{podSelector: {matchLabels: {app: front}}}], ports: [{port: 8080}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: data-from-logic, namespace: shop}
spec:
  podSelector: {matchLabels: {app: data}}
  ingress: [{from: [{podSelector: {matchLabels: {app: logic}}}], ports: [{port: 8080}]}]
";
