//! etcd is lost whole under a cluster with volumes, snapshots and a clone: the replicas' copies give the records back as they
//! were (ADR 0011). And a backup that is older than the volumes comes back in its place: nothing stale is served (R35).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use holdfast_tests::Cluster;
use holdfast_tests::blocks::{BlockLedger, BlockWork, Crash};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::csi::create_request;
use holdfast_tests::process::run;
use holdfast_tests::raw_volume::RawVolume;
use holdfast_tests::rescue::{inspect, rescue, told_of};
use holdfast_tests::work::binaries_dir;
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::api::{Api, DynamicObject, ListParams, ObjectMeta, PostParams, TypeMeta};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::csi_volume::{Volume, delete_snapshot, from_snapshot, get, put};
use crate::{trial, whole};

const MIB: u64 = 1 << 20;
const LEDGER_BYTES: u64 = 48 * MIB;
const LEDGER_BLOCKS: usize = 12_288;
const FILES_BYTES: u64 = 64 * MIB;
/// How long the writer works before something happens.
const WORK: Duration = Duration::from_millis(800);
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);
/// From a change to the object that people see.
const SEEN_WITHIN: Duration = Duration::from_secs(60);
/// What a backup of the objects consists of.
const KINDS: [&str; 4] = ["VolumeRecord", "VolumeName", "SnapshotGroup", "StorageNode"];
const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("rescues::a_lost_etcd_comes_back_from_the_replicas_as_it_was", |bed| {
            with_cluster(bed, lose_and_rescue)
        }),
        trial("rescues::an_older_backup_of_the_objects_never_serves_what_is_stale", |bed| {
            with_cluster(bed, restore_an_older_backup)
        }),
    ]
}

/// Where the cluster's processes find their tokens.
type Kubeconfigs = BTreeMap<String, PathBuf>;

fn with_cluster(bed: &Bed, tell: fn(&Bed, &mut Cluster, &Kubeconfigs) -> Result<()>) -> Result<()> {
    let options = whole::mk_options(bed, None)?;
    let kubeconfigs = options.kubernetes.clone().context("records at the server")?.kubeconfigs;
    let mut cluster = Cluster::start(&options)?;
    let outcome = tell(bed, &mut cluster, &kubeconfigs);
    // The processes need it to end in order.
    let server = bed.server().start_again_if_dead();
    let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(server).and(ended)
}

/// The server comes back empty, and an administrator installs what was there: definitions, accounts, rights.
fn lose_etcd(bed: &Bed, kubeconfigs: &Kubeconfigs) -> Result<()> {
    bed.server().lose_everything()?;
    let anew = whole::mk_options(bed, None)?.kubernetes.context("records at the server")?.kubeconfigs;
    for (process, path) in kubeconfigs {
        std::fs::copy(&anew[process], path).with_context(|| path.display().to_string())?;
    }
    ensure!(objects(bed, "VolumeRecord")?.is_empty(), "the records are not lost: no test");
    Ok(())
}

fn lose_and_rescue(bed: &Bed, cluster: &mut Cluster, kubeconfigs: &Kubeconfigs) -> Result<()> {
    let made = Made::new(bed, cluster).context("before the loss")?;
    let mut raw = RawVolume::create(cluster, "ledger", LEDGER_BYTES)?;
    let ledger = write_on_two_of_three(cluster, &mut raw)?;
    let before = specs(bed)?;
    ensure!(before.len() == 3, "{before:?}");

    the_disks_tell(cluster, &before)?;
    lose_etcd(bed, kubeconfigs)?;
    cluster.start_storage()?;
    wait_for_nodes(bed)?;
    let in_use = inspect(cluster, &NODES).err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(in_use.contains("lock"), "a pool in use was looked into: {in_use}");

    // What is only shown is not done; and each volume comes back as it was, one of them before the others.
    let (_, told) = rescue(cluster, &[])?;
    for id in before.keys() {
        ensure!(told_of(&told, id)?["verdict"] == "sound", "{told}");
    }
    ensure!(objects(bed, "VolumeRecord")?.is_empty(), "something was restored unasked");
    rescue(cluster, &["--volume", &made.files.id])?;
    let alone = objects(bed, "VolumeRecord")?;
    ensure!(alone.len() == 1, "{alone:?}");
    let (whole, told) = rescue(cluster, &["--apply"])?;
    ensure!(whole, "not all is restored: {told}");
    ensure!(told_of(&told, &made.files.id)?["verdict"] == "present", "{told}");
    let restored = objects(bed, "VolumeRecord")?;
    for (id, spec) in &before {
        is_as_it_was(spec, &restored[id].data["spec"]).with_context(|| format!("volume {id}"))?;
    }
    ensure!(rescue(cluster, &["--apply"])?.0, "a rescue after the rescue has something to do");
    // The third one's replica that is behind may be brought up to date meanwhile.
    let again = objects(bed, "VolumeRecord")?;
    for id in [&made.files.id, &made.clone.id] {
        ensure!(again[id] == restored[id], "what was there was touched: {:?}", again[id]);
    }
    ensure!(again[&made.files.id] == alone[&made.files.id], "what was there was touched");

    let checked = serve_again(bed, cluster, &mut raw, ledger)?;
    println!("{checked}");
    made.check(bed, cluster).context("after the rescue")?;
    raw.delete(cluster)?;
    let left = [objects(bed, "VolumeRecord")?, objects(bed, "VolumeName")?];
    ensure!(left.iter().all(BTreeMap::is_empty), "deletions leave objects: {left:?}");
    Ok(())
}

/// With nothing of ours running: the pools alone, read only.
fn the_disks_tell(cluster: &Cluster, records: &BTreeMap<String, Value>) -> Result<()> {
    let before = pool_files(cluster)?;
    let told = inspect(cluster, &NODES)?;
    for (id, spec) in records {
        let volume = told_of(&told, id)?;
        ensure!(volume["verdict"] == "sound" && volume["name"] == spec["name"], "{volume}");
        ensure!(volume["newest"]["lineage"] == spec["lineage"], "{volume} is not {spec}");
        ensure!(volume["newest"]["generation"] == spec["generation"], "{volume} is not {spec}");
    }
    // Without the disk of a member nobody knows whether that knew better.
    let told = inspect(cluster, &["node-a", "node-c"])?;
    for id in records.keys() {
        let volume = told_of(&told, id)?;
        ensure!(
            volume["verdict"] == "doubtful" && volume["notes"].to_string().contains("node-b"),
            "{volume}"
        );
    }
    ensure!(pool_files(cluster)? == before, "a look changed a pool");
    Ok(())
}

/// Each file with its length and its last change.
fn pool_files(cluster: &Cluster) -> Result<BTreeMap<PathBuf, (u64, SystemTime)>> {
    let mut folders: Vec<PathBuf> = NODES.iter().map(|node| cluster.node(node).pool_dir()).collect();
    let mut files = BTreeMap::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let (path, meta) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
            if meta.is_dir() {
                folders.push(path.clone());
            }
            files.insert(path, (meta.len(), meta.modified()?));
        }
    }
    Ok(files)
}

/// A writer through the loss of node-c's replica, until all processes are killed.
fn write_on_two_of_three(cluster: &mut Cluster, raw: &mut RawVolume) -> Result<BlockLedger> {
    let device = raw.attach(cluster, "node-a")?;
    let work = BlockWork::start(&device, BlockLedger::new(LEDGER_BLOCKS), 1)?;
    std::thread::sleep(WORK);
    lose_a_member(cluster, raw)?;
    end_all(cluster, work)
}

fn lose_a_member(cluster: &mut Cluster, raw: &RawVolume) -> Result<()> {
    cluster.node_mut("node-c").data.kill()?;
    raw.wait_in_sync(cluster, 2, RESYNC_TIMEOUT)?;
    std::thread::sleep(WORK);
    Ok(())
}

fn end_all(cluster: &mut Cluster, work: BlockWork) -> Result<BlockLedger> {
    cluster.kill_storage()?;
    let (ledger, _) = work.finish()?;
    ensure!(ledger.flushes > 0, "the writer did nothing: no test");
    Ok(ledger)
}

fn wait_for_nodes(bed: &Bed) -> Result<()> {
    let begun = Instant::now();
    loop {
        let known: BTreeSet<String> = objects(bed, "StorageNode")?.into_keys().collect();
        if NODES.iter().all(|node| known.contains(*node)) {
            return Ok(());
        }
        ensure!(begun.elapsed() < SEEN_WITHIN, "not all nodes have their object again: {known:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What ADR 0011 says that a rescue changes; all else is what the store said last.
fn is_as_it_was(before: &Value, after: &Value) -> Result<()> {
    ensure!(after["restored"] == true, "it is trusted: {after}");
    ensure!(after["generation"].as_i64() > before["generation"].as_i64(), "nobody is fenced: {after}");
    ensure!(after["targetId"].is_null() && after["attachedTo"].is_null(), "it is somebody's: {after}");
    let (mut before, mut after) = (before.clone(), after.clone());
    for spec in [&mut before, &mut after] {
        let fields = spec.as_object_mut().context("a spec")?;
        for changed in ["version", "swapIds", "generation", "restored", "targetId", "attachedTo", "readOnly"]
        {
            fields.remove(changed);
        }
    }
    ensure!(before == after, "it is not as it was:\n{before}\n{after}");
    Ok(())
}

/// Every acknowledged byte is on each node, and the record is trusted from the first target on.
fn serve_again(
    bed: &Bed,
    cluster: &mut Cluster,
    raw: &mut RawVolume,
    mut ledger: BlockLedger,
) -> Result<String> {
    raw.home = None;
    let device = raw.attach(cluster, "node-b")?;
    let checked = ledger.check(&device, Crash::Processes).context("acknowledged before the loss")?;
    let work = BlockWork::start(&device, ledger, 2)?;
    raw.wait_in_sync(cluster, 3, RESYNC_TIMEOUT)?;
    let (mut ledger, error) = work.finish()?;
    ensure!(error.is_none(), "a request failed: {error:?}");
    let spec = &specs(bed)?[&raw.id];
    ensure!(spec["restored"] == false, "all replicas agree, and the record says otherwise: {spec}");
    // The one that missed writes, too.
    let device = raw.attach(cluster, "node-c")?;
    ledger.check(&device, Crash::Processes).context("after the return")?;
    Ok(format!("{checked:?}; {} requests, {} of them flushes", ledger.requests, ledger.flushes))
}

/// A volume with a snapshot, a clone of that, and what Kubernetes keeps of the volume.
struct Made {
    files: Volume,
    clone: Volume,
    snapshot: String,
    persistent: PersistentVolume,
}

impl Made {
    fn new(bed: &Bed, cluster: &Cluster) -> Result<Self> {
        let files = Volume::create(cluster, create_request("files", FILES_BYTES as i64, 3, "ext4"))?;
        let root = files.stage(cluster, "node-b")?;
        put(&root, "first", b"before the snapshot")?;
        let snapshot = files.snapshot(cluster, "nightly")?;
        put(&root, "second", b"after the snapshot")?;
        let clone = Volume::create(cluster, from_snapshot("clone", FILES_BYTES, "ext4", &snapshot))?;
        let cloned = clone.stage(cluster, "node-c")?;
        put(&cloned, "own", b"the clone's own")?;
        clone.unstage(cluster, "node-c")?;
        files.unstage(cluster, "node-b")?;
        let persistent = serde_json::from_value(json!({
            "metadata": {"name": "files"},
            "spec": {
                "capacity": {"storage": "64Mi"}, "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain", "storageClassName": "holdfast",
                "csi": {"driver": "csi.holdfast.dev", "volumeHandle": files.id, "fsType": "ext4"},
                "claimRef": {"kind": "PersistentVolumeClaim", "namespace": "default", "name": "files"},
            },
        }))?;
        let persistent = create_persistent(bed, persistent)?;
        Ok(Self { files, clone, snapshot, persistent })
    }

    /// As kubelet and the sidecars use it, from the objects of a backup.
    fn check(self, bed: &Bed, cluster: &Cluster) -> Result<()> {
        let Self { mut files, clone, snapshot, persistent } = self;
        let metadata = ObjectMeta { name: persistent.metadata.name.clone(), ..ObjectMeta::default() };
        let persistent = create_persistent(bed, PersistentVolume { metadata, status: None, ..persistent })?;
        let csi = persistent.spec.and_then(|spec| spec.csi).context("the volume's driver")?;
        let again = Volume::create(cluster, create_request("files", FILES_BYTES as i64, 3, "ext4"))?;
        ensure!(again.id == csi.volume_handle, "the name is not the volume's any more");
        files.id = csi.volume_handle;
        let root = files.stage(cluster, "node-c")?;
        ensure!(
            get(&root, "first")? == b"before the snapshot" && get(&root, "second")? == b"after the snapshot"
        );
        ensure!(files.snapshot(cluster, "nightly")? == snapshot, "the snapshot's name is lost");
        let cloned = clone.stage(cluster, "node-a")?;
        ensure!(
            get(&cloned, "first")? == b"before the snapshot" && get(&cloned, "own")? == b"the clone's own"
        );
        ensure!(!cloned.join("second").exists(), "the clone has what was written after the snapshot");
        let other = Volume::create(cluster, from_snapshot("other", FILES_BYTES, "ext4", &snapshot))?;
        let read = other.stage(cluster, "node-b")?;
        ensure!(get(&read, "first")? == b"before the snapshot" && !read.join("own").exists());
        for (volume, node) in [(&other, "node-b"), (&clone, "node-a"), (&files, "node-c")] {
            volume.unstage(cluster, node)?;
        }
        other.delete(cluster)?;
        clone.delete(cluster)?;
        delete_snapshot(cluster, &snapshot)?;
        files.delete(cluster)?;
        let persistents: Api<PersistentVolume> = Api::all(bed.kube()?);
        bed.run(async move { Ok(persistents.delete("files", &Default::default()).await.map(drop)?) })
    }
}

fn create_persistent(bed: &Bed, object: PersistentVolume) -> Result<PersistentVolume> {
    let persistents: Api<PersistentVolume> = Api::all(bed.kube()?);
    bed.run(async move { Ok(persistents.create(&PostParams::default(), &object).await?) })
}

fn restore_an_older_backup(bed: &Bed, cluster: &mut Cluster, kubeconfigs: &Kubeconfigs) -> Result<()> {
    let moved = Volume::create(cluster, create_request("moved", FILES_BYTES as i64, 3, "ext4"))?;
    put(&moved.stage(cluster, "node-a")?, "first", b"before the backup")?;
    moved.unstage(cluster, "node-a")?;
    let young = Volume::create(cluster, create_request("young", FILES_BYTES as i64, 3, "ext4"))?;
    let mut raw = RawVolume::create(cluster, "ledger", LEDGER_BYTES)?;
    let device = raw.attach(cluster, "node-a")?;
    let mut backup = Vec::new();
    for kind in KINDS {
        backup.push((kind, objects(bed, kind)?));
    }

    let work = BlockWork::start(&device, BlockLedger::new(LEDGER_BLOCKS), 1)?;
    for (volume, node) in [(&young, "node-a"), (&moved, "node-b"), (&moved, "node-a")] {
        put(&volume.stage(cluster, node)?, node, b"after the backup")?;
        volume.unstage(cluster, node)?;
    }
    lose_a_member(cluster, &raw)?;
    let mut ledger = end_all(cluster, work)?;

    over_what_is_there(bed, &backup[0].1[&raw.id])?;
    lose_etcd(bed, kubeconfigs)?;
    for (kind, saved) in backup {
        create_all(bed, kind, saved)?;
    }
    cluster.start_storage()?;

    // The replica that missed writes agrees with the backup. Nobody serves it, nor the others under that record.
    for node in ["node-c", "node-a"] {
        let served = raw.attach(cluster, node);
        ensure!(served.is_err(), "served under a record of before: {served:?}");
    }
    says_restored(bed, &raw.id)?;
    raw.detach(cluster)?;
    promote_that_of(bed, cluster, &raw.id, "node-a")?;
    let device = raw.attach(cluster, "node-b")?;
    let checked = ledger.check(&device, Crash::Processes).context("acknowledged after the backup")?;
    println!("{checked:?}; {} requests, {} of them flushes", ledger.requests, ledger.flushes);

    // Another one only moved since: it is let in once a generation is beyond what its replicas know.
    let root = stage_at_last(cluster, &moved, "node-c")?;
    ensure!(get(&root, "first")? == b"before the backup");
    for node in ["node-a", "node-b"] {
        ensure!(get(&root, node).context("stale")? == b"after the backup");
    }
    moved.unstage(cluster, "node-c")?;
    // And one was new, so that its record would have it formatted.
    let refused = stage_at_last(cluster, &young, "node-b").err();
    let refused = refused.map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(refused.contains("will not be formatted over"), "formatted once more, or not told: {refused}");
    young.unstage(cluster, "node-b")?;
    forget_and_rescue(bed, cluster, &young.id)?;
    let root = young.stage(cluster, "node-b")?;
    ensure!(get(&root, "node-a")? == b"after the backup");
    young.unstage(cluster, "node-b")?;
    young.delete(cluster)?;
    moved.delete(cluster)?;
    raw.delete(cluster)
}

/// An operator's word that of all replicas this one counts.
fn promote_that_of(bed: &Bed, cluster: &Cluster, id: &str, node: &str) -> Result<()> {
    let spec = specs(bed)?.remove(id).context("its record")?;
    let replicas = spec["replicas"].as_object().context("replicas")?;
    let (replica, _) =
        replicas.iter().find(|(_, replica)| replica["node"] == node).context("a replica there")?;
    let mut command = Command::new(binaries_dir()?.join("holdfast"));
    command.args(["volume", "promote-replica", id, replica, "--yes-the-others-are-lost", "--socket"]);
    run(command.arg(cluster.controller.csi.path())).map(drop)
}

/// The record is deleted, and the replicas tell what they hold.
fn forget_and_rescue(bed: &Bed, cluster: &Cluster, id: &str) -> Result<()> {
    let records = bed.objects("VolumeRecord")?;
    bed.run(async move { Ok(records.delete(id, &Default::default()).await.map(drop)?) })?;
    let (_, told) = rescue(cluster, &["--volume", id])?;
    let volume = told_of(&told, id)?;
    ensure!(volume["verdict"] == "sound" && volume["restored"] == true, "{volume}");
    Ok(())
}

/// `kubectl replace -f` onto a record that went on: the API server has none of it.
fn over_what_is_there(bed: &Bed, saved: &DynamicObject) -> Result<()> {
    let records = bed.objects("VolumeRecord")?;
    let name = saved.metadata.name.clone().context("a name")?;
    bed.run(async move {
        let mut older = saved.clone();
        older.metadata.resource_version = records.get(&name).await?.metadata.resource_version;
        let answer = records.replace(&name, &PostParams::default(), &older).await;
        let Err(kube::Error::Api(status)) = &answer else { anyhow::bail!("it was replaced: {answer:?}") };
        ensure!(status.code == 422 && status.message.contains("version up by one"), "{status:?}");
        Ok(())
    })
}

/// `kubectl create -f` of a backup, without what the old server said of it.
fn create_all(bed: &Bed, kind: &str, saved: BTreeMap<String, DynamicObject>) -> Result<()> {
    let api = bed.objects(kind)?;
    bed.run(async move {
        for (name, mut object) in saved {
            object.metadata = ObjectMeta { name: Some(name), ..ObjectMeta::default() };
            api.create(&PostParams::default(), &object).await?;
        }
        Ok(())
    })
}

fn says_restored(bed: &Bed, id: &str) -> Result<()> {
    let begun = Instant::now();
    loop {
        let seen = objects(bed, "Volume")?.remove(id).map(|volume| volume.data["status"].clone());
        if seen.as_ref().is_some_and(|status| status.to_string().contains("RecordRestored")) {
            return Ok(());
        }
        ensure!(begun.elapsed() < SEEN_WITHIN, "nobody is told why: {seen:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// As kubelet does: over and over, here until it is told of something else than generations.
fn stage_at_last(cluster: &Cluster, volume: &Volume, node: &str) -> Result<PathBuf> {
    let begun = Instant::now();
    loop {
        match volume.stage(cluster, node) {
            Err(error)
                if begun.elapsed() < SEEN_WITHIN && !format!("{error:#}").contains("formatted over") =>
            {
                println!("staged again: {error:#}");
            }
            answer => return answer,
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn specs(bed: &Bed) -> Result<BTreeMap<String, Value>> {
    let all = objects(bed, "VolumeRecord")?.into_iter();
    Ok(all.map(|(name, object)| (name, object.data["spec"].clone())).collect())
}

/// All objects of one of our kinds by their names, as `kubectl get -o json` gives them.
fn objects(bed: &Bed, kind: &str) -> Result<BTreeMap<String, DynamicObject>> {
    let api = bed.objects(kind)?;
    let types = TypeMeta { api_version: "storage.holdfast.dev/v1alpha1".to_owned(), kind: kind.to_owned() };
    bed.run(async move {
        let mut all = BTreeMap::new();
        for object in api.list(&ListParams::default()).await?.items {
            let name = object.metadata.name.clone().context("a name")?;
            all.insert(name, DynamicObject { types: Some(types.clone()), ..object });
        }
        Ok(all)
    })
}
