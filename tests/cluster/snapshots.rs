//! What is in snapshots, clones, grown volumes and groups, through CSI and real data processes: what a pod wrote before
//! the cut, on every node, and nothing that came later.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_proto::csi;
use holdfast_proto::csi::volume_content_source::{Type as Source, VolumeSource};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::csi::{block_capability, create_request, named};
use holdfast_tests::{Cluster, ClusterOptions};
use libtest_mimic::Trial;

use crate::csi_volume::{Volume, delete_snapshot, from_snapshot, fs_bytes, get, put, with_source};
use crate::trial;

const MIB: u64 = 1 << 20;
/// The controller's first sweep comes ten seconds after its start.
const SWEEP_TIMEOUT: Duration = Duration::from_secs(40);

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_snapshot_and_its_clones_have_what_was_written_before_it", || on_a_cluster(snapshots)),
        trial("a_volume_grows_under_its_users", || on_a_cluster(growth)),
        trial("changed_blocks_are_the_real_difference", || on_a_cluster(changed_blocks)),
        trial("a_group_of_volumes_has_no_effect_without_its_cause", || on_a_cluster(group)),
    ]
}

fn on_a_cluster(body: fn(&Cluster) -> Result<()>) -> Result<()> {
    let options = ClusterOptions { kind: "snapshots".to_owned(), ..ClusterOptions::default() };
    let cluster = Cluster::start(&options)?;
    let outcome = body(&cluster);
    let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

/// Waits until the pools have no replica any more: what clones needed of their sources is cleared away after the call.
fn wait_for_empty_pools(cluster: &Cluster) -> Result<()> {
    let until = Instant::now() + SWEEP_TIMEOUT;
    loop {
        let left = replicas_left(cluster)?;
        if left == 0 {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{left} replicas are left on the pools");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Replicas that the pools still have.
fn replicas_left(cluster: &Cluster) -> Result<usize> {
    let mut left = 0;
    for node in &cluster.nodes {
        let folder = node.pool_dir().join("replicas");
        left += std::fs::read_dir(&folder).with_context(|| folder.display().to_string())?.count();
    }
    Ok(left)
}

fn snapshots(cluster: &Cluster) -> Result<()> {
    for (fs_type, bytes) in [("ext4", 64 * MIB), ("xfs", 320 * MIB)] {
        snapshots_of(cluster, fs_type, bytes).with_context(|| fs_type)?;
    }
    wait_for_empty_pools(cluster)
}

fn snapshots_of(cluster: &Cluster, fs_type: &str, bytes: u64) -> Result<()> {
    let (old, new) = (vec![b'o'; 3 << 20], vec![b'n'; 3 << 20]);
    let create = create_request(&format!("{fs_type}-data"), bytes as i64, 3, fs_type);
    let volume = Volume::create(cluster, create)?;
    let root = volume.stage(cluster, "node-a")?;
    put(&root, "file", &old)?;
    let before = fs_bytes(&root)?;
    let snapshot = volume.snapshot(cluster, &format!("{fs_type}-nightly"))?;
    put(&root, "file", &new)?;
    put(&root, "later", &new)?;

    let larger = bytes + 64 * MIB;
    let restored =
        Volume::create(cluster, from_snapshot(&format!("{fs_type}-restored"), larger, fs_type, &snapshot))?;
    // While the source is in use elsewhere.
    let at = restored.stage(cluster, "node-b")?;
    ensure!(get(&at, "file")? == old, "the restored file has not what was written before the snapshot");
    ensure!(!at.join("later").exists(), "a file of after the snapshot is in it");
    let grown = fs_bytes(&at)?;
    ensure!(grown > before + 50 * MIB, "the restored file system has {grown} bytes, its source {before}");
    put(&at, "own", b"its own")?;

    let from_volume = Source::Volume(VolumeSource { volume_id: volume.id.clone() });
    let request =
        with_source(create_request(&format!("{fs_type}-clone"), bytes as i64, 3, fs_type), from_volume);
    let clone = Volume::create(cluster, request)?;
    let cloned = clone.stage(cluster, "node-c")?;
    ensure!(get(&cloned, "file")? == new && get(&cloned, "later")? == new, "the clone is not as its source");
    ensure!(!cloned.join("own").exists(), "what another clone wrote is in this one");
    ensure!(!root.join("own").exists(), "what a clone wrote is in the source");

    // Whoever goes first, the others stay whole.
    volume.unstage(cluster, "node-a")?;
    volume.delete(cluster)?;
    delete_snapshot(cluster, &snapshot)?;
    restored.unstage(cluster, "node-b")?;
    let at = restored.stage(cluster, "node-a")?;
    ensure!(get(&at, "file")? == old && get(&at, "own")? == b"its own", "the restored volume lost something");
    ensure!(get(&cloned, "file")? == new, "the clone lost something");
    restored.unstage(cluster, "node-a")?;
    clone.unstage(cluster, "node-c")?;
    restored.delete(cluster)?;
    clone.delete(cluster)
}

fn growth(cluster: &Cluster) -> Result<()> {
    // Mounted all the time.
    let volume = Volume::create(cluster, create_request("xfs-grows", 320 << 20, 3, "xfs"))?;
    let root = volume.stage(cluster, "node-a")?;
    put(&root, "file", &[b'x'; 1 << 20])?;
    let before = fs_bytes(&root)?;
    volume.expand(cluster, 512 * MIB)?;
    volume.expand_on(cluster, "node-a")?;
    let after = fs_bytes(&root)?;
    ensure!(after > before + 100 * MIB, "xfs had {before} bytes and has {after}");
    put(&root, "more", &vec![b'y'; 200 << 20])?;
    ensure!(get(&root, "file")? == [b'x'; 1 << 20], "a file was lost by growing");
    volume.unstage(cluster, "node-a")?;
    volume.delete(cluster)?;

    // Grown while nobody used it: the next stage finds it smaller than its device.
    let volume = Volume::create(cluster, create_request("ext4-grows", 64 << 20, 3, "ext4"))?;
    let root = volume.stage(cluster, "node-a")?;
    put(&root, "file", &[b'z'; 1 << 20])?;
    let before = fs_bytes(&root)?;
    volume.unstage(cluster, "node-a")?;
    volume.expand(cluster, 256 * MIB)?;
    let root = volume.stage(cluster, "node-b")?;
    let after = fs_bytes(&root)?;
    ensure!(after > before + 150 * MIB, "ext4 had {before} bytes and has {after}");
    ensure!(get(&root, "file")? == [b'z'; 1 << 20], "a file was lost by growing");
    volume.unstage(cluster, "node-b")?;
    volume.delete(cluster)
}

/// Blocks are written, written again with equal content, zeroed, and written beyond the old end; what is told is compared with
/// the two snapshots as they are read.
fn changed_blocks(cluster: &Cluster) -> Result<()> {
    const BLOCK: u64 = 4096;
    let mut request = create_request("changes", 64 << 20, 3, "ext4");
    request.volume_capabilities = vec![block_capability()];
    let volume = Volume::create(cluster, request)?;
    volume.stage(cluster, "node-a")?;
    let write = |block: u64, value: u8, count: u64| -> Result<()> {
        let file = File::options().write(true).open(device(cluster, &volume, "node-a")?)?;
        file.write_all_at(&vec![value; (count * BLOCK) as usize], block * BLOCK)?;
        Ok(file.sync_all()?)
    };
    write(0, 1, 8)?;
    write(100, 2, 300)?;
    write(5_000, 3, 4)?;
    let base = volume.snapshot(cluster, "base")?;
    // The same again, one of them other, zeroes over data, zeroes over nothing, and new data; then the volume grows.
    write(0, 1, 8)?;
    write(3, 9, 1)?;
    write(100, 0, 10)?;
    write(9_000, 0, 10)?;
    write(12_000, 4, 2)?;
    volume.expand(cluster, 96 * MIB)?;
    write(17_000, 5, 3)?;
    let target = volume.snapshot(cluster, "target")?;
    write(0, 7, 8)?;

    let (old, new) = (contents(cluster, &base, 64 * MIB)?, contents(cluster, &target, 96 * MIB)?);
    let zero = [0; BLOCK as usize];
    let blocks = new.chunks(BLOCK as usize).zip(0_u64..);
    let real: Vec<u64> = blocks
        .filter(|(now, index)| {
            let before = old.get((index * BLOCK) as usize..((index + 1) * BLOCK) as usize);
            *now != before.unwrap_or(&zero)
        })
        .map(|(_, index)| index)
        .collect();
    let expected: Vec<u64> =
        [3].into_iter().chain(100..110).chain(12_000..12_002).chain(17_000..17_003).collect();
    ensure!(real == expected, "the snapshots differ in {real:?}");
    let request = csi::GetMetadataDeltaRequest {
        base_snapshot_id: base.clone(),
        target_snapshot_id: target.clone(),
        max_results: 2,
        ..Default::default()
    };
    let told = cluster.controller.csi.metadata(|mut c| async move { c.get_metadata_delta(request).await });
    let told = named("GetMetadataDelta", told)?;
    let told = told.iter().flat_map(|message| &message.block_metadata);
    let told: Vec<u64> = told.flat_map(covered).collect();
    ensure!(told == real, "told are {told:?}, the snapshots differ in {real:?}");

    let request = csi::GetMetadataAllocatedRequest { snapshot_id: base.clone(), ..Default::default() };
    let told =
        cluster.controller.csi.metadata(|mut c| async move { c.get_metadata_allocated(request).await });
    let told = named("GetMetadataAllocated", told)?;
    let told: Vec<u64> = told.iter().flat_map(|message| &message.block_metadata).flat_map(covered).collect();
    let expected: Vec<u64> = (0..8).chain(100..400).chain(5_000..5_004).collect();
    ensure!(told == expected, "of the base {} blocks are told, {} hold data", told.len(), expected.len());
    volume.unstage(cluster, "node-a")?;
    for snapshot in [base, target] {
        delete_snapshot(cluster, &snapshot)?;
    }
    volume.delete(cluster)
}

/// The blocks of a tuple.
fn covered(tuple: &csi::BlockMetadata) -> impl Iterator<Item = u64> + use<> {
    let (start, count) = (tuple.byte_offset as u64 / 4096, tuple.size_bytes as u64 / 4096);
    start..start + count
}

/// All of a snapshot, read from a volume that is made from it.
fn contents(cluster: &Cluster, snapshot_id: &str, bytes: u64) -> Result<Vec<u8>> {
    let mut request = from_snapshot(&format!("read-{bytes}"), bytes, "ext4", snapshot_id);
    request.volume_capabilities = vec![block_capability()];
    let copy = Volume::create(cluster, request)?;
    copy.stage(cluster, "node-b")?;
    let mut content = vec![0; usize::try_from(bytes)?];
    File::open(device(cluster, &copy, "node-b")?)?.read_exact_at(&mut content, 0)?;
    copy.unstage(cluster, "node-b")?;
    copy.delete(cluster)?;
    Ok(content)
}

/// A client writes n to the cause, makes it safe, then n to the effect, and so on; in no group may the effect be ahead.
fn group(cluster: &Cluster) -> Result<()> {
    let raw = |name: &str| {
        let mut request = create_request(name, 32 << 20, 3, "ext4");
        request.volume_capabilities = vec![block_capability()];
        Volume::create(cluster, request)
    };
    let (cause, effect) = (raw("cause")?, raw("effect")?);
    cause.stage(cluster, "node-a")?;
    effect.stage(cluster, "node-b")?;
    let mut members = vec![cause.id.clone(), effect.id.clone()];
    let idle = raw("idle")?;
    members.push(idle.id.clone());
    let stop = Arc::new(AtomicBool::new(false));
    let writer = {
        let (first, second) = (device(cluster, &cause, "node-a")?, device(cluster, &effect, "node-b")?);
        let stop = Arc::clone(&stop);
        std::thread::spawn(move || count_up(&first, &second, &stop))
    };
    let taken =
        (0..5).map(|n| take_group(cluster, &format!("group-{n}"), &members)).collect::<Result<Vec<_>>>();
    stop.store(true, Ordering::Relaxed);
    let written = writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    ensure!(written > 10, "only {written} numbers were written");
    cause.unstage(cluster, "node-a")?;
    effect.unstage(cluster, "node-b")?;
    for (n, group) in taken?.into_iter().enumerate() {
        let (first, second) = (
            read_member(cluster, &group, &cause, &format!("cause-{n}"))?,
            read_member(cluster, &group, &effect, &format!("effect-{n}"))?,
        );
        println!("group {n}: the cause has {first}, the effect {second} of {written}");
        ensure!(first == second || first == second + 1, "the effect has {second}, its cause {first}");
        let request = csi::DeleteVolumeGroupSnapshotRequest {
            group_snapshot_id: group.group_snapshot_id,
            ..Default::default()
        };
        let reply = cluster
            .controller
            .csi
            .groups(|mut c| async move { c.delete_volume_group_snapshot(request).await });
        named("DeleteVolumeGroupSnapshot", reply)?;
    }
    for volume in [&cause, &effect, &idle] {
        volume.delete(cluster)?;
    }
    wait_for_empty_pools(cluster)
}

fn device(cluster: &Cluster, volume: &Volume, node: &str) -> Result<PathBuf> {
    let status = cluster.node(node).data_socket.volume_status(&volume.id);
    Ok(PathBuf::from(named("GetStatus", status)?.device))
}

fn count_up(cause: &Path, effect: &Path, stop: &AtomicBool) -> Result<u64> {
    let open =
        |path: &Path| File::options().write(true).open(path).with_context(|| path.display().to_string());
    let (cause, effect) = (open(cause)?, open(effect)?);
    let mut n = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        n += 1;
        let mut block = [0; 4096];
        block[..8].copy_from_slice(&n.to_le_bytes());
        for file in [&cause, &effect] {
            file.write_all_at(&block, 0)?;
            file.sync_data()?;
        }
    }
    Ok(n)
}

fn take_group(cluster: &Cluster, name: &str, members: &[String]) -> Result<csi::VolumeGroupSnapshot> {
    let request = csi::CreateVolumeGroupSnapshotRequest {
        name: name.to_owned(),
        source_volume_ids: members.to_vec(),
        ..Default::default()
    };
    let reply =
        cluster.controller.csi.groups(|mut c| async move { c.create_volume_group_snapshot(request).await });
    named("CreateVolumeGroupSnapshot", reply)?.group_snapshot.context("no group")
}

/// The number that a member's snapshot has, read from a volume that is made from it.
fn read_member(
    cluster: &Cluster,
    group: &csi::VolumeGroupSnapshot,
    member: &Volume,
    name: &str,
) -> Result<u64> {
    let snapshot =
        group.snapshots.iter().find(|s| s.source_volume_id == member.id).context("no such member")?;
    let mut request = from_snapshot(name, 32 * MIB, "ext4", &snapshot.snapshot_id);
    request.volume_capabilities = vec![block_capability()];
    let copy = Volume::create(cluster, request)?;
    copy.stage(cluster, "node-c")?;
    let mut number = [0; 8];
    File::open(device(cluster, &copy, "node-c")?)?.read_exact_at(&mut number, 0)?;
    copy.unstage(cluster, "node-c")?;
    copy.delete(cluster)?;
    Ok(u64::from_le_bytes(number))
}
