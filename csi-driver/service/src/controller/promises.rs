//! Space of volumes whose records are being written: the next placement counts it before the store shows it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use holdfast_storage_core::ids::{NodeName, VolumeId};
use holdfast_storage_core::record::VolumeRecord;

/// For each volume the nodes of its replicas, and the bytes that each of them may fill.
pub(super) type Promised = BTreeMap<VolumeId, (Vec<NodeName>, u64)>;

/// The promises; as many as calls are under way ([`crate::in_flight`]).
#[derive(Default)]
pub(super) struct Promises(Mutex<Promised>);

/// Ends one: its record is there, or will not be.
pub(super) struct Promise<'a>(&'a Promises, VolumeId);

impl Promises {
    pub(super) fn begin(&self, record: &VolumeRecord) -> Promise<'_> {
        let nodes = record.replicas.values().map(|replica| replica.node.clone()).collect();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(record.volume_id, (nodes, record.size_bytes));
        Promise(self, record.volume_id)
    }

    pub(super) fn all(&self) -> Promised {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Promise<'_> {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}
