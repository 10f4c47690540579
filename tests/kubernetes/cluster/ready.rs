//! From nothing to nodes that are ready through our network, as a user gets there.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::image::{Build, REFERENCE};
use holdfast_tests::k8s::{KubeCluster, NODES, Tools, has_condition};
use holdfast_tests::process::wait_until;
use holdfast_tests::work::binaries_dir;
use libtest_mimic::Trial;
use serde_json::Value;

use super::{trial, volumes};

/// From `kubectl apply` until every node is ready and every pod of ours.
pub const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// Workloads of ours.
pub const NAMESPACE: &str = "holdfast-system";
/// The one that the user applies.
pub const OVERLAY: &str = "manifests/overlays/full";

/// Whether the shared cluster has us.
static INSTALLED: OnceLock<()> = OnceLock::new();

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![trial(tools, "nodes_become_ready_through_our_network", nodes_are_ready)]
}

/// Our own image, packed of the binaries under test as `scripts/image` does it.
pub fn image() -> Result<PathBuf> {
    let programs = binaries_dir()?;
    image_of(&programs, &programs.join("../image"), REFERENCE)
}

/// An image of some programs, packed in `folder`, by the name that manifests are to refer to it by.
pub fn image_of(programs: &Path, folder: &Path, reference: &str) -> Result<PathBuf> {
    std::fs::create_dir_all(folder)?;
    // Downloads are kept beside the build's.
    let packages = binaries_dir()?.join("../image/packages");
    let image = Build { programs, packages: &packages, folder, reference }.run()?;
    Ok(image.map_err(|skip| anyhow::anyhow!(skip.0)).context("our image")?.archive)
}

/// Installs what a user installs, unless an earlier trial did.
pub fn make_ready(cluster: &KubeCluster) -> Result<()> {
    if INSTALLED.get().is_some() {
        return Ok(());
    }
    let took = install(cluster, &repository().join(OVERLAY))?;
    INSTALLED.get_or_init(|| ());
    println!(
        "Nodes were ready {:.1} s after kubectl apply, {:.1} s after the start",
        took.as_secs_f64(),
        cluster.age().as_secs_f64()
    );
    Ok(())
}

/// Installs an overlay on nodes that have no network; answers after which time all of them were ready.
pub fn install(cluster: &KubeCluster, overlay: &Path) -> Result<Duration> {
    wait_until(READY_TIMEOUT, || Ok(nodes(cluster)?.len() == NODES.len()))
        .context("a node does not register")?;
    let ready = nodes(cluster)?.iter().filter(|node| has_condition(node, "Ready")).count();
    ensure!(ready == 0, "{ready} nodes are ready without a network");
    volumes::install_snapshot_controller(cluster)?;
    let start = Instant::now();
    cluster.kubectl(&["apply", "-k", &overlay.display().to_string()])?;
    cluster.wait("every node is ready", READY_TIMEOUT, || {
        Ok(nodes(cluster)?.iter().all(|node| has_condition(node, "Ready")))
    })?;
    Ok(start.elapsed())
}

fn nodes_are_ready(cluster: &mut KubeCluster) -> Result<()> {
    wait_for_workloads(cluster)?;
    println!("All workloads of ours were ready {:.1} s after the start", cluster.age().as_secs_f64());
    Ok(())
}

/// Waits until every workload of ours is whole.
pub fn wait_for_workloads(cluster: &KubeCluster) -> Result<()> {
    cluster.wait("every workload of ours is ready", READY_TIMEOUT, || {
        unready(cluster).map(|left| left.is_empty())
    })
}

/// Workloads of ours that are not whole yet.
pub fn unready(cluster: &KubeCluster) -> Result<Vec<String>> {
    let workloads = cluster.get(&["deployments,daemonsets", "-n", NAMESPACE])?;
    let is_whole = |object: &Value| {
        let (wanted, ready) = if object["kind"] == "DaemonSet" {
            (&object["status"]["desiredNumberScheduled"], &object["status"]["numberReady"])
        } else {
            (&object["spec"]["replicas"], &object["status"]["readyReplicas"])
        };
        wanted.as_u64().is_some_and(|wanted| wanted > 0) && wanted == ready
    };
    let items = workloads["items"].as_array().context("a list")?;
    ensure!(!items.is_empty(), "there are none");
    let left = items.iter().filter(|object| !is_whole(object));
    Ok(left.map(|object| format!("{} {}", object["kind"], object["metadata"]["name"])).collect())
}

fn nodes(cluster: &KubeCluster) -> Result<Vec<Value>> {
    Ok(cluster.get(&["nodes"])?["items"].as_array().context("a list")?.clone())
}

/// The checkout.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
