//! The CSI project's own suite, csi-sanity, against the real driver: a controller and three nodes with their data processes,
//! real volumes, real mounts.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::cluster::{CSI_SOCKET, KUBELET_DIR};
use holdfast_tests::{Cluster, ClusterOptions, go_tools};
use libtest_mimic::Trial;
use tokio::io::copy_bidirectional;
use tokio::net::{UnixListener, UnixStream};

/// Size of its volumes, and what they grow to.
const VOLUME_BYTES: u64 = 64 << 20;
const EXPANDED_BYTES: u64 = 96 << 20;
/// The suite takes less than two minutes on an idle machine.
const SUITE_TIMEOUT: Duration = Duration::from_secs(600);
/// For so long a controller that was just started says of a node that it does not know that it may not have heard of it yet.
const NODES_FILL: Duration = Duration::from_secs(7);
/// Checks of its version 5.6 that run against a driver with every capability; fewer means that some were not run.
const SPECS_MIN: usize = 98;
/// What its ModifyVolume checks ask for.
const MUTABLE_PARAMETERS: &str = "replicas: \"2\"\niopsLimit: 2k\nbandwidthLimit: 512Mi\n";

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![Trial::test("csi_sanity_passes", || sanity().map_err(|error| format!("{error:#}").into()))]
}

fn sanity() -> Result<()> {
    let program = match go_tools::csi_sanity()? {
        Ok(program) => program,
        Err(skip) => {
            println!("{skip}");
            return Ok(());
        }
    };
    let cluster = Cluster::start(&ClusterOptions { kind: "sanity".to_owned(), ..ClusterOptions::default() })?;
    let outcome = run_suite(&cluster, &program);
    let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

fn run_suite(cluster: &Cluster, program: &Path) -> Result<()> {
    let dir = cluster.work().folder("csi-sanity")?;
    // The suite runs on a node, where the controller's socket cannot be seen; a folder of the host's can.
    let controller = dir.join("controller.sock");
    let relay = Relay::start(controller.clone(), cluster.controller.spaces.host_path(CSI_SOCKET))?;
    let log = dir.join("suite.log");
    let mutable = dir.join("mutable.yaml");
    std::fs::write(&mutable, MUTABLE_PARAMETERS)?;
    cluster.node("node-a").spaces.run("mkdir", &["-p", &format!("{KUBELET_DIR}/sanity")])?;
    let mut command = cluster.node("node-a").spaces.command(program);
    command
        .arg(format!("--csi.endpoint=unix://{CSI_SOCKET}"))
        .arg(format!("--csi.controllerendpoint=unix://{}", controller.display()))
        .arg(format!("--csi.mountdir={KUBELET_DIR}/sanity/target"))
        .arg(format!("--csi.stagingdir={KUBELET_DIR}/sanity/staging"))
        .arg(format!("--csi.testvolumesize={VOLUME_BYTES}"))
        .arg(format!("--csi.testvolumeexpandsize={EXPANDED_BYTES}"))
        .arg(format!("--csi.testvolumemutableparameters={}", mutable.display()))
        .args(["--ginkgo.no-color", "--ginkgo.seed=1"])
        .stdout(File::create(&log)?)
        .stderr(File::options().append(true).open(&log)?);
    std::thread::sleep(NODES_FILL);
    let passed = run_for(&mut command, SUITE_TIMEOUT)?;
    drop(relay);
    let text = std::fs::read_to_string(&log)?;
    let summary = text.lines().find(|line| line.starts_with("Ran ")).unwrap_or("it did not finish");
    let counts = text.lines().rev().find(|line| line.contains(" Passed | ")).unwrap_or_default();
    println!("csi-sanity: {summary} {counts}");
    ensure!(passed, "csi-sanity failed, see {}:\n{}", log.display(), failures(&text));
    let ran: usize = summary.split(' ').nth(1).and_then(|word| word.parse().ok()).context("no count")?;
    ensure!(ran >= SPECS_MIN, "only {ran} checks ran: {summary}");
    Ok(())
}

/// Whether a command succeeds; one that takes too long is killed.
fn run_for(command: &mut Command, limit: Duration) -> Result<bool> {
    let mut child = command.spawn().context("csi-sanity cannot be started")?;
    let until = std::time::Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.success());
        }
        if std::time::Instant::now() >= until {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("csi-sanity did not end within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The failed checks with their causes.
fn failures(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut told = String::new();
    for (index, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("[FAILED]")) {
        for more in lines.iter().skip(index).take(8) {
            told.push_str(more);
            told.push('\n');
        }
        if told.len() > 8000 || line.is_empty() {
            break;
        }
    }
    told
}

/// Shows one Unix socket under another path.
struct Relay {
    _runtime: tokio::runtime::Runtime,
    path: PathBuf,
}

impl Relay {
    fn start(path: PathBuf, to: PathBuf) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_io().build()?;
        let listener = {
            let _entered = runtime.enter();
            UnixListener::bind(&path)?
        };
        runtime.spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                let to = to.clone();
                tokio::spawn(async move {
                    if let Ok(mut to) = UnixStream::connect(&to).await {
                        let _ = copy_bidirectional(&mut from, &mut to).await;
                    }
                });
            }
        });
        Ok(Self { _runtime: runtime, path })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
