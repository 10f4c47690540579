//! The seam to the store of volume records: read and compare-and-swap, nothing else decides about a volume.
//!
//! Only the signatures live here; the stores (sled, the registry's client, Kubernetes) are in `service`.

use std::future::Future;
use std::pin::Pin;

use crate::ids::{RecordVersion, VolumeId};
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

    /// All records, for the controller's lists.
    fn list(&self) -> StoreFuture<'_, Vec<Versioned>>;

    /// Makes a record; [`StoreError::Exists`] if its id, or its name among records that are not deleting, is taken.
    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion>;

    /// Replaces the record if its version is still `expected`; durable before it answers.
    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion>;

    /// Removes a record whose tombstone is set and whose version is still `expected`.
    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()>;
}
