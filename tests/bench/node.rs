//! A node with our agent and its pods, as the benches of the network and of policy use them.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_tests::cni::{self, Call};
use holdfast_tests::process::maker;
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Namespaces, Program, ProgramSpec, Work};
use serde_json::Value;

use crate::place::wait_until;

/// How long an agent may take to serve.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Where it serves, inside the node.
pub const AGENT_SOCKET: &str = "/run/holdfast/netd.sock";

/// Starts the agent of a node, whose name is the node's, with `more` arguments.
pub fn start_agent(
    work: &Work,
    node: &Namespaces,
    state: &Path,
    objects: &Path,
    more: &[String],
) -> Result<Program> {
    let name = format!("{}-netd", node.name());
    let log = work.folder("logs")?.join(format!("{name}.log"));
    let mut template = node.command(binaries_dir()?.join("holdfast-netd"));
    template
        .arg(format!("--node={}", node.name()))
        .arg(format!("--objects={}", objects.display()))
        .arg(format!("--state-dir={}", state.display()))
        .arg(format!("--pending-dir={}", state.join("pending").display()))
        .arg(format!("--socket={AGENT_SOCKET}"))
        .args(more);
    let command = maker(&template, Vec::new());
    Program::start(ProgramSpec { name, log, command })
}

/// Waits until the agent takes calls: rules are as compiled then.
pub fn wait_serving(node: &Namespaces, agent: &mut Program) -> Result<()> {
    let socket = node.host_path(AGENT_SOCKET);
    wait_until(START_TIMEOUT, || {
        anyhow::ensure!(agent.is_alive(), "{} ended:\n{}", agent.name(), agent.log_tail());
        Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok())
    })
    .with_context(|| format!("{} does not serve:\n{}", agent.name(), agent.log_tail()))
}

/// Attaches a sandbox by the plugin; `args` are CNI_ARGS. Gives the pod's address.
pub fn attach(node: &Namespaces, config: &Value, name: &str, netns: &Path, args: &str) -> Result<Ipv4Addr> {
    let path = netns.display().to_string();
    let call = Call { command: "ADD", container_id: name, netns: &path, ifname: "eth0", args };
    let answer = cni::execute(node, &call, &config.to_string())?;
    let result = answer.result().with_context(|| format!("ADD of {name}"))?.json()?;
    let text = result["ips"][0]["address"].as_str().context("the result has no address")?;
    Ok(text.split('/').next().unwrap_or(text).parse()?)
}

/// Makes a sandbox as a runtime does, with its loopback up; its path inside the node.
pub fn make_sandbox(node: &Namespaces, name: &str) -> Result<PathBuf> {
    shell(node, &format!("ip netns add {name}; ip -n {name} link set lo up"))?;
    Ok(Path::new("/run/netns").join(name))
}

/// Runs a line of shell on a node.
pub fn shell(node: &Namespaces, line: &str) -> Result<String> {
    node.run("sh", &["-ec", line])
}
