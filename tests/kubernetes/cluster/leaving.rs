//! Holdfast leaves the cluster as docs/operations.md says, and nothing of it stays but the pools.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, KubeNode, NODES, Tools};
use libtest_mimic::Trial;

use super::bank::Bank;
use super::moves::trigger;
use super::ready::{NAMESPACE, OVERLAY, repository, unready};
use super::trial;

/// Until every node says that it is clean.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(120);
/// From its start until a node is known again.
const RETURN_TIMEOUT: Duration = Duration::from_secs(60);
const UNINSTALL: &str = "manifests/uninstall";

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![trial(tools, "what_is_uninstalled_beside_a_dead_node_leaves_nothing_but_the_pools", uninstall)]
}

/// One node has died with a database on it; it is cleaned when it comes back, after all else is gone.
fn uninstall(cluster: &mut KubeCluster) -> Result<()> {
    let bank = Bank::start(cluster, "leaving", 1)?;
    let (dead, _) = bank.place(cluster)?;
    cluster.power_off(&dead)?;
    let start = Instant::now();
    give_up(cluster, &dead)?;
    // What uses it goes first; all else was removed by the trials before.
    bank.remove(cluster)?;
    cluster.kubectl(&["delete", "node", &dead])?;
    let given_up = start.elapsed();
    cluster.kubectl(&[
        "delete",
        "deployment",
        "-n",
        "kube-system",
        "snapshot-controller",
        "--cascade=foreground",
    ])?;
    cluster.kubectl(&[
        "delete",
        "deployments,daemonsets",
        "-n",
        NAMESPACE,
        "--all",
        "--cascade=foreground",
        "--timeout=120s",
    ])?;
    clean_nodes(cluster)?;
    let gone = ["--ignore-not-found", "--timeout=120s"];
    for part in [OVERLAY, "manifests/snapshots", "manifests/crds"] {
        cluster.kubectl(&[&["delete", "-k", &folder(part)][..], &gone].concat())?;
    }
    // Kubernetes forgets them by itself, after an hour.
    cluster.kubectl(&["delete", "csr", "--field-selector=spec.signerName=storage.holdfast.dev/node"])?;
    for node in NODES.iter().filter(|node| **node != dead) {
        expect_clean(cluster, node)?;
    }
    let objects = ours(cluster)?;
    ensure!(objects.is_empty(), "objects are left:\n{}", objects.join("\n"));
    println!(
        "{dead} given up in {:.0} s, uninstalled in {:.0} s; nothing is left but the pools",
        given_up.as_secs_f64(),
        (start.elapsed() - given_up).as_secs_f64()
    );
    clean_returned(cluster, &dead)
}

/// Tells Kubernetes and us that a node is dead.
fn give_up(cluster: &KubeCluster, node: &str) -> Result<()> {
    trigger(cluster, node)?;
    let removed = r#"{"spec":{"state":"Removed"}}"#;
    let object = format!("storagenode/{node}");
    cluster.kubectl(&["patch", &object, "--type=merge", "-p", removed]).map(drop)
}

/// Runs the uninstallers on all nodes, and takes them away again.
fn clean_nodes(cluster: &KubeCluster) -> Result<()> {
    cluster.kubectl(&["apply", "-k", &folder(UNINSTALL)])?;
    cluster.wait("every node is clean", LEAVE_TIMEOUT, || unready(cluster).map(|left| left.is_empty()))?;
    cluster.kubectl(&["delete", "-k", &folder(UNINSTALL), "--cascade=foreground", "--timeout=60s"]).map(drop)
}

/// The node comes back with what it had on its disk, among it the pool with the database's replica.
fn clean_returned(cluster: &mut KubeCluster, node: &str) -> Result<()> {
    cluster.power_on(node)?;
    cluster.wait("the node is back", RETURN_TIMEOUT, || {
        Ok(cluster.get(&["nodes"])?["items"].as_array().is_some_and(|nodes| nodes.len() == NODES.len()))
    })?;
    ensure!(!traces(cluster.node(node)?)?.is_empty(), "nothing is left to be removed on {node}");
    cluster.kubectl(&["create", "namespace", NAMESPACE])?;
    clean_nodes(cluster)?;
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--timeout=60s"])?;
    expect_clean(cluster, node)?;
    let objects = ours(cluster)?;
    ensure!(objects.is_empty(), "objects are left after {node} came back:\n{}", objects.join("\n"));
    println!("{node} came back and is clean, too");
    Ok(())
}

fn folder(name: &str) -> String {
    repository().join(name).display().to_string()
}

fn expect_clean(cluster: &KubeCluster, node: &str) -> Result<()> {
    let left = traces(cluster.node(node)?)?;
    ensure!(left.is_empty(), "on {node} is left:\n{}", left.join("\n"));
    Ok(())
}

/// What there is of ours on a node beside the pool.
fn traces(node: &KubeNode) -> Result<Vec<String>> {
    let script = "
        find /etc/cni /opt/cni /etc/holdfast /run/holdfast /var/lib/cni -type f -o -type s 2>/dev/null
        find /var/lib/holdfast -mindepth 1 -maxdepth 1 ! -name pool
        find /var/lib/kubelet/plugins /var/lib/kubelet/plugins_registry -name '*holdfast*' ! -path '*/kubernetes.io/csi/*' 2>/dev/null
        find /var/lib/kubelet/plugins/kubernetes.io/csi/csi.holdfast.dev -mindepth 1 2>/dev/null
        find /var/lib/kubelet/pods -path '*/kubernetes.io~csi/*' 2>/dev/null
        ip -o link | grep -v -e ': lo:' -e ': eth0@'
        ip route | grep -v -e ^default -e 'dev eth0 proto kernel'
        nft list tables | grep -i holdfast
        ip rule | grep -v -e 'lookup local' -e 'lookup main' -e 'lookup default'
        grep holdfast /proc/mounts | grep -v ' /var/lib/holdfast '
        true";
    let found = node.spaces.run("sh", &["-c", script])?;
    // Kubelet keeps an empty folder for each driver that it has known. The work folder's own path may name us.
    let places = node.folder().display().to_string();
    Ok(found.lines().filter(|line| !line.contains(&places)).map(str::to_owned).collect())
}

/// Objects of ours of any kind.
fn ours(cluster: &KubeCluster) -> Result<Vec<String>> {
    let kinds = "namespaces,clusterroles,clusterrolebindings,crds,csidrivers,storageclasses,priorityclasses,\
                 validatingadmissionpolicies,validatingadmissionpolicybindings,volumeattachments,persistentvolumes,\
                 csistoragecapacities,certificatesigningrequests";
    let all = cluster.kubectl(&["get", kinds, "-A", "-o", "name"])?;
    let mut left: Vec<String> =
        all.lines().filter(|name| name.contains("holdfast")).map(str::to_owned).collect();
    let in_namespaces =
        cluster.kubectl(&["get", "roles,rolebindings,configmaps,leases", "-A", "-o", "name"])?;
    left.extend(in_namespaces.lines().filter(|name| name.contains("holdfast")).map(str::to_owned));
    for node in cluster.get(&["csinodes"])?["items"].as_array().into_iter().flatten() {
        ensure!(!node["spec"]["drivers"].to_string().contains("holdfast"), "CSINode still has {node}");
    }
    Ok(left)
}
