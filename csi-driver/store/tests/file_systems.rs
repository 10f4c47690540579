//! The same on the file systems that pools are made on: ext4 and xfs, each in an image of its own. What is checked is what
//! depends on them: reservation and holes in sparse files, links, renames, and a file system that is really full.
#![expect(clippy::unwrap_used, reason = "a test ends at the first failure")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{Fixture, MIB, REPLICA, ask, close, log, pattern, read, write};
use holdfast_storage_core::ids::{Epoch, Lineage, ReplicaId, SnapshotId, VolumeId};
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_store::{Replica, StoreError};

const ONE: SnapshotId = SnapshotId(1);
/// The smallest that mkfs.xfs makes.
const IMAGE_BYTES: u64 = 320 * MIB;

#[test]
fn on_ext4_layers_are_frozen_merged_and_cloned_and_space_comes_back() {
    with_file_system("ext4", check_layers);
}

#[test]
fn on_xfs_layers_are_frozen_merged_and_cloned_and_space_comes_back() {
    with_file_system("xfs", check_layers);
}

#[test]
fn on_ext4_a_full_file_system_refuses_writes_and_breaks_nothing() {
    with_file_system("ext4", check_full);
}

#[test]
fn on_xfs_a_full_file_system_refuses_writes_and_breaks_nothing() {
    with_file_system("xfs", check_full);
}

fn check_layers(dir: &Path) {
    let fixture = Fixture::in_dir(dir, 1 << 40, 1 << 30, 0);
    let replica = fixture.open();
    log(&replica, &(0..64).collect::<Vec<u32>>());
    for mib in 0..32 {
        write(&replica, mib * MIB, &pattern(1, 1 << 20)).unwrap();
    }
    let before = fixture.pool.space().unwrap().used_bytes;
    let start = Instant::now();
    ask(|done| replica.freeze(ONE, done)).unwrap();
    println!("a freeze of 1 TiB took {:?}", start.elapsed());
    let frozen = fixture.pool.space().unwrap().used_bytes;
    assert!(frozen - before < MIB, "a freeze costs next to nothing: {before} then {frozen}");
    let meta = ReplicaMeta::new(VolumeId(8), ReplicaId(9), Lineage(1), 1 << 40, Epoch::default());
    fixture.pool.create_clone(&meta, REPLICA, ONE).unwrap();
    for mib in 0..24 {
        write(&replica, mib * MIB, &pattern(2, 1 << 20)).unwrap();
    }
    ask(|done| replica.drop_snapshot(ONE, done)).unwrap();
    let clone = fixture.pool.open_replica(meta.replica_id).unwrap();
    assert_eq!(read(&clone, 0, 1 << 20).unwrap(), pattern(1, 1 << 20), "shared layers are not merged");
    close(clone);
    fixture.pool.delete_replica(meta.replica_id).unwrap();
    let shared = fixture.pool.space().unwrap().used_bytes;
    // Opening looks for what there is to merge.
    ask(|done| replica.flush(done)).unwrap();
    close(replica);
    let replica = fixture.open();
    wait_for_one_layer(&fixture.replica_dir());
    let merged = fixture.pool.space().unwrap().used_bytes;
    assert!(shared - merged >= 23 * MIB, "{shared} then {merged}");
    assert_eq!(read(&replica, 23 * MIB, 1 << 20).unwrap(), pattern(2, 1 << 20));
    assert_eq!(read(&replica, 24 * MIB, 1 << 20).unwrap(), pattern(1, 1 << 20));
    ask(|done| replica.zero(0, 32 * MIB, true, true, done)).unwrap();
    let trimmed = fixture.pool.space().unwrap().used_bytes;
    assert!(merged - trimmed >= 31 * MIB, "{merged} then {trimmed}");
    close(replica);
}

/// The file system is the limit, not the pool's capacity.
fn check_full(dir: &Path) {
    let fixture = Fixture::in_dir(dir, 1 << 30, 1 << 40, 8 * MIB);
    let replica = fixture.open();
    log(&replica, &(0..512).collect::<Vec<u32>>());
    let mut written = 0;
    let refused = loop {
        match write(&replica, written * MIB, &pattern(1, 1 << 20)) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, StoreError::NoSpace(REPLICA));
    assert!(written > 100 && written < 320, "{written}");
    assert_eq!(read(&replica, written * MIB, 1 << 20).unwrap(), vec![0; 1 << 20]);
    // What is kept free is enough to freeze, to trim above the frozen layer, to flush and to merge.
    ask(|done| replica.freeze(ONE, done)).unwrap();
    ask(|done| replica.zero(0, written / 2 * MIB, true, true, done)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    ask(|done| replica.drop_snapshot(ONE, done)).unwrap();
    wait_for_one_layer(&fixture.replica_dir());
    write(&replica, 0, &pattern(3, 1 << 20)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    close(replica);
    let replica: Replica = fixture.open();
    assert_eq!(read(&replica, 0, 1 << 20).unwrap(), pattern(3, 1 << 20));
    assert_eq!(read(&replica, MIB, 4096).unwrap(), vec![0; 4096]);
    assert_eq!(read(&replica, (written - 1) * MIB, 1 << 20).unwrap(), pattern(1, 1 << 20));
    close(replica);
}

fn wait_for_one_layer(dir: &Path) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let layers = names.filter(|name| name.to_string_lossy().starts_with("layer-")).count();
        if layers == 1 {
            return;
        }
        assert!(Instant::now() < deadline, "{layers} layers stay");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn with_file_system(kind: &str, check: fn(&Path)) {
    let mkfs = format!("mkfs.{kind}");
    if !nix::unistd::geteuid().is_root() || Command::new(&mkfs).arg("-V").output().is_err() {
        println!("SKIP: an image with {kind} needs root and {mkfs}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    std::fs::File::create_new(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    run(Command::new(&mkfs).arg(&image)).unwrap();
    let mount = dir.path().join("mount");
    std::fs::create_dir(&mount).unwrap();
    if let Err(error) = run(Command::new("mount").arg("-o").arg("loop").arg(&image).arg(&mount)) {
        println!("SKIP: a {kind} image cannot be mounted here: {error}");
        return;
    }
    let mounted = Mounted(mount);
    check(&mounted.0);
}

/// Unmounted also when the check fails; the loop device goes with the mount.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("umount").arg(&self.0)) {
            eprintln!("{} stays mounted: {error}", self.0.display());
        }
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}
