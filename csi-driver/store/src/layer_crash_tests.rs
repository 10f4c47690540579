//! The power goes at every single change of the disk while snapshots are frozen, dropped, merged and cloned and the volume
//! grows. What is found afterwards must be what the format promises: every snapshot that was answered is there with
//! exactly its blocks, the volume reads as any disk may after a crash, and what was interrupted can be done again.
//!
//! Like [`crate::crash_tests`]: a seeded workload on a simulated disk, cut at each change, and a model that keeps, per block,
//! the values a crash may leave. A failure prints `seed`, `cut` and `loss`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use holdfast_io::AlignedBuf;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, BLOCKS_PER_REGION, Block, Epoch, Lineage, Region, ReplicaId};
use holdfast_storage_core::ids::{SnapshotId, VolumeId};
use holdfast_storage_core::replica::ReplicaMeta;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use crate::crash_tests::{
    Crash, REPLICA, ask, check_sectors, fill, mk_cookies, mk_meta_of, mk_pool, value_of,
};
use crate::disk::sim::SimDisk;
use crate::{Pool, Replica};

const CLONE: ReplicaId = ReplicaId(0x99);
/// Three windows of a merge, the last one not whole.
const SIZE_BYTES: u64 = 9 << 20;
const GROWN_BYTES: u64 = 10 << 20;
const STEPS: u32 = 45;
const SEEDS: u64 = 4;
/// Where regions, windows of a merge, and the volume begin and end.
const PLACES: [u64; 7] = [0, 252, 600, 1020, 2044, 2296, 2304];

/// What each block holds.
type Content = BTreeMap<u64, u64>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Asked {
    /// It may be there or not.
    Maybe,
    /// It was answered.
    Sure,
}

/// What the disk may hold.
#[derive(Default, Clone)]
struct Model {
    created: bool,
    /// Per block: the values that a crash may leave; the first one is flushed, further ones came after.
    live: BTreeMap<u64, Vec<u64>>,
    logged: BTreeSet<Region>,
    unanswered: Option<BlockRange>,
    snapshots: BTreeMap<SnapshotId, (Asked, Content)>,
    /// Oldest first, with the blocks that changed since the one before.
    order: Vec<(SnapshotId, BTreeSet<u64>)>,
    changed: BTreeSet<u64>,
    clone: Option<(Asked, Content)>,
    sizes: Vec<u64>,
    finished: bool,
}

impl Model {
    /// What a read gives now.
    fn seen(&self) -> Content {
        self.live.iter().map(|(block, values)| (*block, values[values.len() - 1])).collect()
    }

    fn flushed(&mut self) {
        for values in self.live.values_mut() {
            values.drain(..values.len() - 1);
        }
    }

    fn size_bytes(&self) -> u64 {
        self.sizes[self.sizes.len() - 1]
    }
}

#[test]
fn after_a_cut_at_any_change_every_snapshot_holds_its_instant() {
    let mut checked = 0;
    let mut merged = 0;
    for seed in 0..SEEDS {
        let whole = run(seed, None);
        assert!(whole.model.finished, "without a cut the workload ends");
        merged += whole.merges;
        check(&whole.model, &whole.disk.after_kill(), whole.cookies.path(), Crash::Kill, "no cut");
        for cut in 0..whole.disk.changes() {
            let cut_short = run(seed, Some(cut));
            let label = format!("seed {seed} cut {cut} kill");
            let found = cut_short.disk.after_kill();
            check(&cut_short.model, &found, cut_short.cookies_at_cut.path(), Crash::Kill, &label);
            let found = cut_short.disk.after_power_loss(cut);
            let label = format!("seed {seed} cut {cut} loss");
            check(&cut_short.model, &found, mk_cookies().path(), Crash::PowerLoss, &label);
            checked += 2;
        }
    }
    assert!(checked > 1000 && merged > 3, "{checked} crashes, {merged} merges are too few to mean anything");
}

struct Outcome {
    disk: SimDisk,
    cookies: tempfile::TempDir,
    cookies_at_cut: tempfile::TempDir,
    model: Model,
    merges: u32,
}

fn run(seed: u64, cut: Option<u64>) -> Outcome {
    let disk = SimDisk::default();
    let (cookies, cookies_at_cut) = (mk_cookies(), mk_cookies());
    if let Some(cut) = cut {
        disk.cut_after(cut, cookies.path(), cookies_at_cut.path());
    }
    let mut model = Model { sizes: vec![SIZE_BYTES], ..Model::default() };
    let mut merges = 0;
    model.finished = workload(&disk, cookies.path(), seed, &mut model, &mut merges).is_some();
    Outcome { disk, cookies, cookies_at_cut, model, merges }
}

/// Ends early with `None` at the first failure: the power is off.
fn workload(disk: &SimDisk, cookies: &Path, seed: u64, model: &mut Model, merges: &mut u32) -> Option<()> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let pool = mk_pool(disk, cookies).ok()?;
    pool.create_replica(&mk_meta_of(SIZE_BYTES)).ok()?;
    model.created = true;
    let mut replica = pool.open_replica(REPLICA).ok()?;
    for step in 1..=STEPS {
        match rng.random_range(0..100) {
            0..40 => step_write(&replica, &mut rng, step, model)?,
            40..50 => step_zero(&replica, &mut rng, model)?,
            50..57 => {
                ask(|done| replica.flush(done)).ok()?;
                model.flushed();
            }
            57..72 => step_freeze(&replica, step, model)?,
            72..80 => step_drop(&replica, &mut rng, model)?,
            80..88 => {
                ask(|done| replica.merge_now(done)).ok()?;
                *merges += 1;
            }
            88..91 => step_grow(&replica, model)?,
            91..94 => step_clone(&pool, &mut rng, model)?,
            94..97 => step_clear(&replica, model)?,
            _ => {
                ask(|done| replica.close(done)).ok()?;
                replica = pool.open_replica(REPLICA).ok()?;
            }
        }
    }
    ask(|done| replica.close(done)).ok()?;
    Some(())
}

fn any_range(rng: &mut SmallRng, model: &Model, count_max: u64) -> BlockRange {
    let blocks = model.size_bytes() / BLOCK_BYTES;
    let places: Vec<u64> = PLACES.iter().copied().filter(|place| *place < blocks).collect();
    let start = (places.choose(rng).unwrap() + rng.random_range(0..6)).min(blocks - 1);
    BlockRange::new(start, rng.random_range(1..=count_max).min(blocks - start))
}

fn log_first(replica: &Replica, range: BlockRange, model: &mut Model) -> Option<()> {
    let new: Vec<Region> = range.regions().filter(|region| !model.logged.contains(region)).collect();
    if !new.is_empty() {
        ask(|done| replica.log_add(&new, done)).ok()?;
        model.logged.extend(new);
    }
    Some(())
}

fn step_write(replica: &Replica, rng: &mut SmallRng, step: u32, model: &mut Model) -> Option<()> {
    let range = any_range(rng, model, 3);
    log_first(replica, range, model)?;
    for block in range.start.0..range.end() {
        model.live.entry(block).or_insert_with(|| vec![0]).push(u64::from(step));
        model.changed.insert(block);
    }
    let mut data = AlignedBuf::zeroed(usize::try_from(range.len_bytes()).unwrap());
    data.chunks_mut(BLOCK_BYTES as usize).for_each(|block| fill(block, u64::from(step)));
    model.unanswered = Some(range);
    ask(|done| replica.write(range.offset_bytes(), data.into_bytes(), false, done)).ok()?;
    model.unanswered = None;
    Some(())
}

/// A zero changes a block that has data somewhere below; one that reads as zeroes stays as it is.
fn step_zero(replica: &Replica, rng: &mut SmallRng, model: &mut Model) -> Option<()> {
    let range = any_range(rng, model, 40);
    log_first(replica, range, model)?;
    for block in range.start.0..range.end() {
        if let Some(values) = model.live.get_mut(&block) {
            if values[values.len() - 1] != 0 {
                model.changed.insert(block);
            }
            values.push(0);
        }
    }
    let trim = rng.random();
    model.unanswered = Some(range);
    ask(|done| replica.zero(range.offset_bytes(), range.len_bytes(), trim, false, done)).ok()?;
    model.unanswered = None;
    Some(())
}

fn step_freeze(replica: &Replica, step: u32, model: &mut Model) -> Option<()> {
    let snapshot = SnapshotId(u128::from(step));
    let changed = std::mem::take(&mut model.changed);
    model.order.push((snapshot, changed));
    model.snapshots.insert(snapshot, (Asked::Maybe, model.seen()));
    ask(|done| replica.freeze(snapshot, done)).ok()?;
    model.flushed();
    model.snapshots.get_mut(&snapshot).unwrap().0 = Asked::Sure;
    Some(())
}

fn step_drop(replica: &Replica, rng: &mut SmallRng, model: &mut Model) -> Option<()> {
    let all: Vec<SnapshotId> = model.snapshots.keys().copied().collect();
    let Some(snapshot) = all.choose(rng).copied() else { return Some(()) };
    model.snapshots.get_mut(&snapshot).unwrap().0 = Asked::Maybe;
    ask(|done| replica.drop_snapshot(snapshot, done)).ok()?;
    model.snapshots.remove(&snapshot);
    let index = model.order.iter().position(|(other, _)| *other == snapshot).unwrap();
    let (_, changed) = model.order.remove(index);
    match model.order.get_mut(index) {
        Some((_, later)) => later.extend(changed),
        None => model.changed.extend(changed),
    }
    Some(())
}

fn step_grow(replica: &Replica, model: &mut Model) -> Option<()> {
    model.sizes.push(GROWN_BYTES);
    ask(|done| replica.grow(GROWN_BYTES, done)).ok()?;
    model.sizes = vec![GROWN_BYTES];
    Some(())
}

fn step_clone(pool: &Pool, rng: &mut SmallRng, model: &mut Model) -> Option<()> {
    let all: Vec<SnapshotId> = model.snapshots.keys().copied().collect();
    let Some(snapshot) = all.choose(rng) else { return Some(()) };
    if model.clone.is_some() {
        model.clone.as_mut().unwrap().0 = Asked::Maybe;
        pool.delete_replica(CLONE).ok()?;
        model.clone = None;
        return Some(());
    }
    model.clone = Some((Asked::Maybe, model.snapshots[snapshot].1.clone()));
    pool.create_clone(&mk_clone_meta(), REPLICA, *snapshot).ok()?;
    model.clone.as_mut().unwrap().0 = Asked::Sure;
    Some(())
}

fn step_clear(replica: &Replica, model: &mut Model) -> Option<()> {
    let gone: Vec<Region> = std::mem::take(&mut model.logged).into_iter().collect();
    ask(|done| replica.log_remove(&gone, done)).ok()?;
    model.flushed();
    Some(())
}

fn check(model: &Model, disk: &SimDisk, cookies: &Path, crash: Crash, label: &str) {
    let pool = mk_pool(disk, cookies).unwrap_or_else(|error| panic!("{label}: no pool: {error}"));
    if !pool.list().unwrap().contains(&REPLICA) {
        assert!(!model.created, "{label}: the replica is gone");
        return;
    }
    let replica = pool.open_replica(REPLICA).unwrap_or_else(|error| panic!("{label}: {error}"));
    check_all(model, &replica, crash, label);
    check_clone(model, &pool, label);
    // What was interrupted goes on, and nothing is different afterwards.
    ask(|done| replica.merge_now(done)).unwrap_or_else(|error| panic!("{label}: merging: {error}"));
    let label = format!("{label}, merged");
    check_all(model, &replica, crash, &label);
    check_clone(model, &pool, &label);
    if !pool.list().unwrap().contains(&CLONE) {
        let layers = disk.list(&Path::new("/pool/replicas").join(REPLICA.to_string())).unwrap();
        let layers = layers.iter().filter(|name| name.starts_with("layer-")).count();
        assert_eq!(layers, replica.snapshots().len() + 1, "{label}: layers stay");
    }
    ask(|done| replica.log_add(&[Region(0)], done)).unwrap();
    crate::crash_tests::write(&replica, 3, 4711).unwrap();
    assert_eq!(crate::crash_tests::read(&replica, 3), Ok(4711), "{label}: it takes writes");
}

fn check_all(model: &Model, replica: &Replica, crash: Crash, label: &str) {
    assert!(model.sizes.contains(&replica.size_bytes()), "{label}: {} bytes", replica.size_bytes());
    let found = replica.snapshots();
    for (snapshot, (asked, content)) in &model.snapshots {
        if found.contains(snapshot) {
            check_snapshot(replica, *snapshot, content, label);
        } else {
            assert_eq!(*asked, Asked::Maybe, "{label}: {snapshot:?} is gone");
        }
    }
    assert!(found.iter().all(|snapshot| model.snapshots.contains_key(snapshot)), "{label}: {found:?}");
    check_changed(model, replica, &found, label);
    check_live(model, replica, crash, label);
}

fn check_snapshot(replica: &Replica, snapshot: SnapshotId, content: &Content, label: &str) {
    let size_bytes = replica.snapshot_size_bytes(snapshot).unwrap();
    for (block, value) in content {
        let offset = block * BLOCK_BYTES;
        assert!(offset < size_bytes, "{label}: {snapshot:?} has {size_bytes} bytes");
        let read = ask(|done| replica.read_snapshot(snapshot, offset, BLOCK_BYTES as u32, done));
        let read = read.unwrap_or_else(|error| panic!("{label}: {snapshot:?}: {error}"));
        assert_eq!(value_of(&read), Some(*value), "{label}: {snapshot:?} block {block}");
    }
}

/// Exact between snapshots that are there; what the interrupted request did may be missing or there.
fn check_changed(model: &Model, replica: &Replica, found: &[SnapshotId], label: &str) {
    let mut from = None;
    let mut expected = BTreeSet::new();
    for (snapshot, changed) in &model.order {
        expected.extend(changed.iter().copied());
        if !found.contains(snapshot) {
            continue;
        }
        let blocks = replica.snapshot_size_bytes(*snapshot).unwrap() / BLOCK_BYTES;
        let whole = BlockRange::new(0, blocks);
        let runs = ask(|done| replica.changed_blocks(from, Some(*snapshot), whole, done)).unwrap();
        let listed: Vec<u64> = runs.iter().flat_map(|run| run.start.0..run.end()).collect();
        assert_eq!(
            listed,
            expected.iter().copied().collect::<Vec<u64>>(),
            "{label}: {from:?} to {snapshot:?}"
        );
        from = Some(*snapshot);
        expected.clear();
    }
}

fn check_live(model: &Model, replica: &Replica, crash: Crash, label: &str) {
    let log = &replica.start().log;
    for (block, all) in &model.live {
        let len = u32::try_from(BLOCK_BYTES).unwrap();
        let found = ask(|done| replica.read_unchecked(block * BLOCK_BYTES, len, done)).unwrap();
        let answered = model.unanswered.is_none_or(|range| *block < range.start.0 || *block >= range.end());
        let allowed = match crash {
            Crash::PowerLoss => &all[..],
            Crash::Kill if answered => &all[all.len() - 1..],
            Crash::Kill => &all[all.len().saturating_sub(2)..],
        };
        if found.bad_blocks.is_empty() {
            let value = value_of(&found.data).unwrap_or_else(|| panic!("{label}: block {block} is torn"));
            assert!(allowed.contains(&value), "{label}: block {block} is {value}, not of {allowed:?}");
        } else {
            assert!(allowed.len() > 1, "{label}: block {block} must be one of {allowed:?}");
            assert_eq!(found.in_doubt, [Block(*block)], "{label}: a frozen block is bad");
            check_sectors(&found.data, allowed, &format!("{label}: block {block}"));
            assert!(log.contains(&Block(*block).region()), "{label}: block {block} is not in the log");
        }
    }
}

fn check_clone(model: &Model, pool: &Pool, label: &str) {
    let there = pool.list().unwrap().contains(&CLONE);
    let Some((asked, content)) = &model.clone else {
        assert!(!there, "{label}: a clone is back");
        return;
    };
    assert!(there || *asked == Asked::Maybe, "{label}: the clone is gone");
    if there {
        let clone = pool.open_replica(CLONE).unwrap_or_else(|error| panic!("{label}: {error}"));
        for (block, value) in content {
            let read = crate::crash_tests::read(&clone, *block);
            assert_eq!(read.as_ref(), Ok(value), "{label}: the clone's block {block}");
        }
        let allocated = ask(|done| clone.allocated_blocks(done)).unwrap();
        let data = content.values().filter(|value| **value != 0).count() as u64;
        assert!(allocated >= data, "{label}: {allocated} of {data} blocks");
        ask(|done| clone.close(done)).unwrap();
    }
}

fn mk_clone_meta() -> ReplicaMeta {
    ReplicaMeta::new(VolumeId(8), CLONE, Lineage(3), GROWN_BYTES, Epoch::default())
}

const _: () = assert!((SIZE_BYTES / BLOCK_BYTES).is_multiple_of(BLOCKS_PER_REGION));
