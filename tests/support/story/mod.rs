//! The main job, step by step: the demo tells it, the cluster tests assert it. Each step checks its own promise and fails
//! if it does not hold.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_proto::csi as csi_proto;

use crate::cleanup::Logs;
use crate::cluster::{Cluster, ClusterOptions};
use crate::csi::named;
use crate::direct_io::{DirectOutcome, read_block, write_block};
use crate::ledger::{Entry, Ledger, longest_gap, now_us};
use crate::pod::Pod;
use crate::postgres::{self, Postgres};
use crate::process::{Program, wait_until};
use crate::report::{Report, mebibytes, seconds};
use network::{DB_POLICY, check_matrix};
use volume::in_sync;

/// Size of the demo's volume.
pub const VOLUME_BYTES: u64 = 1 << 30;
/// Longest stall of commits that a killed replica may cause: it is swapped out after 800 ms of silence.
const STALL_MAX: Duration = Duration::from_secs(3);
/// Most that a resync may copy, as a part of the volume: it copies what was written, not everything.
const RESYNC_PART_MAX: u64 = 4;
/// How long commits run before and after something is done to the cluster.
const COMMIT_TIME: Duration = Duration::from_secs(3);
/// How long a resync of what a few seconds wrote may take.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a failover to another node may take until the client's next commit.
const FAILOVER_MAX: Duration = Duration::from_secs(60);
/// How long an old target may take to learn that it is fenced once it reaches anybody again.
const FENCE_TIMEOUT: Duration = Duration::from_secs(20);
/// Where a node stages and publishes the volume.
const STAGING: &str = "/run/kubelet/staging/db";
const PUBLISHED: &str = "/run/kubelet/pods/db/volume";
/// Port of the database.
const DB_PORT: u16 = 5432;

mod client;
mod faults;
mod network;
mod pgbench;
mod volume;

/// The story so far.
pub struct Story {
    /// The cluster.
    pub cluster: Cluster,
    /// Prints what happens.
    pub report: Report,
    volume: Option<Volume>,
    pods: Option<Pods>,
    client: Option<Client>,
    pgbench: Option<pgbench::Pgbench>,
    /// The database on the node that was cut off: it runs on until the node can be told to end it.
    stranded: Option<(Pod, Postgres)>,
}

struct Volume {
    id: String,
    context: HashMap<String, String>,
}

struct Pods {
    database: Pod,
    api: Pod,
    web: Pod,
    postgres: Postgres,
}

struct Client {
    program: Program,
    ledger: Ledger,
    address_file: PathBuf,
}

impl Story {
    /// Step 1: three nodes and a controller.
    ///
    /// # Errors
    /// Something does not start.
    pub fn begin(kind: &str) -> Result<Self> {
        Self::begin_on(&ClusterOptions { kind: kind.to_owned(), ..ClusterOptions::default() })
    }

    /// Step 1 with a cluster of another kind; of three nodes, too.
    ///
    /// # Errors
    /// Something does not start.
    pub fn begin_on(options: &ClusterOptions) -> Result<Self> {
        let mut report = Report::new();
        report.step(
            "1. Three nodes on one underlay, each with data, csi and network processes; one controller",
        );
        let cluster = Cluster::start(options)?;
        report.note("controller, node-a, node-b, node-c answer; every node has announced its pool");
        for node in &cluster.nodes {
            report.block(&format!("{}  {}  pods {}", node.name, node.address, node.pod_cidr));
        }
        Ok(Self { cluster, report, volume: None, pods: None, client: None, pgbench: None, stranded: None })
    }

    /// Step 2: a volume with three replicas, published to node a and mounted there.
    ///
    /// # Errors
    /// A CSI call fails.
    pub fn provision(&mut self) -> Result<()> {
        self.report.step("2. A replicated volume for node-a");
        let bytes = i64::try_from(VOLUME_BYTES)?;
        let created = self.cluster.create_volume("pvc-db", bytes, 3, "ext4")?;
        self.report.note(&format!(
            "CreateVolume: {}, 3 replicas, volume {}",
            mebibytes(VOLUME_BYTES),
            created.volume_id
        ));
        self.volume = Some(Volume { id: created.volume_id, context: created.volume_context });
        self.attach("node-a")?;
        let status = self.status("node-a")?;
        ensure!(status.replicas.len() == 3, "the target on node-a knows {} replicas", status.replicas.len());
        ensure!(in_sync(&status) == 3, "only {} replicas are in sync at the start", in_sync(&status));
        let node = self.cluster.node("node-a");
        let mounts = node.spaces.run("findmnt", &["-n", "-o", "FSTYPE", PUBLISHED])?;
        ensure!(mounts.trim() == "ext4", "{PUBLISHED} holds {mounts:?}");
        self.report
            .note(&format!("node-a: {} is {}, generation {}", PUBLISHED, status.device, status.generation));
        Ok(())
    }

    /// Step 3: three pods, PostgreSQL on the volume, and a policy that lets only `api` reach it.
    ///
    /// # Errors
    /// A pod cannot be made, the database does not start, or the matrix is not as the policy says.
    pub fn run_pods(&mut self) -> Result<()> {
        self.report.step("3. Pods db, api and web, a policy that lets only api reach db on 5432");
        self.cluster.objects.put_text("networkpolicy-db", DB_POLICY)?;
        let database = self.create_pod("db", "node-a")?;
        let api = self.create_pod("api", "node-b")?;
        let web = self.create_pod("web", "node-c")?;
        postgres::initialise(&self.cluster, &database, Path::new(PUBLISHED))?;
        self.report.note("initdb on the volume");
        let postgres = Postgres::start(&self.cluster, &database, Path::new(PUBLISHED))?;
        postgres.create_ledger_table(&self.cluster, &database)?;
        self.report.note("PostgreSQL takes statements");
        let pods = Pods { database, api, web, postgres };
        let matrix = self.measure(&pods)?;
        self.pods = Some(pods);
        self.report.note("who reaches whom, across the VXLAN overlay:");
        self.report.block(&matrix.table());
        check_matrix(&matrix)?;
        self.report.figure("reachability", "as the policy says".to_owned());
        Ok(())
    }

    /// Step 4: commits without pause while a replica's process is killed and comes back.
    ///
    /// # Errors
    /// A commit is lost, the stall is too long, or the resync is not small.
    pub fn lose_a_replica(&mut self) -> Result<()> {
        self.report.step("4. node-c's data process is killed while api commits without pause");
        self.start_client()?;
        self.wait_for_commits(COMMIT_TIME, 20)?;
        let killed_us = now_us();
        self.cluster.node_mut("node-c").data.kill()?;
        self.report.note("kill -9 of node-c's data process");
        self.wait_for_commits(COMMIT_TIME, 20)?;
        let status = self.status("node-a")?;
        ensure!(in_sync(&status) == 2, "{} replicas are in sync while node-c is gone", in_sync(&status));
        let stall = longest_gap(&self.client()?.ledger.entries()?, killed_us);
        self.report
            .note(&format!("commits go on with 2 of 3 replicas; the longest stall was {}", seconds(stall)));
        ensure!(
            stall <= STALL_MAX,
            "commits stalled for {}, allowed are {}",
            seconds(stall),
            seconds(STALL_MAX)
        );
        self.report.figure("longest stall of commits, a replica killed", seconds(stall));
        let returned_us = now_us();
        let node = self.cluster.node_mut("node-c");
        node.data.start_again()?;
        node.wait_for_data()?;
        self.report.note("node-c's data process runs again");
        self.wait_for_resync()?;
        self.wait_for_commits(Duration::from_millis(500), 5)?;
        let stall = longest_gap(&self.client()?.ledger.entries()?, returned_us);
        ensure!(stall <= STALL_MAX, "commits stalled for {} during the resync", seconds(stall));
        self.report.figure("longest stall of commits, the replica back", seconds(stall));
        self.compare("after the resync")?;
        Ok(())
    }

    /// Step 5: node a is cut off, the volume moves to node b without its help, then a comes back and is fenced.
    ///
    /// # Errors
    /// An acknowledged transaction is lost, the failover is too slow, or the old target still serves.
    pub fn lose_a_node(&mut self) -> Result<()> {
        self.report.step("5. node-a is cut off while everything on it runs on; the volume moves to node-b");
        self.wait_for_commits(Duration::from_secs(1), 10)?;
        let old = self.status("node-a")?;
        let (cut, cut_us) = (Instant::now(), now_us());
        self.cluster.set_link("node-a", false)?;
        self.report.note("node-a's link is down; its PostgreSQL and its target run on");
        self.refuse_publish_without_unpublish()?;
        self.unpublish("node-a")?;
        self.report.note("ControllerUnpublish(node-a) succeeded without node-a");
        self.attach("node-b")?;
        let new = self.status("node-b")?;
        ensure!(new.generation > old.generation, "generation {} after {}", new.generation, old.generation);
        self.report.note(&format!("node-b: generation {} (node-a had {})", new.generation, old.generation));
        let first = self.move_database(cut_us)?;
        let failover = Duration::from_micros(first.acknowledged_us - cut_us);
        self.report.note(&format!(
            "transaction {} committed {} after the cut",
            first.number,
            seconds(failover)
        ));
        ensure!(cut.elapsed() <= FAILOVER_MAX, "the failover took {}", seconds(cut.elapsed()));
        self.report.figure("cut of the node to the first new commit", seconds(failover));
        self.wait_for_commits(Duration::from_secs(1), 10)?;
        self.compare("after the failover")?;
        self.return_of_the_old_node(&old.device)
    }

    /// Ends the story as a cluster's user would: client, pods, mounts, volume; then the cluster.
    ///
    /// # Errors
    /// Something refuses to end or is left behind.
    pub fn end(mut self) -> Result<()> {
        self.report.step("6. The end: everything is taken down through the same interfaces");
        let torn_down = self.tear_down();
        let Self { cluster, report, .. } = self;
        // Whatever refused, the rest goes.
        cluster.end(if torn_down.is_ok() { Logs::Remove } else { Logs::Keep })?;
        torn_down?;
        report.note("pods deleted, volume unpublished, unstaged, deleted, cluster ended");
        report.note("no process, namespace, device, mount or file is left");
        report.finish();
        Ok(())
    }

    /// Leaves the cluster running.
    ///
    /// # Errors
    /// A holder is gone.
    pub fn keep(self) -> Result<String> {
        self.report.finish();
        let (pods, client) = (self.pods()?, self.client()?);
        let node = self.cluster.node(&pods.database.node).spaces.pid();
        let psql = format!(
            "database    nsenter -t {node} -m -u -i -p --net={} psql -h {} -U postgres -c 'SELECT max(number) FROM ledger'\n\
             ledger      tail -f {}\n",
            self.cluster.node(&pods.database.node).spaces.host_path(&pods.database.netns).display(),
            pods.database.address,
            client.ledger.path().display(),
        );
        Ok(psql + &self.cluster.keep()?)
    }

    fn wait_for_resync(&mut self) -> Result<()> {
        let waited = wait_until(RESYNC_TIMEOUT, || Ok(in_sync(&self.status("node-a")?) == 3));
        let status = self.status("node-a")?;
        waited.with_context(|| format!("node-c is not in sync again: {:?}", status.replicas))?;
        let replica = status
            .replicas
            .iter()
            .find(|replica| replica.node == "node-c")
            .context("no replica on node-c")?;
        let copied = replica.resync_bytes_done;
        let figure = format!("{} of {}", mebibytes(copied), mebibytes(VOLUME_BYTES));
        self.report.note(&format!("node-c is in sync again; resync copied {figure}"));
        ensure!(copied > 0, "the resync copied nothing although commits went on without node-c");
        ensure!(copied < VOLUME_BYTES / RESYNC_PART_MAX, "the resync copied {figure}");
        self.report.figure("resync of the returned replica", figure);
        Ok(())
    }

    fn move_database(&mut self, cut_us: u64) -> Result<Entry> {
        let database = self.create_pod("db", "node-b")?;
        let postgres = Postgres::start(&self.cluster, &database, Path::new(PUBLISHED))?;
        self.report.note("PostgreSQL on node-b has recovered and takes statements");
        let client = self.client()?;
        let before = client.ledger.entries()?.last().map_or(0, |entry| entry.number);
        let temporary = client.address_file.with_extension("new");
        std::fs::write(&temporary, database.address.to_string())?;
        std::fs::rename(&temporary, &client.address_file)?;
        let mut first = None;
        wait_until(FAILOVER_MAX, || {
            let entries = client.ledger.entries()?;
            first = entries.into_iter().find(|entry| entry.number > before && entry.acknowledged_us > cut_us);
            Ok(first.is_some())
        })
        .with_context(|| {
            format!("no commit after the failover; the client says:\n{}", client.program.log_tail())
        })?;
        let pods = self.pods.as_mut().context("no pods run")?;
        let old_database = std::mem::replace(&mut pods.database, database);
        let old_postgres = std::mem::replace(&mut pods.postgres, postgres);
        self.stranded = Some((old_database, old_postgres));
        first.context("no commit after the failover")
    }

    fn return_of_the_old_node(&mut self, old_device: &str) -> Result<()> {
        let offset = VOLUME_BYTES - 8192;
        let new_device = self.status("node-b")?.device;
        let before = read_block(&self.cluster.node("node-b").spaces, &new_device, offset)?;
        self.cluster.set_link("node-a", true)?;
        self.report.note("node-a's link is up again");
        let mut state = String::new();
        wait_until(FENCE_TIMEOUT, || {
            state = self.status("node-a")?.state;
            Ok(state == "fenced" || state == "failed")
        })
        .with_context(|| format!("the old target on node-a is {state:?}"))?;
        self.report.note(&format!("the old target on node-a is {state}: {}", self.status("node-a")?.reason));
        let old_node = &self.cluster.node("node-a").spaces;
        let write = write_block(old_node, old_device, offset, 0xAB)?;
        self.report.note(&format!("direct write through node-a's {old_device}: {}", write.describe()));
        ensure!(matches!(write, DirectOutcome::Refused(_)), "the old target took a write");
        let read = read_block(old_node, old_device, offset)?;
        self.report.note(&format!("direct read through node-a's {old_device}: {}", read.describe()));
        ensure!(matches!(read, DirectOutcome::Refused(_)), "the old target served a read");
        let after = read_block(&self.cluster.node("node-b").spaces, &new_device, offset)?;
        ensure!(matches!(after, DirectOutcome::Served(_)), "node-b's device: {}", after.describe());
        ensure!(before == after, "the block changed on node-b");
        self.report.note("the block is unchanged on node-b");
        self.report.figure(
            "old target after the cut",
            format!("write {}, read {}", write.describe(), read.describe()),
        );
        self.wait_for_commits(Duration::from_millis(500), 5)?;
        self.compare("at the end")?;
        Ok(())
    }

    fn tear_down(&mut self) -> Result<()> {
        if let Some(mut client) = self.client.take() {
            client.program.kill()?;
        }
        if let Some((database, mut postgres)) = self.stranded.take() {
            // What kubelet does on a node that is back: it ends what no longer belongs there.
            postgres.program.kill()?;
            let node = database.node.clone();
            database.delete(&self.cluster)?;
            self.detach(&node).with_context(|| format!("taking the fenced volume down on {node}"))?;
            self.report.note(&format!("{node}: the stranded pod, mounts and target are taken down"));
        }
        let Some(pods) = self.pods.take() else { return Ok(()) };
        pods.postgres.stop_and_verify(&self.cluster, &pods.database, Path::new(PUBLISHED))?;
        self.report.note("PostgreSQL stopped; the checksum of every page is right");
        let home = pods.database.node.clone();
        for pod in [pods.database, pods.api, pods.web] {
            pod.delete(&self.cluster)?;
        }
        self.detach(&home)?;
        self.unpublish(&home)?;
        let request =
            csi_proto::DeleteVolumeRequest { volume_id: self.volume()?.id.clone(), ..Default::default() };
        let controller = &self.cluster.controller.csi;
        let reply = controller.controller(|mut client| async move { client.delete_volume(request).await });
        named("DeleteVolume", reply).map(drop)
    }

    fn volume(&self) -> Result<&Volume> {
        self.volume.as_ref().context("there is no volume yet")
    }

    fn pods(&self) -> Result<&Pods> {
        self.pods.as_ref().context("no pods run yet")
    }
}
