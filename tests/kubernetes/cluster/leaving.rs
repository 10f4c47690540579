//! Holdfast leaves the cluster as docs/operations.md says, and nothing of it stays but the pools.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, KubeNode, NODES, Tools};
use libtest_mimic::Trial;

use super::ready::{NAMESPACE, OVERLAY, repository, unready};
use super::trial;

/// Until every node says that it is clean.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(120);

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![trial(tools, "what_is_uninstalled_leaves_nothing_but_the_pools", uninstall)]
}

fn uninstall(cluster: &mut KubeCluster) -> Result<()> {
    let start = Instant::now();
    let folder = |name: &str| repository().join(name).display().to_string();
    // What uses it goes first; all else was removed by the trials before.
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
    cluster.kubectl(&["apply", "-k", &folder("manifests/uninstall")])?;
    cluster.wait("every node is clean", LEAVE_TIMEOUT, || unready(cluster).map(|left| left.is_empty()))?;
    cluster.kubectl(&[
        "delete",
        "-k",
        &folder("manifests/uninstall"),
        "--cascade=foreground",
        "--timeout=60s",
    ])?;
    let gone = ["--ignore-not-found", "--timeout=120s"];
    for part in [OVERLAY, "manifests/snapshots", "manifests/crds"] {
        cluster.kubectl(&[&["delete", "-k", &folder(part)][..], &gone].concat())?;
    }
    // Kubernetes forgets them by itself, after an hour.
    cluster.kubectl(&["delete", "csr", "--field-selector=spec.signerName=storage.holdfast.dev/node"])?;
    for node in NODES {
        let left = traces(cluster.node(node)?)?;
        ensure!(left.is_empty(), "on {node} is left:\n{}", left.join("\n"));
    }
    let objects = ours(cluster)?;
    ensure!(objects.is_empty(), "objects are left:\n{}", objects.join("\n"));
    println!("Uninstalled in {:.0} s; nothing is left but the pools", start.elapsed().as_secs_f64());
    Ok(())
}

/// What there is of ours on a node beside the pool.
fn traces(node: &KubeNode) -> Result<Vec<String>> {
    let script = "
        find /etc/cni /opt/cni /etc/holdfast /run/holdfast /var/lib/cni -type f -o -type s 2>/dev/null
        find /var/lib/holdfast -mindepth 1 -maxdepth 1 ! -name pool
        find /var/lib/kubelet/plugins /var/lib/kubelet/plugins_registry -name '*holdfast*' ! -path '*/kubernetes.io/csi/*' 2>/dev/null
        find /var/lib/kubelet/plugins/kubernetes.io/csi/csi.holdfast.dev -mindepth 1 2>/dev/null
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
