//! A replica on a real file system: what is written is read back, what is damaged is noticed, what is full says so.
#![expect(clippy::unwrap_used, reason = "a test ends at the first failure")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use common::{Fixture, MIB, REPLICA, ask, close, flip, log, meta, options, pattern, read, write};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::{BlockSet, Dirty, DirtyMap};
use holdfast_storage_core::ids::{
    BLOCK_BYTES, Block, Epoch, Generation, Lineage, RecordVersion, Region, ReplicaId,
};
use holdfast_storage_core::record_copy::{CopyStamp, RecordCopy};
use holdfast_store::{AllocState, Extent, Pool, PoolError, PoolOptions, StoreError};

#[test]
fn what_was_written_is_read_back_also_after_a_reopen() {
    let fixture = Fixture::new(64 * MIB);
    let replica = fixture.open();
    log(&replica, &[0, 1, 63]);
    write(&replica, 0, &pattern(1, 4096)).unwrap();
    write(&replica, MIB - 4096, &pattern(2, 8192)).unwrap();
    write(&replica, 63 * MIB, &pattern(3, 1 << 20)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    close(replica);

    let replica = fixture.open();
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(1, 4096));
    assert_eq!(read(&replica, MIB - 4096, 8192).unwrap(), pattern(2, 8192));
    assert_eq!(read(&replica, 63 * MIB, 1 << 20).unwrap(), pattern(3, 1 << 20));
    assert_eq!(read(&replica, 4096, 8192).unwrap(), vec![0; 8192], "never written");
    let logged: Vec<Region> = replica.start().log.into_iter().collect();
    assert_eq!(logged, [Region(0), Region(1), Region(63)], "a flush clears no log");
}

#[test]
fn requests_across_a_group_border_are_whole() {
    let fixture = Fixture::new(1025 * MIB);
    let replica = fixture.open();
    log(&replica, &[1023, 1024]);
    write(&replica, 1024 * MIB - 8192, &pattern(1, 16384)).unwrap();
    assert_eq!(read(&replica, 1024 * MIB - 12288, 24576).unwrap()[4096..20480], pattern(1, 16384));
    ask(|done| replica.zero(1024 * MIB - 4096, 8192, true, true, done)).unwrap();
    let mut expected = pattern(1, 16384);
    expected[4096..12288].fill(0);
    assert_eq!(read(&replica, 1024 * MIB - 8192, 16384).unwrap(), expected);
}

#[test]
fn data_in_unaligned_memory_is_taken_too() {
    let fixture = Fixture::new(MIB);
    let replica = fixture.open();
    log(&replica, &[0]);
    let shifted = Bytes::from(pattern(5, 8200)).slice(3..3 + 8192);
    ask(|done| replica.write(4096, shifted.clone(), true, done)).unwrap();
    assert_eq!(read(&replica, 4096, 8192).unwrap(), shifted);
}

#[test]
fn a_write_outside_the_intent_log_is_refused() {
    let fixture = Fixture::new(4 * MIB);
    let replica = fixture.open();
    log(&replica, &[0]);
    let refused = write(&replica, MIB - 4096, &pattern(1, 8192));
    assert_eq!(refused, Err(StoreError::NotLogged { replica: REPLICA, region: Region(1) }));
    assert_eq!(read(&replica, MIB - 4096, 8192).unwrap(), vec![0; 8192]);
    for (offset, len) in [(1, 4096), (0, 100), (4 * MIB, 4096), (u64::MAX - 4095, 4096)] {
        let refused = write(&replica, offset, &pattern(1, len));
        assert_eq!(refused, Err(StoreError::InvalidRange { replica: REPLICA, offset, len: len as u64 }));
    }
}

#[test]
fn zeroes_read_as_zeroes_and_a_trim_gives_space_back() {
    let fixture = Fixture::new(8 * MIB);
    let replica = fixture.open();
    log(&replica, &[0, 1, 2, 3]);
    write(&replica, 0, &pattern(1, 4 << 20)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    let full = fixture.pool.space().unwrap().used_bytes;
    ask(|done| replica.zero(0, MIB, true, true, done)).unwrap();
    ask(|done| replica.zero(MIB, MIB, false, true, done)).unwrap();
    let trimmed = fixture.pool.space().unwrap().used_bytes;
    assert!(full - trimmed >= MIB && full - trimmed < 2 * MIB, "{full} then {trimmed}");

    close(replica);
    let replica = fixture.open();
    assert_eq!(read(&replica, 0, 2 << 20).unwrap(), vec![0; 2 << 20]);
    let extents = ask(|done| replica.allocation(BlockRange::new(0, 2048), done)).unwrap();
    let extent = |start, count, state| Extent { range: BlockRange::new(start, count), state };
    assert_eq!(
        extents,
        [
            extent(0, 512, AllocState::Zero),
            extent(512, 512, AllocState::Data),
            extent(1024, 1024, AllocState::Absent)
        ]
    );
    assert_eq!(ask(|done| replica.allocated_blocks(done)), Ok(1024));
    write(&replica, 0, &pattern(9, 4096)).unwrap();
    assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(9, 4096), "a trimmed block takes data again");
}

#[test]
fn a_flipped_bit_in_data_is_an_error_and_never_data() {
    let fixture = Fixture::new(4 * MIB);
    let replica = fixture.open();
    log(&replica, &[0]);
    write(&replica, 0, &pattern(1, 16384)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    close(replica);
    flip(&fixture.file("layer-000000"), (2 << 20) + (2 << 20) + 8192 + 17);

    let replica = fixture.open();
    let bad = Err(StoreError::Checksum { replica: REPLICA, blocks: vec![Block(2)] });
    assert_eq!(read(&replica, 0, 16384), bad);
    assert_eq!(read(&replica, 0, 8192).unwrap(), pattern(1, 16384)[..8192]);
    let unchecked = ask(|done| replica.read_unchecked(0, 16384, done)).unwrap();
    assert_eq!(unchecked.bad_blocks, [Block(2)]);
    write(&replica, 8192, &pattern(2, 4096)).unwrap();
    assert_eq!(read(&replica, 8192, 4096).unwrap(), pattern(2, 4096), "a rewrite mends it");
}

#[test]
fn a_flipped_bit_in_the_tables_is_an_error_and_never_data() {
    let sums_of_block_1 = (2 << 20) + (1 << 20) + 4;
    let state_of_blocks_0_to_3 = 2 << 20;
    for byte in [sums_of_block_1, state_of_blocks_0_to_3] {
        let fixture = Fixture::new(4 * MIB);
        let replica = fixture.open();
        log(&replica, &[0]);
        write(&replica, 4096, &pattern(1, 4096)).unwrap();
        ask(|done| replica.flush(done)).unwrap();
        close(replica);
        flip(&fixture.file("layer-000000"), byte);
        let replica = fixture.open();
        assert!(matches!(read(&replica, 0, 16384), Err(StoreError::Checksum { .. })), "byte {byte}");
    }
}

#[test]
fn a_pool_is_opened_once_and_a_replica_too() {
    let fixture = Fixture::new(MIB);
    let second = Pool::open(fixture.dir.path(), options(1 << 30));
    let Err(error @ PoolError::Locked(_)) = second else { panic!("{second:?}") };
    assert!(error.to_string().contains("locked by another process"), "{error}");

    let replica = fixture.open();
    assert!(matches!(fixture.pool.open_replica(REPLICA), Err(PoolError::InUse(_))));
    assert!(matches!(fixture.pool.delete_replica(REPLICA), Err(PoolError::InUse(_))));
    close(replica);
    close(fixture.open());
}

#[test]
fn a_replica_whose_file_another_process_holds_is_locked() {
    let fixture = Fixture::new(MIB);
    let file = std::fs::File::open(fixture.file("layer-000000")).unwrap();
    holdfast_io::lock_exclusive(&file, Duration::ZERO).unwrap();
    assert!(matches!(fixture.pool.open_replica(REPLICA), Err(PoolError::Locked(_))));
    drop(file);
    close(fixture.open());
}

#[test]
fn a_full_pool_refuses_writes_and_replicas_and_breaks_nothing() {
    let fixture = Fixture::with_capacity(64 * MIB, 3 * MIB);
    let replica = fixture.open();
    log(&replica, &[0, 1, 2, 3, 4, 5]);
    let written: Vec<u64> =
        (0..6).filter(|n| write(&replica, n * MIB, &pattern(7, 1 << 20)).is_ok()).collect();
    assert!(!written.is_empty() && written.len() < 4, "{written:?}");
    let refused = write(&replica, 5 * MIB, &pattern(8, 1 << 20));
    assert_eq!(refused, Err(StoreError::NoSpace(REPLICA)));
    assert_eq!(refused.unwrap_err().errno(), nix::errno::Errno::ENOSPC as i32);
    assert_eq!(
        read(&replica, 5 * MIB, 1 << 20).unwrap(),
        vec![0; 1 << 20],
        "a refused write changed nothing"
    );
    assert!(!replica.is_poisoned());

    write(&replica, 0, &pattern(9, 1 << 20)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    for n in 2..12 {
        let _ = write(&replica, n * MIB / 2, &pattern(7, 4096));
    }
    let other = meta(ReplicaId(5), 64 * MIB);
    assert!(matches!(fixture.pool.create_replica(&other), Err(PoolError::NoSpace { .. })));
    assert_eq!(fixture.pool.list().unwrap(), [REPLICA]);

    ask(|done| replica.zero(0, MIB, true, true, done)).unwrap();
    write(&replica, 5 * MIB, &pattern(8, 1 << 20)).unwrap();
    assert_eq!(read(&replica, 5 * MIB, 1 << 20).unwrap(), pattern(8, 1 << 20), "trimmed space is used again");
}

#[test]
fn a_damaged_file_is_named_and_nothing_is_changed() {
    for (file, byte) in [("manifest", 30), ("manifest", 9), ("layer-000000", 100), ("log", 18)] {
        let fixture = Fixture::new(MIB);
        flip(&fixture.file(file), byte);
        let before = snapshot(&fixture.replica_dir());
        let opened = fixture.pool.open_replica(REPLICA);
        assert!(
            matches!(&opened, Err(PoolError::Corrupt { path, .. }) if path.ends_with(file)),
            "{opened:?}"
        );
        assert_eq!(snapshot(&fixture.replica_dir()), before, "{file}");
    }
    let fixture = Fixture::new(MIB);
    let dir = fixture.close_pool();
    flip(&dir.path().join("pool"), 20);
    assert!(matches!(Pool::open(dir.path(), options(1 << 30)), Err(PoolError::Corrupt { .. })));
}

#[test]
fn a_file_cut_short_is_named_and_nothing_is_changed() {
    for (file, len) in
        [("manifest", 100), ("layer-000000", (4 << 20) + 4096), ("log", 4096), ("meta", 8192), ("meta", 0)]
    {
        let fixture = Fixture::new(MIB);
        let path = fixture.file(file);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len).unwrap();
        let before = snapshot(&fixture.replica_dir());
        let opened = fixture.pool.open_replica(REPLICA);
        let Err(PoolError::Truncated { path, found_bytes, .. }) = &opened else {
            panic!("{file}: {opened:?}")
        };
        assert!(path.ends_with(file) && *found_bytes == len, "{opened:?}");
        assert_eq!(snapshot(&fixture.replica_dir()), before, "{file}");
    }
}

#[test]
fn a_later_format_version_is_refused() {
    for file in ["manifest", "layer-000000", "log", "meta", "../../pool"] {
        let fixture = Fixture::new(MIB);
        let (at, slot, known) = match file {
            "meta" => (8192, 8192, 1),
            "manifest" => (0, 16384, 2),
            _ => (0, 4096, 1),
        };
        make_version(&fixture.file(file), at, slot, known + 1);
        let dir = fixture.close_pool();
        let opened =
            Pool::open(dir.path(), options(1 << 30)).and_then(|pool| pool.open_replica(REPLICA).map(|_| ()));
        let Err(PoolError::FutureVersion { found, known: told, .. }) = &opened else {
            panic!("{file}: {opened:?}")
        };
        assert_eq!((*found, *told), (known + 1, known), "{file}");
    }
}

#[test]
fn a_damaged_log_counts_as_all_set_and_a_damaged_map_as_all_dirty() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    let absent = ReplicaId(9);
    let mut set = BlockSet::new();
    set.insert(BlockRange::new(300, 2));
    let map = DirtyMap { base: Epoch { number: 4, nonce: 5 }, dirty: Dirty::Blocks(set) };
    ask(|done| replica.put_map(absent, map.clone(), done)).unwrap();
    close(replica);
    flip(&fixture.file("log"), 4096 + 40);
    flip(&fixture.file(&format!("map-{absent}")), 4096 + 60);

    let start = fixture.open().start();
    assert_eq!(start.log.len(), 16);
    let Dirty::Blocks(found) = &start.maps[&absent].dirty else { panic!("{:?}", start.maps) };
    assert_eq!(found.count_blocks(), 15 * 256, "all regions of the damaged sector");
}

#[test]
fn meta_cookie_log_and_maps_survive_a_reopen() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    assert_eq!(replica.start().meta, meta(REPLICA, 16 * MIB));
    let (kept, dropped) = (ReplicaId(7), ReplicaId(8));
    let mut changed = meta(REPLICA, 16 * MIB);
    for generation in 1..=3 {
        changed.generation = Generation(generation);
        ask(|done| replica.persist_meta(&changed, done)).unwrap();
    }
    ask(|done| replica.set_boot_cookie(77, done)).unwrap();
    log(&replica, &[1, 2, 3]);
    ask(|done| replica.log_remove(&[Region(2)], done)).unwrap();
    let mut map = DirtyMap { base: Epoch { number: 4, nonce: 5 }, dirty: Dirty::Blocks(BlockSet::new()) };
    ask(|done| replica.put_map(kept, map.clone(), done)).unwrap();
    ask(|done| replica.put_map(dropped, map.clone(), done)).unwrap();
    let mut set = BlockSet::new();
    set.insert(BlockRange::new(300, 2));
    set.insert(BlockRange::new(16 * 256 - 1, 1));
    let bits = set.regions().map(|(region, bits)| (region, *bits)).collect();
    ask(|done| replica.update_map(kept, bits, done)).unwrap();
    ask(|done| replica.drop_map(dropped, done)).unwrap();
    let missing = ask(|done| replica.update_map(dropped, Vec::new(), done));
    assert_eq!(missing, Err(StoreError::NoMap { replica: REPLICA, absent: dropped }));
    close(replica);

    let start = fixture.open().start();
    map.dirty = Dirty::Blocks(set);
    assert_eq!(start.meta, changed);
    assert_eq!(start.boot_cookie, Some(77));
    assert_eq!(start.log.into_iter().collect::<Vec<_>>(), [Region(1), Region(3)]);
    assert_eq!(start.maps.into_iter().collect::<Vec<_>>(), [(kept, map)]);
}

#[test]
fn replicas_are_made_and_removed_idempotently() {
    let fixture = Fixture::new(MIB);
    fixture.pool.create_replica(&meta(REPLICA, MIB)).unwrap();
    let larger = fixture.pool.create_replica(&meta(REPLICA, 2 * MIB));
    assert!(matches!(larger, Err(PoolError::Conflict(REPLICA))), "{larger:?}");
    for size in [0, 4096, MIB + 1, u64::MAX] {
        let refused = fixture.pool.create_replica(&meta(ReplicaId(1), size));
        assert!(matches!(refused, Err(PoolError::InvalidSize(found)) if found == size), "{refused:?}");
    }
    fixture.pool.delete_replica(REPLICA).unwrap();
    fixture.pool.delete_replica(REPLICA).unwrap();
    assert_eq!(fixture.pool.list().unwrap(), []);
    assert!(matches!(fixture.pool.open_replica(REPLICA), Err(PoolError::NotFound(REPLICA))));
}

#[test]
fn what_an_interrupted_create_or_delete_left_is_removed() {
    let fixture = Fixture::new(MIB);
    let dir = fixture.close_pool();
    for leftover in [".new-0000", ".del-0000"] {
        std::fs::create_dir(dir.path().join("replicas").join(leftover)).unwrap();
    }
    let pool = Pool::open(dir.path(), options(1 << 30)).unwrap();
    assert_eq!(pool.list().unwrap(), [REPLICA]);
    assert_eq!(std::fs::read_dir(dir.path().join("replicas")).unwrap().count(), 1);
}

#[test]
fn a_cookie_folder_that_outlives_the_power_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let cookies = dir.path().join("cookies");
    if holdfast_io::is_tmpfs(dir.path()).unwrap() {
        eprintln!("SKIPPED: temporary files are on tmpfs here, no other file system to test with");
        return;
    }
    let opened = Pool::open(dir.path(), PoolOptions { cookie_dir: Some(cookies), ..options(1 << 30) });
    assert!(matches!(opened, Err(PoolError::NotTmpfs(_))), "{opened:?}");
}

#[test]
fn a_killed_process_loses_no_answered_write() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    log(&replica, &[0, 1]);
    ask(|done| replica.set_boot_cookie(3, done)).unwrap();
    write(&replica, 0, &pattern(1, 16384)).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    write(&replica, 4096, &pattern(2, 4096)).unwrap();
    write(&replica, MIB, &pattern(3, 4096)).unwrap();
    ask(|done| replica.zero(8192, 4096, false, false, done)).unwrap();
    ask(|done| replica.zero(12288, 4096, true, false, done)).unwrap();
    // Closing flushes nothing: the tables in memory are lost, as when the process is killed.
    close(replica);

    for life in 0..3 {
        let replica = fixture.open();
        assert_eq!(replica.start().boot_cookie, Some(3), "life {life}");
        assert_eq!(read(&replica, 0, 4096).unwrap(), pattern(1, 4096), "life {life}");
        assert_eq!(read(&replica, 4096, 4096).unwrap(), pattern(2, 4096), "life {life}");
        assert_eq!(read(&replica, 8192, 8192).unwrap(), vec![0; 8192], "life {life}");
        assert_eq!(read(&replica, MIB, 4096).unwrap(), pattern(3, 4096), "life {life}");
        close(replica);
    }
}

#[test]
fn concurrent_writers_keep_their_blocks_apart() {
    let fixture = Fixture::new(16 * MIB);
    let replica = fixture.open();
    log(&replica, &(0..16).collect::<Vec<u32>>());
    std::thread::scope(|scope| {
        for writer in 0..4_u8 {
            let replica = replica.clone();
            scope.spawn(move || {
                for n in 0..200_u64 {
                    let offset = (n * 37 % 1024 * 4 + u64::from(writer)) * BLOCK_BYTES;
                    write(&replica, offset, &pattern(writer, 4096)).unwrap();
                    if n % 50 == 0 {
                        ask(|done| replica.flush(done)).unwrap();
                    }
                    assert_eq!(read(&replica, offset, 4096).unwrap(), pattern(writer, 4096));
                }
            });
        }
    });
    close(replica);
}

fn make_version(path: &Path, at: u64, page_bytes: usize, version: u32) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut page = vec![0; page_bytes];
    file.read_exact_at(&mut page, at).unwrap();
    page[8..12].copy_from_slice(&version.to_le_bytes());
    page[12..16].fill(0);
    let crc = crc32c::crc32c(&page);
    page[12..16].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&page, at).unwrap();
    file.sync_all().unwrap();
}

fn snapshot(dir: &Path) -> Vec<(PathBuf, u64, u32)> {
    let mut files: Vec<(PathBuf, u64, u32)> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            (path, bytes.len() as u64, crc32c::crc32c(&bytes))
        })
        .collect();
    files.sort();
    files
}

#[test]
fn each_replica_keeps_a_copy_of_its_record_which_is_told_open_or_not_and_damaged_ones_alone_are_not() {
    let fixture = Fixture::new(MIB);
    let others = [ReplicaId(0xabd), ReplicaId(0xabe)];
    for other in others {
        fixture.pool.create_replica(&meta(other, MIB)).unwrap();
    }
    let copy = |version| RecordCopy {
        stamp: CopyStamp { lineage: Lineage(1), generation: Generation(1), version: RecordVersion(version) },
        json: pattern(7, 5_000).into(),
    };
    let replica = fixture.open();
    ask(|done| replica.keep_record(copy(3), done)).unwrap();
    let other = fixture.pool.open_replica(others[0]).unwrap();
    ask(|done| other.keep_record(copy(4), done)).unwrap();
    close(other);
    flip(&fixture.dir.path().join("replicas").join(others[0].to_string()).join("record"), 100);

    let (kept, more) = fixture.pool.records(None, 2).unwrap();
    assert!(more && kept.len() == 2);
    assert_eq!(kept[0].copy.as_ref().unwrap(), &Some(copy(3)), "of an open one");
    assert_eq!(kept[0].volume_id.as_ref().unwrap(), &replica.volume_id());
    assert!(matches!(kept[1].copy, Err(PoolError::Corrupt { .. })), "{:?}", kept[1].copy);
    assert!(kept[1].meta.is_ok(), "what else it knows is told");
    let (kept, more) = fixture.pool.records(Some(others[0]), 2).unwrap();
    assert!(!more && kept.len() == 1 && matches!(kept[0].copy, Ok(None)), "{kept:?}");

    // Nothing of a replica depends on its copy.
    let other = fixture.pool.open_replica(others[0]).unwrap();
    ask(|done| other.keep_record(copy(2), done)).unwrap();
    let (kept, _) = fixture.pool.records(Some(REPLICA), 1).unwrap();
    assert_eq!(kept[0].copy.as_ref().unwrap(), &Some(copy(2)));
}
