//! All that is ours is restarted under load, as an upgrade does it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, NODES, Tools};
use libtest_mimic::Trial;

use super::bank::{Bank, Client};
use super::moves::wait_for_replicas;
use super::ready::{NAMESPACE, unready};
use super::trial;

/// For one workload to be replaced on all nodes, one after the other.
const ROLLOUT_TIMEOUT: Duration = Duration::from_secs(180);
/// What replaces its pods by itself once its template changes.
pub const ROLLED: [&str; 3] =
    ["daemonset/holdfast-netd", "daemonset/holdfast-node", "deployment/holdfast-controller"];
/// A commit waits for a replica that is swapped out (800 ms), and for a machine that does much else.
pub const PAUSE_MAX: Duration = Duration::from_secs(4);

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![
        trial(tools, "a_rolling_upgrade_cuts_no_connection_and_fails_no_io", agents),
        trial(tools, "data_processes_are_replaced_one_by_one_after_their_volumes_moved", data_processes),
    ]
}

/// Waits until each pod of a workload is of its newest template.
pub fn wait_for_rollout(cluster: &KubeCluster, workload: &str) -> Result<()> {
    let timeout = format!("--timeout={}s", ROLLOUT_TIMEOUT.as_secs());
    cluster.kubectl(&["rollout", "status", "-n", NAMESPACE, workload, &timeout]).map(drop)
}

/// Network agents, CSI pods and controllers are replaced while a client commits over one connection through all nodes' networks.
fn agents(cluster: &mut KubeCluster) -> Result<()> {
    let bank = Bank::start(cluster, "upgrade", 1)?;
    let (node, _) = bank.place(cluster)?;
    let client = bank.client(cluster, "upgrade-client", &node, 1)?;
    // Until kube-proxy knew of the pod it may have been refused.
    let before = client.complaints()?;
    let start = Instant::now();
    for workload in ROLLED {
        cluster.kubectl(&["rollout", "restart", "-n", NAMESPACE, workload])?;
        wait_for_rollout(cluster, workload)?;
    }
    let took = start.elapsed();
    client.wait_for(100)?;
    let (complaints, pause) = (client.complaints()?, client.longest_pause()?);
    ensure!(complaints == before, "the client's connection did not hold:\n{complaints}");
    ensure!(pause < PAUSE_MAX, "no commit for {:.1} s", pause.as_secs_f64());
    let kept = client.end(|| bank.numbers(cluster, &node))?;
    println!(
        "Upgrade: agents, CSI pods and controllers replaced in {:.0} s under {kept} commits of one connection, longest pause {:.2} s",
        took.as_secs_f64(),
        pause.as_secs_f64()
    );
    bank.remove(cluster)
}

/// The data process of a node goes once no volume is attached there: the pod moves first.
fn data_processes(cluster: &mut KubeCluster) -> Result<()> {
    let bank = Bank::start(cluster, "renewal", 1)?;
    wait_for_replicas(cluster)?;
    let client = bank.client(cluster, "renewal-client", "", 1)?;
    renew_data_processes(cluster, &bank, &client)?;
    let kept = client.end(|| bank.numbers(cluster, ""))?;
    println!("Data processes: all replaced, {kept} acknowledged entries, all there");
    bank.remove(cluster)
}

/// Replaces the data process of each node, as docs/operations.md says, while a client of the database's one pod goes on.
pub fn renew_data_processes(cluster: &KubeCluster, bank: &Bank, client: &Client) -> Result<()> {
    for node in NODES {
        cluster.kubectl(&["cordon", node])?;
        if bank.place(cluster)?.0 == node {
            let pod = ["delete", "pod", "-n", bank.namespace(), "bank-0"];
            cluster.kubectl(&[&pod[..], &["--wait=true", "--timeout=60s"]].concat())?;
            bank.wait_for_move(cluster, node, ROLLOUT_TIMEOUT)?;
        }
        let at_node = format!("--field-selector=spec.nodeName={node}");
        let app = "--selector=app.kubernetes.io/name=holdfast-data";
        cluster.kubectl(&[
            "delete",
            "pod",
            "-n",
            NAMESPACE,
            &at_node,
            app,
            "--wait=true",
            "--timeout=90s",
        ])?;
        cluster.kubectl(&["uncordon", node])?;
        cluster.wait("the data process is back", ROLLOUT_TIMEOUT, || {
            unready(cluster).map(|left| left.is_empty())
        })?;
        client.wait_for(50)?;
        wait_for_replicas(cluster)?;
    }
    Ok(())
}
