//! What runs keeps running: nothing of ours ends by itself.

use anyhow::{Context, Result, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, Tools};
use libtest_mimic::Trial;

use super::ready::{NAMESPACE, unready};
use super::trial;

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![trial(tools, "no_container_of_ours_has_ended_by_itself", no_restarts)]
}

/// Runs a while after the start and before anything is killed: a sidecar that waits in vain gives up after half a minute.
pub fn no_restarts(cluster: &mut KubeCluster) -> Result<()> {
    let pods = cluster.get(&["pods", "-n", NAMESPACE])?;
    let mut ended = Vec::new();
    for pod in pods["items"].as_array().context("a list")? {
        for status in pod["status"]["containerStatuses"].as_array().into_iter().flatten() {
            if status["restartCount"] != 0 {
                ended.push(format!("{} of {}", status["name"], pod["metadata"]["name"]));
            }
        }
    }
    ensure!(ended.is_empty(), "{} started more than once", ended.join(", "));
    let left = unready(cluster)?;
    ensure!(left.is_empty(), "not ready: {}", left.join(", "));
    Ok(())
}
