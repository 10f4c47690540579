//! The environment's sabotage of a check: a replica whose data is set back to an earlier moment, as by a disk that drops
//! writes it acknowledged. Everything beside the data is as it was left.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use holdfast_tests::Cluster;
use holdfast_tests::process::run;

/// A copy of the data of the only replica of a node.
pub struct StaleReplica {
    node: String,
    replica: PathBuf,
    copy: PathBuf,
}

impl StaleReplica {
    /// Copies the replica's layers as they are on disk; its volume must be detached.
    pub fn copy(cluster: &mut Cluster, node: &str) -> Result<Self> {
        // Stopped in order: nothing is left in memory.
        cluster.node_mut(node).data.terminate()?;
        let replicas = cluster.node(node).pool_dir().join("replicas");
        let mut found: Vec<PathBuf> = std::fs::read_dir(&replicas)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|name| name.len() == 32))
            .collect();
        ensure!(found.len() == 1, "{} holds {} replicas, wanted one", replicas.display(), found.len());
        let replica = found.pop().context("no replica")?;
        let copy = cluster.work().folder("stale")?.join(node);
        std::fs::create_dir_all(&copy)?;
        copy_layers(&replica, &copy)?;
        restart(cluster, node)?;
        Ok(Self { node: node.to_owned(), replica, copy })
    }

    /// Sets the replica's data back; its volume must be detached.
    pub fn put_back(&self, cluster: &mut Cluster) -> Result<()> {
        cluster.node_mut(&self.node).data.terminate()?;
        copy_layers(&self.copy, &self.replica)?;
        restart(cluster, &self.node)
    }
}

fn restart(cluster: &mut Cluster, node: &str) -> Result<()> {
    let node = cluster.node_mut(node);
    node.data.start_again()?;
    node.wait_for_data()
}

fn copy_layers(from: &Path, to: &Path) -> Result<()> {
    let mut layers = 0;
    for entry in std::fs::read_dir(from)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("layer-") {
            run(Command::new("cp").arg("--sparse=always").arg(entry.path()).arg(to.join(entry.file_name())))?;
            layers += 1;
        }
    }
    ensure!(layers > 0, "{} holds no layer", from.display());
    Ok(())
}
