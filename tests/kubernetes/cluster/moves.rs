//! The database's node loses its power, or is only cut off and writes on: the pod goes elsewhere with every acknowledged entry.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, Tools, has_condition};
use libtest_mimic::Trial;

use super::bank::{Bank, entries, expect_all};
use super::trial;

/// A node that does not answer is not ready after 20 s; what lost its pod is noticed every 20 s.
const NOT_READY_TIMEOUT: Duration = Duration::from_secs(60);
const MOVE_TIMEOUT: Duration = Duration::from_secs(120);
/// From a node's return until it is ready and has its replicas back.
const RETURN_TIMEOUT: Duration = Duration::from_secs(120);
/// The trigger: whoever sets it swears that the node is down. In the second run that is not so.
const TAINT: &str = "node.kubernetes.io/out-of-service";

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![
        trial(tools, "a_database_survives_a_power_cut_of_its_node", power_cut),
        trial(tools, "a_database_that_is_cut_off_writes_nothing_behind_its_successor", cut_off),
    ]
}

fn power_cut(cluster: &mut KubeCluster) -> Result<()> {
    let bank = Bank::start(cluster, "bank", 2)?;
    let (node, _) = bank.place(cluster)?;
    let client = bank.client(cluster, "power-cut-client", &node, 1)?;
    client.wait_for(200)?;
    cluster.power_off(&node)?;
    let start = Instant::now();
    trigger(cluster, &node)?;
    let triggered = start.elapsed();
    bank.wait_for_move(cluster, &node, MOVE_TIMEOUT)?;
    client.wait_for_next(MOVE_TIMEOUT)?;
    let served = start.elapsed();
    client.wait_for(100)?;
    let pause = client.longest_pause()?;
    let kept = client.end(|| bank.numbers(cluster, &node))?;
    println!(
        "Power cut: {kept} acknowledged entries, all there; served again {:.1} s after the trigger (set after {:.1} s), without service for {:.1} s",
        (served - triggered).as_secs_f64(),
        triggered.as_secs_f64(),
        pause.as_secs_f64()
    );
    cluster.power_on(&node)?;
    back_to_normal(cluster, &node)?;
    bank.remove(cluster)
}

fn cut_off(cluster: &mut KubeCluster) -> Result<()> {
    let bank = Bank::start(cluster, "cutoff", 1)?;
    let (node, uid) = bank.place(cluster)?;
    let client = bank.client(cluster, "cut-off-client", &node, 1)?;
    // The old pod has a client of its own, which writes on when nobody else reaches it.
    let script = "ledger write 127.0.0.1:7000 /scratch/old 1000000000 >/dev/null 2>&1 & echo started";
    cluster.exec("cutoff/bank-0", &["sh", "-c", script])?;
    let old = old_ledger(cluster, &node, &uid)?;
    let read_old = || entries(&std::fs::read_to_string(&old).unwrap_or_default());
    cluster.wait("the old pod's client writes", MOVE_TIMEOUT, || Ok(read_old()?.len() > 50))?;
    client.wait_for(50)?;
    cluster.set_link(&node, false)?;
    let start = Instant::now();
    trigger(cluster, &node)?;
    let triggered = start.elapsed();
    bank.wait_for_move(cluster, &node, MOVE_TIMEOUT)?;
    client.wait_for_next(MOVE_TIMEOUT)?;
    let served = start.elapsed();
    client.wait_for(100)?;
    // Still cut off: what it told its own client is final now.
    let told = read_old()?;
    let present = bank.numbers(cluster, &node)?;
    expect_all(&told, &present).context("told by the old pod")?;
    let kept = client.end(|| bank.numbers(cluster, &node))?;
    cluster.set_link(&node, true)?;
    back_to_normal(cluster, &node)?;
    let present = bank.numbers(cluster, &node)?;
    expect_all(&told, &present).context("told by the old pod, after its return")?;
    println!(
        "Cut off: {kept} entries of the client and {} of the old pod's own, all there; served again {:.1} s after the trigger (set after {:.1} s)",
        told.len(),
        (served - triggered).as_secs_f64(),
        triggered.as_secs_f64()
    );
    bank.remove(cluster)
}

/// Waits until the node counts as not ready and taints it.
pub fn trigger(cluster: &KubeCluster, node: &str) -> Result<()> {
    cluster.wait("the node is not ready", NOT_READY_TIMEOUT, || Ok(!is_ready(cluster, node)?))?;
    let taint = format!("{TAINT}=nodeshutdown:NoExecute");
    cluster.kubectl(&["taint", "node", node, &taint]).map(drop)
}

/// Takes the taint back, once the node is back, and waits until all volumes have all their replicas.
fn back_to_normal(cluster: &KubeCluster, node: &str) -> Result<()> {
    cluster.wait("the node is ready again", RETURN_TIMEOUT, || is_ready(cluster, node))?;
    cluster.kubectl(&["taint", "node", node, &format!("{TAINT}-")])?;
    wait_for_replicas(cluster)
}

/// Waits until every volume has three replicas in sync.
pub fn wait_for_replicas(cluster: &KubeCluster) -> Result<()> {
    cluster.wait("all replicas are in sync again", RETURN_TIMEOUT, || {
        let volumes = cluster.get(&["volumes.storage.holdfast.dev"])?;
        let items = volumes["items"].as_array().context("a list")?;
        ensure!(!items.is_empty(), "there are no volumes");
        Ok(items.iter().all(|volume| volume["status"]["inSync"] == "3/3"))
    })
}

fn is_ready(cluster: &KubeCluster, node: &str) -> Result<bool> {
    Ok(has_condition(&cluster.get(&["node", node])?, "Ready"))
}

/// Where the scratch folder of a pod lies on its node's disk.
fn old_ledger(cluster: &KubeCluster, node: &str, uid: &str) -> Result<PathBuf> {
    let pods = cluster.node(node)?.folder().join("kubelet/pods");
    Ok(pods.join(uid).join("volumes/kubernetes.io~empty-dir/scratch/old"))
}
