//! The record store is lost whole, under a writer: every process is killed, the store's folder is deleted, and the copies that
//! the replicas keep give every volume back (ADR 0011). With the operators' own command.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::blocks::{BlockLedger, BlockWork, Crash};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::csi::create_request;
use holdfast_tests::raw_volume::RawVolume;
use holdfast_tests::rescue::{rescue, told_of};
use holdfast_tests::{Cluster, ClusterOptions};
use libtest_mimic::Trial;

use crate::csi_volume::{Volume, from_snapshot, fs_bytes, get, put};
use crate::trial;

const MIB: u64 = 1 << 20;
const LEDGER_BYTES: u64 = 48 * MIB;
const LEDGER_BLOCKS: usize = 12_288;
const FILES_BYTES: u64 = 64 * MIB;
const GROWN_BYTES: u64 = 96 * MIB;
const SECRET: &str = "a passphrase for one volume";
/// How long the writer works before something happens.
const WORK: Duration = Duration::from_millis(800);
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);
const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![trial("a_lost_record_store_comes_back_from_the_replicas_with_every_acknowledged_write", || {
        let options = ClusterOptions { kind: "rescue".to_owned(), ..ClusterOptions::default() };
        let mut cluster = Cluster::start(&options)?;
        let outcome = lose_and_rescue(&mut cluster);
        let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
        outcome.and(ended)
    })]
}

fn lose_and_rescue(cluster: &mut Cluster) -> Result<()> {
    let (files, snapshot) = encrypted_files(cluster).context("before the loss")?;
    let idle = Volume::create(cluster, create_request("idle", FILES_BYTES as i64, 3, "ext4"))?;
    let gone = RawVolume::create(cluster, "gone", LEDGER_BYTES)?;
    let mut raw = RawVolume::create(cluster, "ledger", LEDGER_BYTES)?;
    let device = raw.attach(cluster, "node-a")?;
    let work = BlockWork::start(&device, BlockLedger::new(LEDGER_BLOCKS), 1)?;
    std::thread::sleep(WORK);
    // The set changes under the writer; and a volume is deleted whose third node is away, so that its deletion does not end.
    cluster.node_mut("node-c").data.kill()?;
    let gone_id = gone.id.clone();
    ensure!(gone.delete(cluster).is_err(), "a deletion ended without node-c");
    raw.wait_in_sync(cluster, 2, RESYNC_TIMEOUT)?;
    std::thread::sleep(WORK);

    cluster.kill_storage()?;
    let (mut ledger, _) = work.finish()?;
    ensure!(ledger.flushes > 0, "the writer did nothing: no test");
    let store = cluster.work().dir().join("controller/records");
    std::fs::remove_dir_all(&store).with_context(|| store.display().to_string())?;
    cluster.start_storage()?;

    // What is only shown is not done.
    let ids = [&files.id, &idle.id, &raw.id];
    for _ in 0..2 {
        let (whole, told) = rescue(cluster, &[])?;
        ensure!(!whole, "nothing is restored, and the command calls it whole");
        for id in ids {
            let volume = told_of(&told, id)?;
            ensure!(volume["verdict"] == "sound" && volume["restored"] == false, "{volume}");
        }
        let gone = told_of(&told, &gone_id)?;
        ensure!(gone["verdict"] == "doubtful" && gone["notes"].to_string().contains("was deleted"), "{gone}");
    }
    let (_, told) = rescue(cluster, &["--apply"])?;
    for id in ids {
        ensure!(told_of(&told, id)?["restored"] == true, "{told}");
    }
    ensure!(told_of(&told, &gone_id)?["restored"] == false, "a deleted volume came back unasked: {told}");

    raw.home = None;
    let device = raw.attach(cluster, "node-b")?;
    let checked = ledger.check(&device, Crash::Processes).context("acknowledged before the loss")?;
    let work = BlockWork::start(&device, ledger, 2)?;
    raw.wait_in_sync(cluster, 3, RESYNC_TIMEOUT)?;
    let mut ledger = crate::modify::rest(work)?;
    crate::modify::read_on_each(cluster, &mut raw, &mut ledger, &NODES.map(str::to_owned).into())?;
    println!("{checked:?}; {} requests, {} of them flushes", ledger.requests, ledger.flushes);

    check_files(cluster, files, &snapshot).context("after the rescue")?;
    let root = idle.stage(cluster, "node-a").context("a volume that was never used")?;
    put(&root, "file", b"its first")?;
    idle.unstage(cluster, "node-a")?;
    idle.delete(cluster)?;
    raw.delete(cluster)
}

/// An encrypted volume that grew, with a file of before and one of after a snapshot; nobody uses it.
fn encrypted_files(cluster: &Cluster) -> Result<(Volume, String)> {
    let mut request = create_request("files", FILES_BYTES as i64, 3, "ext4");
    request.parameters.insert("encryption".to_owned(), "aes-xts".to_owned());
    let mut volume = Volume::create(cluster, request)?;
    volume.secrets = secret(SECRET);
    let root = volume.stage(cluster, "node-b")?;
    put(&root, "first", b"before the snapshot")?;
    let snapshot = volume.snapshot(cluster, "nightly")?;
    put(&root, "second", b"after the snapshot")?;
    volume.unstage(cluster, "node-b")?;
    volume.expand(cluster, GROWN_BYTES)?;
    Ok((volume, snapshot))
}

fn check_files(cluster: &Cluster, mut volume: Volume, snapshot: &str) -> Result<()> {
    volume.secrets = secret("another passphrase");
    let refused = volume.stage(cluster, "node-c").err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(refused.contains("first staged with another one"), "the key check is lost: {refused}");
    volume.unstage(cluster, "node-c")?;
    volume.secrets = secret(SECRET);
    let root = volume.stage(cluster, "node-c")?;
    ensure!(get(&root, "first")? == b"before the snapshot" && get(&root, "second")? == b"after the snapshot");
    ensure!(fs_bytes(&root)? > FILES_BYTES, "the size of before the growth came back");
    let mut request = from_snapshot("clone", GROWN_BYTES, "ext4", snapshot);
    request.parameters.insert("encryption".to_owned(), "aes-xts".to_owned());
    let mut clone = Volume::create(cluster, request).context("the snapshot is lost")?;
    clone.secrets = secret(SECRET);
    let cloned = clone.stage(cluster, "node-a")?;
    ensure!(get(&cloned, "first")? == b"before the snapshot", "the clone does not read as the snapshot");
    ensure!(!cloned.join("second").exists(), "the snapshot has what was written after it");
    clone.unstage(cluster, "node-a")?;
    clone.delete(cluster)?;
    volume.unstage(cluster, "node-c")?;
    let again = Volume::create(cluster, {
        let mut request = create_request("files", GROWN_BYTES as i64, 3, "ext4");
        request.parameters.insert("encryption".to_owned(), "aes-xts".to_owned());
        request
    })?;
    ensure!(again.id == volume.id, "the name is not the volume's any more");
    crate::csi_volume::delete_snapshot(cluster, snapshot)?;
    volume.delete(cluster)
}

fn secret(text: &str) -> HashMap<String, String> {
    HashMap::from([("encryption-passphrase".to_owned(), text.to_owned())])
}
