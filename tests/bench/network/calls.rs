//! ADD and DEL, timed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Namespaces, Work};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::nodes::{NAMESPACE, Ours, Peer, pod_name};
use crate::figures::{Figure, RatioLimit, percentile};

/// Pods of a burst: as many as a /24 and most limits of pods per node allow.
pub const BURST: usize = 250;
/// What the agent may need beside them.
const RSS_MIB_MAX: f64 = 25.0;
/// Leases beside which the 10,000th is taken.
pub const LEASES: usize = 9_999;
/// After a burst, before the agent's memory is read.
const CALM: Duration = Duration::from_secs(4);
const PEER_PLUGINS: &str = "/usr/lib/cni";
const PEER_NAME: &str = "containernetworking bridge+host-local+portmap";

/// What the process inside a node is told.
#[derive(Debug, Args)]
pub struct CallsOptions {
    /// The plugins, [`Plugin`]s as a JSON array in the order of ADD.
    #[arg(long)]
    plugins: String,
    /// How many pods.
    #[arg(long)]
    pods: usize,
    /// All at once, not one after the other.
    #[arg(long)]
    at_once: bool,
    /// Only this verb.
    #[arg(long)]
    only: Option<String>,
}

/// One plugin of a configuration list.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plugin {
    /// The executable.
    pub path: PathBuf,
    /// Its configuration.
    pub config: Value,
}

/// Milliseconds of each pod's calls, and of all of them together.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Times {
    add_ms: Vec<f64>,
    del_ms: Vec<f64>,
    /// From the first call of ADD to the end of the last one.
    pub all_adds_ms: f64,
}

/// The plugins of both sides.
pub struct Sides {
    /// Ours.
    pub ours: Vec<Plugin>,
    /// The peer's.
    pub peer: Vec<Plugin>,
}

impl Sides {
    /// As they run on the first node of each side.
    pub fn new(work: &Work, ours: &Ours) -> Result<Self> {
        let plugin = |name: &str, config: Value| Plugin { path: Path::new(PEER_PLUGINS).join(name), config };
        let bridge = peer_config(&work.folder("host-local")?);
        let portmap = json!({
            "cniVersion": "1.0.0", "name": "peer", "type": "portmap", "capabilities": {"portMappings": true},
        });
        eprintln!("peer: {PEER_PLUGINS}/bridge with {bridge}, then {PEER_PLUGINS}/portmap without a mapping");
        eprintln!(
            "ours: holdfast-cni and holdfast-netd with a NetworkPolicy that selects every pod; the peer has none"
        );
        Ok(Self {
            ours: vec![Plugin { path: binaries_dir()?.join("holdfast-cni"), config: ours.config(0) }],
            peer: vec![plugin("bridge", bridge), plugin("portmap", portmap)],
        })
    }
}

/// Figures of both, in rounds that alternate.
pub fn compare(
    sides: &Sides,
    ours: &Ours,
    peer: &Peer,
    pods: usize,
    rounds: usize,
    tell: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let mut figures = [Vec::new(), Vec::new(), Vec::new()];
    let mut peers = [Vec::new(), Vec::new(), Vec::new()];
    for round in 1..=rounds {
        tell(&format!("ADD and DEL of {pods} pods, round {round} of {rounds}"));
        let own = run_inside(&ours.nodes[0], &sides.ours, pods, &[])?;
        let other = run_inside(&peer.nodes[0], &sides.peer, pods, &[])?;
        for (values, times) in [(&mut figures, &own), (&mut peers, &other)] {
            values[0].push(percentile(&times.add_ms, 50));
            values[1].push(percentile(&times.add_ms, 99));
            values[2].push(percentile(&times.del_ms, 50));
        }
    }
    let names = ["cni.add_p50", "cni.add_p99", "cni.del_p50"];
    let third = [Some(RatioLimit::AtMost(0.33)), None, Some(RatioLimit::AtMost(0.33))];
    Ok((0..3)
        .map(|n| {
            let figure = Figure::of_rounds(names[n], "ms", PEER_NAME, &figures[n], &peers[n]);
            Figure { ratio_limit: third[n], ..figure }
        })
        .collect())
}

/// ADD beside many leases and beside none, by turns: nobody may pay for the pods that are there. The second node has the leases.
pub fn flatness(ours: &Ours, pods: usize, rounds: usize, tell: &dyn Fn(&str)) -> Result<Figure> {
    let (mut first, mut last) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        tell(&format!("ADD beside {LEASES} leases and beside none, round {round} of {rounds}"));
        for (index, values) in [(0, &mut first), (1, &mut last)] {
            let plugin = Plugin { path: binaries_dir()?.join("holdfast-cni"), config: ours.config(index) };
            let times = run_inside(&ours.nodes[index], &[plugin], pods, &[])?;
            values.push(percentile(&times.add_ms, 50));
        }
    }
    let figure = Figure::of_rounds("cni.add_10000th_vs_1st", "ms", "ours without leases", &last, &first);
    Ok(figure.with_ratio(RatioLimit::AtMost(1.1)))
}

/// As many pods at once as a node takes: seconds until the last one is attached, and the agent's memory beside them.
pub fn burst(
    sides: &Sides,
    ours: &Ours,
    peer: &Peer,
    rounds: usize,
    tell: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let (mut own, mut other, mut memory) = (Vec::new(), Vec::new(), 0.0_f64);
    for round in 1..=rounds {
        tell(&format!("{BURST} pods at once, round {round} of {rounds}"));
        for (node, plugins, seconds) in
            [(&ours.nodes[0], &sides.ours, &mut own), (&peer.nodes[0], &sides.peer, &mut other)]
        {
            let times = run_inside(node, plugins, BURST, &["--at-once", "--only", "ADD"])?;
            seconds.push(times.all_adds_ms / 1000.0);
            // What stays, not what the calls themselves took.
            std::thread::sleep(CALM);
            memory = memory.max(ours.agent_rss_mib(0)?);
            run_inside(node, plugins, BURST, &["--only", "DEL"])?;
        }
    }
    let burst = Figure::of_rounds("cni.burst_250_s", "s", PEER_NAME, &own, &other);
    Ok(vec![
        burst.with_ratio(RatioLimit::AtMost(0.5)),
        Figure::within("netd.rss_mib", "MiB", memory, RSS_MIB_MAX),
    ])
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

/// One round by a process inside the node, so that what is timed is the plugins alone.
pub fn run_inside(node: &Namespaces, plugins: &[Plugin], pods: usize, more: &[&str]) -> Result<Times> {
    let program = std::env::current_exe()?;
    let output = node
        .command(program)
        .args(["network-calls", "--plugins", &serde_json::to_string(plugins)?])
        .args(["--pods", &pods.to_string()])
        .args(more)
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
    let plugins: Vec<Plugin> = serde_json::from_str(&options.plugins)?;
    let is_wanted = |verb: &str| options.only.as_deref().is_none_or(|only| only == verb);
    let mut times = Times::default();
    let mut results = vec![None; options.pods];
    let begin = Instant::now();
    if is_wanted("ADD") && options.at_once {
        let plugins = &plugins;
        let all: Vec<Result<(f64, Value)>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..options.pods).map(|index| scope.spawn(move || add(plugins, &pod_name(index)))).collect();
            let ended = threads.into_iter().map(std::thread::ScopedJoinHandle::join);
            ended.map(|ended| ended.unwrap_or_else(|_| Err(anyhow::anyhow!("a call panicked")))).collect()
        });
        for (index, ended) in all.into_iter().enumerate() {
            let (ms, result) = ended?;
            times.add_ms.push(ms);
            results[index] = Some(result);
        }
    } else if is_wanted("ADD") {
        for (index, known) in results.iter_mut().enumerate() {
            let (ms, result) = add(&plugins, &pod_name(index))?;
            times.add_ms.push(ms);
            *known = Some(result);
        }
    }
    times.all_adds_ms = begin.elapsed().as_secs_f64() * 1000.0;
    if is_wanted("DEL") {
        for (index, result) in results.into_iter().enumerate() {
            times.del_ms.push(del(&plugins, &pod_name(index), result)?);
        }
    }
    println!("{}", serde_json::to_string(&times)?);
    Ok(())
}

/// ADD of all plugins as a runtime does it: each one gets the result of the one before.
fn add(plugins: &[Plugin], pod: &str) -> Result<(f64, Value)> {
    let (mut ms, mut result) = (0.0, None);
    for plugin in plugins {
        let (took, answer) = call(plugin, "ADD", pod, result)?;
        ms += took;
        result = Some(serde_json::from_str::<Value>(&answer).context("ADD gave no JSON")?);
    }
    Ok((ms, result.context("no plugin")?))
}

/// DEL of all plugins, the last one first.
fn del(plugins: &[Plugin], pod: &str, result: Option<Value>) -> Result<f64> {
    let mut ms = 0.0;
    for plugin in plugins.iter().rev() {
        ms += call(plugin, "DEL", pod, result.clone())?.0;
    }
    Ok(ms)
}

fn call(plugin: &Plugin, verb: &str, pod: &str, previous: Option<Value>) -> Result<(f64, String)> {
    let mut config = plugin.config.clone();
    if let Some(previous) = previous {
        config["prevResult"] = previous;
    }
    let (stdin, plugin) = (config.to_string(), &plugin.path);
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
