//! A layer file: header, tables and data (see [`crate::layout`]).
//!
//! Header payload: volume_id 16, replica_id 16, number 4, reserved 4, size_bytes 8, all as they were when the layer was
//! made: a clone's lower layers name the replica that wrote them, and a layer that grew names its first size. What holds
//! now says the manifest.

use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_io::{AlignedBuf, LockOutcome, OpenMode};

use crate::disk::{Disk, DiskFile};
use crate::error::PoolError;
use crate::layout::{PAGE_BYTES, layer_file_bytes};
use crate::manifest::{LayerEntry, bad_page};
use crate::sealed::{seal, u64_at, unseal};

const MAGIC: &[u8; 8] = b"HFLAYER\0";
const VERSION: u32 = 1;
/// Bytes of the payload before the size.
const IDENTITY_BYTES: usize = 40;

/// The file of layer `number`.
pub fn layer_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("layer-{number:06}"))
}

/// [`write_new`], durable except for its name.
pub fn create(disk: &Disk, dir: &Path, entry: &LayerEntry) -> Result<DiskFile, PoolError> {
    let file = write_new(disk, dir, entry)?;
    file.sync_now().map_err(PoolError::io("syncing", &layer_path(dir, entry.number)))?;
    Ok(file)
}

/// Makes an empty layer, to be synced by the caller. It costs the same whatever its size: the file is sparse, and the
/// space of a group's tables is reserved with the first write into the group (R16).
pub fn write_new(disk: &Disk, dir: &Path, entry: &LayerEntry) -> Result<DiskFile, PoolError> {
    let path = layer_path(dir, entry.number);
    // Left by a freeze that was interrupted before its manifest.
    disk.remove_file(&path).map_err(PoolError::io("removing", &path))?;
    let file = disk.open(&path, OpenMode::New).map_err(PoolError::io("creating", &path))?;
    file.set_len(layer_file_bytes(entry.size_bytes)).map_err(PoolError::io("sizing", &path))?;
    let mut page = AlignedBuf::zeroed(PAGE_BYTES);
    seal(MAGIC, VERSION, &header_payload(entry), &mut page);
    file.write_now(0, &page).map_err(PoolError::io("writing", &path))?;
    Ok(file)
}

/// Opens a layer and checks header and length.
pub fn open(disk: &Disk, dir: &Path, entry: &LayerEntry) -> Result<DiskFile, PoolError> {
    let path = layer_path(dir, entry.number);
    let file = disk.open(&path, OpenMode::Existing).map_err(PoolError::io("opening", &path))?;
    let found_bytes = file.len_bytes().map_err(PoolError::io("reading", &path))?;
    let expected_bytes = layer_file_bytes(entry.size_bytes);
    if found_bytes < expected_bytes {
        return Err(PoolError::Truncated { path, found_bytes, expected_bytes });
    }
    let page = file.read_now(0, PAGE_BYTES).map_err(PoolError::io("reading", &path))?;
    let payload = unseal(MAGIC, VERSION, &page).map_err(|bad| bad_page(&path, VERSION, &bad))?;
    let expected = header_payload(entry);
    let is_ours = payload.len() == expected.len()
        && payload[..IDENTITY_BYTES] == expected[..IDENTITY_BYTES]
        && u64_at(payload, IDENTITY_BYTES) <= entry.size_bytes;
    if !is_ours {
        return Err(PoolError::Corrupt { path, what: "it belongs to another replica or layer".to_owned() });
    }
    Ok(file)
}

/// Takes the lock of the layer that takes writes (R3). Frozen layers have none: nothing is in flight to them, and clones
/// share them.
pub fn lock(file: &DiskFile, path: PathBuf, wait: Duration) -> Result<(), PoolError> {
    match file.lock(wait).map_err(PoolError::io("locking", &path))? {
        LockOutcome::Locked => Ok(()),
        LockOutcome::HeldByAnother => Err(PoolError::Locked(path)),
    }
}

fn header_payload(entry: &LayerEntry) -> Vec<u8> {
    let mut payload = Vec::with_capacity(IDENTITY_BYTES + 8);
    payload.extend(entry.seed.0.to_le_bytes());
    payload.extend(entry.origin.0.to_le_bytes());
    payload.extend(entry.number.to_le_bytes());
    payload.extend([0; 4]);
    payload.extend(entry.size_bytes.to_le_bytes());
    payload
}
