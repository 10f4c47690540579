//! What the fault tests do to a running story, beyond the demo's steps.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_proto::csi as csi_proto;

use super::network::check_matrix;
use super::volume::in_sync;
use super::{PUBLISHED, RESYNC_TIMEOUT, Story};
use crate::cluster::Cluster;
use crate::csi::named;
use crate::ledger::now_us;
use crate::pod::{NAMESPACE, Pod, PodSpec};
use crate::postgres::Postgres;
use crate::process::wait_until;

impl Story {
    /// Lets the client commit for a second.
    ///
    /// # Errors
    /// It cannot.
    pub fn commit_for_a_moment(&mut self) -> Result<()> {
        self.wait_for_commits(Duration::from_secs(1), 5)
    }

    /// How many volumes the controller lists.
    ///
    /// # Errors
    /// The controller's status.
    pub fn volumes(&self) -> Result<usize> {
        let request = csi_proto::ListVolumesRequest::default();
        let controller = &self.cluster.controller.csi;
        let reply = controller.controller(|mut client| async move { client.list_volumes(request).await });
        Ok(named("ListVolumes", reply)?.entries.len())
    }

    /// The number of the target's start on a node, and of its members.
    ///
    /// # Errors
    /// The volume is not attached there.
    pub fn generation_and_members(&self, node: &str) -> Result<(u64, usize)> {
        let status = self.status(node)?;
        Ok((status.generation, in_sync(&status)))
    }

    /// Publishes, stages and mounts the volume on node a although it is: every call must find its work done.
    ///
    /// # Errors
    /// A CSI call fails.
    pub fn attach_again(&self) -> Result<()> {
        let before = self.status("node-a")?.generation;
        self.attach("node-a")?;
        let after = self.status("node-a")?.generation;
        anyhow::ensure!(
            before == after,
            "staging again started a new target: generation {before}, then {after}"
        );
        Ok(())
    }

    /// Measures who reaches whom and compares it with the policy.
    ///
    /// # Errors
    /// It is not as the policy says.
    pub fn check_reachability(&self) -> Result<()> {
        let matrix = self.measure(self.pods()?)?;
        check_matrix(&matrix).with_context(|| matrix.table())
    }

    /// Makes one more pod.
    ///
    /// # Errors
    /// The plugin's sentence.
    pub fn add_pod(&self, name: &str, node: &str) -> Result<Pod> {
        Pod::create(&self.cluster, PodSpec { name, app: name, node })
    }

    /// Removes what a pod that could not be made left: its sandbox and its object.
    ///
    /// # Errors
    /// They cannot be removed.
    pub fn remove_sandbox(&self, name: &str, node: &str) -> Result<()> {
        self.cluster.node(node).spaces.run("ip", &["netns", "delete", &format!("{name}-{node}")])?;
        self.cluster.objects.remove(&format!("pod-{NAMESPACE}-{name}"))
    }

    /// Waits until all three replicas are in sync.
    ///
    /// # Errors
    /// They are not, in time.
    pub fn wait_for_all_in_sync(&self) -> Result<()> {
        let home = &self.pods()?.database.node;
        wait_until(RESYNC_TIMEOUT, || Ok(in_sync(&self.status(home)?) == 3))
            .with_context(|| format!("replicas: {:?}", self.status(home).map(|status| status.replicas)))
    }

    /// The database's node loses its power; volume and database move to node b, then the node comes back.
    ///
    /// # Errors
    /// A call fails, or the returned node's replica does not come in sync.
    pub fn survive_a_power_cut(&mut self) -> Result<()> {
        let cut_us = now_us();
        self.cluster.power_off("node-a")?;
        self.report.note("node-a has lost its power");
        self.unpublish("node-a")?;
        self.attach("node-b")?;
        let first = self.move_database(cut_us)?;
        self.report.note(&format!("transaction {} is committed on node-b", first.number));
        self.compare("after the power cut")?;
        self.cluster.power_on("node-a")?;
        self.report.note("node-a is back, with its disk and without its memory");
        self.wait_for_all_in_sync()?;
        // Its pods are gone; the runtime detaches what it finds in its own books, without a namespace.
        let (stranded, _) = self.stranded.take().context("no pod was stranded")?;
        let answer = stranded.call(&self.cluster, "DEL")?;
        answer.result().context("DEL of a pod that the power cut ended")?;
        Ok(())
    }

    /// Does something that ends the volume's I/O on node a, then brings volume and database up again there, as kubelet
    /// would with a new pod on the same node.
    ///
    /// # Errors
    /// A CSI call fails, or the database does not start.
    pub fn recover_database_after(&mut self, fault: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
        fault(&mut self.cluster)?;
        self.pods.as_mut().context("no pods run yet")?.postgres.program.kill()?;
        self.detach("node-a").context("taking the dead volume down")?;
        self.attach("node-a").context("staging it again")?;
        let pods = self.pods()?;
        let postgres = Postgres::start(&self.cluster, &pods.database, Path::new(PUBLISHED))?;
        self.pods.as_mut().context("no pods run yet")?.postgres = postgres;
        self.wait_for_all_in_sync()
    }
}
