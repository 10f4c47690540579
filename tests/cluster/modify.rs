//! Volumes that are modified while they are used: limits of I/O hold and are lifted, replicas go and come under a writer.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_tests::blocks::{BlockLedger, BlockWork, Crash};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::raw_volume::RawVolume;
use holdfast_tests::{Cluster, ClusterOptions};
use libtest_mimic::Trial;

use crate::trial;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
const VOLUME_BYTES: u64 = 48 * MIB;
const VOLUME_BLOCKS: usize = 12_288;
/// How long writes are counted. Rates are of a machine that others use too: what is asked of them is an order.
const COUNTED: Duration = Duration::from_secs(4);
const IOPS_LIMIT: u64 = 40;
const BYTES_LIMIT: u64 = 4 * MIB;
/// How long the writer works between two changes.
const WORK: Duration = Duration::from_millis(800);
const REBUILD_TIMEOUT: Duration = Duration::from_secs(60);
const RESYNC_RATE: u64 = 2 * MIB;
/// How long copies are counted.
const COPIED: Duration = Duration::from_secs(5);

/// Trials of this file, each on a cluster of its own.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("limits_hold_on_a_volume_in_use_and_are_lifted", || on_a_cluster(limits)),
        trial("replicas_go_and_come_under_a_writer_and_nothing_acknowledged_is_lost", || {
            on_a_cluster(replicas)
        }),
        trial("a_new_replica_is_copied_to_at_the_volume_s_rate_until_it_is_lifted", || {
            on_a_cluster(resync_rate)
        }),
    ]
}

fn on_a_cluster(body: fn(&Cluster) -> Result<()>) -> Result<()> {
    let options = ClusterOptions { kind: "modify".to_owned(), ..ClusterOptions::default() };
    let cluster = Cluster::start(&options)?;
    let outcome = body(&cluster);
    let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

/// Writes past every cache, one after the other, for [`COUNTED`]; gives how many were done per second.
fn writes_per_s(device: &Path, bytes: usize) -> Result<f64> {
    let file = File::options().write(true).custom_flags(libc::O_DIRECT).open(device)?;
    let memory = vec![7; bytes + BLOCK];
    let aligned = &memory[memory.as_ptr().align_offset(BLOCK)..][..bytes];
    let begun = Instant::now();
    let mut done = 0_u64;
    while begun.elapsed() < COUNTED {
        file.write_all_at(
            aligned,
            done * bytes as u64 % (VOLUME_BYTES - bytes as u64) / BLOCK as u64 * BLOCK as u64,
        )?;
        done += 1;
    }
    Ok(done as f64 / begun.elapsed().as_secs_f64())
}

fn limits(cluster: &Cluster) -> Result<()> {
    let mut volume = RawVolume::create(cluster, "limited", VOLUME_BYTES)?;
    let device = volume.attach(cluster, "node-a")?;
    for (key, limit, bytes, most_per_s) in [
        ("iopsLimit", IOPS_LIMIT, BLOCK, IOPS_LIMIT as f64),
        ("bandwidthLimit", BYTES_LIMIT, 256 << 10, (BYTES_LIMIT >> 18) as f64),
    ] {
        volume.modify(cluster, &[(key, &limit.to_string())])?;
        let limited = writes_per_s(&device, bytes)?;
        volume.modify(cluster, &[(key, "0")])?;
        let lifted = writes_per_s(&device, bytes)?;
        println!("{key}: {limited:.1} writes of {bytes} bytes per second under {limit}, {lifted:.1} without");
        // The burst is a tenth of a second.
        ensure!(limited <= most_per_s * 1.15, "{key}: {limited:.1} writes per second, {most_per_s} may be");
        ensure!(limited >= most_per_s / 4.0, "{key}: only {limited:.1} writes per second of {most_per_s}");
        ensure!(
            lifted >= most_per_s * 2.0,
            "{key}: {lifted:.1} writes per second after the limit was lifted"
        );
    }
    // Whoever attaches it next finds the limits in the record.
    volume.modify(cluster, &[("iopsLimit", &IOPS_LIMIT.to_string())])?;
    let device = volume.attach(cluster, "node-b")?;
    let moved = writes_per_s(&device, BLOCK)?;
    ensure!(moved <= IOPS_LIMIT as f64 * 1.15, "{moved:.1} writes per second on another node");
    volume.delete(cluster)
}

/// Nodes with a replica, as the target knows them.
pub(crate) fn nodes(cluster: &Cluster, volume: &RawVolume) -> Result<BTreeSet<String>> {
    Ok(volume.status(cluster)?.replicas.into_iter().map(|replica| replica.node).collect())
}

/// What a node's pool keeps of all volumes.
pub(crate) fn kept_on(cluster: &Cluster, node: &str) -> Result<usize> {
    Ok(std::fs::read_dir(cluster.node(node).pool_dir().join("replicas"))?.count())
}

/// Lets the writer go on for a moment and stops it.
pub(crate) fn rest(work: BlockWork) -> Result<BlockLedger> {
    std::thread::sleep(WORK);
    let (ledger, error) = work.finish()?;
    ensure!(error.is_none(), "the writer failed: {error:?}");
    Ok(ledger)
}

/// A node with a replica reads from its own.
pub(crate) fn read_on_each(
    cluster: &Cluster,
    volume: &mut RawVolume,
    ledger: &mut BlockLedger,
    nodes: &BTreeSet<String>,
) -> Result<()> {
    volume.detach(cluster)?;
    for node in nodes {
        let device = volume.attach(cluster, node)?;
        ledger.check(&device, Crash::Processes).with_context(|| format!("read on {node}"))?;
        volume.detach(cluster)?;
    }
    Ok(())
}

fn replicas(cluster: &Cluster) -> Result<()> {
    let mut volume = RawVolume::create(cluster, "replicas", VOLUME_BYTES)?;
    let device = volume.attach(cluster, "node-b")?;
    let all = nodes(cluster, &volume)?;
    let work = BlockWork::start(&device, BlockLedger::new(VOLUME_BLOCKS), 1)?;
    std::thread::sleep(WORK);
    volume.modify(cluster, &[("replicas", "2")])?;
    ensure!(volume.in_sync(cluster)? == 2, "{:?}", volume.status(cluster)?.replicas);
    let left = nodes(cluster, &volume)?;
    let gone: Vec<&String> = all.difference(&left).collect();
    ensure!(left.len() == 2 && left.contains("node-b"), "replicas are left on {left:?}");
    ensure!(kept_on(cluster, gone[0])? == 0, "{} keeps what was taken out", gone[0]);
    let mut ledger = rest(work)?;
    let before = ledger.requests;
    read_on_each(cluster, &mut volume, &mut ledger, &left)?;

    let device = volume.attach(cluster, "node-b")?;
    let work = BlockWork::start(&device, ledger, 2)?;
    volume.modify(cluster, &[("replicas", "3"), ("minInSync", "2")])?;
    volume.wait_in_sync(cluster, 3, REBUILD_TIMEOUT)?;
    let mut ledger = rest(work)?;
    ensure!(nodes(cluster, &volume)? == all, "replicas are on {:?}", nodes(cluster, &volume)?);
    read_on_each(cluster, &mut volume, &mut ledger, &all)?;
    println!("{before} requests until two replicas were read, {} until three were", ledger.requests);
    ensure!(before > 0 && ledger.requests > before, "the writer did nothing: no test");
    volume.delete(cluster)
}

fn resync_rate(cluster: &Cluster) -> Result<()> {
    let mut volume = RawVolume::create(cluster, "resync", VOLUME_BYTES)?;
    let device = volume.attach(cluster, "node-b")?;
    std::fs::write(&device, vec![7; VOLUME_BYTES as usize])?;
    File::options().write(true).open(&device)?.sync_all()?;
    volume.modify(cluster, &[("replicas", "2")])?;
    volume.modify(cluster, &[("replicas", "3"), ("resyncRate", &RESYNC_RATE.to_string())])?;
    let begun = Instant::now();
    std::thread::sleep(COPIED);
    let replicas = volume.status(cluster)?.replicas;
    let seconds = begun.elapsed().as_secs_f64();
    let copied = replicas.iter().map(|replica| replica.resync_bytes_copied).max().unwrap_or(0) as f64;
    let most = RESYNC_RATE as f64 * seconds;
    println!("{copied} bytes copied in {seconds:.1} s, {most:.0} may be");
    // What is copied at once is a region.
    ensure!(copied <= most * 1.15 + MIB as f64, "{copied} bytes copied in {seconds:.1} s");
    ensure!(copied >= most / 4.0, "only {copied} bytes copied in {seconds:.1} s");
    volume.modify(cluster, &[("resyncRate", "0")])?;
    let lifted = Instant::now();
    volume.wait_in_sync(cluster, 3, REBUILD_TIMEOUT)?;
    let left = Duration::from_secs_f64((VOLUME_BYTES as f64 - copied) / RESYNC_RATE as f64);
    ensure!(lifted.elapsed() < left / 2, "the rest took {:?} after the rate was lifted", lifted.elapsed());
    volume.delete(cluster)
}
