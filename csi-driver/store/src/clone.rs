//! Clones: a new replica whose lower layers are another one's frozen layers, by hard links.
//!
//! Nothing is copied: the files are immutable while they have another link (see [`crate::merge`]), and the last link keeps
//! the data, whichever replica goes first. They keep the seed of the volume that wrote them (R30), so that a block of the
//! clone verifies as what it is.

use std::path::Path;

use holdfast_storage_core::ids::SnapshotId;
use holdfast_storage_core::replica::ReplicaMeta;

use crate::disk::{Disk, DiskFile};
use crate::error::PoolError;
use crate::layer::{self, layer_path};
use crate::manifest::{LAYERS_FOR_MERGES, LAYERS_MAX, Manifest};
use crate::merge_cursor::cursor_path;

/// The manifest of a clone: the source's layers up to the snapshot, below an empty one of its own.
pub fn manifest_of(
    meta: &ReplicaMeta,
    source: &Manifest,
    snapshot: SnapshotId,
) -> Result<Manifest, PoolError> {
    let no_snapshot = PoolError::NoSnapshot { replica: source.replica_id, snapshot };
    let index = source.index_of(snapshot).ok_or(no_snapshot)?;
    let mut layers = source.layers[..=index].to_vec();
    if layers.len() + 1 > LAYERS_MAX - LAYERS_FOR_MERGES {
        return Err(PoolError::TooManyLayers(meta.replica_id));
    }
    if meta.size_bytes < layers[index].size_bytes {
        return Err(PoolError::CloneTooSmall {
            replica: meta.replica_id,
            size_bytes: meta.size_bytes,
            needed_bytes: layers[index].size_bytes,
        });
    }
    for layer in &mut layers {
        layer.snapshot = None;
    }
    let mut manifest = Manifest {
        volume_id: meta.volume_id,
        replica_id: meta.replica_id,
        size_bytes: meta.size_bytes,
        next_layer: source.next_layer,
        layers,
    };
    manifest.push_top();
    Ok(manifest)
}

/// Links the lower layers into a folder that nobody else sees yet and makes the top. The source's stack must not change
/// meanwhile. Gives the top, which the caller syncs.
pub fn write_layers(
    disk: &Disk,
    new: &Path,
    manifest: &Manifest,
    source: &Path,
) -> Result<DiskFile, PoolError> {
    let top = manifest.top();
    for entry in manifest.layers.iter().filter(|entry| entry.number != top.number) {
        let (from, to) = (layer_path(source, entry.number), layer_path(new, entry.number));
        disk.hard_link(&from, &to).map_err(PoolError::io("linking", &from))?;
        // How far its blocks were moved down: they are in the layer beneath, which the clone shares as well.
        let cursor = cursor_path(source, entry.number);
        if disk.exists(&cursor).map_err(PoolError::io("examining", &cursor))? {
            let copy = cursor_path(new, entry.number);
            disk.hard_link(&cursor, &copy).map_err(PoolError::io("linking", &cursor))?;
        }
    }
    layer::write_new(disk, new, top)
}

/// Whether a replica that is there already is what a repeated request wants.
pub fn is_same(found: &Manifest, meta: &ReplicaMeta) -> bool {
    found.volume_id == meta.volume_id && found.size_bytes == meta.size_bytes
}
