//! The manifest: which replica this is and which layers it stacks, bottom first. Replaced whole by rename.
//!
//! Payload of version 2: volume_id 16, replica_id 16, size_bytes 8, next layer number 4, layer count 4, then per layer:
//! number 4, frozen 4 (0 or 1), size_bytes 8, seed volume 16 (the volume whose id seeds its checksums, R30), origin
//! replica 16 (whose header the file carries), snapshot 16 (0 for none). Version 1 had one layer.

use std::path::Path;

use holdfast_io::{AlignedBuf, OpenMode};
use holdfast_storage_core::ids::{ReplicaId, SnapshotId, VolumeId};

use crate::disk::{Disk, DiskFile};
use crate::error::PoolError;
use crate::layout::{PAGE_BYTES, is_volume_size};
use crate::sealed::{BadPage, seal, u32_at, u64_at, u128_at, unseal};

const MAGIC: &[u8; 8] = b"HFMANIFE";
const VERSION: u32 = 2;
const FILE_BYTES: usize = 16 << 10;
const HEAD_BYTES: usize = 48;
const LAYER_BYTES: usize = 64;
const V1_HEAD_BYTES: usize = 44;
/// Layers of a replica. A read of blocks that no layer has looks at the tables of all; more would make that slow.
pub const LAYERS_MAX: usize = 128;
/// Of these, layers that only a merge may add: it freezes the top to move it down while writes go on.
pub const LAYERS_FOR_MERGES: usize = 2;
const FILE: &str = "manifest";
const NEW_FILE: &str = "manifest.new";

const _: () = assert!(LAYERS_MAX * LAYER_BYTES + HEAD_BYTES + crate::sealed::FRAME_BYTES <= FILE_BYTES);

/// What a replica is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The volume.
    pub volume_id: VolumeId,
    /// The replica.
    pub replica_id: ReplicaId,
    /// Bytes.
    pub size_bytes: u64,
    /// Number of the next layer; numbers are never used twice.
    pub next_layer: u32,
    /// Bottom first; the last one takes the writes.
    pub layers: Vec<LayerEntry>,
}

/// One layer of the stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// Names its file.
    pub number: u32,
    /// Takes no more writes. A frozen layer without a snapshot is merged with the one above it.
    pub frozen: bool,
    /// Blocks beyond are absent here: the volume grew later.
    pub size_bytes: u64,
    /// Whose id seeds its checksums (R30).
    pub seed: VolumeId,
    /// The replica that made the file.
    pub origin: ReplicaId,
    /// The snapshot that froze it.
    pub snapshot: Option<SnapshotId>,
}

impl Manifest {
    /// Of a new replica: one empty layer.
    pub fn new(volume_id: VolumeId, replica_id: ReplicaId, size_bytes: u64) -> Self {
        let mut manifest = Self { volume_id, replica_id, size_bytes, next_layer: 0, layers: Vec::new() };
        manifest.push_top();
        manifest
    }

    /// Puts an empty layer on top.
    pub fn push_top(&mut self) {
        self.layers.push(LayerEntry {
            number: self.next_layer,
            frozen: false,
            size_bytes: self.size_bytes,
            seed: self.volume_id,
            origin: self.replica_id,
            snapshot: None,
        });
        self.next_layer += 1;
    }

    /// The layer that takes the writes.
    pub fn top(&self) -> &LayerEntry {
        self.layers.last().expect("a replica has a layer that takes writes")
    }

    /// Which layer a snapshot froze, counted from the bottom.
    pub fn index_of(&self, snapshot: SnapshotId) -> Option<usize> {
        self.layers.iter().position(|layer| layer.snapshot == Some(snapshot))
    }

    /// The snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        self.layers.iter().filter_map(|layer| layer.snapshot).collect()
    }

    /// Writes the manifest of a folder that nobody else sees yet, to be synced by the caller.
    pub fn write_new(&self, disk: &Disk, dir: &Path) -> Result<DiskFile, PoolError> {
        write_sealed_file(disk, &dir.join(FILE), MAGIC, VERSION, &self.encode(), FILE_BYTES)
    }

    /// Puts this manifest in the place of the old one, durably.
    ///
    /// 1. Write it beside the old one and sync it: a crash leaves a file that the next opening removes.
    /// 2. Rename it and sync the folder: a crash leaves the old or the new one.
    ///
    /// After an error in step 1 the old one holds; after one in step 2 nobody knows, see [`ReplaceError`].
    pub fn replace(&self, disk: &Disk, dir: &Path) -> Result<(), ReplaceError> {
        let new = dir.join(NEW_FILE);
        disk.remove_file(&new)
            .map_err(PoolError::io("removing", &new))
            .and_then(|()| self.write(disk, &new))
            .map_err(ReplaceError::Unchanged)?;
        disk.rename(&new, &dir.join(FILE))
            .map_err(PoolError::io("renaming", &new))
            .and_then(|()| disk.sync_dir(dir).map_err(PoolError::io("syncing", dir)))
            .map_err(ReplaceError::Unknown)
    }

    /// Removes what interrupted changes of the stack left: a new manifest, and layers that this one does not
    /// list, with their cursors.
    pub fn remove_leftovers(&self, disk: &Disk, dir: &Path) -> Result<(), PoolError> {
        for name in disk.list(dir).map_err(PoolError::io("listing", dir))? {
            let digits = name.strip_prefix("layer-").or_else(|| name.strip_prefix("merge-"));
            let number = digits.and_then(|digits| digits.parse::<u32>().ok());
            let unlisted =
                number.is_some_and(|number| self.layers.iter().all(|layer| layer.number != number));
            if unlisted || name == NEW_FILE || name == crate::record_file::NEW_FILE {
                tracing::info!(replica = %self.replica_id, file = %name, "removing what an interrupted change left");
                let path = dir.join(name);
                disk.remove_file(&path).map_err(PoolError::io("removing", &path))?;
            }
        }
        Ok(())
    }

    /// Reads a replica's manifest.
    pub fn read(disk: &Disk, dir: &Path) -> Result<Self, PoolError> {
        let path = dir.join(FILE);
        let file = disk.open(&path, OpenMode::Existing).map_err(PoolError::io("opening", &path))?;
        let found_bytes = file.len_bytes().map_err(PoolError::io("reading", &path))?;
        if found_bytes < PAGE_BYTES as u64 {
            return Err(PoolError::Truncated { path, found_bytes, expected_bytes: FILE_BYTES as u64 });
        }
        // Version 1 had one page.
        let len = if found_bytes < FILE_BYTES as u64 { PAGE_BYTES } else { FILE_BYTES };
        let page = file.read_now(0, len).map_err(PoolError::io("reading", &path))?;
        let payload = unseal(MAGIC, VERSION, &page).map_err(|bad| bad_page(&path, VERSION, &bad))?;
        let decoded = if u32_at(&page, 8) == 1 { Self::decode_v1(payload) } else { Self::decode(payload) };
        decoded.ok_or(PoolError::Corrupt { path, what: "it lists no usable stack of layers".to_owned() })
    }

    fn write(&self, disk: &Disk, path: &Path) -> Result<(), PoolError> {
        let file = write_sealed_file(disk, path, MAGIC, VERSION, &self.encode(), FILE_BYTES)?;
        file.sync_now().map_err(PoolError::io("syncing", path))
    }

    fn encode(&self) -> Vec<u8> {
        assert!(self.layers.len() <= LAYERS_MAX, "{} layers do not fit", self.layers.len());
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.layers.len() * LAYER_BYTES);
        bytes.extend(self.volume_id.0.to_le_bytes());
        bytes.extend(self.replica_id.0.to_le_bytes());
        bytes.extend(self.size_bytes.to_le_bytes());
        bytes.extend(self.next_layer.to_le_bytes());
        bytes.extend(u32::try_from(self.layers.len()).expect("checked above").to_le_bytes());
        for layer in &self.layers {
            bytes.extend(layer.number.to_le_bytes());
            bytes.extend(u32::from(layer.frozen).to_le_bytes());
            bytes.extend(layer.size_bytes.to_le_bytes());
            bytes.extend(layer.seed.0.to_le_bytes());
            bytes.extend(layer.origin.0.to_le_bytes());
            bytes.extend(layer.snapshot.map_or(0, |snapshot| snapshot.0).to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let head = bytes.get(..HEAD_BYTES)?;
        let count = u32_at(head, 44) as usize;
        let rest = bytes.get(HEAD_BYTES..).filter(|rest| rest.len() == count.saturating_mul(LAYER_BYTES))?;
        let layers = rest.chunks(LAYER_BYTES).map(|layer| LayerEntry {
            number: u32_at(layer, 0),
            frozen: u32_at(layer, 4) != 0,
            size_bytes: u64_at(layer, 8),
            seed: VolumeId(u128_at(layer, 16)),
            origin: ReplicaId(u128_at(layer, 32)),
            snapshot: Some(SnapshotId(u128_at(layer, 48))).filter(|snapshot| snapshot.0 != 0),
        });
        let manifest = Self {
            volume_id: VolumeId(u128_at(head, 0)),
            replica_id: ReplicaId(u128_at(head, 16)),
            size_bytes: u64_at(head, 32),
            next_layer: u32_at(head, 40),
            layers: layers.collect(),
        };
        manifest.is_usable().then_some(manifest)
    }

    fn decode_v1(bytes: &[u8]) -> Option<Self> {
        let head = bytes.get(..V1_HEAD_BYTES).filter(|head| u32_at(head, 40) == 1)?;
        let (volume_id, replica_id) = (VolumeId(u128_at(head, 0)), ReplicaId(u128_at(head, 16)));
        let manifest = Self::new(volume_id, replica_id, u64_at(head, 32));
        manifest.is_usable().then_some(manifest)
    }

    fn is_usable(&self) -> bool {
        let Some((top, below)) = self.layers.split_last() else { return false };
        let sizes_ascend = self.layers.windows(2).all(|pair| pair[0].size_bytes <= pair[1].size_bytes);
        is_volume_size(self.size_bytes)
            && top.size_bytes == self.size_bytes
            && !top.frozen
            && top.snapshot.is_none()
            && below.iter().all(|layer| layer.frozen)
            && sizes_ascend
            && self.layers.iter().all(|layer| layer.number < self.next_layer)
    }
}

/// Why a manifest was not replaced.
#[derive(Debug)]
pub enum ReplaceError {
    /// The old one holds.
    Unchanged(PoolError),
    /// The old or the new one holds: the replica must be opened again.
    Unknown(PoolError),
}

/// Makes a file of one sealed page, durable except for its name.
pub fn write_page_file(
    disk: &Disk,
    path: &Path,
    magic: &[u8; 8],
    version: u32,
    payload: &[u8],
) -> Result<(), PoolError> {
    let file = write_sealed_file(disk, path, magic, version, payload, PAGE_BYTES)?;
    file.sync_now().map_err(PoolError::io("syncing", path))
}

fn write_sealed_file(
    disk: &Disk,
    path: &Path,
    magic: &[u8; 8],
    version: u32,
    payload: &[u8],
    file_bytes: usize,
) -> Result<DiskFile, PoolError> {
    let mut page = AlignedBuf::zeroed(file_bytes);
    seal(magic, version, payload, &mut page);
    let file = disk.open(path, OpenMode::New).map_err(PoolError::io("creating", path))?;
    file.write_now(0, &page).map_err(PoolError::io("writing", path))?;
    Ok(file)
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

    fn mk_manifest() -> Manifest {
        let mut manifest = Manifest::new(VolumeId(1), ReplicaId(2), 1 << 30);
        manifest.layers[0].frozen = true;
        manifest.layers[0].snapshot = Some(SnapshotId(9));
        manifest.layers[0].seed = VolumeId(5);
        manifest.layers[0].origin = ReplicaId(6);
        manifest.push_top();
        manifest
    }

    #[test]
    fn a_stack_of_layers_survives_its_bytes() {
        let manifest = mk_manifest();
        assert_eq!(Manifest::decode(&manifest.encode()), Some(manifest.clone()));
        assert_eq!(manifest.index_of(SnapshotId(9)), Some(0));
        assert_eq!(Manifest::decode(&manifest.encode()[..60]), None);
    }

    #[test]
    fn a_stack_that_cannot_be_is_refused() {
        let breaks: [fn(&mut Manifest); 6] = [
            |m| m.layers[1].frozen = true,
            |m| m.layers[0].frozen = false,
            |m| m.layers.clear(),
            |m| m.next_layer = 1,
            |m| m.layers[0].size_bytes *= 2,
            |m| m.layers[1].snapshot = Some(SnapshotId(3)),
        ];
        for (number, break_it) in breaks.iter().enumerate() {
            let mut manifest = mk_manifest();
            break_it(&mut manifest);
            assert_eq!(Manifest::decode(&manifest.encode()), None, "{number}");
        }
    }

    #[test]
    fn a_manifest_of_version_1_is_read_as_one_layer() {
        let mut bytes = 1_u128.to_le_bytes().to_vec();
        bytes.extend(2_u128.to_le_bytes());
        bytes.extend((1_u64 << 30).to_le_bytes());
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend([0; 40]);
        assert_eq!(Manifest::decode_v1(&bytes), Some(Manifest::new(VolumeId(1), ReplicaId(2), 1 << 30)));
    }
}
