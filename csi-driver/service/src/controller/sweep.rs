//! What is left behind when a controller dies in the middle, and what a finished call leaves for later: once a minute, and
//! when a call says so.
//!
//! - A source's record names a clone that is finished or gone: the name goes.
//! - A snapshot was cut only for a clone that is finished, gone or was never recorded: it is deleted.
//! - A retired volume has no snapshot any more: it is deleted.
//! - A tombstone is left of a volume that nobody asks to be deleted again: it is deleted, once its nodes all answer.
//! - Replicas are missing, do not come back, are to leave their nodes, or were given up: [`super::heal`].
//! - A group's record is neither committed nor being worked on: its coordinator died; what is left of it is deleted.
//!
//! Every step is one that a call does, too, and is safe beside it; whatever fails is tried again next time.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use holdfast_storage_core::group::GroupState;
use holdfast_storage_core::ids::{ReplicaId, VolumeId};
use holdfast_storage_core::record::{CloneSource, ReplicaRecord, VolumeRecord};
use holdfast_storage_core::transitions;
use tonic::Status;

use super::Inner;
use super::heal::TENDED_MAX;
use crate::status::from_store;
use crate::volume_request::SnapshotHandle;

/// How often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// How often while replicas are on their way from node to node.
const MOVING_INTERVAL: Duration = Duration::from_secs(5);
/// The first one waits for the nodes to announce themselves.
const FIRST_SWEEP: Duration = Duration::from_secs(10);

/// A target that was run for a volume that nobody attaches.
struct Tended {
    /// Its replicas as they were before.
    replicas: BTreeMap<ReplicaId, ReplicaRecord>,
    /// None while it runs.
    ended: Option<Instant>,
}

impl Tended {
    /// Whether another one may be run: one that changed nothing, because a node answers its fellows and not us, or the other
    /// way round, shall not be followed by the next at once.
    fn is_over(&self, replicas: &BTreeMap<ReplicaId, ReplicaRecord>) -> bool {
        self.ended.is_some_and(|ended| self.replicas != *replicas || ended.elapsed() >= SWEEP_INTERVAL)
    }
}

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
        let mut tending = FuturesUnordered::new();
        let mut tended: BTreeMap<VolumeId, Tended> = BTreeMap::new();
        loop {
            if let Err(status) = self.sweep().await {
                tracing::warn!(%status, "not all that calls left behind could be cleared away; tried again later");
            }
            let to_tend = self.to_tend();
            tended.retain(|volume, last| to_tend.contains_key(volume) || last.ended.is_none());
            for (volume, replicas) in to_tend {
                if tending.len() < TENDED_MAX
                    && tended.get(&volume).is_none_or(|last| last.is_over(&replicas))
                {
                    tended.insert(volume, Tended { replicas, ended: None });
                    tending.push(async move {
                        self.bring_in_sync(volume).await;
                        volume
                    });
                }
            }
            let pause = if self.moving.load(Ordering::Relaxed) { MOVING_INTERVAL } else { SWEEP_INTERVAL };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.sweep_soon.notified() => {}
                Some(volume) = tending.next() => {
                    if let Some(last) = tended.get_mut(&volume) {
                        last.ended = Some(Instant::now());
                    }
                }
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
        note(self.heal(&sources).await);
        for record in &sources {
            if record.deleting {
                note(self.end_deletion(record).await);
                continue;
            }
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

    /// Ends a deletion that a call began. Not before all its nodes answer: until then each try would wait for them.
    async fn end_deletion(&self, record: &VolumeRecord) -> Result<(), Status> {
        let all_answer = self.alive_nodes().is_some_and(|alive| {
            record.replicas.values().all(|r| alive.contains(&r.node) || self.is_removed(&r.node))
        });
        if !all_answer {
            return Ok(());
        }
        match self.in_flight.begin(format!("volume {}", record.volume_id)) {
            Ok(_by_id) => self.erase(record.volume_id).await,
            // A call is at it.
            Err(_) => Ok(()),
        }
    }

    pub(super) async fn all_records(&self) -> Result<Vec<VolumeRecord>, Status> {
        let all = self.store.list().await.map_err(from_store)?;
        Ok(all.iter().map(|found| found.record.clone()).collect())
    }
}
