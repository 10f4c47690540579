//! Snapshots, clones and growth on a real file system.
#![expect(clippy::unwrap_used, reason = "a test ends at the first failure")]

mod common;

use std::time::{Duration, Instant};

use common::{Fixture, MIB, REPLICA, ask, close, flip, log, pattern, read, write};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::{BlockSet, Dirty, DirtyMap};
use holdfast_storage_core::ids::{
    BLOCK_BYTES, Block, Epoch, Lineage, Region, ReplicaId, SnapshotId, VolumeId,
};
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_store::{AllocState, Extent, PoolError, Replica, StoreError};

const ONE: SnapshotId = SnapshotId(1);
const TWO: SnapshotId = SnapshotId(2);
const CLONE: ReplicaId = ReplicaId(0xc10e);

#[test]
fn a_snapshot_keeps_its_instant_and_the_volume_goes_on() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    log(&replica, &[0, 1, 2]);
    write(&replica, 0, &pattern(1, 16384)).unwrap();
    freeze(&replica, ONE).unwrap();
    write(&replica, 4096, &pattern(2, 4096)).unwrap();
    ask(|done| replica.zero(8192, 4096, true, false, done)).unwrap();
    write(&replica, 2 * MIB, &pattern(3, 4096)).unwrap();
    freeze(&replica, TWO).unwrap();
    write(&replica, 0, &pattern(4, 4096)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    close(replica);

    let replica = fixture.open();
    assert_eq!(replica.start().snapshots, [ONE, TWO]);
    assert_eq!(replica.snapshots(), [ONE, TWO]);
    assert_eq!(read_at(&replica, ONE, 0, 16384).unwrap(), pattern(1, 16384));
    assert_eq!(read_at(&replica, ONE, 2 * MIB, 4096).unwrap(), vec![0; 4096]);
    let mut two = pattern(1, 16384);
    two[4096..8192].copy_from_slice(&pattern(2, 4096));
    two[8192..12288].fill(0);
    assert_eq!(read_at(&replica, TWO, 0, 16384).unwrap(), two, "a zero shadows what is frozen");
    two[..4096].copy_from_slice(&pattern(4, 4096));
    assert_eq!(read(&replica, 0, 16384).unwrap(), two);
    let missing = read_at(&replica, SnapshotId(9), 0, 4096);
    assert_eq!(missing, Err(StoreError::NoSnapshot { replica: REPLICA, snapshot: SnapshotId(9) }));
}

#[test]
fn allocation_and_changes_come_from_the_maps_exactly() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    log(&replica, &[0, 1, 2]);
    write(&replica, 0, &pattern(1, 16384)).unwrap();
    freeze(&replica, ONE).unwrap();
    write(&replica, 4096, &pattern(2, 4096)).unwrap();
    ask(|done| replica.zero(8192, 2 * MIB, true, false, done)).unwrap();
    freeze(&replica, TWO).unwrap();
    write(&replica, MIB, &pattern(3, 8192)).unwrap();

    let whole = BlockRange::new(0, 4096);
    let changed = |from, to| ask(|done| replica.changed_blocks(from, to, whole, done));
    assert_eq!(changed(None, Some(ONE)).unwrap(), [BlockRange::new(0, 4)]);
    assert_eq!(changed(Some(ONE), Some(TWO)).unwrap(), [BlockRange::new(1, 3)], "a zero of nothing is none");
    assert_eq!(changed(Some(TWO), None).unwrap(), [BlockRange::new(256, 2)]);
    assert_eq!(changed(Some(ONE), None).unwrap(), [BlockRange::new(1, 3), BlockRange::new(256, 2)]);
    assert_eq!(changed(Some(TWO), Some(TWO)).unwrap(), []);
    assert!(matches!(changed(Some(TWO), Some(ONE)), Err(StoreError::NoSnapshot { snapshot: TWO, .. })));
    let extents = ask(|done| replica.allocation_at(Some(TWO), BlockRange::new(0, 8), done)).unwrap();
    let extent = |start, count, state| Extent { range: BlockRange::new(start, count), state };
    let expected =
        [extent(0, 2, AllocState::Data), extent(2, 2, AllocState::Zero), extent(4, 4, AllocState::Absent)];
    assert_eq!(extents, expected);
    assert_eq!(ask(|done| replica.allocated_blocks(done)), Ok(6));
}

#[test]
fn a_freeze_is_refused_for_an_id_that_is_there_and_changes_nothing() {
    let fixture = Fixture::new(MIB);
    let replica = fixture.open();
    freeze(&replica, ONE).unwrap();
    assert_eq!(freeze(&replica, ONE), Err(StoreError::SnapshotExists { replica: REPLICA, snapshot: ONE }));
    assert_eq!(replica.snapshots(), [ONE]);
    ask(|done| replica.drop_snapshot(SnapshotId(77), done)).unwrap();
    assert_eq!(replica.snapshots(), [ONE], "an unknown one is a success");
}

#[test]
fn a_full_stack_refuses_a_freeze_and_goes_on() {
    let fixture = Fixture::new(MIB);
    let replica = fixture.open();
    replica.set_merge_rate(0);
    let mut frozen = 0;
    let refused = loop {
        match freeze(&replica, SnapshotId(1000 + frozen)) {
            Ok(()) => frozen += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, StoreError::TooManyLayers { replica: REPLICA, layers: 126 });
    assert_eq!(frozen, 125);
    log(&replica, &[0]);
    write(&replica, 0, &pattern(1, 4096)).unwrap();
    close(replica);
    let replica = fixture.open();
    assert_eq!(replica.snapshots().len(), 125);
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(1, 4096));
}

#[test]
fn a_dropped_snapshot_gives_its_space_back_and_nothing_else_changes() {
    let fixture = Fixture::new(64 * MIB);
    let replica = fixture.open();
    log(&replica, &(0..64).collect::<Vec<u32>>());
    for mib in 0..16 {
        write(&replica, mib * MIB, &pattern(1, 1 << 20)).unwrap();
    }
    freeze(&replica, ONE).unwrap();
    for mib in 0..12 {
        write(&replica, mib * MIB, &pattern(2, 1 << 20)).unwrap();
    }
    freeze(&replica, TWO).unwrap();
    write(&replica, 20 * MIB, &pattern(3, 1 << 20)).unwrap();
    write(&replica, 0, &pattern(4, 4096)).unwrap();
    let before = fixture.pool.space().unwrap().used_bytes;
    ask(|done| replica.drop_snapshot(ONE, done)).unwrap();
    assert_eq!(replica.snapshots(), [TWO]);
    wait_for_layers(&fixture, 2);
    let after = fixture.pool.space().unwrap().used_bytes;
    assert!(before - after >= 11 * MIB, "{before} then {after}");

    let check = |replica: &Replica| {
        assert_eq!(read_at(replica, TWO, 11 * MIB, 1 << 20).unwrap(), pattern(2, 1 << 20));
        assert_eq!(read_at(replica, TWO, 12 * MIB, 1 << 20).unwrap(), pattern(1, 1 << 20));
        assert_eq!(read_at(replica, TWO, 0, 4096).unwrap(), pattern(2, 1 << 20)[..4096]);
        assert_eq!(read(replica, 0, 4096).unwrap(), pattern(4, 4096));
        assert_eq!(read(replica, 20 * MIB, 1 << 20).unwrap(), pattern(3, 1 << 20));
    };
    check(&replica);
    ask(|done| replica.flush(done)).unwrap();
    close(replica);
    let replica = fixture.open();
    check(&replica);
    // The layer that takes writes is moved down as well: in the end there is one.
    ask(|done| replica.drop_snapshot(TWO, done)).unwrap();
    wait_for_layers(&fixture, 1);
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(4, 4096));
    assert_eq!(read(&replica, 15 * MIB, 1 << 20).unwrap(), pattern(1, 1 << 20));
    write(&replica, 15 * MIB, &pattern(5, 4096)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    close(replica);
    assert_eq!(read(&fixture.open(), 15 * MIB, 4096).unwrap(), pattern(5, 4096));
}

#[test]
fn reads_and_writes_go_on_correctly_while_layers_are_merged() {
    let fixture = Fixture::new(64 * MIB);
    let replica = fixture.open();
    log(&replica, &(0..64).collect::<Vec<u32>>());
    let block = |seed: u64, at: u64| pattern((seed * 31 + at) as u8, 4096);
    for at in 0..1024 {
        write(&replica, at * 16 * BLOCK_BYTES, &block(0, at)).unwrap();
    }
    std::thread::scope(|scope| {
        for writer in 0..2_u64 {
            let replica = replica.clone();
            scope.spawn(move || {
                for round in 1..8 {
                    for at in (writer..1024).step_by(2) {
                        let offset = at * 16 * BLOCK_BYTES;
                        assert_eq!(read(&replica, offset, 4096).unwrap(), block(round - 1, at), "{at}");
                        write(&replica, offset, &block(round, at)).unwrap();
                    }
                }
            });
        }
        for round in 0..8 {
            freeze(&replica, SnapshotId(100 + round)).unwrap();
            std::thread::sleep(Duration::from_millis(30));
            ask(|done| replica.drop_snapshot(SnapshotId(100 + round), done)).unwrap();
        }
    });
    wait_for_layers(&fixture, 1);
    for at in 0..1024 {
        assert_eq!(read(&replica, at * 16 * BLOCK_BYTES, 4096).unwrap(), block(7, at), "{at}");
    }
}

#[test]
fn a_killed_process_loses_nothing_across_a_freeze() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    log(&replica, &[0]);
    ask(|done| replica.set_boot_cookie(3, done)).unwrap();
    write(&replica, 0, &pattern(1, 4096)).unwrap();
    freeze(&replica, ONE).unwrap();
    write(&replica, 4096, &pattern(2, 4096)).unwrap();
    // Closing flushes nothing: the tables in memory are lost, as when the process is killed.
    close(replica);
    let replica = fixture.open();
    assert_eq!(replica.start().boot_cookie, Some(3));
    assert_eq!(read(&replica, 0, 8192).unwrap(), [pattern(1, 4096), pattern(2, 4096)].concat());
    assert_eq!(read_at(&replica, ONE, 0, 8192).unwrap(), [pattern(1, 4096), vec![0; 4096]].concat());
}

#[test]
fn a_clone_begins_as_the_snapshot_and_outlives_its_source() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    log(&replica, &[0, 1]);
    write(&replica, 0, &pattern(1, 8192)).unwrap();
    freeze(&replica, ONE).unwrap();
    write(&replica, 0, &pattern(2, 4096)).unwrap();
    freeze(&replica, TWO).unwrap();
    write(&replica, 4096, &pattern(3, 4096)).unwrap();
    let used = fixture.pool.space().unwrap().used_bytes;
    let meta = clone_meta(32 * MIB);
    fixture.pool.create_clone(&meta, REPLICA, TWO).unwrap();
    fixture.pool.create_clone(&meta, REPLICA, TWO).unwrap();
    let cloned = fixture.pool.space().unwrap().used_bytes;
    assert!(cloned - used < MIB, "shared layers count once: {used} then {cloned}");

    let clone = fixture.pool.open_replica(CLONE).unwrap();
    assert_eq!((clone.size_bytes(), clone.snapshots()), (32 * MIB, Vec::new()));
    let expected = [pattern(2, 4096), pattern(1, 8192)[4096..].to_vec()].concat();
    assert_eq!(read(&clone, 0, 8192).unwrap(), expected);
    log(&clone, &[0, 31]);
    write(&clone, 4096, &pattern(4, 4096)).unwrap();
    write(&clone, 31 * MIB, &pattern(5, 4096)).unwrap();
    assert_eq!(read(&replica, 4096, 4096).unwrap(), pattern(3, 4096), "the source goes its own way");

    // The source's layers are shared: dropping its snapshots must not touch them.
    ask(|done| replica.drop_snapshot(ONE, done)).unwrap();
    ask(|done| replica.drop_snapshot(TWO, done)).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(read(&clone, 0, 4096).unwrap(), pattern(2, 4096));
    close(replica);
    fixture.pool.delete_replica(REPLICA).unwrap();
    ask(|done| clone.flush(done)).unwrap();
    close(clone);
    let clone = fixture.pool.open_replica(CLONE).unwrap();
    wait_for_layers_of(&fixture, CLONE, 1);
    assert_eq!(read(&clone, 0, 4096).unwrap(), pattern(2, 4096), "merged, with its own volume's seed or not");
    assert_eq!(read(&clone, 4096, 4096).unwrap(), pattern(4, 4096));
    assert_eq!(read(&clone, 31 * MIB, 4096).unwrap(), pattern(5, 4096));
}

#[test]
fn a_clone_that_cannot_be_is_refused_and_leaves_nothing() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    freeze(&replica, ONE).unwrap();
    let meta = clone_meta(16 * MIB);
    assert!(matches!(
        fixture.pool.create_clone(&meta, REPLICA, TWO),
        Err(PoolError::NoSnapshot { snapshot: TWO, .. })
    ));
    assert!(matches!(fixture.pool.create_clone(&meta, ReplicaId(5), ONE), Err(PoolError::NotFound(_))));
    let smaller = fixture.pool.create_clone(&clone_meta(8 * MIB), REPLICA, ONE);
    assert!(matches!(smaller, Err(PoolError::CloneTooSmall { .. })), "{smaller:?}");
    let other = fixture.pool.create_clone(&common::meta(REPLICA, 8 * MIB), REPLICA, ONE);
    assert!(matches!(other, Err(PoolError::Conflict(REPLICA))), "{other:?}");
    assert_eq!(fixture.pool.list().unwrap(), [REPLICA]);
}

#[test]
fn growth_keeps_everything_and_extends_log_and_maps() {
    let fixture = Fixture::new(8 * MIB);
    let replica = fixture.open();
    log(&replica, &[0]);
    write(&replica, 0, &pattern(1, 4096)).unwrap();
    let absent = ReplicaId(9);
    let map = DirtyMap { base: Epoch { number: 4, nonce: 5 }, dirty: Dirty::Blocks(BlockSet::new()) };
    ask(|done| replica.put_map(absent, map, done)).unwrap();
    freeze(&replica, ONE).unwrap();
    let smaller = ask(|done| replica.grow(4 * MIB, done));
    assert!(matches!(smaller, Err(StoreError::InvalidGrowth { .. })), "{smaller:?}");
    for _ in 0..2 {
        // Far enough for another group and another page of log and map.
        ask(|done| replica.grow(40_000 * MIB, done)).unwrap();
    }
    log(&replica, &[7, 39_999]);
    write(&replica, 40_000 * MIB - 4096, &pattern(2, 4096)).unwrap();
    let mut set = BlockSet::new();
    set.insert(BlockRange::new(40_000 * 256 - 1, 1));
    let bits = set.regions().map(|(region, bits)| (region, *bits)).collect();
    ask(|done| replica.update_map(absent, bits, done)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    close(replica);

    let replica = fixture.open();
    let start = replica.start();
    assert_eq!((replica.size_bytes(), start.meta.size_bytes), (40_000 * MIB, 40_000 * MIB));
    assert_eq!(start.log.into_iter().collect::<Vec<_>>(), [Region(0), Region(7), Region(39_999)]);
    assert_eq!(start.maps[&absent].dirty, Dirty::Blocks(set));
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(1, 4096));
    assert_eq!(
        read(&replica, 40_000 * MIB - 8192, 8192).unwrap(),
        [vec![0; 4096], pattern(2, 4096)].concat()
    );
    assert_eq!(replica.snapshot_size_bytes(ONE), Some(8 * MIB));
    let beyond = read_at(&replica, ONE, 8 * MIB, 4096);
    assert!(matches!(beyond, Err(StoreError::InvalidRange { .. })), "{beyond:?}");
    // Merging the small layer below must not lose what lies beyond its size.
    ask(|done| replica.drop_snapshot(ONE, done)).unwrap();
    wait_for_layers(&fixture, 1);
    assert_eq!(read(&replica, 40_000 * MIB - 4096, 4096).unwrap(), pattern(2, 4096));
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(1, 4096));
}

#[test]
fn a_full_pool_still_freezes_trims_and_merges() {
    let fixture = Fixture::with_capacity(64 * MIB, 16 * MIB);
    let replica = fixture.open();
    log(&replica, &(0..32).collect::<Vec<u32>>());
    let mut full = 0;
    while write(&replica, full * MIB / 4, &pattern(1, 1 << 18)).is_ok() {
        full += 1;
    }
    assert!(full > 40, "{full}");
    freeze(&replica, ONE).unwrap();
    assert_eq!(write(&replica, 0, &pattern(2, 4096)), Err(StoreError::NoSpace(REPLICA)));
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(1, 1 << 18)[..4096]);
    ask(|done| replica.zero(0, 4 * MIB, true, true, done)).unwrap();
    assert_eq!(read(&replica, 0, 4096).unwrap(), vec![0; 4096]);
    assert!(!replica.is_poisoned());
    ask(|done| replica.drop_snapshot(ONE, done)).unwrap();
    wait_for_layers(&fixture, 1);
    write(&replica, 0, &pattern(3, 4096)).unwrap();
    assert_eq!(read(&replica, 0, 8192).unwrap(), [pattern(3, 4096), vec![0; 4096]].concat());
    let space = fixture.pool.space().unwrap();
    assert!(space.metadata_bytes > 0 && space.available_bytes > 3 * MIB, "{space:?}");
}

#[test]
fn rot_in_a_frozen_layer_is_damage_and_never_in_doubt() {
    let fixture = Fixture::new(4 * MIB);
    let replica = fixture.open();
    log(&replica, &[0]);
    write(&replica, 0, &pattern(1, 16384)).unwrap();
    freeze(&replica, ONE).unwrap();
    write(&replica, 4096, &pattern(2, 4096)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    close(replica);
    let data_at = (2 << 20) + (2 << 20);
    flip(&fixture.file("layer-000000"), data_at + 8192);
    flip(&fixture.file("layer-000000"), data_at + 4096);
    flip(&fixture.file("layer-000001"), data_at + 4096);

    let replica = fixture.open();
    let found = ask(|done| replica.read_unchecked(0, 16384, done)).unwrap();
    assert_eq!(found.bad_blocks, [Block(1), Block(2)]);
    assert_eq!(found.in_doubt, [Block(1)], "only the layer that takes writes");
    let verify = |at| ask(|done| replica.verify(at, BlockRange::new(0, 1024), done)).unwrap();
    assert_eq!(verify(None), [Block(1)]);
    assert_eq!(verify(Some(ONE)), [Block(1), Block(2)], "also what is shadowed above");
    assert_eq!(ask(|done| replica.unverified(vec![Region(0), Region(1)], done)).unwrap(), [Block(1)]);
    let changed = ask(|done| replica.recompute(vec![Block(0), Block(1), Block(2)], done)).unwrap();
    assert_eq!(changed, 1, "told, and only what is in doubt");
    assert_eq!(verify(None), []);
    assert!(matches!(read(&replica, 8192, 4096), Err(StoreError::Checksum { .. })), "damage stays damage");

    // A merge carries damage along instead of giving it a checksum that fits.
    ask(|done| replica.drop_snapshot(ONE, done)).unwrap();
    wait_for_layers(&fixture, 1);
    assert!(matches!(read(&replica, 8192, 4096), Err(StoreError::Checksum { .. })));
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(1, 16384)[..4096]);
}

#[test]
fn rot_of_a_state_above_never_lets_older_data_through() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    log(&replica, &[0, 8]);
    for offset in [0, 8 * MIB] {
        write(&replica, offset, &pattern(1, 4096)).unwrap();
    }
    freeze(&replica, ONE).unwrap();
    for offset in [0, 8 * MIB] {
        write(&replica, offset, &pattern(2, 4096)).unwrap();
    }
    freeze(&replica, TWO).unwrap();
    close(replica);
    // Data (2) becomes absent (0), in a window where nothing else is written.
    let map = 2 << 20;
    flip_bits(&fixture.file("layer-000001"), map + 8 * 256 / 4, 2);
    let replica = fixture.open();
    assert!(matches!(read(&replica, 8 * MIB, 4096), Err(StoreError::Checksum { .. })));
    ask(|done| replica.drop_snapshot(ONE, done)).unwrap();
    wait_for_layers(&fixture, 2);
    assert!(matches!(read(&replica, 8 * MIB, 4096), Err(StoreError::Checksum { .. })), "also once merged");
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(2, 4096));
}

fn freeze(replica: &Replica, snapshot: SnapshotId) -> Result<(), StoreError> {
    ask(|done| replica.freeze(snapshot, done))
}

fn read_at(replica: &Replica, at: SnapshotId, offset: u64, len: u32) -> Result<Vec<u8>, StoreError> {
    ask(|done| replica.read_snapshot(at, offset, len, done)).map(|data| data.to_vec())
}

fn clone_meta(size_bytes: u64) -> ReplicaMeta {
    ReplicaMeta::new(VolumeId(0xc), CLONE, Lineage(1), size_bytes, Epoch { number: 1, nonce: 2 })
}

fn wait_for_layers(fixture: &Fixture, count: usize) {
    wait_for_layers_of(fixture, REPLICA, count);
}

/// Waits until merges left so many layers.
fn wait_for_layers_of(fixture: &Fixture, replica: ReplicaId, count: usize) {
    let dir = fixture.dir.path().join("replicas").join(replica.to_string());
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let names: Vec<String> = std::fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.starts_with("layer-") || name.starts_with("merge-"))
            .collect();
        let layers = names.iter().filter(|name| name.starts_with("layer-")).count();
        if layers == count && layers == names.len() {
            return;
        }
        assert!(Instant::now() < deadline, "{names:?} where {count} layers belong");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn flip_bits(path: &std::path::Path, byte: u64, bits: u8) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut value = [0];
    file.read_exact_at(&mut value, byte).unwrap();
    file.write_all_at(&[value[0] ^ bits], byte).unwrap();
    file.sync_all().unwrap();
}
