//! The first format of a volume, after rule R36, and nothing else that could destroy data.
//!
//! ```text
//!            every block of every member absent
//!   never ──────────────────────────────────────> formatting ── mkfs done ──> yes ── mount
//!                                                  ^      │
//!                                                  └──────┘ mkfs may be repeated: nothing was ever mounted
//! ```
//!
//! What the device shows is never asked: a device that cannot be read looks blank too. In `yes` no failure of a mount
//! leads back here.

use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use holdfast_storage_core::ids::{Attachment, VolumeId};
use holdfast_storage_core::record::Formatted;
use holdfast_storage_core::record_store::{RecordStore, StoreError, Versioned};
use holdfast_storage_core::transitions::set_formatted;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::process::Command;
use tonic::Status;

use super::Inner;
use crate::status::{from_store, from_transition};

/// How often a swap is decided anew because another writer moved the record, or its answer was lost.
pub(super) const SWAP_ATTEMPTS_MAX: u32 = 16;
/// Bytes of a tool's own words that a sentence quotes.
const QUOTED_BYTES_MAX: usize = 512;

/// How long mkfs waits for the lock that an earlier mkfs, or a prober of devices, holds; then the caller is told to
/// repeat.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(50);

/// Whether the device may hold anything from an earlier try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Device {
    /// Every block is absent and reads as zero.
    Blank,
    /// An earlier mkfs may have written.
    Unknown,
}

impl Inner {
    /// Makes sure that a file system is on the attached device, making the first one if the record allows it.
    pub(super) async fn ensure_formatted(
        &self,
        volume: VolumeId,
        attachment: Attachment,
        device: &Path,
    ) -> Result<(), Status> {
        let (found, state) = match self.begin_format(volume, attachment).await? {
            None => return Ok(()),
            Some(begun) => begun,
        };
        let fs_type = &found.record.params.fs_type;
        tracing::info!(%volume, %fs_type, device = %device.display(), "making the first file system");
        mkfs(fs_type, device, state).await?;
        self.end_format(found, attachment).await
    }

    /// Swaps in `formatting`. `None`: a file system was made earlier.
    async fn begin_format(
        &self,
        volume: VolumeId,
        attachment: Attachment,
    ) -> Result<Option<(Versioned, Device)>, Status> {
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.read_mine(volume, attachment).await?;
            let state = match found.record.formatted {
                Formatted::Yes => return Ok(None),
                Formatted::Formatting => Device::Unknown,
                Formatted::Never => {
                    let blocks = self.data.count_allocated(volume).await?;
                    if blocks != 0 {
                        return Err(Status::failed_precondition(format!(
                            "volume {volume} was never formatted by this driver, but {blocks} blocks of it are \
                             allocated: it will not be formatted over them"
                        )));
                    }
                    Device::Blank
                }
            };
            if found.record.read_only {
                let sentence = format!("volume {volume} has no file system yet and is published read-only");
                return Err(Status::failed_precondition(sentence));
            }
            // In `formatting` too: an earlier call's swap to `yes` that is still under way must not land during this
            // mkfs, and the moved version keeps it out.
            let record = set_formatted(&found.record, Formatted::Formatting).map_err(from_transition)?;
            match self.store.swap(found.version, record.clone()).await {
                Ok(version) => return Ok(Some((Versioned { version, record }, state))),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }

    /// Swaps in `yes`; until it is known to be in, nothing is mounted.
    async fn end_format(&self, begun: Versioned, attachment: Attachment) -> Result<(), Status> {
        let volume = begun.record.volume_id;
        let mut found = begun;
        for _ in 0..SWAP_ATTEMPTS_MAX {
            if found.record.formatted == Formatted::Yes {
                return Ok(());
            }
            let record = set_formatted(&found.record, Formatted::Yes).map_err(from_transition)?;
            match self.store.swap(found.version, record).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict(_)) => found = self.read_mine(volume, attachment).await?,
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }

    /// Reads the record, and refuses if this node's attachment is over.
    pub(super) async fn read_mine(
        &self,
        volume: VolumeId,
        attachment: Attachment,
    ) -> Result<Versioned, Status> {
        let store: &dyn RecordStore = self.store.as_ref();
        let found = store.read(volume).await.map_err(from_store)?;
        let record = &found.record;
        if record.deleting {
            return Err(Status::not_found(format!("volume {volume} is being deleted")));
        }
        match &record.attached_to {
            Some(node) if *node == self.node && record.attachment == attachment => Ok(found),
            Some(node) if *node == self.node => Err(Status::failed_precondition(format!(
                "publish_context: attachment {attachment} of volume {volume} is over, {} is current; publish it anew",
                record.attachment
            ))),
            Some(node) => Err(Status::failed_precondition(format!(
                "volume {volume} is published to node {node}, not to {}",
                self.node
            ))),
            None => Err(Status::failed_precondition(format!("volume {volume} is not published to any node"))),
        }
    }
}

/// Locks the device against another mkfs of ours.
///
/// The child inherits the lock as its standard input, so that it outlives this process: a mkfs that goes on after its
/// service was killed would otherwise write into the file system that the next one made and mounted.
async fn lock(device: &Path) -> Result<Flock<File>, Status> {
    let begun = Instant::now();
    loop {
        let file = File::open(device)
            .map_err(|e| Status::internal(format!("{} cannot be opened for mkfs: {e}", device.display())))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((_, Errno::EWOULDBLOCK)) if begun.elapsed() < LOCK_WAIT_MAX => {
                tokio::time::sleep(LOCK_POLL).await
            }
            Err((_, errno)) => {
                return Err(Status::aborted(format!(
                    "{} is locked, by an earlier mkfs perhaps ({errno}); repeat the call",
                    device.display()
                )));
            }
        }
    }
}

/// Runs mkfs to its end: killing it would not undo anything.
async fn mkfs(fs_type: &str, device: &Path, state: Device) -> Result<(), Status> {
    let locked = lock(device).await?;
    let inherited = locked
        .try_clone()
        .map_err(|e| Status::internal(format!("{} cannot be locked for mkfs: {e}", device.display())))?;
    let program = format!("mkfs.{fs_type}");
    let arguments = mkfs_arguments(fs_type, state).ok_or_else(|| {
        Status::internal(format!("the record names the file system \"{fs_type}\", which is unknown"))
    })?;
    let output = Command::new(&program)
        .args(arguments)
        .arg(device)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::from(inherited))
        .output()
        .await
        .map_err(|e| {
            Status::internal(format!("{program} cannot be run: {e}; is it installed on this node?"))
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = quoted(&output.stderr);
    Err(Status::internal(format!("{program} on {} failed ({}): {said}", device.display(), output.status)))
}

/// What a tool said, for a sentence.
pub(super) fn quoted(said: &[u8]) -> String {
    String::from_utf8_lossy(said).trim().chars().take(QUOTED_BYTES_MAX).collect()
}

/// No discard: on a new volume it would only write zeroes, and the map of absent blocks is worth keeping.
fn mkfs_arguments(fs_type: &str, state: Device) -> Option<&'static [&'static str]> {
    match (fs_type, state) {
        // Inode tables that read as zero need no zeroing, neither now nor in the background after the mount.
        ("ext4", Device::Blank) => {
            Some(&["-F", "-q", "-m", "0", "-b", "4096", "-E", "nodiscard,assume_storage_prezeroed=1"])
        }
        ("ext4", Device::Unknown) => Some(&[
            "-F",
            "-q",
            "-m",
            "0",
            "-b",
            "4096",
            "-E",
            "nodiscard,lazy_itable_init=0,lazy_journal_init=0",
        ]),
        ("xfs", _) => Some(&["-f", "-q", "-K"]),
        _ => None,
    }
}
