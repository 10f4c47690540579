//! Changes of an open replica's stack of layers: freeze, drop, growth. Blocking; one at a time.
//!
//! Every change is one replacement of the manifest. What it needs is durable before, what it makes useless is removed
//! after, and opening removes what a crash left in between:
//!
//! freeze
//! 1. Make the new layer's file and sync it. *Crash:* a file that the manifest does not list; opening removes it.
//! 2. Hold back new writes, wait for those begun, flush. *Crash:* as without the freeze.
//! 3. Replace the manifest: the top is frozen under the snapshot's id, the new layer is the top. *Crash:* the old one or
//!    the new one; either way no write is lost, as all are durable in the layer that is or was the top.
//! 4. Switch in memory, let writes go on.
//!
//! drop: replace the manifest by one in which the layer has no snapshot. Such layers are merged ([`crate::merge`]).
//!
//! grow: make files longer, each with its own sync, then replace the manifest. *Crash before:* files longer than the
//! manifest says; the next growth does it again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use holdfast_io::Errno;
use holdfast_storage_core::ids::{BLOCK_BYTES, SnapshotId};

use crate::data::{DataPath, Layer};
use crate::disk::{Disk, DiskFile};
use crate::error::{PoolError, StoreError};
use crate::layer::{self, layer_path};
use crate::layout::{is_volume_size, layer_file_bytes};
use crate::manifest::{LAYERS_FOR_MERGES, LAYERS_MAX, LayerEntry, Manifest, ReplaceError};
use crate::merge_cursor::cursor_path;
use crate::space::Charge;
use crate::sums::Summer;
use crate::tables::Tables;

/// What a freeze takes from the pool at once: header, manifest, and what the file system needs.
const FREEZE_BYTES: u64 = 64 << 10;

/// The manifest of an open replica, and what is needed to change it.
pub struct StackFiles {
    /// Where the files are.
    pub disk: Disk,
    /// The replica's folder.
    pub dir: PathBuf,
    /// What the disk says.
    pub manifest: Manifest,
    /// The same in memory.
    pub data: Arc<DataPath>,
}

impl Layer {
    /// Of a file whose tables are not in memory yet.
    pub fn new(entry: &LayerEntry, file: DiskFile) -> Self {
        Self {
            number: entry.number,
            snapshot: entry.snapshot,
            blocks: entry.size_bytes / BLOCK_BYTES,
            moved_below: 0,
            copied_below: 0,
            file,
            summer: Summer::new(entry.seed),
            tables: Tables::default(),
        }
    }
}

impl StackFiles {
    /// See [`crate::Replica::freeze`].
    pub fn freeze(&mut self, snapshot: SnapshotId) -> Result<(), StoreError> {
        let replica = self.manifest.replica_id;
        if self.manifest.index_of(snapshot).is_some() {
            return Err(StoreError::SnapshotExists { replica, snapshot });
        }
        if snapshot == SnapshotId(0) {
            return Err(StoreError::NoSnapshot { replica, snapshot });
        }
        self.freeze_top(Some(snapshot), LAYERS_MAX - LAYERS_FOR_MERGES)
    }

    /// Freezes the top without a snapshot, so that it can be merged while writes go on.
    pub fn freeze_for_merge(&mut self) -> Result<(), StoreError> {
        self.freeze_top(None, LAYERS_MAX)
    }

    fn freeze_top(&mut self, snapshot: Option<SnapshotId>, layers_max: usize) -> Result<(), StoreError> {
        let replica = self.manifest.replica_id;
        let layers = self.manifest.layers.len();
        if layers >= layers_max {
            return Err(StoreError::TooManyLayers { replica, layers });
        }
        if !self.data.pool().charge(FREEZE_BYTES, Charge::Metadata) {
            return Err(StoreError::NoSpace(replica));
        }
        let mut next = self.manifest.clone();
        if let Some(top) = next.layers.last_mut() {
            top.frozen = true;
            top.snapshot = snapshot;
        }
        next.push_top();
        let new = next.top().clone();
        let file = layer::create(&self.disk, &self.dir, &new)
            .and_then(|file| {
                layer::lock(&file, layer_path(&self.dir, new.number), Duration::ZERO).map(|()| file)
            })
            .map_err(|error| self.undo_new_layer(new.number, &error))?;
        let old_top = self.data.top_file();
        let gate = self.data.close_gate();
        self.data.flush_and_wait().inspect_err(|_| self.remove_layer_file(new.number))?;
        self.replace(next).inspect_err(|_| {
            if !self.data.is_poisoned() {
                self.remove_layer_file(new.number);
            }
        })?;
        gate.push(snapshot, Layer::new(&new, file));
        drop(gate);
        if let Err(error) = old_top.unlock() {
            tracing::warn!(%replica, %error, "unlocking a frozen layer failed");
        }
        Ok(())
    }

    /// See [`crate::Replica::drop_snapshot`].
    pub fn drop_snapshot(&mut self, snapshot: SnapshotId) -> Result<(), StoreError> {
        let Some(index) = self.manifest.index_of(snapshot) else { return Ok(()) };
        let mut next = self.manifest.clone();
        next.layers[index].snapshot = None;
        let number = next.layers[index].number;
        self.replace(next)?;
        self.data.forget_snapshot(number);
        Ok(())
    }

    /// Whether the volume may get this size; `Ok(false)` if it has it already.
    pub fn check_growth(&self, wanted_bytes: u64) -> Result<bool, StoreError> {
        let size_bytes = self.manifest.size_bytes;
        if wanted_bytes < size_bytes || !is_volume_size(wanted_bytes) {
            let replica = self.manifest.replica_id;
            return Err(StoreError::InvalidGrowth { replica, size_bytes, wanted_bytes });
        }
        Ok(wanted_bytes > size_bytes)
    }

    /// Makes the top's file long enough, durably.
    pub fn grow_top_file(&self, size_bytes: u64) -> Result<(), StoreError> {
        let file = self.data.top_file();
        let grown = file.set_len(layer_file_bytes(size_bytes)).and_then(|()| file.sync_now());
        grown.map_err(|source| {
            let path = layer_path(&self.dir, self.manifest.top().number);
            self.failed_io("growing a layer", source, path)
        })
    }

    /// The last step of growth: the manifest, then the size in memory.
    pub fn finish_growth(&mut self, size_bytes: u64) -> Result<(), StoreError> {
        let mut next = self.manifest.clone();
        next.size_bytes = size_bytes;
        if let Some(top) = next.layers.last_mut() {
            top.size_bytes = size_bytes;
        }
        self.replace(next)?;
        self.data.set_size(size_bytes);
        Ok(())
    }

    /// Replaces the manifest. After a failure that leaves open which one holds, the handle is poisoned.
    pub fn replace(&mut self, next: Manifest) -> Result<(), StoreError> {
        match next.replace(&self.disk, &self.dir) {
            Ok(()) => {
                self.manifest = next;
                Ok(())
            }
            Err(ReplaceError::Unchanged(error)) => Err(self.store_error("writing a manifest", &error)),
            Err(ReplaceError::Unknown(error)) => {
                self.data.poison();
                Err(self.store_error("replacing the manifest", &error))
            }
        }
    }

    /// Removes the files of a layer that no manifest lists; a crash or a failure leaves them to the next opening.
    pub fn remove_layer_file(&self, number: u32) {
        for path in [layer_path(&self.dir, number), cursor_path(&self.dir, number)] {
            if let Err(error) = self.disk.remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "a layer that is not used any more stays");
            }
        }
    }

    /// Whether no clone shares the file.
    pub fn is_unshared(file: &DiskFile) -> std::io::Result<bool> {
        Ok(file.link_count()? == 1)
    }

    fn undo_new_layer(&self, number: u32, error: &PoolError) -> StoreError {
        self.remove_layer_file(number);
        self.store_error("making a layer", error)
    }

    /// A failed write or sync of a layer, other than for want of space, poisons the handle.
    pub fn failed_io(&self, action: &'static str, source: std::io::Error, path: PathBuf) -> StoreError {
        let error = self.store_error(action, &PoolError::Io { action, path, source });
        if !matches!(error, StoreError::NoSpace(_)) {
            self.data.poison();
        }
        error
    }

    /// What an error on files means for the request.
    pub fn store_error(&self, action: &'static str, error: &PoolError) -> StoreError {
        let replica = self.manifest.replica_id;
        tracing::warn!(%replica, %error, "changing the stack of layers failed");
        match error {
            PoolError::Io { source, .. } => match source.raw_os_error() {
                Some(nix::libc::ENOSPC | nix::libc::EDQUOT) => StoreError::NoSpace(replica),
                number => StoreError::Io { replica, action, errno: Errno(number.unwrap_or(nix::libc::EIO)) },
            },
            other => StoreError::File { replica, action, what: other.to_string() },
        }
    }
}
