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

/// Begins the names of the specs for our driver.
const DRIVER: &str = "External Storage [Driver: csi.holdfast.dev]";
/// In the names of specs that need claims to bind without a pod.
const UNBOUND: &str = "] volume-modify-stress ";
/// In the names of specs that grow a file system of the class in use.
const GROW_IN_USE: [&str; 3] = [
    "(default fs)(allowExpansion)] volume-expand should resize volume when PVC is edited while pod is using it",
    "(default fs) (late-binding)] ephemeral should support expansion",
    "(default fs) (immediate-binding)] ephemeral should support expansion",
];
/// The capability that lets the kernel grow a mounted ext4.
const CAP_SYS_RESOURCE: u32 = 24;
/// Specs at a time: they wait more than they work.
const PROCESSES: u8 = 3;

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    if !effort::wants_suites() {
        return Vec::new();
    }
    vec![
        trial(tools, "suites::network_policies", network_policies),
        trial(tools, "suites::volumes", volumes),
        trial(tools, "suites::volumes_of_another_class", volumes_of_another_class),
        trial(tools, "suites::volumes_and_topologies", volumes_and_topologies),
        trial(tools, "suites::nothing_of_ours_has_ended_meanwhile", steady::no_restarts),
    ]
}

fn network_policies(cluster: &mut KubeCluster) -> Result<()> {
    let mut without = Vec::new();
    if !has_sctp() {
        without.push(("SCTPConnectivity", "the kernel has no SCTP sockets"));
    }
    let suite = Suite {
        name: "netpol",
        focus: "Netpol",
        only: &[],
        without,
        processes: PROCESSES,
        arguments: Vec::new(),
    };
    check(cluster, &suite)
}

fn volumes(cluster: &mut KubeCluster) -> Result<()> {
    let mut without = vec![
        ("[Disruptive]", "they restart kubelets by ssh, which no node has"),
        (UNBOUND, "it wants claims that bind without a pod: see the other class"),
        ("any volume data source", "the image of its populator cannot be had"),
        ("] volumegroupsnapshottable ", "they restore into claims of 1 MiB; ours are of 16 MiB at least"),
    ];
    if !has_capability(CAP_SYS_RESOURCE)? {
        let reason = "a mounted ext4 grows only with CAP_SYS_RESOURCE, which this machine gives to nobody: see the other class";
        without.extend(GROW_IN_USE.map(|part| (part, reason)));
    }
    storage(cluster, "storage", &[], without, &[])
}

/// What cannot run with our class: its claims wait for a pod, and its file system may not grow in use here.
fn volumes_of_another_class(cluster: &mut KubeCluster) -> Result<()> {
    let class =
        ("  FromExistingClassName: holdfast\nSnapshotClass", "  FromFile: other-class.yaml\nSnapshotClass");
    storage(cluster, "storage-other-class", &[&[UNBOUND], &GROW_IN_USE[..]].concat(), Vec::new(), &[class])
}

/// Each node is a topology.
fn volumes_and_topologies(cluster: &mut KubeCluster) -> Result<()> {
    let changes = [
        ("topology: false", "topology: true"),
        ("  Capabilities:\n", "  TopologyKeys: [csi.holdfast.dev/node]\n  Capabilities:\n"),
    ];
    let without = vec![(
        "(immediate binding)",
        "where a class lets volumes be made says nothing of where ours can be used: on every node",
    )];
    storage(cluster, "storage-topologies", &["] topology "], without, &changes)
}

fn storage(
    cluster: &KubeCluster,
    name: &str,
    only: &[&str],
    without: Vec<(&str, &str)>,
    changes: &[(&str, &str)],
) -> Result<()> {
    let mut driver = std::fs::read_to_string(files().join("driver.yaml"))?;
    for (from, to) in changes {
        ensure!(driver.matches(from).count() == 1, "driver.yaml has no {from}");
        driver = driver.replace(from, to);
    }
    let class = repository().join("manifests/snapshots");
    cluster.kubectl(&["apply", "-k", &class.display().to_string()])?;
    let file = cluster.work().dir().join(format!("{name}.yaml"));
    std::fs::write(&file, driver)?;
    let arguments = vec![
        format!("--storage.testdriver={}", file.display()),
        // Files that the driver's file names are below it.
        format!("--repo-root={}", files().display()),
    ];
    check(cluster, &Suite { name, focus: DRIVER, only, without, processes: PROCESSES, arguments })
}

fn files() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kubernetes/suites")
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

/// Whether this process could ever have it, and with it the pods of the cluster.
fn has_capability(number: u32) -> Result<bool> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let bounds = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).context("no CapBnd")?;
    Ok(u64::from_str_radix(bounds.trim(), 16)? >> number & 1 == 1)
}
