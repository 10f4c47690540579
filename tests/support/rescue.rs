//! The loss of a record store as operators meet it: everything of the storage ends and starts again, and their own command
//! tells and restores what the replicas keep.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::process::{run, wait_until};
use crate::work::binaries_dir;

/// All processes answer again, and all nodes are announced.
const BACK_WITHIN: Duration = Duration::from_secs(60);

impl Cluster {
    /// `kill -9` of the controller and of each node's storage processes; agents go on.
    ///
    /// # Errors
    /// One does not go.
    pub fn kill_storage(&mut self) -> Result<()> {
        self.controller.program.kill()?;
        for node in &mut self.nodes {
            node.csi.kill()?;
            node.data.kill()?;
        }
        Ok(())
    }

    /// Starts them again and waits until all nodes are announced.
    ///
    /// # Errors
    /// Something does not start.
    pub fn start_storage(&mut self) -> Result<()> {
        self.controller.program.start_again()?;
        for node in &mut self.nodes {
            node.data.start_again()?;
            node.csi.start_again()?;
            node.wait_for_data()?;
            node.wait_for_csi()?;
        }
        self.controller.wait()?;
        wait_until(BACK_WITHIN, || Ok(self.largest_volume_bytes(self.nodes.len())? > 0))
            .context("not all nodes are back")
    }
}

/// `holdfast records rescue --json`: whether nothing is left to do, and what it tells.
///
/// # Errors
/// It fails.
pub fn rescue(cluster: &Cluster, words: &[&str]) -> Result<(bool, Value)> {
    let mut command = Command::new(binaries_dir()?.join("holdfast"));
    command.args(["records", "rescue", "--json"]).args(words).arg("--socket");
    let output = command.arg(cluster.controller.csi.path()).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let Some(code @ 0..=1) = output.status.code() else {
        bail!("holdfast records rescue {words:?}: {stderr}")
    };
    Ok((code == 0, serde_json::from_slice(&output.stdout)?))
}

/// `holdfast-csi inspect --json` of the pools of some nodes, whose data processes do not run.
///
/// # Errors
/// It fails, as it does while one of them runs.
pub fn inspect(cluster: &Cluster, nodes: &[&str]) -> Result<Value> {
    let mut command = Command::new(binaries_dir()?.join("holdfast-csi"));
    command.args(["inspect", "--json"]);
    for node in nodes {
        command.arg("--pool-dir").arg(cluster.node(node).pool_dir());
    }
    Ok(serde_json::from_str(&run(&mut command)?)?)
}

/// What either of them tells of one volume.
///
/// # Errors
/// Nothing.
pub fn told_of<'told>(told: &'told Value, id: &str) -> Result<&'told Value> {
    let volumes = told["volumes"].as_array().context("no list of volumes")?;
    let found = volumes.iter().find(|volume| volume["volume"] == id);
    found.with_context(|| format!("volume {id} is not told of: {told}"))
}
