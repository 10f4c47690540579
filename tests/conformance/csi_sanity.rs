//! The CSI project's own suite, csi-sanity, against the real driver: a controller and three nodes with their data processes,
//! real volumes, real mounts. The newest one, and as clients of older versions of the specification the suites that were made
//! for these.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::cluster::{CSI_SOCKET, KUBELET_DIR};
use holdfast_tests::go_tools::Skip;
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
/// What the ModifyVolume checks ask for.
const MUTABLE_PARAMETERS: &str = "replicas: \"2\"\niopsLimit: 2k\nbandwidthLimit: 512Mi\n";
/// Volumes that may be attached to a node: the suite attaches one more.
const VOLUMES_MAX: u32 = 4;

/// How its test library shows a failure, in its newer and its older version.
const FAILURE_MARKS: [&str; 2] = ["[FAILED]", "• Failure"];

/// One version of it.
struct Suite {
    program: fn() -> Result<Result<PathBuf, Skip>>,
    /// Checks that must run; fewer means that some were left out.
    specs_min: usize,
    /// Checks that may be skipped, by the suite itself or by us.
    skipped_max: usize,
    /// How its test library is told not to colour its output.
    no_color: &'static str,
    /// It has checks of ModifyVolume, and an argument for the parameters that these change.
    modifies: bool,
    /// Whether its check of a node's limit takes down again what it attached; the oldest one's leaves the node full.
    limits: bool,
    /// Checks that cannot hold for a driver of a later version of the specification.
    not_applicable: &'static [&'static str],
}

/// For version 1.13.
const NEWEST: Suite = Suite {
    program: go_tools::csi_sanity,
    specs_min: 102,
    skipped_max: 0,
    no_color: "--ginkgo.no-color",
    modifies: true,
    limits: true,
    not_applicable: &[],
};

/// Each of these lists what a plugin can do and fails at a capability that came after its version, where a client of that
/// version passes over what it does not know.
const LATER_CAPABILITIES: [&str; 3] =
    ["ControllerGetCapabilities", "NodeGetCapabilities", "GetPluginCapabilities"];

const FOR_1_12: Suite = Suite {
    program: go_tools::csi_sanity_1_12,
    specs_min: 80,
    skipped_max: 12,
    no_color: "--ginkgo.no-color",
    modifies: true,
    limits: true,
    not_applicable: &LATER_CAPABILITIES,
};

const FOR_1_5: Suite = Suite {
    program: go_tools::csi_sanity_1_5,
    specs_min: 60,
    skipped_max: 12,
    no_color: "--ginkgo.noColor",
    modifies: false,
    limits: false,
    not_applicable: &[
        LATER_CAPABILITIES[0],
        LATER_CAPABILITIES[1],
        LATER_CAPABILITIES[2],
        // Afterwards they delete a volume that they have not detached, which the specification forbids.
        "volume lifecycle",
        "already published but is incompatible",
    ],
};

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    let trial = |name: &str, suite: &'static Suite| {
        Trial::test(name, move || sanity(suite).map_err(|error| format!("{error:#}").into()))
    };
    vec![
        trial("csi_sanity_passes", &NEWEST),
        trial("csi_sanity_of_csi_1_12_passes", &FOR_1_12),
        trial("csi_sanity_of_csi_1_5_passes", &FOR_1_5),
    ]
}

fn sanity(suite: &Suite) -> Result<()> {
    let program = match (suite.program)()? {
        Ok(program) => program,
        Err(skip) => {
            println!("{skip}");
            return Ok(());
        }
    };
    let cluster = Cluster::start(&ClusterOptions {
        kind: "sanity".to_owned(),
        volumes_max: Some(VOLUMES_MAX),
        ..ClusterOptions::default()
    })?;
    let outcome = run_suite(&cluster, suite, &program);
    let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

fn run_suite(cluster: &Cluster, suite: &Suite, program: &Path) -> Result<()> {
    let dir = cluster.work().folder("csi-sanity")?;
    // The suite runs on a node, where the controller's socket cannot be seen; a folder of the host's can.
    let controller = dir.join("controller.sock");
    let relay = Relay::start(controller.clone(), cluster.controller.spaces.host_path(CSI_SOCKET))?;
    let log = cluster.work().folder("logs")?.join("csi-sanity.log");
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
        .args([suite.no_color, "--ginkgo.seed=1"])
        .stdout(File::create(&log)?)
        .stderr(File::options().append(true).open(&log)?);
    if suite.limits {
        command.arg("--csi.testnodevolumeattachlimit");
    }
    if suite.modifies {
        command.arg(format!("--csi.testvolumemutableparameters={}", mutable.display()));
    }
    if !suite.not_applicable.is_empty() {
        command.arg(format!("--ginkgo.skip={}", suite.not_applicable.join("|")));
    }
    std::thread::sleep(NODES_FILL);
    let passed = run_for(&mut command, SUITE_TIMEOUT)?;
    drop(relay);
    let text = std::fs::read_to_string(&log)?;
    let summary = text.lines().find(|line| line.starts_with("Ran ")).unwrap_or("it did not finish");
    let counts = text.lines().rev().find(|line| line.contains(" Passed | ")).unwrap_or_default();
    println!("csi-sanity: {summary} {counts}");
    ensure!(passed, "csi-sanity failed, see {}:\n{}", log.display(), failures(&text));
    let ran: usize = summary.split(' ').nth(1).and_then(|word| word.parse().ok()).context("no count")?;
    ensure!(ran >= suite.specs_min, "only {ran} checks ran: {summary}");
    // The suite counts what it was told to leave out among the skipped ones.
    let skipped = counts.rsplit('|').find(|part| part.contains("Skipped")).and_then(first_number);
    let skipped = skipped.context("the number of skipped checks is missing")?;
    ensure!(skipped <= suite.skipped_max, "{skipped} checks were skipped: {counts}");
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

fn first_number(text: &str) -> Option<usize> {
    text.split_whitespace().find_map(|word| word.parse().ok())
}

/// The failed checks with their causes.
fn failures(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let mut told = String::new();
    for (index, line) in
        lines.iter().enumerate().filter(|(_, line)| FAILURE_MARKS.iter().any(|mark| line.contains(mark)))
    {
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
