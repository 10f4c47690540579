//! Blocks that do not verify, as bits in their content: what a damaged block holds shows to nobody but a last resort.
//!
//! Checksums are seeded by address, so a block that holds another's data does not verify either.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage_core::replica::DiskError;
use rand::Rng;
use rand::rngs::StdRng;

use crate::disk::{BlockData, Blocks, CachedWrite};

/// The block does not verify; the other bits are what the disk holds.
const BAD: u64 = 1 << 63;
/// Marked bad by the protocol: never to be taken for data (R25).
const MARKED: u64 = 1 << 62;
/// The device cannot read it.
const UNREADABLE: u64 = 1 << 61;
/// What it holds was never its data, or is not any more.
const FOREIGN: u64 = 1 << 60;
const FLAGS: u64 = BAD | MARKED | UNREADABLE | FOREIGN;
/// A value that no client ever writes.
const GARBAGE: u64 = 1 << 59;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Data and checksum of different writes, or halves of two.
    Torn,
    /// It holds what belongs elsewhere, or what a write that went elsewhere should have replaced.
    Foreign,
    /// The device reports an error.
    Unreadable,
}

pub fn damaged(held: BlockData, damage: Damage) -> BlockData {
    let flags = match damage {
        Damage::Torn => BAD,
        Damage::Foreign => BAD | FOREIGN,
        Damage::Unreadable => BAD | UNREADABLE,
    };
    held.map(|half| half | flags)
}

/// What the disk holds of a block, whether it verifies or not.
pub fn held(data: BlockData) -> BlockData {
    data.map(|half| half & !FLAGS)
}

/// A block whose bits flipped.
pub fn rotten(rng: &mut StdRng) -> BlockData {
    let garbage = GARBAGE | u64::from(rng.random::<u32>());
    damaged([garbage; 2], Damage::Foreign)
}

pub fn marked() -> BlockData {
    [BAD | MARKED; 2]
}

pub fn verifies(data: BlockData) -> bool {
    data.iter().all(|half| half & BAD == 0)
}

/// What a read of these blocks comes to.
pub fn verify_all(blocks: &Blocks) -> Result<(), DiskError> {
    if blocks.values().flatten().any(|half| half & UNREADABLE != 0) {
        return Err(DiskError::Device);
    }
    if blocks.values().all(|data| verifies(*data)) { Ok(()) } else { Err(DiskError::Corrupt) }
}

/// Whether it is damage that no crash explains.
pub fn is_foreign(data: BlockData) -> bool {
    data.iter().any(|half| half & FOREIGN != 0)
}

/// What the block's data is once it is adopted; none if it is left alone.
pub fn adopted(data: BlockData) -> Option<BlockData> {
    let kept = data.iter().any(|half| half & (MARKED | UNREADABLE) != 0);
    (!kept && !verifies(data)).then(|| held(data))
}

/// As members are compared: a block that does not verify gives nothing, whatever it holds.
pub fn seen(blocks: &Blocks) -> Blocks {
    let seen = |data: BlockData| if verifies(data) { data } else { [BAD; 2] };
    blocks.iter().map(|(block, data)| (*block, seen(*data))).collect()
}

/// Blocks that a power loss leaves without a checksum that fits: each half holds one of the values written since the last
/// flush, or the one before.
pub fn torn(cache: &[CachedWrite], durable: &Blocks, rng: &mut StdRng) -> Blocks {
    let mut versions: BTreeMap<u64, Vec<BlockData>> = BTreeMap::new();
    for (_, block, data) in cache {
        let before = || vec![durable.get(block).copied().unwrap_or_default()];
        versions.entry(*block).or_insert_with(before).push(*data);
    }
    let mut torn = Blocks::new();
    for (block, values) in versions {
        let whole = values.iter().flatten().any(|half| half & (MARKED | UNREADABLE) != 0);
        if !whole && rng.random_bool(0.3) {
            let half = |half: usize, rng: &mut StdRng| values[rng.random_range(0..values.len())][half];
            let mixed = [half(0, rng), half(1, rng)];
            torn.insert(block, damaged(mixed, Damage::Torn));
        }
    }
    torn
}

/// Blocks that do not verify.
pub fn bad_blocks(blocks: &Blocks) -> BTreeSet<u64> {
    blocks.iter().filter(|(_, data)| !verifies(**data)).map(|(block, _)| *block).collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn r32_only_what_a_disk_can_read_and_was_not_marked_is_adopted() {
        let mut rng = StdRng::seed_from_u64(1);
        assert_eq!(adopted([4, 5]), None);
        assert_eq!(adopted(damaged([4, 5], Damage::Torn)), Some([4, 5]));
        assert_eq!(adopted(marked()), None);
        assert_eq!(adopted(damaged([4, 5], Damage::Unreadable)), None);
        let garbage = adopted(rotten(&mut rng)).expect("a disk cannot tell");
        assert!(verifies(garbage) && garbage[0] & GARBAGE != 0);
    }

    #[test]
    fn a_torn_block_holds_what_was_written_to_it_and_never_verifies() {
        let durable = Blocks::from([(7, [1, 1])]);
        let cache = [(1, 7, [2, 2]), (2, 7, [3, 3])];
        let mut seen = BTreeSet::new();
        for seed in 0..200 {
            let torn = torn(&cache, &durable, &mut StdRng::seed_from_u64(seed));
            assert_eq!(bad_blocks(&torn).len(), torn.len());
            seen.extend(torn.into_values().filter_map(adopted));
        }
        assert_eq!(seen.len(), 9);
    }
}
