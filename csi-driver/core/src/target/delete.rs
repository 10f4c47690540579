//! Deleting a snapshot (R28, R30): out of the record first, then off the replicas that are there. One that is away, or that
//! dies half way, merges the layer back at its next Open, which does not name it.

use std::collections::BTreeSet;

use crate::ids::{ReplicaId, SnapshotId, TargetId};
use crate::record::VolumeRecord;
use crate::transitions::{self, TransitionError};

use super::calls::CallKind;
use super::jobs::Current;
use super::{Control, JobId, Target};

#[derive(Debug)]
pub(super) struct Delete {
    pub job: JobId,
    snapshot: SnapshotId,
    /// Replicas that were told and have not answered; none before the record forgot the snapshot.
    waiting: Option<BTreeSet<ReplicaId>>,
}

impl Delete {
    pub(super) fn new(job: JobId, snapshot: SnapshotId) -> Self {
        Self { job, snapshot, waiting: None }
    }

    pub(super) fn swap(
        &self,
        record: &VolumeRecord,
        owner: TargetId,
    ) -> Option<Result<VolumeRecord, TransitionError>> {
        record.snapshot(self.snapshot)?;
        Some(transitions::delete_snapshot(record, owner, self.snapshot))
    }

    pub(super) fn session_lost(&mut self, replica: ReplicaId) {
        if let Some(waiting) = &mut self.waiting {
            waiting.remove(&replica);
        }
    }
}

impl Target {
    pub(super) fn pump_delete(&mut self) {
        let Some(Current::Delete(delete)) = &self.jobs.current else { return };
        let snapshot = delete.snapshot;
        if self.volume().is_none_or(|record| record.snapshot(snapshot).is_some()) {
            return;
        }
        match &delete.waiting {
            Some(waiting) if waiting.is_empty() => self.finish_job(Ok(())),
            Some(_) => {}
            // A copy that names a layer which is gone would be of no use.
            None if !self.copies_kept() => {}
            None => {
                if self.rebuilds_layers() {
                    // It may be reading what goes away.
                    self.abort_catch_up();
                }
                let open: BTreeSet<ReplicaId> =
                    self.peers.keys().copied().filter(|replica| self.is_open(*replica)).collect();
                if let Some(Current::Delete(delete)) = &mut self.jobs.current {
                    delete.waiting = Some(open.clone());
                }
                for replica in open {
                    self.send_control(replica, CallKind::Drop(snapshot), Control::DropSnapshot { snapshot });
                }
                self.dirty = true;
            }
        }
    }

    pub(super) fn snapshot_dropped(&mut self, replica: ReplicaId, snapshot: SnapshotId) {
        if let Some(Current::Delete(delete)) = &mut self.jobs.current
            && delete.snapshot == snapshot
        {
            delete.session_lost(replica);
        }
    }
}
