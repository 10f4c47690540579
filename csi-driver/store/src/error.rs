//! What can go wrong, one enum for pools and one for replicas.

use std::io;
use std::path::{Path, PathBuf};

use holdfast_io::Errno;
use holdfast_storage_core::ids::{Block, Region, ReplicaId, SnapshotId};

/// A pool or a whole replica could not be opened, made or removed. Nothing on disk was changed, unless the text says
/// so.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// Another process (or another open handle) holds the pool or one of its replicas.
    #[error(
        "{} is locked by another process: one data process uses a pool at a time; stop the other one, or wait \
         until the kernel finished its last I/O",
        .0.display()
    )]
    Locked(PathBuf),
    /// The file is not what this version of the format says it must be.
    #[error("{} is damaged: {what}; the replica must be replaced from another member", .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// The file was written by a later release.
    #[error(
        "{} has format version {found}, this release knows versions up to {known}: run the release that wrote it",
        .path.display()
    )]
    FutureVersion {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The latest one known here.
        known: u32,
    },
    /// The file is shorter than its own header says.
    #[error(
        "{} was cut short: {found_bytes} bytes where {expected_bytes} belong; the replica must be replaced from \
         another member",
        .path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        found_bytes: u64,
        /// The length it must have.
        expected_bytes: u64,
    },
    /// The pool has no room.
    #[error("pool {} has {available_bytes} bytes left, {wanted_bytes} are needed", .pool.display())]
    NoSpace {
        /// The pool.
        pool: PathBuf,
        /// What was asked for.
        wanted_bytes: u64,
        /// What is left.
        available_bytes: u64,
    },
    /// The replica exists with another volume or size.
    #[error("replica {0} exists already and belongs to another volume or has another size")]
    Conflict(ReplicaId),
    /// No such replica in this pool.
    #[error("no replica {0} in this pool")]
    NotFound(ReplicaId),
    /// No such snapshot on the replica.
    #[error("replica {replica} has no snapshot {snapshot}: clone one that is there")]
    NoSnapshot {
        /// The replica.
        replica: ReplicaId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// A clone would have more layers than a replica may have.
    #[error(
        "replica {0} would have too many layers: delete older snapshots of its source and wait until they are merged"
    )]
    TooManyLayers(ReplicaId),
    /// A clone must be as large as what it clones.
    #[error("replica {replica} with {size_bytes} bytes is smaller than its source: it needs {needed_bytes}")]
    CloneTooSmall {
        /// The clone.
        replica: ReplicaId,
        /// What was asked for.
        size_bytes: u64,
        /// The snapshot's size.
        needed_bytes: u64,
    },
    /// The replica is open in this process.
    #[error("replica {0} is open in this process: close it first")]
    InUse(ReplicaId),
    /// A size that no volume may have.
    #[error(
        "{0} bytes is no volume size: it must be a multiple of 1 MiB, at least 1 MiB and at most 4096 TiB"
    )]
    InvalidSize(u64),
    /// An initial replica state that does not fit its slot.
    #[error("the replica's state has {0} bytes, its slot holds {max}", max = crate::META_BYTES_MAX)]
    MetaTooLarge(usize),
    /// The folder for the continuity cookie would survive a power loss (R19).
    #[error(
        "{} is not on a tmpfs: the continuity cookie must vanish with the machine's memory; give a folder on tmpfs, \
         such as below /run or /dev/shm",
        .0.display()
    )]
    NotTmpfs(PathBuf),
    /// The kernel refused.
    #[error("{action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl PoolError {
    /// Builds the `map_err` of a file operation.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PoolError {
        let path = path.to_owned();
        move |source| PoolError::Io { action, path, source }
    }
}

/// A request to an open replica failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Blocks whose data does not match their checksum or their allocation state. The data is not given out.
    #[error("replica {replica}: {} block(s) do not match their checksum, the first is block {}", .blocks.len(), first_of(.blocks))]
    Checksum {
        /// The replica.
        replica: ReplicaId,
        /// The blocks, ascending.
        blocks: Vec<Block>,
    },
    /// The pool or its file system is full; nothing is poisoned, blocks of the request hold old or new data (R16).
    #[error("the pool of replica {0} is full")]
    NoSpace(ReplicaId),
    /// A write into a region that is not durably in the intent log: a broken caller (R18).
    #[error("replica {replica}: region {} is not in the intent log; log it before changing it", .region.0)]
    NotLogged {
        /// The replica.
        replica: ReplicaId,
        /// The first such region.
        region: Region,
    },
    /// Outside the volume, or not on block borders.
    #[error("replica {replica}: bytes {offset}+{len} are no whole blocks of this volume")]
    InvalidRange {
        /// The replica.
        replica: ReplicaId,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The replica's state does not fit its slot.
    #[error("replica {replica}: a state of {bytes} bytes does not fit its slot")]
    MetaTooLarge {
        /// The replica.
        replica: ReplicaId,
        /// Its size.
        bytes: usize,
    },
    /// No dirty map is kept for that replica: everything counts as dirty (R21).
    #[error("replica {replica} keeps no dirty map for {absent}: everything counts as dirty")]
    NoMap {
        /// The replica.
        replica: ReplicaId,
        /// The absent one.
        absent: ReplicaId,
    },
    /// No such snapshot on this replica, or not in this order.
    #[error(
        "replica {replica} has no snapshot {snapshot}, or it is not older than the other one that was named"
    )]
    NoSnapshot {
        /// The replica.
        replica: ReplicaId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The snapshot exists; from which instant the caller cannot know (R27).
    #[error("replica {replica} has a snapshot {snapshot} already: drop it, or take another id")]
    SnapshotExists {
        /// The replica.
        replica: ReplicaId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The stack of layers is full; nothing was changed.
    #[error(
        "replica {replica} has {layers} layers, no more are possible: delete snapshots and wait until they are merged"
    )]
    TooManyLayers {
        /// The replica.
        replica: ReplicaId,
        /// Its layers.
        layers: usize,
    },
    /// Growth to a size that no volume may have, or a smaller one.
    #[error("replica {replica} has {size_bytes} bytes and cannot get {wanted_bytes}")]
    InvalidGrowth {
        /// The replica.
        replica: ReplicaId,
        /// Its size.
        size_bytes: u64,
        /// What was asked for.
        wanted_bytes: u64,
    },
    /// A file of the replica is not as it must be.
    #[error("replica {replica}: {action} failed: {what}")]
    File {
        /// The replica.
        replica: ReplicaId,
        /// What was tried.
        action: &'static str,
        /// What was found.
        what: String,
    },
    /// The kernel refused. If it was a write or a flush, the handle is poisoned.
    #[error("replica {replica}: {action} failed: {errno}")]
    Io {
        /// The replica.
        replica: ReplicaId,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
    /// An earlier write or flush failed: what the disk holds is unknown until the replica is opened again.
    #[error("replica {0}: an earlier write or flush failed; close it and open it again")]
    Poisoned(ReplicaId),
    /// The handle was closed.
    #[error("replica {0} is closed")]
    Closed(ReplicaId),
    /// Too many requests wait; nothing was done.
    #[error("replica {0}: too many requests wait for the disk; retry later")]
    Busy(ReplicaId),
}

impl StoreError {
    /// The errno that a block device reports for this.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            StoreError::Checksum { .. } => errno::EBADMSG,
            StoreError::NoSpace(_) => errno::ENOSPC,
            StoreError::InvalidRange { .. }
            | StoreError::MetaTooLarge { .. }
            | StoreError::InvalidGrowth { .. } => errno::EINVAL,
            StoreError::NoMap { .. } | StoreError::NoSnapshot { .. } => errno::ENOENT,
            StoreError::SnapshotExists { .. } => errno::EEXIST,
            StoreError::TooManyLayers { .. } => errno::EMLINK,
            StoreError::File { .. } => errno::EIO,
            StoreError::Io { errno: kernels, .. } => kernels.0,
            StoreError::NotLogged { .. } | StoreError::Poisoned(_) => errno::EIO,
            StoreError::Closed(_) => errno::ESHUTDOWN,
            StoreError::Busy(_) => errno::EAGAIN,
        }
    }
}

fn first_of(blocks: &[Block]) -> u64 {
    blocks.first().map_or(0, |block| block.0)
}

mod errno {
    use nix::errno::Errno;
    pub const EBADMSG: i32 = Errno::EBADMSG as i32;
    pub const ENOSPC: i32 = Errno::ENOSPC as i32;
    pub const EINVAL: i32 = Errno::EINVAL as i32;
    pub const ENOENT: i32 = Errno::ENOENT as i32;
    pub const EEXIST: i32 = Errno::EEXIST as i32;
    pub const EMLINK: i32 = Errno::EMLINK as i32;
    pub const EIO: i32 = Errno::EIO as i32;
    pub const ESHUTDOWN: i32 = Errno::ESHUTDOWN as i32;
    pub const EAGAIN: i32 = Errno::EAGAIN as i32;
}
