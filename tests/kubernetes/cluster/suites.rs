//! Kubernetes' own suites, by hand (`scripts/test kubernetes --suites --only suites::`): policies of the network, and our driver.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use holdfast_tests::effort;
use holdfast_tests::go_tools::{self, Skip};
use holdfast_tests::k8s::suites::{Suite, images, run_suite};
use holdfast_tests::k8s::{KubeCluster, Tools};
use holdfast_tests::work::binaries_dir;
use libtest_mimic::Trial;

use super::ready::{READY_TIMEOUT, repository, unready};
use super::{steady, trial};

/// Specs at a time: they wait more than they work.
const PROCESSES: u8 = 3;

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    if !effort::wants_suites() {
        return Vec::new();
    }
    vec![
        trial(tools, "suites::network_policies", network_policies),
        trial(tools, "suites::volumes", volumes),
        trial(tools, "suites::nothing_of_ours_has_ended_meanwhile", steady::no_restarts),
    ]
}

fn network_policies(cluster: &mut KubeCluster) -> Result<()> {
    let mut without = Vec::new();
    if !has_sctp() {
        without.push(("SCTPConnectivity", "the kernel has no SCTP sockets"));
    }
    let suite =
        Suite { name: "netpol", focus: "Netpol", without, processes: PROCESSES, arguments: Vec::new() };
    check(cluster, &suite)
}

fn volumes(cluster: &mut KubeCluster) -> Result<()> {
    let class = repository().join("manifests/snapshots");
    cluster.kubectl(&["apply", "-k", &class.display().to_string()])?;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes/suites");
    let arguments = vec![
        format!("--storage.testdriver={}", folder.join("driver.yaml").display()),
        // Files that the driver's file names are below it.
        format!("--repo-root={}", folder.display()),
    ];
    let without = vec![("[Disruptive]", "they restart kubelets by ssh, which no node has")];
    let focus = "External Storage [Driver: csi.holdfast.dev]";
    check(cluster, &Suite { name: "storage", focus, without, processes: PROCESSES, arguments })
}

fn check(cluster: &KubeCluster, suite: &Suite<'_>) -> Result<()> {
    let tools = prepare(cluster)?;
    let folder = binaries_dir()?.join("../suites").join(suite.name);
    let outcome = run_suite(cluster, suite, &tools, &folder)?;
    println!(
        "{}: {}; reports are in {}\n{}",
        suite.name,
        outcome.counts(),
        folder.display(),
        outcome.story()
    );
    ensure!(!outcome.passed.is_empty(), "no spec ran");
    ensure!(outcome.failed.is_empty(), "{} failed", outcome.failed.len());
    Ok(())
}

/// The images are on the nodes, and all of ours runs.
fn prepare(cluster: &KubeCluster) -> Result<PathBuf> {
    let tools = go_tools::e2e()?.map_err(|skip| anyhow::anyhow!(skip.0))?;
    let folder = cluster.work().folder("suite-images")?;
    if std::fs::read_dir(&folder)?.next().is_none() {
        cluster.add_images(&images(&folder, &tools, &cluster.pod_program("pause"))?)?;
    }
    cluster
        .wait("every workload of ours is ready", READY_TIMEOUT, || {
            unready(cluster).map(|left| left.is_empty())
        })
        .context("before the suite")?;
    Ok(tools)
}

/// The kernel shows its SCTP sockets there, where it knows any.
fn has_sctp() -> bool {
    Path::new("/proc/net/sctp").exists()
}
