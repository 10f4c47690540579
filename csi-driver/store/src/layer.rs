//! A layer file: header, tables and data (see [`crate::layout`]).
//!
//! Header payload: volume_id 16, replica_id 16, number 4, reserved 4, size_bytes 8.

use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_io::{AlignedBuf, LockOutcome, OpenMode};

use crate::disk::{Disk, DiskFile};
use crate::error::PoolError;
use crate::layout::{PAGE_BYTES, layer_file_bytes, table_areas};
use crate::manifest::{Manifest, bad_page};
use crate::sealed::{seal, unseal};

const MAGIC: &[u8; 8] = b"HFLAYER\0";
const VERSION: u32 = 1;

/// The file of layer `number`.
pub fn layer_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("layer-{number:06}"))
}

/// Makes an empty layer, durable except for its name, with the space of its tables reserved (R16).
pub fn create(disk: &Disk, dir: &Path, manifest: &Manifest, number: u32) -> Result<(), PoolError> {
    let path = layer_path(dir, number);
    let file = disk.open(&path, OpenMode::New).map_err(PoolError::io("creating", &path))?;
    file.set_len(layer_file_bytes(manifest.size_bytes)).map_err(PoolError::io("sizing", &path))?;
    for (offset, len) in table_areas(manifest.size_bytes) {
        match file.reserve_now(offset, len) {
            Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => break,
            other => other.map_err(PoolError::io("reserving space in", &path))?,
        }
    }
    let mut page = AlignedBuf::zeroed(PAGE_BYTES);
    seal(MAGIC, VERSION, &header_payload(manifest, number), &mut page);
    file.write_now(0, &page).map_err(PoolError::io("writing", &path))?;
    file.sync_now().map_err(PoolError::io("syncing", &path))
}

/// Opens a layer, takes its lock and checks header and length.
pub fn open(
    disk: &Disk,
    dir: &Path,
    manifest: &Manifest,
    number: u32,
    lock_wait: Duration,
) -> Result<DiskFile, PoolError> {
    let path = layer_path(dir, number);
    let file = disk.open(&path, OpenMode::Existing).map_err(PoolError::io("opening", &path))?;
    match file.lock(lock_wait).map_err(PoolError::io("locking", &path))? {
        LockOutcome::Locked => {}
        LockOutcome::HeldByAnother => return Err(PoolError::Locked(path)),
    }
    let found_bytes = file.len_bytes().map_err(PoolError::io("reading", &path))?;
    let expected_bytes = layer_file_bytes(manifest.size_bytes);
    if found_bytes < expected_bytes {
        return Err(PoolError::Truncated { path, found_bytes, expected_bytes });
    }
    let page = file.read_now(0, PAGE_BYTES).map_err(PoolError::io("reading", &path))?;
    let payload = unseal(MAGIC, VERSION, &page).map_err(|bad| bad_page(&path, VERSION, &bad))?;
    if payload != header_payload(manifest, number) {
        return Err(PoolError::Corrupt { path, what: "it belongs to another replica or layer".to_owned() });
    }
    Ok(file)
}

fn header_payload(manifest: &Manifest, number: u32) -> Vec<u8> {
    let mut payload = Vec::with_capacity(48);
    payload.extend(manifest.volume_id.0.to_le_bytes());
    payload.extend(manifest.replica_id.0.to_le_bytes());
    payload.extend(number.to_le_bytes());
    payload.extend([0; 4]);
    payload.extend(manifest.size_bytes.to_le_bytes());
    payload
}
