//! The manifest: which replica this is and which layers it stacks, bottom first. Replaced whole by rename.
//!
//! Payload: volume_id 16, replica_id 16, size_bytes 8, layer count 4, then per layer: number 4, frozen 4 (0 or 1),
//! seed volume 16 (the volume whose id seeds its checksums, R30), snapshot 16 (0 for the top layer).

use std::path::Path;

use holdfast_io::{AlignedBuf, OpenMode};
use holdfast_storage_core::ids::{ReplicaId, VolumeId};

use crate::disk::Disk;
use crate::error::PoolError;
use crate::layout::{PAGE_BYTES, is_volume_size};
use crate::sealed::{BadPage, seal, u32_at, u64_at, u128_at, unseal};

const MAGIC: &[u8; 8] = b"HFMANIFE";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 44;
const LAYER_BYTES: usize = 40;
/// Layers that fit a manifest; a snapshot beyond it is refused.
const LAYERS_MAX: usize = (PAGE_BYTES - crate::sealed::FRAME_BYTES - HEAD_BYTES) / LAYER_BYTES;
const FILE: &str = "manifest";

/// What a replica is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The volume.
    pub volume_id: VolumeId,
    /// The replica.
    pub replica_id: ReplicaId,
    /// Bytes.
    pub size_bytes: u64,
    /// Bottom first; the last one takes the writes.
    pub layers: Vec<LayerEntry>,
}

/// One layer of the stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// Names its file.
    pub number: u32,
    /// Takes no more writes.
    pub frozen: bool,
    /// Whose id seeds its checksums (R30).
    pub seed: VolumeId,
    /// The snapshot that froze it, 0 for none.
    pub snapshot: u128,
}

impl Manifest {
    /// Writes the manifest of a folder that nobody else sees yet.
    pub fn write_new(&self, disk: &Disk, dir: &Path) -> Result<(), PoolError> {
        let path = dir.join(FILE);
        write_page_file(disk, &path, MAGIC, VERSION, &self.encode())
    }

    /// Reads a replica's manifest.
    pub fn read(disk: &Disk, dir: &Path) -> Result<Self, PoolError> {
        let path = dir.join(FILE);
        let payload = read_page_file(disk, &path, MAGIC, VERSION)?;
        Self::decode(&payload)
            .ok_or(PoolError::Corrupt { path, what: "it lists no usable stack of layers".to_owned() })
    }

    fn encode(&self) -> Vec<u8> {
        assert!(self.layers.len() <= LAYERS_MAX, "{} layers do not fit", self.layers.len());
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.layers.len() * LAYER_BYTES);
        bytes.extend(self.volume_id.0.to_le_bytes());
        bytes.extend(self.replica_id.0.to_le_bytes());
        bytes.extend(self.size_bytes.to_le_bytes());
        bytes.extend(u32::try_from(self.layers.len()).expect("checked above").to_le_bytes());
        for layer in &self.layers {
            bytes.extend(layer.number.to_le_bytes());
            bytes.extend(u32::from(layer.frozen).to_le_bytes());
            bytes.extend(layer.seed.0.to_le_bytes());
            bytes.extend(layer.snapshot.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let head = bytes.get(..HEAD_BYTES)?;
        let count = u32_at(head, 40) as usize;
        let rest = bytes.get(HEAD_BYTES..).filter(|rest| rest.len() == count.saturating_mul(LAYER_BYTES))?;
        let layers = rest.chunks(LAYER_BYTES).map(|layer| LayerEntry {
            number: u32_at(layer, 0),
            frozen: u32_at(layer, 4) != 0,
            seed: VolumeId(u128_at(layer, 8)),
            snapshot: u128_at(layer, 24),
        });
        let manifest = Self {
            volume_id: VolumeId(u128_at(head, 0)),
            replica_id: ReplicaId(u128_at(head, 16)),
            size_bytes: u64_at(head, 32),
            layers: layers.collect(),
        };
        let usable =
            is_volume_size(manifest.size_bytes) && manifest.layers.last().is_some_and(|top| !top.frozen);
        usable.then_some(manifest)
    }
}

/// Makes a file of one sealed page, durable except for its name.
pub fn write_page_file(
    disk: &Disk,
    path: &Path,
    magic: &[u8; 8],
    version: u32,
    payload: &[u8],
) -> Result<(), PoolError> {
    let mut page = AlignedBuf::zeroed(PAGE_BYTES);
    seal(magic, version, payload, &mut page);
    let file = disk.open(path, OpenMode::New).map_err(PoolError::io("creating", path))?;
    file.write_now(0, &page).map_err(PoolError::io("writing", path))?;
    file.sync_now().map_err(PoolError::io("syncing", path))
}

/// The payload of a file of one sealed page.
pub fn read_page_file(disk: &Disk, path: &Path, magic: &[u8; 8], known: u32) -> Result<Vec<u8>, PoolError> {
    let file = disk.open(path, OpenMode::Existing).map_err(PoolError::io("opening", path))?;
    let found_bytes = file.len_bytes().map_err(PoolError::io("reading", path))?;
    let expected_bytes = PAGE_BYTES as u64;
    if found_bytes < expected_bytes {
        return Err(PoolError::Truncated { path: path.to_owned(), found_bytes, expected_bytes });
    }
    let page = file.read_now(0, PAGE_BYTES).map_err(PoolError::io("reading", path))?;
    unseal(magic, known, &page).map(<[u8]>::to_vec).map_err(|bad| bad_page(path, known, &bad))
}

/// What a bad page means for the file.
pub fn bad_page(path: &Path, known: u32, bad: &BadPage) -> PoolError {
    match bad {
        BadPage::Damaged(what) => PoolError::Corrupt { path: path.to_owned(), what: (*what).to_owned() },
        BadPage::Future { found } => PoolError::FutureVersion { path: path.to_owned(), found: *found, known },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_of_layers_survives_its_bytes() {
        let layer =
            |number, frozen| LayerEntry { number, frozen, seed: VolumeId(5), snapshot: u128::from(number) };
        let manifest = Manifest {
            volume_id: VolumeId(1),
            replica_id: ReplicaId(2),
            size_bytes: 1 << 30,
            layers: vec![layer(7, true), layer(8, false)],
        };
        assert_eq!(Manifest::decode(&manifest.encode()), Some(manifest.clone()));
        let frozen_top = Manifest { layers: vec![layer(7, true)], ..manifest.clone() };
        assert_eq!(Manifest::decode(&frozen_top.encode()), None);
        assert_eq!(Manifest::decode(&manifest.encode()[..60]), None);
    }
}
