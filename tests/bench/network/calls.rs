//! ADD and DEL, timed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Namespaces, Work};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::nodes::{NAMESPACE, Ours, Peer, pod_name};
use crate::figures::{Figure, percentile};
use crate::node::make_sandbox;

const PEER_PLUGINS: &str = "/usr/lib/cni";
const PEER_NAME: &str = "containernetworking bridge+host-local";

/// What the process inside a node is told: which plugin, with what.
#[derive(Debug, Args)]
pub struct CallsOptions {
    /// The plugin.
    #[arg(long)]
    plugin: PathBuf,
    /// Its configuration, JSON.
    #[arg(long)]
    config: String,
    /// How many pods.
    #[arg(long)]
    pods: usize,
}

/// Milliseconds of each call.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Times {
    add_ms: Vec<f64>,
    del_ms: Vec<f64>,
}

/// Figures of both, in rounds that alternate.
pub fn compare(
    work: &Work,
    ours: &Ours,
    peer: &Peer,
    pods: usize,
    rounds: usize,
    tell: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let peer_config = peer_config(&work.folder("host-local")?);
    eprintln!("peer: {PEER_PLUGINS}/bridge with {peer_config}");
    eprintln!(
        "ours: holdfast-cni and holdfast-netd with a NetworkPolicy that selects every pod; the peer has none"
    );
    tell(&format!("making {pods} sandboxes on each side"));
    for index in 0..pods {
        make_sandbox(&ours.nodes[0], &pod_name(index))?;
        make_sandbox(&peer.nodes[0], &pod_name(index))?;
    }
    let plugin = binaries_dir()?.join("holdfast-cni");
    let bridge = Path::new(PEER_PLUGINS).join("bridge");
    let mut figures = [Vec::new(), Vec::new(), Vec::new()];
    let mut peers = [Vec::new(), Vec::new(), Vec::new()];
    for round in 1..=rounds {
        tell(&format!("ADD and DEL of {pods} pods, round {round} of {rounds}"));
        let own = round_of(&ours.nodes[0], &plugin, &ours.config(0), pods)?;
        let other = round_of(&peer.nodes[0], &bridge, &peer_config, pods)?;
        for (values, times) in [(&mut figures, &own), (&mut peers, &other)] {
            values[0].push(percentile(&times.add_ms, 50));
            values[1].push(percentile(&times.add_ms, 99));
            values[2].push(percentile(&times.del_ms, 50));
        }
    }
    let names = ["cni.add_p50", "cni.add_p99", "cni.del_p50"];
    Ok((0..3).map(|n| Figure::of_rounds(names[n], "ms", PEER_NAME, &figures[n], &peers[n])).collect())
}

fn peer_config(data_dir: &Path) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "peer", "type": "bridge", "bridge": "br0", "isGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": data_dir.display().to_string(),
            "ranges": [[{"subnet": "10.253.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
        },
    })
}

/// One round by a process inside the node, so that what is timed is the plugin alone.
fn round_of(node: &Namespaces, plugin: &Path, config: &Value, pods: usize) -> Result<Times> {
    let program = std::env::current_exe()?;
    let output = node
        .command(program)
        .args(["network-calls", "--plugin"])
        .arg(plugin)
        .args(["--config", &config.to_string(), "--pods", &pods.to_string()])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    anyhow::ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    serde_json::from_str(text.trim()).with_context(|| format!("no times: {text:?}"))
}

/// The process inside: ADD for all pods, then DEL for all; prints the times as JSON.
///
/// # Errors
/// The plugin's own sentence.
pub fn run_calls(options: &CallsOptions) -> Result<()> {
    let mut config: Value = serde_json::from_str(&options.config)?;
    let mut times = Times::default();
    let mut results = Vec::new();
    for index in 0..options.pods {
        let (ms, result) = call(&options.plugin, "ADD", &pod_name(index), &config)?;
        times.add_ms.push(ms);
        results.push(serde_json::from_str::<Value>(&result).context("ADD gave no JSON")?);
    }
    for (index, result) in results.into_iter().enumerate() {
        config["prevResult"] = result;
        times.del_ms.push(call(&options.plugin, "DEL", &pod_name(index), &config)?.0);
    }
    println!("{}", serde_json::to_string(&times)?);
    Ok(())
}

fn call(plugin: &Path, verb: &str, pod: &str, config: &Value) -> Result<(f64, String)> {
    let stdin = config.to_string();
    let folder = plugin.parent().unwrap_or(Path::new("/"));
    let mut command = Command::new(plugin);
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("CNI_PATH", folder)
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", pod)
        .env("CNI_NETNS", format!("/run/netns/{pod}"))
        .env("CNI_IFNAME", "eth0")
        .env(
            "CNI_ARGS",
            format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={pod};K8S_POD_UID={pod}"),
        )
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot execute {}", plugin.display()))?;
    if let Some(mut pipe) = child.stdin.take() {
        // A plugin that refuses early may not read its input.
        let _ = pipe.write_all(stdin.as_bytes());
    }
    let output = child.wait_with_output()?;
    let ms = start.elapsed().as_secs_f64() * 1000.0;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    anyhow::ensure!(
        output.status.success(),
        "{verb} of {pod}: {}{}",
        stdout.trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok((ms, stdout))
}
