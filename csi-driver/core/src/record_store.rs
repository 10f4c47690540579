//! The seams to the stores of volume records and of group records: read and compare-and-swap, nothing else decides about a
//! volume or a group.
//!
//! Only the signatures live here; the stores (sled, the registry's client, Kubernetes) are in `service`.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::group::{GroupRecord, VersionedGroup};
use crate::ids::{GroupId, RecordVersion, VolumeId};
use crate::record::VolumeRecord;

/// What a store call returns. Dropping the future may or may not cancel the change: treat it as
/// [`StoreError::Unknown`].
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// A record with the version that a swap must name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned {
    /// Store version.
    pub version: RecordVersion,
    /// The record.
    pub record: VolumeRecord,
}

/// Why a store call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No such record.
    #[error("volume {0} has no record")]
    NotFound(VolumeId),
    /// A record of that id or name exists already.
    #[error("a record of volume {0} exists already")]
    Exists(VolumeId),
    /// The version moved; nothing was changed. Read again and decide anew (R7).
    #[error("the record of volume {0} was changed by another writer")]
    Conflict(VolumeId),
    /// The version of a group's record moved; nothing was changed.
    #[error("the record of group {0} was changed by another writer")]
    GroupConflict(GroupId),
    /// Nothing is known: the change may or may not have happened, now or later (R8).
    #[error("the record store did not answer: {0}")]
    Unknown(String),
    /// The store refused for a reason that repeating does not cure.
    #[error("the record store refused: {0}")]
    Refused(String),
}

/// Linearizable read and compare-and-swap of volume records.
pub trait RecordStore: Send + Sync {
    /// The newest record, never from a cache (R7).
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned>;

    /// All records, as they are durable at one moment between call and answer, never from a cache. Shared, so that a store that
    /// has them in memory copies none.
    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>>;

    /// Makes a record; [`StoreError::Exists`] if its id, or its name among records that are not gone
    /// ([`VolumeRecord::is_gone`]), is taken.
    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion>;

    /// Replaces the record if its version is still `expected`; durable before it answers.
    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion>;

    /// Removes a record whose tombstone is set and whose version is still `expected`.
    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()>;
}

/// Linearizable read and compare-and-swap of the records of group snapshots (R29). The controller alone uses it.
pub trait GroupStore: Send + Sync {
    /// The newest record, never from a cache; none: there is no such group.
    fn read_group(&self, group: GroupId) -> StoreFuture<'_, Option<VersionedGroup>>;

    /// All records.
    fn list_groups(&self) -> StoreFuture<'_, Vec<VersionedGroup>>;

    /// Makes (`expected` none), replaces or removes (`record` none) a group's record; durable before it answers.
    /// [`StoreError::GroupConflict`] if its version is not `expected`. A version is never used twice for one group, not even
    /// after its record was removed.
    fn swap_group(
        &self,
        group: GroupId,
        expected: Option<RecordVersion>,
        record: Option<GroupRecord>,
    ) -> StoreFuture<'_, RecordVersion>;
}
