//! What is left behind when a controller dies in the middle, and what a finished call leaves for later: once a minute, and
//! when a call says so.
//!
//! - A source's record names a clone that is finished or gone: the name goes.
//! - A snapshot was cut only for a clone that is finished, gone or was never recorded: it is deleted.
//! - A retired volume has no snapshot any more: it is deleted.
//! - A group's record is neither committed nor being worked on: its coordinator died; what is left of it is deleted.
//!
//! Every step is one that a call does, too, and is safe beside it; whatever fails is tried again next time.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use holdfast_storage_core::group::GroupState;
use holdfast_storage_core::ids::VolumeId;
use holdfast_storage_core::record::{CloneSource, VolumeRecord};
use holdfast_storage_core::transitions;
use tonic::Status;

use super::Inner;
use crate::status::from_store;
use crate::volume_request::SnapshotHandle;

/// How often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// The first one waits for the nodes to announce themselves.
const FIRST_SWEEP: Duration = Duration::from_secs(10);

/// Clones that calls are making and that may have no record yet.
#[derive(Default)]
pub(super) struct Making(Mutex<BTreeSet<VolumeId>>);

/// Ends it.
pub(super) struct BeingMade<'a>(&'a Making, VolumeId);

impl Making {
    pub(super) fn begin(&self, clone: VolumeId) -> BeingMade<'_> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(clone);
        BeingMade(self, clone)
    }

    fn all(&self) -> BTreeSet<VolumeId> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for BeingMade<'_> {
    fn drop(&mut self) {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
    }
}

impl Inner {
    /// Runs for ever; cancellation safe.
    pub(super) async fn keep_sweeping(&self) {
        tokio::time::sleep(FIRST_SWEEP).await;
        loop {
            if let Err(status) = self.sweep().await {
                tracing::warn!(%status, "not all that calls left behind could be cleared away; tried again later");
            }
            tokio::select! {
                () = tokio::time::sleep(SWEEP_INTERVAL) => {}
                () = self.sweep_soon.notified() => {}
            }
        }
    }

    pub(super) async fn sweep(&self) -> Result<(), Status> {
        let mut outcome = Ok(());
        let mut note = |result: Result<(), Status>| {
            if result.is_err() {
                outcome = result;
            }
        };
        // In this order: a clone is being made from before its snapshot is asked for until after it is recorded, so that one
        // that a source names, that is not being made, and that has no record afterwards is gone.
        let sources: Vec<VolumeRecord> = self.all_records().await?;
        let making = self.making.all();
        let clones: HashMap<VolumeId, VolumeRecord> =
            self.all_records().await?.into_iter().map(|record| (record.volume_id, record)).collect();
        let over = |clone: &VolumeId| {
            !making.contains(clone)
                && clones.get(clone).is_none_or(|record| record.source.as_ref().is_some_and(|s| s.linked))
        };
        for record in sources.iter().filter(|record| !record.deleting) {
            let volume = record.volume_id;
            for snapshot in record.committed() {
                for clone in snapshot.clones.iter().filter(|clone| over(clone)) {
                    let source =
                        CloneSource { volume, snapshot: snapshot.id, of_volume: false, linked: true };
                    note(self.release_source(&source, *clone).await);
                }
            }
            for (snapshot, clone) in transitions::cut_for_clones(record) {
                if over(&clone) {
                    note(self.remove_snapshot(SnapshotHandle { volume, snapshot }).await);
                }
            }
            if record.retired {
                note(self.remove_if_bare(volume).await);
            }
        }
        for found in self.group_store.list_groups().await.map_err(from_store)? {
            if found.record.state != GroupState::Committed {
                note(self.forget_group(&found.record).await);
            }
        }
        outcome
    }

    async fn all_records(&self) -> Result<Vec<VolumeRecord>, Status> {
        let all = self.store.list().await.map_err(from_store)?;
        Ok(all.iter().map(|found| found.record.clone()).collect())
    }
}
