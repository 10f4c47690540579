//! The core's share of every I/O: `cargo bench -p holdfast-storage-core`.

use std::collections::{BTreeMap, BTreeSet};
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::BlockSet;
use holdfast_storage_core::encryption::VolumeKey;
use holdfast_storage_core::ids::{
    BLOCKS_PER_REGION, Block, Epoch, Generation, Lineage, ReplicaId, Salt, SessionToken, TargetId, VolumeId,
};
use holdfast_storage_core::replica::{
    DataOp, OpenRequest, Replica, ReplicaAction, ReplicaCall, ReplicaEvent, ReplicaMeta, ReplicaStart,
};
use holdfast_storage_core::target::RangeLock;

/// What a busy volume has in flight.
const IN_FLIGHT: u64 = 32;
/// Blocks of the volume.
const BLOCKS: u64 = 1 << 18;
const EPOCH: Epoch = Epoch { number: 1, nonce: 1 };

/// A lock taken and released while others are held: spread over the volume, and crowded into one region.
fn range_lock(criterion: &mut Criterion) {
    for (name, stride) in [("spread", BLOCKS / IN_FLIGHT), ("one_region", BLOCKS_PER_REGION / IN_FLIGHT)] {
        let mut locks = RangeLock::default();
        for n in 0..IN_FLIGHT {
            assert!(locks.acquire(n, BlockRange::new(n * stride, 1), true));
        }
        let mut id = IN_FLIGHT;
        criterion.bench_function(&format!("range_lock_{name}"), |bencher| {
            bencher.iter(|| {
                id += 1;
                let range = BlockRange::new(id % IN_FLIGHT * stride + 1, 1);
                assert!(locks.acquire(black_box(id), range, true));
                black_box(locks.release(id))
            });
        });
    }
}

/// One more dirty block, and all of a map by region.
fn dirty_map(criterion: &mut Criterion) {
    let mut blocks = BlockSet::new();
    let mut at = 0;
    criterion.bench_function("dirty_map_insert", |bencher| {
        bencher.iter(|| {
            at = (at + 12_347) % BLOCKS;
            black_box(blocks.insert(BlockRange::new(at, 1)))
        });
    });
    criterion
        .bench_function("dirty_map_to_bytes_1_gib", |bencher| bencher.iter(|| black_box(blocks.to_bytes())));
}

/// A 4 KiB write through the replica's state machine: in, to the disk, from the disk, answered.
fn replica_write(criterion: &mut Criterion) {
    let (mut replica, token) = mk_open_replica();
    let mut call = 0;
    criterion.bench_function("replica_write_logged", |bencher| {
        bencher.iter(|| {
            call += 1;
            let op = DataOp::Write { range: BlockRange::new(call % BLOCKS_PER_REGION, 1), fua: false };
            replica.handle_event(1, ReplicaEvent::Data { call: ReplicaCall(call), token, op });
            drive(&mut replica)
        });
    });
}

fn mk_open_replica() -> (Replica, SessionToken) {
    let size_bytes = BLOCKS * 4096;
    let meta = ReplicaMeta::new(VolumeId(1), ReplicaId(1), Lineage(1), size_bytes, EPOCH);
    let start = ReplicaStart {
        meta,
        log: BTreeSet::new(),
        maps: BTreeMap::new(),
        boot_cookie: Some(0),
        snapshots: Vec::new(),
    };
    let mut replica = Replica::new(0, start);
    let request = OpenRequest {
        volume_id: VolumeId(1),
        replica_id: ReplicaId(1),
        generation: Generation(1),
        target_id: TargetId(1),
        lineage: Lineage(1),
        promoted_from: None,
        epoch: EPOCH,
        in_sync: BTreeSet::from([ReplicaId(1)]),
        size_bytes,
        snapshots: BTreeSet::new(),
        sequence: 1,
        copy: None,
    };
    let token = SessionToken(1);
    replica.handle_event(0, ReplicaEvent::Open { call: ReplicaCall(1 << 40), request, token });
    drive(&mut replica);
    assert!(replica.accepts(token), "the session is open");
    (replica, token)
}

/// What encryption costs a request, and a stage.
fn encryption(criterion: &mut Criterion) {
    let key = VolumeKey::from_bytes(&[7; 64]).expect("a key has 64 bytes");
    let cipher = key.cipher();
    for (name, blocks) in [("4k", 1), ("1m", 256)] {
        let mut buffer = vec![5_u8; blocks * 4096];
        criterion.bench_function(&format!("encrypt_{name}"), |bencher| {
            bencher.iter(|| cipher.encrypt(Block(9), black_box(&mut buffer)).is_ok());
        });
        criterion.bench_function(&format!("decrypt_{name}"), |bencher| {
            bencher.iter(|| cipher.decrypt(Block(9), black_box(&mut buffer)));
        });
    }
    criterion.bench_function("derive_key", |bencher| {
        bencher.iter(|| VolumeKey::derive(black_box(b"a passphrase"), Salt(1)).is_ok());
    });
}

/// Lets every disk operation succeed; counts the answers.
fn drive(replica: &mut Replica) -> u32 {
    let mut answers = 0;
    while let Some(action) = replica.poll_action() {
        match action {
            ReplicaAction::Disk { id, .. } => {
                replica.handle_event(1, ReplicaEvent::DiskDone { id, result: Ok(()) });
            }
            ReplicaAction::Reply { .. } => answers += 1,
            ReplicaAction::CloseConnections { .. } | ReplicaAction::Failed => {}
        }
    }
    answers
}

criterion_group!(hot_parts, range_lock, dirty_map, replica_write, encryption);
criterion_main!(hot_parts);
