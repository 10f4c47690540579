//! The CNI plugin, executed as a container runtime does it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::namespaces::Namespaces;
use crate::work::binaries_dir;

/// Name of the network that the harness configures.
pub const NETWORK: &str = "holdfast";
/// Version of the specification that the harness speaks.
pub const CNI_VERSION: &str = "1.1.0";

/// One execution of the plugin.
pub struct Call<'a> {
    /// `CNI_COMMAND`.
    pub command: &'a str,
    /// `CNI_CONTAINERID`.
    pub container_id: &'a str,
    /// `CNI_NETNS`; empty is left out.
    pub netns: &'a str,
    /// `CNI_IFNAME`.
    pub ifname: &'a str,
    /// `CNI_ARGS`.
    pub args: &'a str,
}

/// What the plugin answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Whether it exited with 0.
    pub success: bool,
    /// Its standard output, which on an error is the error object.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Answer {
    /// Its output as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("no JSON: {:?} {:?}", self.stdout, self.stderr))
    }

    /// The error's code; none on success.
    #[must_use]
    pub fn error_code(&self) -> Option<u64> {
        if self.success { None } else { self.json().ok()?.get("code")?.as_u64() }
    }

    /// The result, or the plugin's sentence as an error.
    ///
    /// # Errors
    /// The plugin failed.
    pub fn result(&self) -> Result<&Self> {
        anyhow::ensure!(self.success, "the plugin failed: {}{}", self.stdout.trim(), self.stderr.trim());
        Ok(self)
    }
}

/// The network configuration that a runtime hands to the plugin.
#[must_use]
pub fn network_config(agent_socket: &str, pending_dir: &str) -> Value {
    json!({
        "cniVersion": CNI_VERSION, "name": NETWORK, "type": "holdfast-cni",
        "agentSocket": agent_socket, "pendingDir": pending_dir,
    })
}

/// Executes the plugin on a node with `stdin` as its input.
///
/// # Errors
/// It cannot be executed; its own failures are answers.
pub fn execute(node: &Namespaces, call: &Call<'_>, stdin: &str) -> Result<Answer> {
    answer(node.command(plugin_path()?), call, stdin)
}

/// The same, but the plugin gets SIGKILL after a time, unless it ended before.
///
/// # Errors
/// As for [`execute`].
pub fn execute_killed(node: &Namespaces, call: &Call<'_>, stdin: &str, after: Duration) -> Result<Answer> {
    let mut command = node.command("timeout");
    command.args(["--signal=KILL", &format!("{:.4}", after.as_secs_f64())]).arg(plugin_path()?);
    answer(command, call, stdin)
}

fn answer(mut command: Command, call: &Call<'_>, stdin: &str) -> Result<Answer> {
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    let path = plugin_path()?.parent().unwrap_or(Path::new("/")).to_path_buf();
    command.env("CNI_PATH", path);
    let variables = [
        ("CNI_COMMAND", call.command),
        ("CNI_CONTAINERID", call.container_id),
        ("CNI_NETNS", call.netns),
        ("CNI_IFNAME", call.ifname),
        ("CNI_ARGS", call.args),
    ];
    for (name, value) in variables.into_iter().filter(|(_, value)| !value.is_empty()) {
        command.env(name, value);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot execute the plugin")?;
    if let Some(mut pipe) = child.stdin.take() {
        // A plugin that refuses early may not read its input.
        let _ = pipe.write_all(stdin.as_bytes());
    }
    let output = child.wait_with_output()?;
    Ok(Answer {
        success: output.status.success(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn plugin_path() -> Result<PathBuf> {
    Ok(binaries_dir()?.join("holdfast-cni"))
}
