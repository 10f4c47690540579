//! Replicas leave a node that is drained, under a writer and of a volume that nobody attaches; a node that is lost for ever is
//! removed. With the operators' own command.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::blocks::{BlockLedger, BlockWork};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::process::{self, wait_until};
use holdfast_tests::raw_volume::RawVolume;
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Cluster, ClusterOptions};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::modify::{kept_on, nodes, read_on_each, rest};
use crate::trial;

const VOLUME_BYTES: u64 = 48 << 20;
const VOLUME_BLOCKS: usize = 12_288;
/// How long the writer works before something happens.
const WORK: Duration = Duration::from_millis(800);
/// A controller's first sweep, a rebuild, and the sweeps that take out and delete.
const MOVED_WITHIN: Duration = Duration::from_secs(90);
const REPLICAS: usize = 3;

/// Trials of this file, on one cluster.
pub fn trials() -> Vec<Trial> {
    vec![trial("replicas_leave_nodes_that_drain_or_are_lost_and_no_write_is", leave_nodes)]
}

fn leave_nodes() -> Result<()> {
    let names = ["node-a", "node-b", "node-c", "node-d"].map(str::to_owned).to_vec();
    let options = ClusterOptions { kind: "leaving".to_owned(), nodes: names, ..ClusterOptions::default() };
    let mut cluster = Cluster::start(&options)?;
    let outcome = drained(&mut cluster);
    let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

fn operator(cluster: &Cluster, words: &[&str]) -> Result<Command> {
    let mut command = Command::new(binaries_dir()?.join("holdfast"));
    command.args(words).arg("--socket").arg(cluster.controller.csi.path());
    Ok(command)
}

/// What `holdfast node list` says of one node.
fn told(cluster: &Cluster, node: &str) -> Result<Value> {
    let output = process::run(&mut operator(cluster, &["node", "list", "--json"])?)?;
    for line in output.lines() {
        let told: Value = serde_json::from_str(line)?;
        if told["node"] == node {
            return Ok(told);
        }
    }
    bail!("holdfast node list does not name {node}: {output}")
}

fn drained(cluster: &mut Cluster) -> Result<()> {
    let mut used = RawVolume::create(cluster, "used", VOLUME_BYTES)?;
    let mut cold = RawVolume::create(cluster, "cold", VOLUME_BYTES)?;
    let device = cold.attach(cluster, "node-a")?;
    let mut cold_ledger = rest(BlockWork::start(&device, BlockLedger::new(VOLUME_BLOCKS), 1)?)?;
    let cold_on = nodes(cluster, &cold)?;
    cold.detach(cluster)?;

    used.attach(cluster, "node-b")?;
    let used_on = nodes(cluster, &used)?;
    let leaves = used_on.iter().find(|node| cold_on.contains(*node)).context("three of four meet")?;
    // The writer is on the node that is drained: its target goes on without the replica beside it.
    used.detach(cluster)?;
    let device = used.attach(cluster, leaves)?;
    let work = BlockWork::start(&device, BlockLedger::new(VOLUME_BLOCKS), 2)?;
    std::thread::sleep(WORK);
    let begun = Instant::now();
    let mut waiting = operator(cluster, &["node", "drain", leaves, "--wait"])?.spawn()?;
    let mut fewest = REPLICAS;
    let ended = loop {
        fewest = fewest.min(used.in_sync(cluster)?);
        if let Some(ended) = waiting.try_wait()? {
            break ended;
        }
        if begun.elapsed() > MOVED_WITHIN {
            let _ = waiting.kill();
            let _ = waiting.wait();
            bail!("the drain does not end: {}", told(cluster, leaves)?);
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let took = begun.elapsed();
    ensure!(ended.success(), "holdfast node drain failed");
    ensure!(fewest == REPLICAS, "only {fewest} replicas were in sync on the way");
    let mut used_ledger = rest(work)?;
    ensure!(kept_on(cluster, leaves)? == 0, "{leaves} keeps data");
    ensure!(told(cluster, leaves)?["state"] == "draining");
    let now_on = nodes(cluster, &used)?;
    ensure!(now_on.len() == REPLICAS && !now_on.contains(leaves), "replicas are on {now_on:?}");
    read_on_each(cluster, &mut used, &mut used_ledger, &now_on)?;
    // What nobody attached was copied all the same: whoever attaches it has nothing to wait for.
    cold.attach(cluster, "node-a")?;
    ensure!(cold.in_sync(cluster)? == REPLICAS, "{:?}", cold.status(cluster)?.replicas);
    let copied: u64 = cold.status(cluster)?.replicas.iter().map(|replica| replica.resync_bytes_copied).sum();
    ensure!(copied == 0, "{copied} bytes were left to be copied");
    let now_on = nodes(cluster, &cold)?;
    ensure!(now_on.len() == REPLICAS && !now_on.contains(leaves), "replicas are on {now_on:?}");
    read_on_each(cluster, &mut cold, &mut cold_ledger, &now_on)?;
    println!("{leaves} is drained in {took:.1?} under {} requests", used_ledger.requests);

    let leaves = leaves.clone();
    removed(cluster, &leaves, [(&mut used, &mut used_ledger), (&mut cold, &mut cold_ledger)])?;
    used.delete(cluster)?;
    cold.delete(cluster)
}

/// Another node loses its power for ever, while nobody has the volumes attached; the drained one takes over.
fn removed(
    cluster: &mut Cluster,
    back: &str,
    volumes: [(&mut RawVolume, &mut BlockLedger); 2],
) -> Result<()> {
    let names: Vec<String> = cluster.nodes.iter().map(|node| node.name.clone()).collect();
    let dead = names.iter().find(|name| *name != back && *name != "node-a").context("a node to lose")?;
    process::run(&mut operator(cluster, &["node", "activate", back])?)?;
    let remove = ["node", "remove", dead, "--yes-it-never-comes-back"];
    let refusal =
        process::run(&mut operator(cluster, &remove)?).err().context("a living node was removed")?;
    ensure!(format!("{refusal:#}").contains("answers"), "the cause is not named: {refusal:#}");
    cluster.power_off(dead)?;
    wait_until(MOVED_WITHIN, || Ok(process::run(&mut operator(cluster, &remove)?).is_ok()))
        .context("a dead node is not removed")?;
    let begun = Instant::now();
    wait_until(MOVED_WITHIN, || Ok(told(cluster, dead)?["replicas"] == 0))
        .with_context(|| format!("replicas stay: {:?}", told(cluster, dead)))?;
    wait_until(MOVED_WITHIN, || Ok(told(cluster, back)?["inSync"] == 2))
        .with_context(|| format!("replicas do not come: {:?}", told(cluster, back)))?;
    println!("what {dead} had is replaced in {:.1?}", begun.elapsed());
    for (volume, ledger) in volumes {
        volume.attach(cluster, "node-a")?;
        ensure!(volume.in_sync(cluster)? == REPLICAS, "{:?}", volume.status(cluster)?.replicas);
        let on = nodes(cluster, volume)?;
        ensure!(on.contains(back) && !on.contains(dead), "replicas are on {on:?}");
        read_on_each(cluster, volume, ledger, &on)?;
    }
    Ok(())
}
