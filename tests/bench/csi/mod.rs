//! `csi`: many volumes of three replicas on three nodes, made, attached in turns, snapshotted and deleted by CSI calls alone.
//!
//! Everything is real: a controller with the embedded record store, three nodes with data process and CSI node service, mutual
//! TLS between them. There is no peer; goals are limits of our own.

mod calls;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Args;
use futures::future::join_all;
use holdfast_tests::cleanup::Logs;
use holdfast_tests::{Cluster, ClusterOptions};

use crate::figures::{self, Figure, median, percentile};
use calls::{Calls, Volume};

/// CreateVolume with three replicas on the embedded store, at most, for half of the calls.
const CREATE_LIMIT_MS: f64 = 50.0;
/// Memory of the controller, at most.
const RSS_LIMIT_MIB: f64 = 100.0;
/// How many volumes count as the first ones, and as the last ones.
const EDGE: usize = 100;
/// How often a list is asked for, and most single volumes that are.
const LISTS: usize = 20;
const GETS_MAX: usize = 200;
/// Volumes in a page of a list.
const PAGE: i32 = 100;
/// Number of records for which the controller's memory is worked out.
const MANY_RECORDS: f64 = 10_000.0;
/// What a pool may promise, for each volume: some for the parallel ones, too.
const POOL_SHARE: u64 = 2;

/// How much is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// One JSON object per line instead of the table.
    #[arg(long)]
    json: bool,
    /// Volumes that exist at the same time.
    #[arg(long, default_value_t = 1000)]
    volumes: usize,
    /// How many of them are also mounted, one after the other.
    #[arg(long, default_value_t = 100)]
    mounted: usize,
    /// How many of them get a snapshot; all, if there are fewer.
    #[arg(long, default_value_t = 1000)]
    snapshots: usize,
    /// Calls at once in the parallel part.
    #[arg(long, default_value_t = 100)]
    parallel: usize,
    /// Size of each volume.
    #[arg(long, default_value_t = 64)]
    size_mib: u64,
}

impl Options {
    fn volume_bytes(&self) -> Result<i64> {
        i64::try_from(self.size_mib << 20).context("the size is too large")
    }
}

/// Runs it all and prints the figures.
pub fn run(options: &Options) -> Result<()> {
    ensure!(options.volumes > 0 && options.parallel > 0, "there must be at least one volume");
    let pool_bytes = (options.volumes + options.parallel) as u64 * (options.size_mib << 20) * POOL_SHARE;
    let cluster = Cluster::start(&ClusterOptions {
        kind: "bench-csi".to_owned(),
        pool_bytes,
        ..ClusterOptions::default()
    })?;
    let measured = Bench::new(&cluster, options).and_then(|bench| bench.measure());
    let ended = cluster.end(if measured.is_ok() { Logs::Remove } else { Logs::Keep });
    figures::print(&measured?, options.json);
    ended
}

struct Bench<'a> {
    cluster: &'a Cluster,
    options: &'a Options,
    calls: Calls,
    start: Instant,
}

impl<'a> Bench<'a> {
    fn new(cluster: &'a Cluster, options: &'a Options) -> Result<Self> {
        let calls = cluster.runtime().block_on(async { Calls::new(cluster) })?;
        Ok(Self { cluster, options, calls, start: Instant::now() })
    }

    fn measure(&self) -> Result<Vec<Figure>> {
        self.cluster.runtime().block_on(self.measure_all())
    }

    async fn measure_all(&self) -> Result<Vec<Figure>> {
        let (empty_mib, _) = self.controller_mib()?;
        let volumes = self.create().await?;
        let (full_mib, _) = self.controller_mib()?;
        self.tell(&format!("the controller has {full_mib:.1} MiB, had {empty_mib:.1} without volumes"));
        self.attach_in_turns(&volumes).await?;
        self.ask(&volumes).await?;
        self.snapshot(&volumes).await?;
        self.in_parallel().await?;
        self.tell(&format!("deleting {} volumes", volumes.len()));
        for volume in &volumes {
            self.calls.delete_volume(volume).await?;
        }
        ensure!(self.calls.list_volumes(0).await? == 0, "volumes are left");
        let (_, most_mib) = self.controller_mib()?;
        let per_record_kib = (full_mib - empty_mib) * 1024.0 / volumes.len() as f64;
        let mut figures = self.call_figures();
        figures.extend([
            Figure::within("csi.controller_rss_max_mib", "MiB", most_mib, RSS_LIMIT_MIB),
            Figure::told("csi.controller_rss_per_volume_kib", "KiB", per_record_kib),
            Figure::told(
                "csi.controller_rss_at_10k_mib",
                "MiB",
                most_mib + per_record_kib * (MANY_RECORDS - volumes.len() as f64) / 1024.0,
            ),
        ]);
        Ok(figures)
    }

    async fn create(&self) -> Result<Vec<Volume>> {
        let (count, bytes) = (self.options.volumes, self.options.volume_bytes()?);
        self.tell(&format!("making {count} volumes of {} MiB with 3 replicas", self.options.size_mib));
        let mut volumes = Vec::with_capacity(count);
        for number in 0..count {
            volumes.push(self.calls.create_volume(number, &format!("bench-{number}"), bytes).await?);
        }
        Ok(volumes)
    }

    /// One volume after the other, each on the next node; a share of them is mounted as well.
    async fn attach_in_turns(&self, volumes: &[Volume]) -> Result<()> {
        let mounted = self.options.mounted.min(volumes.len());
        self.tell(&format!("attaching {} volumes in turns; {mounted} of them are mounted", volumes.len()));
        for node in &self.cluster.nodes {
            node.spaces
                .run("mkdir", &["-p", &format!("{}/staging", holdfast_tests::cluster::KUBELET_DIR)])?;
        }
        let ids = volumes.iter().take(mounted).map(|volume| volume.id.clone());
        self.cluster.work().change_state(|state| state.volume_ids.extend(ids))?;
        for (number, volume) in volumes.iter().enumerate() {
            let context = self.calls.publish(volume).await?;
            if number < mounted {
                self.calls.mount_and_unmount(volume, context).await?;
            }
            self.calls.unpublish(volume).await?;
        }
        Ok(())
    }

    async fn ask(&self, volumes: &[Volume]) -> Result<()> {
        self.tell("asking for lists and for single volumes");
        for _ in 0..LISTS {
            ensure!(self.calls.list_volumes(0).await? == volumes.len(), "a list is not complete");
        }
        ensure!(self.calls.list_volumes(PAGE).await? == volumes.len(), "the pages are not complete");
        for volume in volumes.iter().take(GETS_MAX) {
            self.calls.get_volume(volume).await?;
        }
        Ok(())
    }

    async fn snapshot(&self, volumes: &[Volume]) -> Result<()> {
        let count = self.options.snapshots.min(volumes.len());
        self.tell(&format!("taking and deleting snapshots of {count} volumes that are attached to nobody"));
        let mut snapshots = Vec::with_capacity(count);
        for (number, volume) in volumes.iter().take(count).enumerate() {
            snapshots.push(self.calls.create_snapshot(volume, &format!("snapshot-{number}")).await?);
        }
        for snapshot in &snapshots {
            self.calls.delete_snapshot(snapshot).await?;
        }
        Ok(())
    }

    /// The same calls for many volumes at once, beside the volumes that exist.
    async fn in_parallel(&self) -> Result<()> {
        let count = self.options.parallel;
        self.tell(&format!("{count} calls at once: creates, attaches, detaches, deletes"));
        let (calls, bytes) = (self.calls.with_prefix("parallel_"), self.options.volume_bytes()?);
        let creates = (0..count).map(|number| {
            let calls = &calls;
            async move { calls.create_volume(number, &format!("parallel-{number}"), bytes).await }
        });
        let volumes = join_all(creates).await.into_iter().collect::<Result<Vec<Volume>>>()?;
        all(volumes.iter().map(|volume| async { calls.publish(volume).await.map(drop) })).await?;
        all(volumes.iter().map(|volume| calls.unpublish(volume))).await?;
        all(volumes.iter().map(|volume| calls.delete_volume(volume))).await
    }

    fn call_figures(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for (name, ms) in self.calls.times() {
            let row = |what: &str| format!("csi.{name}_{what}");
            let p50 = row("p50");
            if name == "create_volume" {
                let edge = EDGE.min(ms.len());
                figures.push(Figure::within(&p50, "ms", median(&ms), CREATE_LIMIT_MS));
                let first = median(&ms[..edge]);
                figures.push(Figure::within(&row("first_100_p50"), "ms", first, CREATE_LIMIT_MS));
                let last = median(&ms[ms.len() - edge..]);
                figures.push(Figure::within(&row("last_100_p50"), "ms", last, CREATE_LIMIT_MS));
            } else {
                figures.push(Figure::told(&p50, "ms", median(&ms)));
            }
            figures.push(Figure::told(&row("p99"), "ms", percentile(&ms, 99)));
            figures.push(Figure::told(&row("max"), "ms", percentile(&ms, 100)));
        }
        figures
    }

    /// The controller's memory now, and at most so far.
    fn controller_mib(&self) -> Result<(f64, f64)> {
        self.cluster.controller.program.rss_mib()
    }

    fn tell(&self, text: &str) {
        eprintln!("{:>6.1} s  {text}", self.start.elapsed().as_secs_f64());
    }
}

async fn all(calls: impl Iterator<Item = impl Future<Output = Result<()>>>) -> Result<()> {
    join_all(calls).await.into_iter().collect()
}
