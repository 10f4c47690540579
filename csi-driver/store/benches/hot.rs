//! The pure parts of the store that run for every block: checksums, allocation and checksum tables, dirty maps.
//!
//! `cargo bench -p holdfast-store`

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use holdfast_io::AlignedBuf;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::BlockSet;
use holdfast_storage_core::ids::{Block, VolumeId};
use holdfast_store::hot;

fn checksums(c: &mut Criterion) {
    let mut group = c.benchmark_group("checksum");
    for blocks in [1_usize, 16, 256] {
        let data = vec![0xa5; blocks * 4096];
        group.throughput(Throughput::Bytes(data.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(format!("{blocks} blocks")), |b| {
            b.iter(|| hot::sums(VolumeId(7), 1000, black_box(&data)));
        });
    }
    group.finish();
}

fn tables(c: &mut Criterion) {
    let mut group = c.benchmark_group("tables");
    let mut tables = hot::Tables::of_blocks(64 << 10);
    let mut at = 0;
    group.bench_function("set 1 entry", |b| {
        b.iter(|| {
            at = (at * 5 + 7) % (64 << 10);
            tables.set_data(black_box(at), 0x1234_5678 ^ u32::try_from(at).unwrap_or_default());
        });
    });
    group.bench_function("get 1 entry", |b| {
        b.iter(|| {
            at = (at * 5 + 7) % (64 << 10);
            tables.sum_of(black_box(at))
        });
    });
    let page = AlignedBuf::copy_of(&[0b1001_0010; 4096]);
    group.bench_function("count 16384 blocks", |b| b.iter(|| hot::count_allocated(black_box(&page))));
    group.finish();
}

fn dirty_maps(c: &mut Criterion) {
    let mut group = c.benchmark_group("dirty map");
    let mut set = BlockSet::new();
    let mut at = 0_u64;
    group.bench_function("insert 1 block", |b| {
        b.iter(|| {
            at = (at * 5 + 7) % (1 << 20);
            set.insert(black_box(BlockRange::new(at, 1)))
        });
    });
    let mut full = BlockSet::new();
    full.insert(BlockRange::new(0, 1 << 18));
    group.bench_function("contains", |b| b.iter(|| full.contains(black_box(Block(12_345)))));
    group.bench_function("merge 1 GiB", |b| {
        b.iter(|| {
            let mut union = BlockSet::new();
            union.merge(black_box(&full));
            union
        });
    });
    group.bench_function("to bytes 1 GiB", |b| b.iter(|| black_box(&full).to_bytes()));
    group.finish();
}

criterion_group!(hot_parts, checksums, tables, dirty_maps);
criterion_main!(hot_parts);
