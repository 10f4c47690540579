//! The frozen layers of a simulated disk.

use std::collections::BTreeSet;

use holdfast_storage_core::ids::SnapshotId;
use rand::rngs::StdRng;

use crate::disk::{BlockData, Blocks, CachedWrite, keep_some};

/// A snapshot: what the volume read as when it was frozen.
#[derive(Debug, Clone)]
pub struct Layer {
    pub id: SnapshotId,
    /// As reads see it.
    pub current: Blocks,
    /// On stable storage.
    durable: Blocks,
    /// Written before the freeze and not flushed since.
    cache: Vec<CachedWrite>,
    /// Blocks written since the snapshot before.
    pub written: BTreeSet<u64>,
}

/// Oldest first.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    layers: Vec<Layer>,
    /// Blocks written since the newest snapshot.
    top: BTreeSet<u64>,
}

impl Layers {
    pub fn ids(&self) -> Vec<SnapshotId> {
        self.layers.iter().map(|layer| layer.id).collect()
    }

    pub fn get(&self, id: SnapshotId) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.id == id)
    }

    pub fn wrote(&mut self, block: u64) {
        self.top.insert(block);
    }

    pub fn freeze(&mut self, id: SnapshotId, current: &Blocks, durable: &Blocks, cache: &[CachedWrite]) {
        assert!(self.get(id).is_none(), "the core froze snapshot {id} twice");
        self.layers.push(Layer {
            id,
            current: current.clone(),
            durable: durable.clone(),
            cache: cache.to_vec(),
            written: std::mem::take(&mut self.top),
        });
    }

    /// The layer above takes over which blocks were written.
    pub fn remove(&mut self, id: SnapshotId) {
        let Some(at) = self.layers.iter().position(|layer| layer.id == id) else { return };
        let gone = self.layers.remove(at);
        self.layers.get_mut(at).map_or(&mut self.top, |above| &mut above.written).extend(gone.written);
    }

    /// Blocks that were written after one snapshot and before another, or before now; none if there is no such snapshot.
    pub fn changed(&self, from: Option<SnapshotId>, to: Option<SnapshotId>) -> Option<BTreeSet<u64>> {
        let position = |id: SnapshotId| self.layers.iter().position(|layer| layer.id == id);
        let first = from.map_or(Some(0), |id| position(id).map(|at| at + 1))?;
        let last = to.map_or(Some(self.layers.len()), |id| position(id).map(|at| at + 1))?;
        let mut changed: BTreeSet<u64> =
            self.layers.get(first..last)?.iter().flat_map(|layer| layer.written.iter().copied()).collect();
        if to.is_none() {
            changed.extend(self.top.iter().copied());
        }
        Some(changed)
    }

    pub fn flush(&mut self, mark: u64) {
        for layer in &mut self.layers {
            layer.cache.retain(|(number, block, data)| {
                if *number <= mark {
                    layer.durable.insert(*block, *data);
                }
                *number > mark
            });
        }
    }

    pub fn lose_cache(&mut self, rng: &mut StdRng) {
        for layer in &mut self.layers {
            keep_some(std::mem::take(&mut layer.cache), &mut layer.durable, rng);
            layer.current = layer.durable.clone();
        }
    }
}

/// Blocks that are not zero, for comparing.
pub fn non_zero(blocks: &Blocks) -> Blocks {
    let zero: BlockData = [0, 0];
    blocks.iter().filter(|(_, data)| **data != zero).map(|(block, data)| (*block, *data)).collect()
}
