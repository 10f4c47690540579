//! The power goes at every single change of the disk; what is found afterwards must be what the format promises.
//!
//! A seeded workload runs on a simulated disk that fails from change `cut` on. Then either the power was lost: unsynced
//! sectors are kept or not at random, and tmpfs is empty; or the process was killed: disk and tmpfs are as they were.
//! The pool is opened again, and every block, the log, the meta and the maps are compared with a model that keeps, per
//! block, the values a crash may leave. A failure prints `seed`, `cut` and `loss`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use holdfast_io::AlignedBuf;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::{BlockSet, Dirty, DirtyMap};
use holdfast_storage_core::ids::{
    BLOCK_BYTES, Block, Epoch, Generation, Lineage, Region, ReplicaId, SnapshotId, VolumeId,
};
use holdfast_storage_core::replica::ReplicaMeta;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::disk::Disk;
use crate::disk::sim::SimDisk;
use crate::{Done, Pool, PoolError, PoolOptions, Replica, StoreError};

const REGIONS: u32 = 3;
const SIZE_BYTES: u64 = REGIONS as u64 * (1 << 20);
const BLOCKS: u64 = SIZE_BYTES / BLOCK_BYTES;
pub(crate) const REPLICA: ReplicaId = ReplicaId(0x77);
const ABSENT: ReplicaId = ReplicaId(0x88);
const STEPS: u32 = 50;
const SEEDS: u64 = 3;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crash {
    /// Unsynced changes and tmpfs are lost.
    PowerLoss,
    /// The process is gone, nothing else.
    Kill,
}

#[test]
fn after_a_cut_at_any_change_the_disk_holds_what_was_promised() {
    let mut checked = 0;
    for seed in 0..SEEDS {
        let whole = run(seed, None);
        assert!(whole.model.finished, "without a cut the workload ends");
        for cut in 0..whole.disk.changes() {
            let cut_short = run(seed, Some(cut));
            let killed = cut_short.disk.after_kill();
            check(
                &cut_short.model,
                &killed,
                cut_short.cookies_at_cut.path(),
                Crash::Kill,
                &format!("seed {seed} cut {cut} kill"),
            );
            for loss in 0..2 {
                let found = cut_short.disk.after_power_loss(loss * 1000 + cut);
                let empty = mk_cookies();
                let label = format!("seed {seed} cut {cut} loss {loss}");
                check(&cut_short.model, &found, empty.path(), Crash::PowerLoss, &label);
            }
            checked += 3;
        }
    }
    assert!(checked > 500, "{checked} crashes are too few to mean anything");
}

#[test]
fn a_failed_sync_poisons_the_handle_until_it_is_opened_again() {
    let disk = SimDisk::default();
    let cookies = mk_cookies();
    let (pool, replica) = mk_replica(&disk, cookies.path());
    ask(|done| replica.log_add(&[Region(0)], done)).unwrap();
    ask(|done| replica.set_boot_cookie(5, done)).unwrap();
    write(&replica, 3, 1).unwrap();
    disk.fail_syncs(true);
    let failed = ask(|done| replica.flush(done));
    assert!(matches!(failed, Err(StoreError::Io { .. })), "{failed:?}");
    assert_eq!(
        std::fs::read_dir(cookies.path()).unwrap().count(),
        0,
        "the cookie's copy and the shadow are gone"
    );
    disk.fail_syncs(false);
    let poisoned = Err(StoreError::Poisoned(REPLICA));
    assert_eq!(write(&replica, 3, 2), poisoned);
    assert_eq!(
        ask(|done| replica.flush(done)),
        poisoned,
        "a second flush does not hide the first one's failure"
    );
    assert_eq!(ask(|done| replica.log_add(&[Region(1)], done)), poisoned);
    ask(|done| replica.close(done)).unwrap();
    let replica = pool.open_replica(REPLICA).unwrap();
    assert_eq!(replica.start().boot_cookie, None);
    write(&replica, 3, 2).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    assert_eq!(read(&replica, 3), Ok(2));
}

#[test]
fn a_file_system_that_is_full_refuses_new_blocks_only() {
    let disk = SimDisk::default();
    let cookies = mk_cookies();
    let (pool, replica) = mk_replica(&disk, cookies.path());
    ask(|done| replica.log_add(&[Region(0), Region(1)], done)).unwrap();
    write(&replica, 3, 1).unwrap();
    disk.set_full(true);
    assert_eq!(write(&replica, 300, 1), Err(StoreError::NoSpace(REPLICA)));
    assert_eq!(read(&replica, 300), Ok(0));
    write(&replica, 3, 2).unwrap();
    ask(|done| replica.flush(done)).unwrap();
    assert_eq!(read(&replica, 3), Ok(2));
    let map = DirtyMap { base: Epoch { number: 1, nonce: 1 }, dirty: Dirty::Blocks(BlockSet::new()) };
    ask(|done| replica.put_map(ABSENT, map, done)).unwrap();
    ask(|done| replica.close(done)).unwrap();
    let start = pool.open_replica(REPLICA).unwrap().start();
    assert_eq!(start.maps[&ABSENT].dirty, Dirty::Void, "no room for the bits: everything is dirty");
}

#[test]
fn rot_in_any_sector_of_a_flushed_replica_is_noticed_or_harmless() {
    let disk = SimDisk::default();
    let cookies = mk_cookies();
    let (_, replica) = mk_replica(&disk, cookies.path());
    ask(|done| replica.log_add(&[Region(0)], done)).unwrap();
    for block in 0..8 {
        write(&replica, block, 100 + block).unwrap();
    }
    ask(|done| replica.flush(done)).unwrap();
    ask(|done| replica.close(done)).unwrap();
    let layer = Path::new("/pool/replicas").join(REPLICA.to_string()).join("layer-000000");
    // Bytes of the allocation map, the checksums and the data of these blocks.
    let places =
        (0..2).chain((1 << 20)..(1 << 20) + 32).chain((2 << 20)..(2 << 20) + 8 * BLOCK_BYTES).step_by(1);
    for place in places.filter(|place| *place < (1 << 20) + 32 || place % 211 == 0) {
        let rotten = disk.after_power_loss(0);
        rotten.flip_bit(&layer, (2 << 20) + place);
        let replica = mk_pool(&rotten, cookies.path()).unwrap().open_replica(REPLICA).unwrap();
        let wrong = (0..8).filter(|block| read(&replica, *block) != Ok(100 + block)).collect::<Vec<u64>>();
        assert_eq!(wrong.len(), 1, "byte {place}: exactly the damaged block");
        assert!(matches!(read(&replica, wrong[0]), Err(StoreError::Checksum { .. })), "byte {place}");
    }
}

/// A block's place in the file holds something else than the block reads as when it is written, and the power goes in the
/// middle of the flush: what is there must not come out, not even by the sector (P2).
#[test]
fn what_a_blocks_place_held_does_not_come_out_with_a_torn_write() {
    let zeroed = |replica: &Replica| {
        write(replica, 3, 1).unwrap();
        ask(|done| replica.flush(done)).unwrap();
        ask(|done| replica.zero(3 * BLOCK_BYTES, BLOCK_BYTES, false, false, done)).unwrap();
        ask(|done| replica.flush(done)).unwrap();
    };
    cut_in_the_flush_of_a_write(zeroed, false, &[0, 2]);
    cut_in_the_flush_of_a_write(zeroed, true, &[0, 2]);
    let in_a_snapshot = |replica: &Replica| {
        write(replica, 3, 1).unwrap();
        ask(|done| replica.freeze(SnapshotId(9), done)).unwrap();
    };
    cut_in_the_flush_of_a_write(in_a_snapshot, false, &[1, 2]);
    cut_in_the_flush_of_a_write(in_a_snapshot, true, &[1, 2]);
}

/// `killed`: the process dies between the write and the flush, which another one does.
fn cut_in_the_flush_of_a_write(prepare: impl Fn(&Replica), killed: bool, allowed: &[u64]) {
    let (mut in_doubt, mut flushed) = (0, false);
    for cut in 0.. {
        for seed in 0..60 {
            let disk = SimDisk::default();
            let (cookies, copy) = (mk_cookies(), mk_cookies());
            let (_, replica) = mk_replica(&disk, cookies.path());
            ask(|done| replica.log_add(&[Region(0)], done)).unwrap();
            prepare(&replica);
            write(&replica, 3, 2).unwrap();
            let (disk, replica) = if killed {
                let found = disk.after_kill();
                let pool = mk_pool(&found, cookies.path()).unwrap();
                (found, pool.open_replica(REPLICA).unwrap())
            } else {
                (disk, replica)
            };
            disk.cut_after(cut, cookies.path(), copy.path());
            flushed = ask(|done| replica.flush(done)).is_ok();
            let found = disk.after_power_loss(seed);
            let replica = mk_pool(&found, mk_cookies().path()).unwrap().open_replica(REPLICA).unwrap();
            let read = ask(|done| replica.read_unchecked(3 * BLOCK_BYTES, BLOCK_BYTES as u32, done)).unwrap();
            check_sectors(
                &read.data,
                if flushed { &[2] } else { allowed },
                &format!("cut {cut} seed {seed}"),
            );
            in_doubt += read.in_doubt.len();
        }
        if flushed {
            break;
        }
    }
    assert!(in_doubt > 10, "{in_doubt} blocks in doubt are too few to mean anything");
}

/// What the disk may hold.
#[derive(Default)]
struct Model {
    /// `create_replica` was begun, and answered.
    creating: bool,
    created: bool,
    /// Per block: the values that a crash may leave; the first one is flushed, further ones came after.
    blocks: BTreeMap<u64, Vec<u64>>,
    /// Regions whose addition was answered and whose removal was not asked for.
    logged: BTreeSet<Region>,
    /// Blocks of a request that was not answered.
    unanswered: Option<BlockRange>,
    generations: Vec<u64>,
    /// Blocks that the map must name; `None` before it was answered.
    map: Option<BlockSet>,
    finished: bool,
}

struct Outcome {
    disk: SimDisk,
    cookies_at_cut: tempfile::TempDir,
    model: Model,
}

fn run(seed: u64, cut: Option<u64>) -> Outcome {
    let disk = SimDisk::default();
    let (cookies, cookies_at_cut) = (mk_cookies(), mk_cookies());
    if let Some(cut) = cut {
        disk.cut_after(cut, cookies.path(), cookies_at_cut.path());
    }
    let mut model = Model::default();
    let finished = workload(&disk, cookies.path(), seed, &mut model).is_some();
    model.finished = finished;
    Outcome { disk, cookies_at_cut, model }
}

/// Ends early with `None` at the first failure: the power is off.
fn workload(disk: &SimDisk, cookies: &Path, seed: u64, model: &mut Model) -> Option<()> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let pool = mk_pool(disk, cookies).ok()?;
    model.creating = true;
    model.generations.push(0);
    pool.create_replica(&mk_meta(0)).ok()?;
    model.created = true;
    let mut replica = pool.open_replica(REPLICA).ok()?;
    for step in 1..=STEPS {
        match rng.random_range(0..100) {
            0..45 => step_write(&replica, &mut rng, step, model)?,
            45..55 => step_zero(&replica, &mut rng, model)?,
            55..75 => step_flush(&replica, model)?,
            75..83 => step_clear(&replica, &mut rng, model)?,
            83..90 => {
                let generation = model.generations[model.generations.len() - 1] + 1;
                model.generations.push(generation);
                ask(|done| replica.persist_meta(&mk_meta(generation), done)).ok()?;
                model.generations = vec![generation];
            }
            90..97 => step_map(&replica, &mut rng, model)?,
            _ => {
                ask(|done| replica.close(done)).ok()?;
                replica = pool.open_replica(REPLICA).ok()?;
                model.logged = replica.start().log;
            }
        }
    }
    Some(())
}

fn log_first(replica: &Replica, range: BlockRange, model: &mut Model) -> Option<()> {
    let new: Vec<Region> = range.regions().filter(|region| !model.logged.contains(region)).collect();
    if !new.is_empty() {
        ask(|done| replica.log_add(&new, done)).ok()?;
        model.logged.extend(new);
    }
    Some(())
}

/// Mostly among few blocks, so that what one step did another finds.
fn mk_place(rng: &mut SmallRng, count: u64) -> u64 {
    if rng.random_bool(0.3) {
        return rng.random_range(0..BLOCKS - count);
    }
    let region = rng.random_range(0..u64::from(REGIONS));
    (region * (BLOCKS / u64::from(REGIONS)) + rng.random_range(0..8)).min(BLOCKS - count)
}

fn step_write(replica: &Replica, rng: &mut SmallRng, step: u32, model: &mut Model) -> Option<()> {
    let count = rng.random_range(1..4);
    let range = BlockRange::new(mk_place(rng, count), count);
    log_first(replica, range, model)?;
    let value = u64::from(step);
    for block in range.start.0..range.end() {
        model.blocks.entry(block).or_insert_with(|| vec![0]).push(value);
    }
    let mut data = AlignedBuf::zeroed(usize::try_from(range.len_bytes()).unwrap());
    data.chunks_mut(BLOCK_BYTES as usize).for_each(|block| fill(block, value));
    model.unanswered = Some(range);
    ask(|done| replica.write(range.offset_bytes(), data.into_bytes(), false, done)).ok()?;
    model.unanswered = None;
    Some(())
}

fn step_zero(replica: &Replica, rng: &mut SmallRng, model: &mut Model) -> Option<()> {
    let count = rng.random_range(1..40);
    let range = BlockRange::new(mk_place(rng, count), count);
    log_first(replica, range, model)?;
    for block in range.start.0..range.end() {
        if let Some(values) = model.blocks.get_mut(&block) {
            values.push(0);
        }
    }
    let trim = rng.random();
    model.unanswered = Some(range);
    ask(|done| replica.zero(range.offset_bytes(), range.len_bytes(), trim, false, done)).ok()?;
    model.unanswered = None;
    Some(())
}

fn step_flush(replica: &Replica, model: &mut Model) -> Option<()> {
    ask(|done| replica.flush(done)).ok()?;
    for values in model.blocks.values_mut() {
        values.drain(..values.len() - 1);
    }
    Some(())
}

/// What the target does: a flush, then the removal of regions. Without the flush the store does it by itself.
fn step_clear(replica: &Replica, rng: &mut SmallRng, model: &mut Model) -> Option<()> {
    if rng.random() {
        step_flush(replica, model)?;
    }
    let gone: Vec<Region> = model.logged.iter().copied().filter(|_| rng.random_bool(0.6)).collect();
    for region in &gone {
        model.logged.remove(region);
    }
    ask(|done| replica.log_remove(&gone, done)).ok()?;
    for (block, values) in &mut model.blocks {
        if gone.contains(&Block(*block).region()) {
            values.drain(..values.len() - 1);
        }
    }
    Some(())
}

fn step_map(replica: &Replica, rng: &mut SmallRng, model: &mut Model) -> Option<()> {
    let Some(bits) = &mut model.map else {
        let map = DirtyMap { base: Epoch { number: 9, nonce: 9 }, dirty: Dirty::Blocks(BlockSet::new()) };
        ask(|done| replica.put_map(ABSENT, map, done)).ok()?;
        model.map = Some(BlockSet::new());
        return Some(());
    };
    let mut larger = bits.clone();
    larger.insert(BlockRange::new(rng.random_range(0..BLOCKS - 8), 8));
    let regions = larger.regions().map(|(region, bits)| (region, *bits)).collect();
    ask(|done| replica.update_map(ABSENT, regions, done)).ok()?;
    *bits = larger;
    Some(())
}

fn check(model: &Model, disk: &SimDisk, cookies: &Path, crash: Crash, label: &str) {
    let pool =
        mk_pool(disk, cookies).unwrap_or_else(|error| panic!("{label}: the pool does not open: {error}"));
    let listed = pool.list().unwrap();
    assert!(!model.created || listed == [REPLICA], "{label}: a created replica is gone");
    assert!(model.creating || listed.is_empty(), "{label}: {listed:?}");
    if listed.is_empty() {
        return;
    }
    let replica = pool.open_replica(REPLICA).unwrap_or_else(|error| panic!("{label}: {error}"));
    let start = replica.start();
    let generation = start.meta.generation.0;
    assert!(
        model.generations.contains(&generation),
        "{label}: generation {generation} of {:?}",
        model.generations
    );
    assert!(
        start.log.is_superset(&model.logged),
        "{label}: log {:?} lacks some of {:?}",
        start.log,
        model.logged
    );
    if let Some(bits) = &model.map {
        let Dirty::Blocks(found) = &start.maps[&ABSENT].dirty else { panic!("{label}: the map is void") };
        let mut union = found.clone();
        union.merge(bits);
        assert_eq!(&union, found, "{label}: the map lacks bits");
    }
    check_blocks(model, &replica, &start.log, crash, label);
}

fn check_blocks(model: &Model, replica: &Replica, log: &BTreeSet<Region>, crash: Crash, label: &str) {
    let len = u32::try_from(SIZE_BYTES).unwrap();
    let found = ask(|done| replica.read_unchecked(0, len, done)).unwrap();
    let bad: BTreeSet<u64> = found.bad_blocks.iter().map(|block| block.0).collect();
    for (block, data) in (0..BLOCKS).zip(found.data.chunks(BLOCK_BYTES as usize)) {
        let answered = model.unanswered.is_none_or(|range| block < range.start.0 || block >= range.end());
        let all = model.blocks.get(&block).map_or(&[0][..], |values| &values[..]);
        let allowed = match crash {
            Crash::PowerLoss => all,
            // Everything that was answered is there; the last request may be there or not.
            Crash::Kill if answered => &all[all.len() - 1..],
            Crash::Kill => &all[all.len().saturating_sub(2)..],
        };
        if bad.contains(&block) {
            assert!(
                allowed.len() > 1,
                "{label}: block {block} must be one of {allowed:?} and does not verify"
            );
            assert!(log.contains(&Block(block).region()), "{label}: block {block} is bad and not in the log");
            check_sectors(data, allowed, &format!("{label}: block {block}"));
        } else {
            let value =
                value_of(data).unwrap_or_else(|| panic!("{label}: block {block} is torn and verifies"));
            assert!(allowed.contains(&value), "{label}: block {block} is {value}, not of {allowed:?}");
        }
    }
}

/// What is adopted where no copy verifies (R32): nothing older than the last flush may be in it.
pub(crate) fn check_sectors(data: &[u8], allowed: &[u64], label: &str) {
    for sector in data.chunks(512) {
        let value = value_of(sector).unwrap_or_else(|| panic!("{label}: a sector is torn inside"));
        assert!(
            allowed.contains(&value),
            "{label} would be adopted with a sector of {value}, not of {allowed:?}"
        );
    }
}

pub(crate) fn mk_pool(disk: &SimDisk, cookies: &Path) -> Result<Pool, PoolError> {
    let options = PoolOptions {
        capacity_bytes: 1 << 30,
        reserve_bytes: 0,
        cookie_dir: Some(cookies.to_owned()),
        lock_wait: Duration::ZERO,
    };
    Pool::open_on(Disk::Sim(disk.clone()), Path::new("/pool"), options)
}

pub(crate) fn mk_cookies() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn mk_replica(disk: &SimDisk, cookies: &Path) -> (Pool, Replica) {
    let pool = mk_pool(disk, cookies).unwrap();
    pool.create_replica(&mk_meta(0)).unwrap();
    let replica = pool.open_replica(REPLICA).unwrap();
    (pool, replica)
}

fn mk_meta(generation: u64) -> ReplicaMeta {
    let mut meta = mk_meta_of(SIZE_BYTES);
    meta.generation = Generation(generation);
    meta
}

pub(crate) fn mk_meta_of(size_bytes: u64) -> ReplicaMeta {
    ReplicaMeta::new(VolumeId(1), REPLICA, Lineage(2), size_bytes, Epoch::default())
}

pub(crate) fn ask<T: Send + 'static>(call: impl FnOnce(Done<T>)) -> Result<T, StoreError> {
    let (sender, receiver) = std::sync::mpsc::channel();
    call(Box::new(move |result| sender.send(result).unwrap()));
    receiver.recv_timeout(Duration::from_secs(30)).expect("an answer within 30 s")
}

pub(crate) fn write(replica: &Replica, block: u64, value: u64) -> Result<(), StoreError> {
    let mut data = AlignedBuf::zeroed(BLOCK_BYTES as usize);
    fill(&mut data, value);
    ask(|done| replica.write(block * BLOCK_BYTES, data.into_bytes(), false, done))
}

/// The value a block was filled with; 0 if it is zero.
pub(crate) fn read(replica: &Replica, block: u64) -> Result<u64, StoreError> {
    let data = ask(|done| replica.read(block * BLOCK_BYTES, BLOCK_BYTES as u32, done))?;
    Ok(value_of(&data).expect("a block that verifies is whole"))
}

/// What a block was filled with, unless it is torn.
pub(crate) fn value_of(data: &[u8]) -> Option<u64> {
    let value = u64::from_le_bytes(data[..8].try_into().unwrap());
    (data == value.to_le_bytes().repeat(data.len() / 8)).then_some(value)
}

pub(crate) fn fill(block: &mut [u8], value: u64) {
    block.chunks_mut(8).for_each(|word| word.copy_from_slice(&value.to_le_bytes()));
}
