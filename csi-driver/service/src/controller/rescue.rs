//! RescueRecords: the records of a store that is lost, from the copies that replicas keep (ADR 0011).
//!
//! 1. Every node that is alive tells what its replicas know and keep.
//! 2. The core's [`rescue::plan`] finds the newest copy of each volume and what speaks against it.
//! 3. Those that are asked for are created, each by itself. A crash between two of them: the call is repeated, and finds the
//!    first ones there.
//!
//! Nothing is ever changed that is there: a record is created under its id and name, or refused by the store.

use std::collections::{BTreeMap, BTreeSet};

use futures::future::join_all;
use holdfast_proto::storage::{
    Epoch as WireEpoch, KeptRecord, RescueNode, RescueRecordsReply, RescueRecordsRequest, RescueVerdict,
    RescuedReplica, RescuedVolume,
};
use holdfast_storage_core::encryption::EncryptionKind;
use holdfast_storage_core::ids::{Epoch, Generation, NodeName, VolumeId};
use holdfast_storage_core::node_directory::{NodeInfo, NodeState};
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_storage_core::rescue::{
    self, Found, FoundCopy, GENERATION_LEAP, Present, Rescue, Survey, Verdict, Whereabouts,
};
use tonic::Status;

use super::Inner;
use crate::record_copies;
use crate::registry_wire::parse_volume;
use crate::status::from_store;

impl Inner {
    pub(super) async fn rescue_records(
        &self,
        request: RescueRecordsRequest,
    ) -> Result<RescueRecordsReply, Status> {
        let named: BTreeSet<VolumeId> =
            request.volume_ids.iter().map(|text| parse_volume(text)).collect::<Result<_, _>>()?;
        let _one = self.in_flight.begin("the rescue of records".to_owned())?;
        let (nodes, survey) = self.survey_records(request.all_sound).await?;
        let plan = rescue::plan(&survey);
        if let Some(lost) = named.iter().find(|volume| plan.iter().all(|rescue| rescue.volume != **volume)) {
            return Err(Status::not_found(format!(
                "volume {lost}: no node that answers has a replica of it; start the nodes that do, and repeat the call"
            )));
        }
        let mut volumes = Vec::new();
        for rescue in plan {
            let wanted =
                named.contains(&rescue.volume) || (request.all_sound && rescue.verdict == Verdict::Sound);
            volumes.push(self.restore(rescue, wanted).await);
        }
        Ok(RescueRecordsReply { nodes, volumes })
    }

    async fn restore(&self, rescue: Rescue, wanted: bool) -> RescuedVolume {
        let mut told = told(&rescue);
        let (volume, verdict) = (rescue.volume, rescue.verdict);
        let Some(record) = rescue.record.filter(|_| wanted) else {
            if wanted && verdict == Verdict::Impossible {
                told.error = format!("volume {volume} cannot be restored: {}", rescue.notes.join("; "));
            }
            return told;
        };
        match self.store.create(record).await {
            Ok(_) => {
                tracing::warn!(%volume, ?verdict, notes = rescue.notes.join("; "), "a record was restored from its replicas' copies");
                told.restored = true;
            }
            Err(StoreError::Exists(_)) => {
                told.error = format!(
                    "volume {volume}: a record of that id or name is there now; it was left as it is"
                );
            }
            Err(error) => told.error = format!("volume {volume}: {error}; repeat the call"),
        }
        told
    }

    async fn survey_records(&self, for_all: bool) -> Result<(Vec<RescueNode>, Survey), Status> {
        let records = self.store.list().await.map_err(from_store)?;
        // What a rescue wrote is ahead of every count for ever.
        let other = records.iter().find(|read| read.record.generation < Generation(GENERATION_LEAP));
        if let Some(other) = other.filter(|_| for_all) {
            return Err(Status::failed_precondition(format!(
                "volume {} has a record that no rescue wrote: the record store was not lost whole, and what is missing from it may \
                 have been deleted. Name the volumes to restore",
                other.record.volume_id
            )));
        }
        let present = records.iter().map(|read| Present {
            volume: read.record.volume_id,
            name: (!read.record.is_gone()).then(|| read.record.name.clone()),
        });
        let mut survey = Survey { present: present.collect(), ..Survey::default() };
        let infos =
            self.book.all().into_iter().filter(|info| self.book.state(&info.name) != NodeState::Removed);
        let ask = |info: NodeInfo| async move { (info.name.clone(), self.pools.kept_records(&info).await) };
        let mut nodes = Vec::new();
        for (node, answer) in join_all(infos.map(ask)).await {
            let mut told = RescueNode { name: node.0.clone(), ..RescueNode::default() };
            match answer {
                Ok(kept) => {
                    told.replicas = u32::try_from(kept.len()).unwrap_or(u32::MAX);
                    for kept in kept {
                        let replica = kept.replica_id.clone();
                        match found(&node, kept) {
                            Some(found) => survey.found.push(found),
                            None => told.unreadable.push(replica),
                        }
                    }
                    survey.answered.insert(node);
                }
                Err(status) => told.error = status.message().to_owned(),
            }
            nodes.push(told);
        }
        Ok((nodes, survey))
    }
}

/// A replica as its node tells of it; none: nobody knows of which volume it is.
fn found(node: &NodeName, kept: KeptRecord) -> Option<Found> {
    let replica = kept.replica_id.parse().ok()?;
    let copy = match (kept.copy, kept.copy_error.is_empty()) {
        (Some(copy), _) => record_copies::from_wire(copy).map_or_else(
            |status| FoundCopy::Unreadable(status.message().to_owned()),
            |copy| record_copies::read(&copy),
        ),
        (None, true) => FoundCopy::Absent,
        (None, false) => FoundCopy::Unreadable(kept.copy_error),
    };
    let volume = kept.volume_id.parse().ok().or(match &copy {
        FoundCopy::Record(read) => Some(read.record.volume_id),
        FoundCopy::Absent | FoundCopy::Unreadable(_) | FoundCopy::Later(_) => None,
    })?;
    let meta = kept.meta.and_then(|known| {
        let epoch = known.epoch?;
        let epoch = Epoch { number: epoch.number, nonce: epoch.nonce };
        let mut meta =
            ReplicaMeta::new(volume, replica, known.lineage.parse().ok()?, known.size_bytes, epoch);
        meta.generation = Generation(known.generation);
        Some(meta)
    });
    Some(Found { node: node.clone(), replica, volume, meta, holds_data: kept.holds_data, copy })
}

fn told(rescue: &Rescue) -> RescuedVolume {
    let verdict = match rescue.verdict {
        Verdict::Present => RescueVerdict::Present,
        Verdict::Sound => RescueVerdict::Sound,
        Verdict::Doubtful => RescueVerdict::Doubtful,
        Verdict::Impossible => RescueVerdict::Impossible,
    };
    let mut told = RescuedVolume {
        volume_id: rescue.volume.to_string(),
        verdict: verdict.into(),
        notes: rescue.notes.clone(),
        replicas: replicas(rescue),
        ..RescuedVolume::default()
    };
    if let Some(stamp) = &rescue.newest {
        (told.generation, told.version) = (stamp.generation.0, stamp.version.0);
    }
    if let Some(record) = &rescue.record {
        describe(record, &mut told);
    }
    told
}

fn describe(record: &VolumeRecord, told: &mut RescuedVolume) {
    told.name = record.name.clone();
    told.size_bytes = record.size_bytes;
    told.fs_type = record.params.fs_type.clone();
    told.encrypted = record.params.encryption != EncryptionKind::None;
    told.snapshots = u32::try_from(record.committed().count()).unwrap_or(u32::MAX);
    told.epoch = Some(WireEpoch { number: record.epoch.number, nonce: record.epoch.nonce });
}

fn replicas(rescue: &Rescue) -> Vec<RescuedReplica> {
    let listed = rescue.record.as_ref().map(|record| &record.replicas);
    let states: BTreeMap<_, _> = listed.into_iter().flatten().map(|(id, entry)| (*id, entry.state)).collect();
    let replica = |(id, (node, whereabouts)): (&_, &(NodeName, Whereabouts))| RescuedReplica {
        replica_id: ToString::to_string(id),
        node: node.0.clone(),
        state: match states.get(id) {
            Some(ReplicaState::InSync) => "in_sync",
            Some(ReplicaState::Offline { .. }) => "offline",
            Some(ReplicaState::Faulted) => "faulted",
            None => "unlisted",
        }
        .to_owned(),
        whereabouts: match whereabouts {
            Whereabouts::Here | Whereabouts::Unlisted => "here",
            Whereabouts::Silent => "silent",
            Whereabouts::Gone => "gone",
        }
        .to_owned(),
    };
    rescue.replicas.iter().map(replica).collect()
}
